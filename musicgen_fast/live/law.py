"""What transformers draws from, as parameters of our sampler: guidance, temperature, top-k and top-p together.

Reads the lists of processors and stopping criteria as transformers builds them. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..sampling import SamplingParams
from .handle import Unsupported


@dataclass(frozen=True)
class Law:
    """What the processors of a call ask for. `guidance` None: no second branch; temperature 0: greedy."""

    guidance: float | None
    temperature: float
    top_k: int
    top_p: float

    def params(self, batch: int, num_codebooks: int, device: torch.device) -> SamplingParams:
        params = SamplingParams.build(
            batch,
            num_codebooks,
            device,
            cfg_coef=1.0 if self.guidance is None else self.guidance,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )
        # with top-p, audiocraft draws its random numbers for the sorted probabilities, transformers does not sort
        return replace(params, any_sorted=False)


def read_processors(processors: Iterable[Any], sampling: bool) -> Law:
    """The law of a `LogitsProcessorList` as transformers builds it.

    Raises:
        Unsupported: a processor that is none of guidance, temperature, top-k and top-p, or another order of them.
    """
    from transformers import (
        ClassifierFreeGuidanceLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    order = (ClassifierFreeGuidanceLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
    given = list(processors)
    kinds: list[Any] = [type(p) for p in given]
    unknown = [k.__name__ for k in kinds if k not in order]
    unknown += [f"{type(p).__name__} with other arguments" for p in given if not _plain(p)]
    if not unknown and kinds != [k for k in order if k in kinds]:
        unknown = ["logits processors in this order"]
    if unknown:
        raise Unsupported(*unknown)
    found = dict(zip(kinds, given, strict=True))
    guidance, temperature, top_k, top_p = (found.get(kind) for kind in order)
    return Law(
        None if guidance is None else float(guidance.guidance_scale),
        0.0 if not sampling else 1.0 if temperature is None else float(temperature.temperature),
        0 if top_k is None else int(top_k.top_k),
        # 0 keeps the likeliest token there, and means off in our sampler
        0.0 if top_p is None else max(float(top_p.top_p), 1e-12),
    )


def _plain(processor: Any) -> bool:
    smallest = getattr(processor, "min_tokens_to_keep", 1)
    return smallest == 1 and getattr(processor, "filter_value", -float("inf")) == -float("inf")


def other_criteria(criteria: Any, length: int) -> list[str]:
    """Stopping criteria other than the length of the sequence."""
    from transformers import MaxLengthCriteria

    return [type(c).__name__ for c in criteria if type(c) is not MaxLengthCriteria or c.max_length != length]
