"""Every tensor that a decoding step touches: conditions, KV cache, cross-attention states, the sequence, its counters.

A `State` is a lane: B requests in lockstep in one window. It runs any number of windows one after the other; a decoder
steps several lanes at once. Knows nothing of how a step is computed, nor of text and audio. Shapes: R rows
(branch-major: all requests of the first branch, then the next), B requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import ModelConfig
from .pattern import UNKNOWN, Pattern
from .rng import rng_state, set_rng_state
from .sampling import Draw, SamplingParams, draw, raise_on_failure
from .sampling.noise import divides, multinomial_noise

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
    mixed where two are the same: on a text model the wav branch of double CFG *is* the null branch.
    """

    batch: int
    branches: list[Branch]
    mix: int

    @property
    def num_rows(self) -> int:
        return self.batch * len(self.branches)

    def expand_logits(self, logits: Tensor) -> Tensor:
        """[R, K, V] of the rows that ran -> [NB, B, K, V]."""
        stacked = logits.unflatten(0, (len(self.branches), self.batch))
        if self.mix == 3 and len(self.branches) == 2:
            return stacked[[0, 1, 1]]
        return stacked

    def prefix_lengths(self) -> list[int]:
        """Prefix positions of every row."""
        per_branch = [[len(p) for p in b.prefix] if b.prefix else [0] * self.batch for b in self.branches]
        return sum(per_branch, [])


@dataclass
class Place:
    """Where a column is written, on the device of the logits: what the sampler reads and writes besides parameters.

    `sequence` int64 [B, K, S], `UNKNOWN` where a token is to be drawn; `frames` int32 [S, K] is all zeros: cells that
    the pattern masks hold the special token from the start, so one table serves every pattern and length. `column`
    int32 [B] is the place in the window (outside of [0, S): nothing is drawn), `step` int64 [B] the same counted over
    the whole generation; `status` int32 [B, K] is 1 where a draw failed. `reserved`: states of the global generator
    from which the next columns take their noise, see `Sampler.reserve`.
    """

    sequence: Tensor
    frames: Tensor
    column: Tensor
    step: Tensor
    status: Tensor
    reserved: list[Tensor] = field(default_factory=list)

    @staticmethod
    def allocate(batch: int, num_codebooks: int, num_steps: int, device: torch.device | str) -> Place:
        """Room for windows of up to S columns; no column is being drawn."""
        return Place(
            torch.zeros(batch, num_codebooks, num_steps, dtype=torch.int64, device=device),
            torch.zeros(num_steps, num_codebooks, dtype=torch.int32, device=device),
            torch.full((batch,), num_steps, dtype=torch.int32, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(batch, num_codebooks, dtype=torch.int32, device=device),
        )

    def rows(self, first: int, last: int) -> Place:
        """The requests [first, last), on the same memory."""
        part = slice(first, last)
        return Place(self.sequence[part], self.frames, self.column[part], self.step[part], self.status[part])

    def advance(self) -> None:
        self.column.add_(1)
        self.step.add_(1)


@dataclass
class Sampler:
    """How the tokens of a column are drawn, for all B requests.

    Without `seeds` this is noise mode: `exponential_` from the global generator of the logits' device at every column,
    all K codebooks: the random numbers of audiocraft and transformers, in their order. With `seeds` the noise is
    counted by (seed, column of the whole generation, codebook, token).
    """

    params: SamplingParams
    seeds: Tensor | None = None  # int64 [B]
    backend: str = "auto"
    stream: Tensor | None = field(init=False)  # 0, ordinary sampling, for all

    def __post_init__(self) -> None:
        self.stream = None if self.seeds is None else torch.zeros_like(self.seeds)

    def __call__(self, logits: Tensor, place: Place) -> None:
        """logits [NB, B, K, V] -> the column of `place`: its unknown cells get their tokens."""
        inputs = Draw(logits, self.params, place.sequence, place.status, column=place.column, frames=place.frames)
        if self.seeds is not None:
            inputs.seed, inputs.step, inputs.stream = self.seeds, place.step, self.stream
        elif not self.params.all_greedy:
            inputs.noise, inputs.divide = self._noise(logits, place), divides(logits.device)
        draw(inputs, self.backend)

    def _noise(self, logits: Tensor, place: Place) -> Tensor:
        if not place.reserved:
            return multinomial_noise(logits, self.params)
        now = rng_state(logits.device)
        set_rng_state(logits.device, place.reserved.pop(0))
        noise = multinomial_noise(logits, self.params)
        set_rng_state(logits.device, now)
        return noise

    def reserve(self, place: Place, columns: int, vocab: int) -> None:
        """In noise mode, set the random numbers of the next columns aside: others may draw before these do."""
        if self.seeds is not None or self.params.all_greedy:
            return
        cells, device = place.status.numel(), place.status.device
        for _ in range(columns):
            place.reserved.append(rng_state(device))
            torch.empty(cells, vocab, device=device).exponential_(1)  # the numbers of `multinomial_noise`, thrown away

    def set_guidance(self, request: int, cfg_coef: float, temperature: float) -> None:
        """Other values for one request from the next draw on; a temperature <= 0 is greedy."""
        new = SamplingParams.build(1, self.params.scale.shape[1], cfg_coef=cfg_coef, temperature=temperature)
        for name in ("cfg_coef", "scale", "divisor"):  # in place: a captured graph reads these tensors
            getattr(self.params, name)[request] = getattr(new, name)[0]
        all_greedy = new.all_greedy and bool((self.params.scale < 0).all())
        if all_greedy != self.params.all_greedy:
            self.params = replace(self.params, all_greedy=all_greedy)


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


@dataclass
class State:
    """The working set of a decoder.

    Attributes:
        kv: keys and values; row r holds `lengths[r]` positions.
        texts: what `decoder.condition` made of the conditions' texts; None where no row attends to any.
        place: where the next column is written: sequence and counters on the device. Given, it is reused for every
            window; else each window gets its own.
        column: `place.column` as the host knows it: the next step of the sequence to be written.
        source: set while the columns before `source.first` are another lane's tokens: they are copied, not drawn.
        blend: set while two lanes at one place are crossfaded: what to draw from, see `crossfade.py`.
        rows: which rows of `board` the place is, for decoders that work on a whole board.
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
    rows: range = range(0)
    board: Any = None  # a Board
    blend: Mixer | None = None
    own_place: bool = field(init=False)

    def __post_init__(self) -> None:
        self.own_place = self.place is None

    @property
    def capacity(self) -> int:
        return self.kv.capacity

    @property
    def done(self) -> bool:
        return self.pattern is None or self.column >= self.pattern.num_steps

    @property
    def sequence(self) -> Tensor:
        """int64 [B, K, S], `UNKNOWN` where nothing is written yet; S is that of the window or larger."""
        assert self.place is not None
        return self.place.sequence

    def start_window(self, pattern: Pattern, codes: Tensor, prompt: int, step_offset: int) -> None:
        """Begin a window: codes [B, K, T], the first `prompt` frames known and the rest `UNKNOWN`.

        `step_offset`: columns of the whole generation before this window; it only feeds the noise.
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
        """Start from a sequence [B, K, S] whose cells before `column` are known; the cache counts as empty."""
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
        """`draw` and `check`."""
        self.draw(logits)
        self.check()

    def codes(self) -> Tensor:
        """int64 [B, K, T] of the finished window."""
        assert self.pattern is not None and self.done
        return self.pattern.revert(self.sequence)
