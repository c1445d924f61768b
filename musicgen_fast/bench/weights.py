"""Random weights for other people's models, in seconds: time does not depend on their values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

__all__ = ["default_dtype", "fill", "undrawn"]


@contextmanager
def undrawn() -> Iterator[None]:
    """Modules built inside keep raw memory where they would draw weights: 10 s less for the small size, a minute for
    the large one."""

    def keep(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor

    patches = (
        mock.patch.object(torch.Tensor, "normal_", keep),
        mock.patch.object(torch.Tensor, "uniform_", keep),
        mock.patch.object(nn.init, "trunc_normal_", keep),
    )
    with patches[0], patches[1], patches[2]:
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Matrices from one repeated block of normal values over sqrt(columns); vectors: 1 in weights, 0 in biases."""
    block = torch.randn(1_048_573)
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        values = (block / math.sqrt(math.prod(parameter.shape[1:]))).to(parameter.dtype)
        for part in parameter.data.view(-1).split(len(block)):
            part.copy_(values[: len(part)])
