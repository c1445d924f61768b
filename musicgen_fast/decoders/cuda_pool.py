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
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        step: int,
        moved: Callable[[], None],
        width: int | None = None,
    ):
        """`step`: capacities are its multiples. `width`: of the last dimension, None is d/H."""
        self._config, self._dtype, self._device, self._step = config, dtype, device, step
        self._width = config.head_dim if width is None else width
        self.moved = moved
        self._taken = [0, 0]  # positions that the taker of each slot asked for; 0: nobody has it
        self.tensor, self.scales = self._memory(2, step)

    @property
    def capacity(self) -> int:
        return self.tensor.shape[4]

    def take(self, count: int, capacity: int) -> list[int]:
        """Slots of zeros. torch.OutOfMemoryError where there is no room; then nothing has changed."""
        self.reserve(count, capacity)
        slots = [i for i, taken in enumerate(self._taken) if not taken][:count]
        for slot in slots:
            self._taken[slot] = capacity
        self.clear(slots)
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._taken[slot] = 0

    def reserve(self, count: int, capacity: int) -> None:
        """Make room for so many more slots. torch.OutOfMemoryError as `take`."""
        if capacity > self.capacity or self._taken.count(0) < count:
            self._grow(count, capacity)

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
        """Move to memory for `count` more; of as many positions as those that are there need, not as there were."""
        taken = sum(map(bool, self._taken))
        capacity = -(-max(capacity, *self._taken) // self._step) * self._step
        if not taken:  # nobody's memory: let go of it before the next is asked for
            before = len(self._taken), self.capacity
            self._empty()
            try:
                self._move(count, capacity)
            except torch.OutOfMemoryError:
                self._move(*before)
                raise
            return
        wanted = max(taken + count, len(self._taken))
        try:
            self._move(max(wanted, 2 * taken), capacity)  # doubled: few moves, however many come
        except torch.OutOfMemoryError:
            self._move(wanted, capacity)

    def _empty(self) -> None:
        self._taken = []
        self.tensor, self.scales = self._memory(0, self._step)
        self.moved()

    def _move(self, slots: int, capacity: int) -> None:
        tensor, scales = self._memory(slots, capacity)
        old, kept = self.tensor.shape[2], min(capacity, self.capacity)
        tensor[:, :, :old, :, :kept] = self.tensor[..., :kept, :]
        if scales is not None and self.scales is not None:
            scales[:, :, :old, :, :kept] = self.scales[..., :kept]
        self.tensor, self.scales = tensor, scales
        self._taken += [0] * (slots - len(self._taken))
        self.moved()

    def _memory(self, slots: int, capacity: int) -> tuple[Tensor, Tensor | None]:
        c = self._config
        shape = (c.num_layers, 2, slots, c.num_heads, capacity)
        tensor = torch.zeros(*shape, self._width, dtype=self._dtype, device=self._device)
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
    """Keys and values of the texts of a lane's first rows; `lengths` of each. The others attend to nothing.

    `folded`: the same with the projections around them folded in (`Layer.folded_text`), where that is kept.
    """

    def __init__(self, pool: Pool, lengths: list[int], folded: Pool | None = None):
        super().__init__(pool, len(lengths), max(lengths))
        self.lengths = lengths
        self.folded = None if folded is None else PooledCache(folded, len(lengths), max(lengths))
