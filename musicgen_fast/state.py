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
from .sampling import SamplingParams, raise_on_failure, sample_seeded, sample_with_noise


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
class Sampler:
    """How the tokens of a column are drawn, for all B requests.

    Without `seeds` this is noise mode: `exponential_` from the global generator of the logits' device at every column,
    all K codebooks: the random numbers of audiocraft and transformers, in their order. With `seeds`
    the noise is counted by (seed, column of the whole generation, codebook, token).
    """

    params: SamplingParams
    seeds: Tensor | None = None  # int64 [B]
    all_greedy: bool = False

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """logits [NB, B, K, V], step = column of the whole generation -> tokens int64 [B, K]."""
        if self.seeds is not None:
            tokens, status = sample_seeded(logits, self.params, self.seeds, torch.full_like(self.seeds, step))
        else:
            noise = None if self.all_greedy else self._fill(logits)
            tokens, status = sample_with_noise(logits, self.params, noise)
        raise_on_failure(status)
        return tokens

    def _fill(self, logits: Tensor) -> Tensor:
        _, batch, num_codebooks, vocab = logits.shape
        # softmax runs in fp32 in both references, so the noise is fp32 whatever the logits are
        noise = torch.empty(batch * num_codebooks, vocab, device=logits.device)
        return noise.exponential_(1)


@dataclass
class State:
    """The working set of a decoder.

    Attributes:
        kv: [L, 2, R, H, C, d/H] keys and values; row r holds `lengths[r]` positions.
        cross_kv: per layer keys and values [2, Rc, H, N, d/H] of the first Rc rows (the others attend to nothing).
        cross_mask: bool [Rc, 1, 1, N] where the texts differ in length, else None.
        absorbed: per layer two [Rc, H*N, d] in the place of the projections around `cross_kv`; empty: not worth it.
        sequence: int64 [B, K, S], `UNKNOWN` where nothing is written yet.
        column: the next step of the sequence to be written.
        step_offset: columns of the whole generation before this window; only feeds the sampler's counter.
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
    sequence: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    known: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    column: int = 0
    step_offset: int = 0

    @property
    def capacity(self) -> int:
        return self.kv.shape[4]

    @property
    def done(self) -> bool:
        return self.pattern is None or self.column >= self.pattern.num_steps

    def start_window(self, pattern: Pattern, codes: Tensor, prompt: int, step_offset: int) -> None:
        """Begin a window: codes [B, K, T], the first `prompt` frames known and the rest `UNKNOWN`."""
        special = self.config.special_token
        self.pattern = pattern
        self.sequence = pattern.build(codes, special)
        self.known = (self.sequence != UNKNOWN).all(0)  # [K, S]: the same for every request
        self.column = pattern.first_step(prompt)
        self.step_offset = step_offset
        self.lengths = [0] * len(self.lengths)
        if not self.known[:, : self.column].all():
            raise ValueError(
                f"the {self.config.pattern.kind} pattern cannot continue a prompt of {prompt} frames: "
                "cells before the prompt's end are not known"
            )

    def fed_tokens(self, first: int) -> Tensor:
        """Tokens [B, K, n] of the columns from `first` up to the one being written."""
        return self.sequence[:, :, first : self.column]

    def write_column(self, logits: Tensor) -> None:
        """Draw the column's tokens from logits [R, K, V]; write the cells that are unknown; advance."""
        tokens = self.sampler(self.conditions.expand_logits(logits), self.step_offset + self.column)
        target = self.sequence[:, :, self.column]
        target.copy_(torch.where(self.known[:, self.column], target, tokens))
        self.column += 1

    def codes(self) -> Tensor:
        """int64 [B, K, T] of the finished window."""
        assert self.pattern is not None and self.done
        return self.pattern.revert(self.sequence)
