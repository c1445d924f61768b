"""One window of a batch in a lane of the slots: its state, and what the pattern says about frames and columns.

Knows which frames are finished and where they stand; nothing of the windows before and after. Shapes: frames int64
[B, K, t], numbered over the whole generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig
from .pattern import Pattern
from .place import Sampler
from .slots import Slots
from .state import Cache, Conditions, State
from .windows import Window

Guidance = Callable[[int], tuple[float, float]]  # frame -> (cfg_coef, temperature)


class Decoder(Protocol):
    """What the engine needs of `decoders/`; `config` is that of the model whose weights it holds."""

    config: ModelConfig

    def allocate(self, rows: int, capacity: int) -> Cache:
        """A cache for `rows` rows of up to `capacity` positions, reusable for any window that fits."""

    def condition(self, state: State) -> None:
        """Project the texts of `state.conditions` for cross-attention into `state.texts`; once per conditions."""

    def prefill(self, state: State, draw: bool = True) -> None:
        """Prefix and known columns of `state`'s window in one pass; then, with `draw`, the first that is drawn."""

    def step(self, *states: State) -> None:
        """One column of each of the `states`, the lanes of one or many batches, in one pass."""


class Lane:
    """A state in its place among the slots, and the window that it plays."""

    def __init__(self, state: State, parity: int):
        self.state = state
        self.parity = parity
        self.window = Window(0, 0, 0)
        self._guided: list[tuple[float, float] | None] = [None] * state.conditions.batch
        self._tables: Tables | None = None

    def enter(self, window: Window, pattern: Pattern) -> None:
        self.window = window
        self._tables = tables(pattern)

    def ready(self) -> int:
        """The frame before which all are finished."""
        assert self._tables is not None
        return self.window.start + int(self._tables.ready[self.state.column])

    def frames(self, first: int, last: int) -> Tensor:
        """The frames [first, last) of the whole generation, all of which lie in this window."""
        assert self._tables is not None
        steps = self._tables.steps[:, first - self.window.start : last - self.window.start]
        sequence = self.state.sequence
        return sequence.gather(2, steps.to(sequence.device).expand(len(sequence), -1, -1))

    def newest(self) -> int:
        """The newest frame in the column to be drawn."""
        assert self._tables is not None
        return self.window.start + int(self._tables.newest[self.state.column])

    def guide(self, guidance: Sequence[Guidance | None]) -> None:
        """The parameters of the column to be drawn, which belong to its newest frame."""
        frame = self.newest()
        for row, at in enumerate(guidance):
            if at is None or (values := at(frame)) == self._guided[row]:
                continue
            self.state.sampler.set_guidance(row, *values)
            self._guided[row] = values


def cache_for(decoder: Decoder, slots: Slots, rows: int, capacity: int) -> Cache:
    """A cache that was given back, or a new one."""
    kv = slots.reuse_cache(rows, capacity)
    return decoder.allocate(rows, capacity) if kv is None else kv


def open_lane(
    decoder: Decoder,
    slots: Slots,
    rows: range,
    parity: int,
    conditions: Conditions,
    sampler: Sampler,
    texts_of: State | None = None,
) -> Lane:
    """A lane in these rows of the slots. `texts_of` lends its projected texts if its conditions are the same object."""
    if conditions.batch != len(rows):
        raise ValueError(f"conditions for {conditions.batch} requests were given for a batch of {len(rows)}")
    capacity = max(conditions.prefix_lengths()) + slots.num_steps - 1  # the last column is written, never read
    kv = cache_for(decoder, slots, conditions.num_rows, capacity)
    place = slots.place.rows(rows.start, rows.stop)
    own = slots.sampler(rows, sampler)
    state = State(decoder.config, kv, [0] * conditions.num_rows, conditions, own, place=place, slots=slots, rows=rows)
    if texts_of is not None and texts_of.conditions is conditions:
        state.texts = texts_of.texts
    else:
        decoder.condition(state)
    return Lane(state, parity)


class Tables:
    """What a pattern says about time: `steps` int64 [K, T], the column of every cell; by number of the next column,
    [S + 1]: `ready`, how many leading frames are finished, and `newest`, the newest frame written up to there."""

    def __init__(self, pattern: Pattern):
        table, frames = pattern.table, pattern.num_frames
        s, k = np.nonzero(table >= 0)
        steps = np.zeros((table.shape[1], frames), dtype=np.int64)
        steps[k, table[s, k]] = s
        finished = np.maximum.accumulate(steps.max(axis=0))  # the column that completes frames 0..t
        self.steps = torch.from_numpy(steps)
        self.ready = np.searchsorted(finished, np.arange(pattern.num_steps + 1), side="left")
        newest = np.maximum.accumulate(table.max(axis=1)).clip(min=0)
        self.newest = np.append(newest, newest[-1])


tables = lru_cache(maxsize=32)(Tables)
