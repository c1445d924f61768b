"""What the torch decoder keeps of a request: keys and values of the tokens and of the texts, and where a step writes.

Knows nothing of layers' weights. Letters as in `config.py`; N text states, C positions, Rc rows with a text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class TensorCache:
    """Keys and values [L, 2, R, H, C, d/H]."""

    tensor: Tensor

    @property
    def rows(self) -> int:
        return self.tensor.shape[2]

    @property
    def capacity(self) -> int:
        return self.tensor.shape[4]

    def clear(self) -> None:
        self.tensor.zero_()

    def copy_from(self, other: TensorCache, positions: int) -> None:
        self.tensor[..., :positions, :] = other.tensor[..., :positions, :]


@dataclass
class Texts:
    """The texts of the first Rc rows of a lane; the others attend to nothing.

    Attributes:
        kv: per layer keys and values [2, Rc, H, N, d/H].
        mask: bool [Rc, 1, 1, N] where the texts differ in length, else None.
        absorbed: per layer two [Rc, H*N, d] in the place of the projections around `kv`; empty: not worth it.
    """

    kv: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None
    absorbed: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Place:
    """Where a step's keys and values go in a cache [2, R, H, C, d/H], and what is attended."""

    def write(self, cache: Tensor, kv: Tensor) -> None:
        raise AssertionError

    def read(self, cache: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        raise AssertionError


class SamePlace(Place):
    """All rows are equally long: a slice, and no mask."""

    def __init__(self, position: int):
        self.position = position

    def write(self, cache: Tensor, kv: Tensor) -> None:
        cache[:, :, :, self.position] = kv

    def read(self, cache: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        keys, values = cache[:, :, :, : self.position + 1].unbind()
        return keys, values, None


class RowPlaces(Place):
    """Each row writes at its own length; positions beyond it are masked."""

    def __init__(self, positions: Tensor, longest: int):
        self.positions = positions
        self.longest = longest
        self.rows = torch.arange(len(positions), device=positions.device)
        inside = torch.arange(longest, device=positions.device) <= positions[:, None]
        self.mask = inside[:, None, None, :]

    def write(self, cache: Tensor, kv: Tensor) -> None:
        cache[:, self.rows, :, self.positions] = kv.transpose(0, 1)

    def read(self, cache: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        keys, values = cache[:, :, :, : self.longest].unbind()
        return keys, values, self.mask
