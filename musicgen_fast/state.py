"""Every tensor that a decoding step touches: conditions, KV cache, cross-attention states, the sequence, its counters.

A `State` is a lane: B requests in lockstep in one window. It runs any number of windows one after the other; a decoder
steps several lanes at once. Knows nothing of how a step is computed, nor of text and audio. Shapes: R rows
(branch-major: all requests of the first branch, then the next), B requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from .config import ModelConfig
from .pattern import UNKNOWN, Pattern
from .place import Place, Sampler
from .sampling import raise_on_failure

# Columns between two looks at `status`: a look at a GPU waits for it, and a failed draw costs at most these steps.
STATUS_INTERVAL = {"cpu": 1}
OTHER_STATUS_INTERVAL = 50


@dataclass
class Branch:
    """One CFG branch of B requests. Lists have B entries; `cross` None: cross-attention contributes nothing."""

    prefix: list[Tensor] | None = None  # each [P_b, d]
    cross: list[Tensor] | None = None  # each [N_b, d]


@dataclass
class Conditions:
    """The branches that run, in row order, and how they are mixed.

    `mix` is NB of the sampler: 1, 2 (conditional, null) or 3 (text and wav, wav, null). Fewer branches run than are
    mixed where two are the same: on a text model the wav branch of double CFG *is* the null branch. `batch` is B.
    """

    batch: int
    branches: list[Branch]
    mix: int

    @property
    def num_rows(self) -> int:
        """R: requests x branches that run."""
        return self.batch * len(self.branches)

    def expand_logits(self, logits: Tensor) -> Tensor:
        """[R, K, V] of the rows that ran -> [NB, B, K, V]; the rows may be those of several lanes."""
        stacked = logits.unflatten(0, (len(self.branches), -1))
        if self.mix == 3 and len(self.branches) == 2:
            return stacked[[0, 1, 1]]
        return stacked

    def prefix_lengths(self) -> list[int]:
        """Prefix positions of every row."""
        per_branch = [[len(p) for p in b.prefix] if b.prefix else [0] * self.batch for b in self.branches]
        return sum(per_branch, [])


class Cache(Protocol):
    """Keys and values of R rows for up to `capacity` positions; how they lie in it is its decoder's business."""

    @property
    def rows(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    def clear(self) -> None: ...  # zeros, written to all of its memory

    def copy_from(self, other: Any, positions: int) -> None: ...  # the first positions of all rows


class Source(Protocol):
    """Where a lane that follows another one takes its tokens from; see `shadow.py`."""

    first: int  # the column from which the lane draws tokens of its own

    def copy(self, state: State) -> None: ...


class Mixer(Protocol):
    """Several lanes that draw together."""

    def mixed(self, state: State, logits: Tensor) -> Tensor | None: ...


class Rows(Protocol):
    """The memory of many lanes; see `slots.Slots`."""

    board: Any  # a Board: what decoders that work on all of its rows need

    def part(self, rows: range, states: Sequence[State]) -> tuple[Sampler, Place]: ...  # of lanes side by side, as one


@dataclass
class State:
    """The working set of a decoder.

    Attributes:
        config: of the model.
        kv: keys and values; row r holds `lengths[r]` positions.
        pattern: of the window; None before the first one.
        own_place: no `place` was given, so each window gets its own.
        texts: what `decoder.condition` made of the conditions' texts; None where no row attends to any.
        place: where the next column is written: sequence and counters on the device. Given, it is reused for every
            window; else each window gets its own.
        column: `place.column` as the host knows it: the next step of the sequence to be written.
        source: set while the columns before `source.first` are another lane's tokens: they are copied, not drawn.
        blend: set while two lanes at one place are crossfaded: what to draw from, see `crossfade.py`.
        slots, rows: the memory that `place` and `sampler` are parts of, and where in it; see `slots.Slots`.
    """

    config: ModelConfig
    kv: Any  # a Cache
    lengths: list[int]
    conditions: Conditions
    sampler: Sampler
    texts: Any = None
    pattern: Pattern | None = None
    place: Place | None = None
    column: int = 0
    source: Source | None = None
    slots: Rows | None = None
    rows: range = range(0)
    blend: Mixer | None = None
    own_place: bool = field(init=False)

    def __post_init__(self) -> None:
        self.own_place = self.place is None

    @property
    def capacity(self) -> int:
        """Positions that fit into the cache."""
        return self.kv.capacity

    @property
    def done(self) -> bool:
        """Every column of the window is written, or there is no window."""
        return self.pattern is None or self.column >= self.pattern.num_steps

    @property
    def sequence(self) -> Tensor:
        """int64 [B, K, S], `UNKNOWN` where nothing is written yet; S is that of the window or larger."""
        assert self.place is not None
        return self.place.sequence

    def start_window(self, pattern: Pattern, codes: Tensor, prompt: int, step_offset: int) -> None:
        """Begin a window of `pattern`: codes [B, K, T], the first `prompt` frames known and the rest `UNKNOWN`.

        `step_offset`: columns of the whole generation before this window; it only feeds the noise. ValueError where the
        pattern needs cells behind the prompt to go on from it.
        """
        batch, num_codebooks, _ = codes.shape
        sequence = pattern.build(codes, self.config.special_token)
        column = pattern.first_step(prompt)
        if (sequence[:, :, :column] == UNKNOWN).any():
            raise ValueError(
                f"the {self.config.pattern.kind} pattern cannot continue a prompt of {prompt} frames: "
                "cells before the prompt's end are not known"
            )
        if self.own_place:
            self.place = Place.allocate(batch, num_codebooks, pattern.num_steps, codes.device)
        self.begin_at(pattern, sequence, column, step_offset)

    def begin_at(self, pattern: Pattern, sequence: Tensor, column: int, step_offset: int) -> None:
        """Start `pattern` from a sequence [B, K, S] whose cells before `column` are known; the cache counts as empty.

        `step_offset`: as for `start_window`.
        """
        place = self.place
        assert place is not None
        self.pattern, self.column = pattern, column
        self.lengths = [0] * len(self.lengths)
        place.sequence[:, :, : pattern.num_steps] = sequence
        place.column.fill_(column)
        place.step.fill_(step_offset + column)
        place.status.zero_()
        place.reserved.clear()

    def fed_tokens(self, first: int, last: int | None = None) -> Tensor:
        """Tokens [B, K, n] of the columns from `first` up to `last`, by default the one being written."""
        return self.sequence[:, :, first : self.column if last is None else last]

    @property
    def follows(self) -> bool:
        """The next column is copied from another lane; nothing is drawn."""
        return self.source is not None and self.column < self.source.first

    def draw(self, logits: Tensor) -> None:
        """Draw the column's tokens from logits [R, K, V]; write the cells that are unknown; advance."""
        assert self.place is not None
        if self.source is None or not self.follows:
            own = self.conditions.expand_logits(logits)
            mixed = own if self.blend is None else self.blend.mixed(self, own)
            if mixed is not None:
                self.sampler(mixed, self.place)
                self.place.advance()
        self.drawn()

    def drawn(self) -> None:
        """Book a column that was drawn. Lanes that follow others come behind them: they copy from their column."""
        if self.source is not None:
            self.source.copy(self)
        self.column += 1

    def check(self) -> None:
        """ValueError where a draw failed. A look at a GPU waits for it, so not every column is looked at."""
        assert self.place is not None
        interval = STATUS_INTERVAL.get(self.place.status.device.type, OTHER_STATUS_INTERVAL)
        if self.column % interval == 0 or self.done:
            raise_on_failure(self.place.status)

    def write_column(self, logits: Tensor) -> None:
        """`draw` from logits [R, K, V], then `check`."""
        self.draw(logits)
        self.check()

    def codes(self) -> Tensor:
        """int64 [B, K, T] of the finished window."""
        assert self.pattern is not None and self.done
        return self.pattern.revert(self.sequence)
