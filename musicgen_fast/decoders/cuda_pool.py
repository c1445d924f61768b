"""Memory of the CUDA decoder that requests take slots of: keys and values of their tokens, and of their texts.

One tensor per pool at a fixed address, so that a captured graph finds every request by its slot's number. A pool that
is too small moves to a larger tensor; graphs that were captured before are stale then. Letters as in
kernels/reference.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..config import ModelConfig


class Pool:
    """Slots of C positions each.

    Attributes:
        tensor: half or int8 [L, 2, slots, H, C, d/H]; scales: fp32 [L, 2, slots, H, C] with int8, else None.
        moved: called when the tensors have been replaced.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, step: int, moved: Callable[[], None]
    ):
        """`step`: capacities are its multiples."""
        self._config, self._dtype, self._device, self._step = config, dtype, device, step
        self.moved = moved
        self._taken: list[bool] = []
        self.tensor, self.scales = self._memory(0, step)

    @property
    def capacity(self) -> int:
        return self.tensor.shape[4]

    def take(self, count: int, capacity: int) -> list[int]:
        """Slots of zeros. torch.OutOfMemoryError where there is no room; then nothing has changed."""
        if capacity > self.capacity or self._taken.count(False) < count:
            self._grow(count, -(-capacity // self._step) * self._step)
        slots = [i for i, taken in enumerate(self._taken) if not taken][:count]
        for slot in slots:
            self._taken[slot] = True
        self.clear(slots)
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._taken[slot] = False

    def clear(self, slots: Sequence[int]) -> None:
        """Zeros: a masked position still counts as 0 x value in torch's attention, and 0 x NaN is NaN."""
        index = self.index(slots)
        self.tensor[:, :, index] = 0
        if self.scales is not None:
            self.scales[:, :, index] = 0

    def index(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(list(slots), device=self._device)

    def write(self, layer: int, slots: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Keys and values [R, H, n, d/H] of the first n positions of R slots."""
        both, index, n = torch.stack([keys, values]), self.index(slots), keys.shape[2]
        if self.scales is not None:
            size = both.float().abs().amax(-1) / 127
            both = (both.float() / size.clamp(min=1e-30)[..., None]).round().clamp(-127, 127)
            self.scales[layer][:, index, :, :n] = size
        self.tensor[layer][:, index, :, :n] = both.to(self.tensor.dtype)

    def copy(self, source: Sequence[int], target: Sequence[int], positions: int) -> None:
        """The first positions of some slots into others."""
        there, here = self.index(source), self.index(target)
        self.tensor[:, :, here, :, :positions] = self.tensor[:, :, there, :, :positions]
        if self.scales is not None:
            self.scales[:, :, here, :, :positions] = self.scales[:, :, there, :, :positions]

    def _grow(self, count: int, capacity: int) -> None:
        taken = sum(self._taken)
        if not taken:  # nobody's memory: let go of it before the next is asked for
            before = len(self._taken), self.capacity
            self.tensor, self.scales = self._memory(0, self._step)
            try:
                self._move(count, capacity)
            except torch.OutOfMemoryError:
                self._move(*before)
                raise
            return
        wanted, capacity = taken + count, max(capacity, self.capacity)
        try:
            self._move(max(wanted, 2 * len(self._taken)), capacity)  # doubled: few moves, however many come
        except torch.OutOfMemoryError:
            self._move(max(wanted, len(self._taken)), capacity)

    def _move(self, slots: int, capacity: int) -> None:
        tensor, scales = self._memory(slots, capacity)
        old = self.tensor.shape[2]
        tensor[:, :, :old, :, : self.capacity] = self.tensor
        if scales is not None and self.scales is not None:
            scales[:, :, :old, :, : self.capacity] = self.scales
        self.tensor, self.scales = tensor, scales
        self._taken += [False] * (slots - len(self._taken))
        self.moved()

    def _memory(self, slots: int, capacity: int) -> tuple[Tensor, Tensor | None]:
        c = self._config
        shape = (c.num_layers, 2, slots, c.num_heads, capacity)
        tensor = torch.zeros(*shape, c.head_dim, dtype=self._dtype, device=self._device)
        return tensor, torch.zeros(shape, device=self._device) if self._dtype == torch.int8 else None


class PooledCache:
    """Keys and values of R rows of a lane: their slots, given back when nobody holds this any more."""

    def __init__(self, pool: Pool, rows: int, capacity: int):
        self.pool, self.capacity = pool, capacity
        self.slots = pool.take(rows, capacity)
        weakref.finalize(self, pool.give_back, self.slots)

    @property
    def rows(self) -> int:
        return len(self.slots)

    def clear(self) -> None:
        self.pool.clear(self.slots)

    def copy_from(self, other: PooledCache, positions: int) -> None:
        self.pool.copy(other.slots, self.slots, positions)


class PooledTexts(PooledCache):
    """Keys and values of the texts of a lane's first rows; `lengths` of each. The others attend to nothing."""

    def __init__(self, pool: Pool, lengths: list[int]):
        super().__init__(pool, len(lengths), max(lengths))
        self.lengths = lengths
