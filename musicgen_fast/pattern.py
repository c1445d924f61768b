"""Codebook patterns: which frame of which codebook stands in which step of the sequence.

Every pattern is one integer table [S, K]: `table[s, k]` is the frame that cell (step s, codebook k) holds, or -1 where
the cell holds the special token. Everything else (building a sequence, reading it back, where a prompt ends) is
indexing with that table, so no other file knows the name of a pattern. Steps count from 0; step 0 holds no frame.

The layouts are those of audiocraft's `codebooks_patterns` providers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .config import PatternConfig

UNKNOWN = -1  # a cell of a sequence, or of codes, that is still to be generated


@dataclass(frozen=True, eq=False)
class Pattern:
    """A pattern for a fixed number of frames.

    Attributes:
        table: int32 array [S, K], frame of each cell or -1.
        num_frames: T.
    """

    table: np.ndarray
    num_frames: int

    @property
    def num_steps(self) -> int:
        """S, the special first step included: a generation runs S - `first_step` forward passes."""
        return len(self.table)

    def first_step(self, frame: int) -> int:
        """The first step that holds `frame` for any codebook: where generation after a prompt that long starts.

        ValueError for a frame outside of 0..T-1.
        """
        if not 0 <= frame < self.num_frames:
            raise ValueError(f"frame {frame} is outside of the {self.num_frames} frames of this pattern")
        return int(np.flatnonzero((self.table == frame).any(axis=1))[0])

    def build(self, codes: Tensor, special_token: int) -> Tensor:
        """codes [B, K, T] (`UNKNOWN` where not generated yet) -> sequence [B, K, S], `special_token` in the gaps."""
        batch, num_codebooks, num_frames = codes.shape
        assert num_frames == self.num_frames and num_codebooks == self.table.shape[1]
        frames = torch.from_numpy(self.table.T.astype(np.int64)).to(codes.device)  # [K, S]
        taken = codes.gather(2, frames.clamp(min=0).expand(batch, -1, -1))
        return torch.where(frames >= 0, taken, special_token)

    def revert(self, sequence: Tensor) -> Tensor:
        """Sequence [B, K, S] -> codes [B, K, T]; the inverse of `build`."""
        return sequence.gather(2, self._steps().to(sequence.device).expand(sequence.shape[0], -1, -1))

    def _steps(self) -> Tensor:
        """int64 [K, T]: the step of each (codebook, frame)."""
        steps = np.full((self.table.shape[1], self.num_frames), -1, dtype=np.int64)
        s, k = np.nonzero(self.table >= 0)
        steps[k, self.table[s, k]] = s
        assert (steps >= 0).all(), "the pattern leaves frames out"
        return torch.from_numpy(steps)


@lru_cache(maxsize=128)
def build_pattern(config: PatternConfig, num_codebooks: int, num_frames: int) -> Pattern:
    """The pattern of `config` for K = `num_codebooks` and T = `num_frames`.

    Raises:
        ValueError: an unknown kind, or options that do not fit K.
    """
    if config.kind not in _LAYOUTS:
        raise ValueError(f"unknown codebook pattern {config.kind!r}: expected one of {', '.join(sorted(_LAYOUTS))}")
    table = _LAYOUTS[config.kind](config, num_codebooks, num_frames)
    table = np.where(table < num_frames, table, -1).astype(np.int32)  # delays run past the last frame: masked cells
    table.setflags(write=False)
    return Pattern(table, num_frames)


def columns_per_frame(config: PatternConfig, num_codebooks: int) -> int:
    """Steps that a frame of `num_codebooks` tokens takes in the pattern of `config`.

    They number the columns of a generation over its windows (spec/sampling `step`).
    """
    if config.kind == "unroll":
        return max(config.flattening, default=num_codebooks - 1) + 1
    return {"musiclm": num_codebooks, "coarse_first": 2}.get(config.kind, 1)


def _checked_delays(config: PatternConfig, count: int, default: tuple[int, ...]) -> tuple[int, ...]:
    delays = config.delays or default
    if len(delays) != count or list(delays) != sorted(delays) or delays[0] < 0:
        raise ValueError(f"{config.kind} pattern: needs {count} ascending delays >= 0, got {list(delays)}")
    return delays


def _rows(rows: list[dict[int, int]], num_codebooks: int) -> np.ndarray:
    """A list of {codebook: frame}, one per step, as a table."""
    table = np.full((len(rows), num_codebooks), -1, dtype=np.int64)
    for s, cells in enumerate(rows):
        for k, t in cells.items():
            table[s, k] = t
    return table


def _delay_block(delays: tuple[int, ...], num_frames: int, first: int = 0) -> np.ndarray:
    """Steps first..T+max(delays)-1, codebook k `delays[k]` frames behind; frames before `first` are masked."""
    t = np.arange(first, num_frames + delays[-1])[:, None] - np.asarray(delays)[None, :]
    return np.where(t >= first, t, -1)


def _delay(config: PatternConfig, num_codebooks: int, num_frames: int) -> np.ndarray:
    parallel = config.kind == "parallel"
    default = (0,) * num_codebooks if parallel else tuple(range(num_codebooks))
    delays = default if parallel else _checked_delays(config, num_codebooks, default)
    if config.empty_initial < 0:
        raise ValueError("a pattern without its first special step (empty_initial < 0) cannot generate from nothing")
    flat = 0 if parallel else config.flatten_first
    empty = _rows([{}] * (1 + config.empty_initial), num_codebooks)
    flattened = _rows([{k: t} for t in range(min(num_frames, flat)) for k in range(num_codebooks)], num_codebooks)
    return np.concatenate([empty, flattened, _delay_block(delays, num_frames, flat)])


def _unroll(config: PatternConfig, num_codebooks: int, num_frames: int) -> np.ndarray:
    """Several inner steps per frame; codebooks with the same inner step share it. Sorted by the time of emission."""
    inner = config.flattening or tuple(range(num_codebooks))
    if len(inner) != num_codebooks or list(inner) != sorted(inner) or inner[0] < 0:
        raise ValueError(f"unroll pattern: flattening needs {num_codebooks} ascending steps, got {list(inner)}")
    delays = _checked_delays(config, num_codebooks, (0,) * num_codebooks)
    groups = {step: [k for k in range(num_codebooks) if inner[k] == step] for step in range(inner[-1] + 1)}
    if any(len({delays[k] for k in ks}) > 1 for ks in groups.values()):
        raise ValueError("unroll pattern: codebooks of the same inner step must share their delay")
    end = num_frames + delays[-1]
    emitted: list[tuple[int, list[tuple[int, int]]]] = [(-1, [])]
    for t in range(end):
        for ks in groups.values():
            time = t + delays[ks[0]] if ks else t
            if time < end:
                emitted.append((time, [(t, k) for k in ks]))
    return _rows([{k: t for t, k in cells} for _, cells in sorted(emitted)], num_codebooks)


def _coarse_first(config: PatternConfig, num_codebooks: int, num_frames: int) -> np.ndarray:
    """All of codebook 0, then the others (by default side by side)."""
    if num_codebooks < 2:
        raise ValueError("coarse_first pattern: needs at least 2 codebooks")
    delays = _checked_delays(config, num_codebooks - 1, (0,) * (num_codebooks - 1))
    coarse = _rows([{}] + [{0: t} for t in range(num_frames)], num_codebooks)
    fine = _delay_block(delays, num_frames)
    return np.concatenate([coarse, np.pad(fine, ((0, 0), (1, 0)), constant_values=-1)])


def _musiclm(config: PatternConfig, num_codebooks: int, num_frames: int) -> np.ndarray:
    """Groups of codebooks one after the other, each group fully flattened."""
    group = config.group_by
    if group < 1 or num_codebooks % group:
        raise ValueError(f"musiclm pattern: group_by {group} does not divide the {num_codebooks} codebooks")
    starts = range(0, num_codebooks, group)
    cells = [{k: t} for first in starts for t in range(num_frames) for k in range(first, first + group)]
    return _rows([{}, *cells], num_codebooks)


_LAYOUTS = {
    "delay": _delay,
    "parallel": _delay,
    "unroll": _unroll,
    "coarse_first": _coarse_first,
    "musiclm": _musiclm,
}
