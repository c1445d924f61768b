"""The loop for one batch: windows one after the other, step after step; tokens in, tokens out.

Knows no device, no text and no audio: it drives a decoder (prefill, step) over the lanes of the batch. `generate` gives
the whole, `Generation` frame by frame; `slot_engine.py` has the loop for requests that come and go. The order of
reading: `state.py` (a lane), `slots.py` (its memory), `lanes.py`, `shadow.py`, `chain.py` (its windows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import saving
from .chain import Chain, ConditionsOf
from .crossfade import Change
from .lanes import Decoder, Guidance
from .slots import Slots
from .state import Sampler
from .windows import Window, WindowPlan

__all__ = ["Change", "Decoder", "Generation", "Guidance", "Progress", "generate"]

Progress = Callable[[int, int], None]


def generate(
    decoder: Decoder,
    windows: list[Window],
    prompt: Tensor,
    conditions_of: ConditionsOf,
    sampler: Sampler,
    progress: Progress | None = None,
    *,
    shadow: bool = False,
) -> Tensor:
    """Tokens of a whole generation.

    Args:
        windows: from `plan_windows`; the last one ends at T.
        prompt: int64 [B, K, P], P frames that are known already.
        conditions_of: the conditions of a window; the same object where they do not change.
        progress: called after every step with (steps done, steps of all windows). What it raises ends the generation.
        shadow: see `Generation`. A prefill at once is cheaper where nobody waits for a single step.

    Returns:
        int64 [B, K, T], the prompt included.
    """

    def window_at(index: int) -> Window | None:
        return windows[index] if index < len(windows) else None

    batch = len(prompt)
    slots = Slots.on(decoder, batch, windows[0].length, prompt.device, lanes=1 + shadow)
    chain = Chain(decoder, slots, range(batch), window_at, prompt, conditions_of, sampler, shadow=shadow)
    while not chain.done:
        _step(decoder, chain)
        if progress is not None:
            progress(chain.steps_done, chain.steps_total or 0)
    return torch.cat([prompt, chain.take()], dim=2)


def _step(decoder: Decoder, chain: Chain) -> None:
    lanes = chain.begin()
    if lanes:
        decoder.step(*lanes)
    chain.end()


class Generation:
    """A batch in lockstep, frame by frame: an iterator of int64 [B, K, t] new frames per step, t >= 0.

    The prompt is not among the frames; all codebooks of a frame are known when it is yielded, so the first frame of a
    delay pattern comes after K steps. Memory does not grow with the duration. Attributes: `steps_done`; `steps_total`,
    None where the plan has no end.
    """

    def __init__(
        self,
        decoder: Decoder,
        plan: WindowPlan,
        prompt: Tensor,
        conditions_of: ConditionsOf,
        sampler: Sampler,
        *,
        shadow: bool = True,
        guidance: Sequence[Guidance | None] = (),
        changes: Sequence[Change] = (),
        saved: dict[str, Any] | None = None,
    ):
        """
        Args:
            plan: `total` None is endless; `prompt` must be P.
            prompt: int64 [B, K, P].
            conditions_of: the conditions of a window, called once for each; the same object where they do not change.
            sampler: with seeds, or without (noise mode): then nothing else may draw from torch's global generator
                between the steps, if the tokens are to be those of the references.
            shadow: fill the next window's cache while the current one plays (see `shadow.py`), so that no step takes
                much longer than the others; up to twice the rows and the cache. Where that cannot be (prefixes, strides
                of about half a window or less, flattened patterns) the windows are prefilled at once.
            guidance: per request None or a function frame -> (cfg_coef, temperature), asked before every step for the
                newest frame of the column to be drawn. It cannot add a branch: with one branch cfg_coef has no effect.
            changes: other conditions from a frame on, in order, with the same rows; cross-attention models only. The
                cache stays; during a crossfade twice the rows run. A window that would be filled as a shadow while
                the conditions change is prefilled instead.
            saved: go on from a state that `save` of a generation with the same arguments returned.

        Raises:
            ValueError: sizes that do not fit each other, or a saved state of another generation.
        """
        if plan.prompt != prompt.shape[2]:
            raise ValueError(f"the plan is for a prompt of {plan.prompt} frames, got {prompt.shape[2]}")
        if guidance and len(guidance) != len(prompt):
            raise ValueError(f"{len(guidance)} guidance functions were given for {len(prompt)} requests")
        first = plan.at(0)
        assert first is not None
        self._decoder = decoder
        slots = Slots.on(decoder, len(prompt), first.length, prompt.device, lanes=1 + shadow)
        self._chain = Chain(
            decoder, slots, range(len(prompt)), plan.at, prompt, conditions_of, sampler,
            shadow=shadow, endless=plan.total is None, guidance=guidance, changes=changes,
        )  # fmt: skip
        if saved is not None:
            saving.restore(self._chain, saved)

    @property
    def steps_done(self) -> int:
        return self._chain.steps_done

    @property
    def steps_total(self) -> int | None:
        return self._chain.steps_total

    @property
    def done(self) -> bool:
        return self._chain.done

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Tensor:
        if self._chain.done:
            raise StopIteration
        try:
            _step(self._decoder, self._chain)
        except BaseException:
            self.close()  # the lanes may be half a step apart
            raise
        return self._chain.take()

    def close(self) -> None:
        """End the generation and let go of its memory; iterating stops."""
        self._chain.close()

    def save(self) -> dict[str, Any]:
        """The state between two steps: tensors, numbers, lists and dicts, for `torch.save` and weights_only=True.

        In noise mode the state of torch's global generator is part of it. Raises ValueError where nothing is left.
        """
        if self._chain.done:
            raise ValueError("the generation has ended or was closed: there is nothing to go on from")
        return saving.save(self._chain)
