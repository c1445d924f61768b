"""Every tensor that a decoding step touches: conditions, KV cache, cross-attention states, the sequence, its counters.

A decoder allocates a `State` once and runs any number of windows in it. Knows nothing of how a step is computed, nor
of text and audio. Shapes: R rows (branch-major: all requests of the first branch, then the next), B requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import ModelConfig
from .pattern import UNKNOWN, Pattern
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

    `sequence` int64 [B, K, S] and `frames` int32 [S, K] of the window; `column` int32 [B] the place in the window and
    `step` int64 [B] the same counted over the whole generation; `status` int32 [B, K], 1 where a draw failed.
    """

    sequence: Tensor
    frames: Tensor
    column: Tensor
    step: Tensor
    status: Tensor

    def advance(self) -> None:
        self.column.add_(1)
        self.step.add_(1)


@dataclass
class Sampler:
    """How the tokens of a column are drawn, for all B requests.

    Without `seeds` this is noise mode: `exponential_` from the global generator of the logits' device at every column,
    all K codebooks: the random numbers of audiocraft and transformers, in their order. With `seeds`
    the noise is counted by (seed, column of the whole generation, codebook, token).
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
            inputs.noise, inputs.divide = multinomial_noise(logits, self.params), divides(logits.device)
        draw(inputs, self.backend)


@dataclass
class State:
    """The working set of a decoder.

    Attributes:
        kv: [L, 2, R, H, C, d/H] keys and values; row r holds `lengths[r]` positions.
        cross_kv: per layer keys and values [2, Rc, H, N, d/H] of the first Rc rows (the others attend to nothing).
        cross_mask: bool [Rc, 1, 1, N] where the texts differ in length, else None.
        absorbed: per layer two [Rc, H*N, d] in the place of the projections around `cross_kv`; empty: not worth it.
        place: where the next column is written: sequence and counters on the device.
        column: `place.column` as the host knows it: the next step of the sequence to be written.
    """

    config: ModelConfig
    kv: Tensor
    lengths: list[int]
    conditions: Conditions
    sampler: Sampler
    cross_kv: list[Tensor] = field(default_factory=list)
    cross_mask: Tensor | None = None
    absorbed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pattern: Pattern | None = None
    place: Place | None = None
    column: int = 0

    @property
    def capacity(self) -> int:
        return self.kv.shape[4]

    @property
    def done(self) -> bool:
        return self.pattern is None or self.column >= self.pattern.num_steps

    @property
    def sequence(self) -> Tensor:
        """int64 [B, K, S], `UNKNOWN` where nothing is written yet."""
        assert self.place is not None
        return self.place.sequence

    def start_window(self, pattern: Pattern, codes: Tensor, prompt: int, step_offset: int) -> None:
        """Begin a window: codes [B, K, T], the first `prompt` frames known and the rest `UNKNOWN`.

        `step_offset`: columns of the whole generation before this window; it only feeds the noise.
        """
        batch, num_codebooks, _ = codes.shape
        device = codes.device
        self.pattern = pattern
        self.column = pattern.first_step(prompt)
        self.lengths = [0] * len(self.lengths)
        self.place = Place(
            pattern.build(codes, self.config.special_token).contiguous(),
            torch.tensor(pattern.table, device=device),
            torch.full((batch,), self.column, dtype=torch.int32, device=device),
            torch.full((batch,), step_offset + self.column, dtype=torch.int64, device=device),
            torch.zeros(batch, num_codebooks, dtype=torch.int32, device=device),
        )
        if (self.sequence[:, :, : self.column] == UNKNOWN).any():
            raise ValueError(
                f"the {self.config.pattern.kind} pattern cannot continue a prompt of {prompt} frames: "
                "cells before the prompt's end are not known"
            )

    def fed_tokens(self, first: int) -> Tensor:
        """Tokens [B, K, n] of the columns from `first` up to the one being written."""
        return self.sequence[:, :, first : self.column]

    def write_column(self, logits: Tensor) -> None:
        """Draw the column's tokens from logits [R, K, V]; write the cells that are unknown; advance."""
        assert self.place is not None
        self.sampler(self.conditions.expand_logits(logits), self.place)
        self.place.advance()
        self.column += 1
        if self.done or self.column % STATUS_INTERVAL.get(logits.device.type, OTHER_STATUS_INTERVAL) == 0:
            raise_on_failure(self.place.status)

    def codes(self) -> Tensor:
        """int64 [B, K, T] of the finished window."""
        assert self.pattern is not None and self.done
        return self.pattern.revert(self.sequence)
