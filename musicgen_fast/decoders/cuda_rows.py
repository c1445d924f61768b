"""What a step's kernels are told of its rows, in device memory: one int32 table at a fixed address.

The host writes it when lanes come, go or jump, in one copy that nobody waits for; between that the kernels count for
themselves (`advance`), and the host keeps the same count to know whether the table still holds.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..board import Board
from ..place import Sampler
from ..state import State
from .cuda_pool import PooledCache, PooledTexts

Filters = tuple[bool, bool, bool]  # whether any request filters by top k, top p, min p
TOP_K: Filters = (True, False, False)
_FIELDS = ("request", "slot", "length", "fed", "text_slot", "text_length", "drawn")


@dataclass(frozen=True)
class Rows:
    """The table's columns for a bucket: int32 [R] each, see kernels/reference.py; branches int32 [R, NB]."""

    request: Tensor
    slot: Tensor
    length: Tensor
    fed: Tensor
    text_slot: Tensor
    text_length: Tensor
    drawn: Tensor
    branches: Tensor


class RowTable:
    """Rows of up to `size` rows; rows that nobody has are silent: their length and request are negative."""

    def __init__(self, size: int, device: torch.device):
        self.size = size
        self._data = torch.full(((len(_FIELDS) + 3) * size,), -1, dtype=torch.int32, device=device)
        self._mirror: list[tuple[weakref.ref[State], int, int, bool]] = []
        self._shown = (0, False)

    def bucket(self, rows: int, mix: int) -> Rows:
        """The first rows of the table; `mix` is NB of the draw."""
        columns = {name: self._data[i * self.size :][:rows] for i, name in enumerate(_FIELDS)}
        return Rows(**columns, branches=self._data[len(_FIELDS) * self.size :][: rows * mix].view(rows, mix))

    def forget(self) -> None:
        """The next `show` writes the table anew."""
        self._mirror = []

    def silence(self) -> None:
        """No row takes part: what a launch needs that is to do nothing."""
        self._data.fill_(-1)
        self.forget()

    def show(self, states: Sequence[State], mix: int, folded: bool = False) -> None:
        """Make the table say that these lanes, as they are now, are the next step's rows; `folded`: so are texts."""
        same = self._shown == (mix, folded) and len(states) == len(self._mirror)
        if same and all(m[0]() is s and m[1:] == _count(s) for m, s in zip(self._mirror, states, strict=True)):
            return
        host = torch.tensor(self._table(states, mix, folded), dtype=torch.int32)
        if self._data.is_cuda:
            host = host.pin_memory()  # freed when the copy is done: the allocator waits for it, not the caller
        self._data.copy_(host, non_blocking=True)
        self._shown = (mix, folded)
        self._mirror = [(weakref.ref(s), *_count(s)) for s in states]

    def advanced(self) -> None:
        """The kernels have counted a step."""
        self._mirror = [(ref, column + 1, length + 1, follows) for ref, column, length, follows in self._mirror]

    def _table(self, states: Sequence[State], mix: int, folded: bool) -> list[int]:
        columns: dict[str, list[int]] = {name: [] for name in _FIELDS}
        branches: list[int] = []
        for state in states:
            first, batch = len(columns["request"]), state.conditions.batch
            count = len(state.conditions.branches)
            places = list(state.rows) or list(range(batch))
            cache: PooledCache = state.kv
            texts: PooledTexts | None = state.texts
            lengths = texts.lengths if texts else []
            slots = [] if texts is None else texts.folded.slots if folded and texts.folded else texts.slots
            without = len(cache.slots) - len(lengths)
            columns["request"] += places * count
            columns["slot"] += cache.slots
            columns["length"] += state.lengths
            columns["fed"] += [state.column - 1] * (batch * count)
            columns["text_slot"] += slots + [-1] * without
            columns["text_length"] += lengths + [0] * without
            columns["drawn"] += [-1] * batch if state.follows else places
            branches += [row for b in range(batch) for row in _branches_of(state, first + b, mix)]
        padded = [numbers + [-1] * (self.size - len(numbers)) for numbers in columns.values()]
        return sum(padded, []) + branches + [-1] * (3 * self.size - len(branches))


def _count(state: State) -> tuple[int, int, bool]:
    return state.column, state.lengths[0], state.follows


def _branches_of(state: State, first: int, mix: int) -> list[int]:
    """The rows of a request's conditional, middle and null branch, of which `first` is the first.

    A branch that is not mixed is named as one that is: c + (c - c) * cfg is c.
    """
    batch, count, own = state.conditions.batch, len(state.conditions.branches), state.conditions.mix
    rows = [first + min(i, count - 1) * batch for i in range(own)]
    return rows[:1] * (mix - own) + rows


def board_of(state: State) -> Board | None:
    """None for a state with a place of its own."""
    return None if state.slots is None else state.slots.board


def joint_filters(states: Sequence[State]) -> Filters | None:
    """Which filters the one launch needs that draws for all lanes; None where they must draw one by one.

    In noise mode the order of the draws matters, a crossfade draws from two lanes, and a sampler may be the user's own.
    Top k alone, or all filters: two graphs a bucket are enough, since a filter that is off costs a row a comparison.
    """
    for state in states:
        sampler = state.sampler
        counted = sampler.seeds is not None or sampler.params.all_greedy
        if not counted or state.blend is not None or type(sampler) is not Sampler:
            return None
        if (
            board_of(state) is None
            or board_of(state) is not board_of(states[0])
            or sampler.backend not in ("auto", "triton")
        ):
            return None
    if os.environ.get("MUSICGEN_FAST_SAMPLER", "auto") not in ("", "auto", "triton"):
        return None
    used = [state.sampler.params for state in states]
    rare = any(p.any_top_p or p.any_min_p for p in used)
    return True, rare, rare
