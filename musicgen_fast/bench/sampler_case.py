"""What `bench sampler` gives to samplers: a case and its logits [2, B, K, V] (conditional, null). Knows no sampler."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .job import DTYPES

__all__ = ["Case", "first_line"]


@dataclass(frozen=True)
class Case:
    """What is sampled. `filter` is none, top_kN or top_pX; guidance of two branches."""

    device: str = "cpu"
    batch: int = 1
    codebooks: int = 4
    filter: str = "top_k250"
    dtype: str = "float32"
    vocab: int = 2048
    cfg_coef: float = 3.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"none|top_k[1-9]\d*|top_p0?\.\d*[1-9]\d*", self.filter):
            raise ValueError(f"a filter is none, top_k250 or top_p0.9 with numbers of your own, got {self.filter!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"a dtype is one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if min(self.batch, self.codebooks) < 1:
            raise ValueError(f"batch and codebooks must be at least 1, got {self.batch} and {self.codebooks}")

    @property
    def top_k(self) -> int:
        return int(self.filter[5:]) if self.filter.startswith("top_k") else 0

    @property
    def top_p(self) -> float:
        return float(self.filter[5:]) if self.filter.startswith("top_p") else 0.0

    @property
    def title(self) -> str:
        return f"batch {self.batch}, {self.codebooks} codebooks, {self.filter}, {self.dtype}"

    def logits(self) -> Tensor:
        """[2, B, K, V] normal with deviation 2.5, the null branch near the conditional one."""
        generator = torch.Generator().manual_seed(self.batch * 100 + self.codebooks)
        shape = (self.batch, self.codebooks, self.vocab)
        cond = torch.randn(shape, generator=generator) * 2.5
        null = cond + 0.5 * torch.randn(shape, generator=generator)
        return torch.stack([cond, null]).to(self.device, DTYPES[self.dtype])

    def numbers(self) -> dict[str, Any]:
        """The arguments that `sample` and `SamplingParams.build` share."""
        return {
            "cfg_coef": self.cfg_coef,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"
