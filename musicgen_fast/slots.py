"""The fixed memory that requests come and go in: tensors of N slots, and caches that are used again.

Everything a sampler or a fixed-shape decoder must know of a request lies in tensors whose address and shape never
change: sequence, column, step, parameters, seed. A free slot has its column outside of the sequence, so a launch over
all slots does nothing there. Knows nothing of windows or of how a step is computed.

Each slot has up to two lanes: the window that plays, and the next one while its cache is filled (`shadow.py`). Row
`first + lane * N + slot` of the tensors is theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .board import Board
from .config import ModelConfig
from .pattern import build_pattern
from .place import Place, Sampler
from .sampling import SamplingParams
from .state import Cache, State

_PARAMETERS = ("cfg_coef", "cfg_coef_beta", "scale", "divisor", "top_k", "top_p", "min_p")
_MOST_PARTS = 256


class Slots:
    """N slots for windows of up to `num_frames` frames.

    Attributes:
        board, place, params, seeds: the tensors of all rows, which may be more than these slots have.
    """

    def __init__(
        self,
        config: ModelConfig,
        count: int,
        num_frames: int,
        device: torch.device | str = "cpu",
        lanes: int = 1,
        board_for: Callable[[int, int], Board] | None = None,
    ):
        """`board_for`: (rows, columns) -> a board with such rows free; None: a board of their own."""
        if count < 1:
            raise ValueError(f"at least one slot is needed, got {count}")
        self.count = count
        self.num_frames = num_frames
        self.num_steps = build_pattern(config.pattern, config.num_codebooks, num_frames).num_steps
        rows = count * lanes
        self.board = (
            Board(config, rows, self.num_steps, device) if board_for is None else board_for(rows, self.num_steps)
        )
        taken = self.board.take(rows)
        weakref.finalize(self, self.board.give_back, taken)
        self._first, self._lanes = taken.start, lanes
        self.place, self.params, self.seeds = self.board.place, self.board.params, self.board.seeds
        self._free = [True] * count
        self._caches: list[Cache] = []
        self._parts: dict[tuple, tuple[Sampler, Place]] = {}

    @classmethod
    def on(cls, decoder: Any, count: int, num_frames: int, device: torch.device | str, lanes: int = 1) -> Slots:
        """Slots where a decoder wants them: a decoder with graphs has a `board_for` of its own."""
        return cls(decoder.config, count, num_frames, device, lanes, getattr(decoder, "board_for", None))

    @property
    def free(self) -> int:
        """How many slots are free; a batch needs them side by side."""
        return sum(self._free)

    def take(self, batch: int) -> range | None:
        """`batch` free slots side by side, or None."""
        for first in range(self.count - batch + 1):
            if all(self._free[first : first + batch]):
                self._free[first : first + batch] = [False] * batch
                return range(first, first + batch)
        return None

    def release(self, slots: range) -> None:
        """Give slots back whose rows are silent."""
        self._free[slots.start : slots.stop] = [True] * len(slots)

    def rows(self, slots: range, lane: int) -> range:
        """The rows of the tensors that belong to a lane of these slots."""
        first = self._first + lane * self.count
        return range(first + slots.start, first + slots.stop)

    def silence(self, rows: range) -> None:
        """Nothing is drawn in these rows any more."""
        self.place.column[rows.start : rows.stop] = self.board.num_steps

    def sampler(self, rows: range, given: Sampler) -> Sampler:
        """The given sampler, its parameters and seeds copied into the slots' tensors."""
        part = slice(rows.start, rows.stop)
        views = {name: getattr(self.params, name)[part] for name in _PARAMETERS}
        for name, view in views.items():
            view.copy_(getattr(given.params, name))
        seeds = None
        if given.seeds is not None:
            seeds = self.seeds[part]
            seeds.copy_(given.seeds)
        return Sampler(replace(given.params, **views), seeds, given.backend)

    def launch_params(self, states: Iterable[State]) -> SamplingParams:
        """The parameters of all rows, for one draw over all of them: with the filters that any of these lanes uses."""
        used = [state.sampler.params for state in states]
        return replace(
            self.params,
            any_top_k=any(p.any_top_k for p in used),
            any_top_p=any(p.any_top_p for p in used),
            any_min_p=any(p.any_min_p for p in used),
            any_sorted=any(p.any_sorted for p in used),
            all_greedy=all(p.all_greedy for p in used),
        )

    def part(self, rows: range, states: Sequence[State]) -> tuple[Sampler, Place]:
        """One sampler and one place for lanes with seeds that fill these rows; made once (60 us), not every step."""
        used = [state.sampler.params for state in states]
        key = (
            rows.start, rows.stop, states[0].sampler.backend, any([p.any_top_k for p in used]),
            any([p.any_top_p for p in used]), any([p.any_min_p for p in used]), any([p.any_sorted for p in used]),
        )  # fmt: skip
        if key not in self._parts:
            if len(self._parts) >= _MOST_PARTS:
                self._parts.clear()
            own, whole = slice(rows.start, rows.stop), self.launch_params(states)
            params = replace(whole, **{name: getattr(whole, name)[own] for name in _PARAMETERS})
            sampler = Sampler(params, self.seeds[own], states[0].sampler.backend)
            self._parts[key] = sampler, self.place.rows(rows.start, rows.stop)
        return self._parts[key]

    def reuse_cache(self, rows: int, capacity: int) -> Cache | None:
        """A cache that was given back, large enough for these rows and positions."""
        for index, cache in enumerate(self._caches):
            if cache.rows == rows and cache.capacity >= capacity:
                return self._caches.pop(index)
        return None

    def keep_cache(self, cache: Cache) -> None:
        """Keep a cache for the next lane; at most as many as there are lanes."""
        self._caches.append(cache)
        del self._caches[: -self.count * self._lanes]
