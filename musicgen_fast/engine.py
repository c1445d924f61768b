"""The loop: windows, one prefill each, then step after step; tokens in, tokens out.

Knows no device, no text and no audio: it drives a decoder (prefill, step) over a `State`. One cache serves all windows
of a generation; keys and values of the text are projected once, unless the conditions of a window are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .config import ModelConfig
from .pattern import UNKNOWN, build_pattern, columns_per_frame
from .state import Conditions, Sampler, State
from .windows import Window

Progress = Callable[[int, int], None]


class Decoder(Protocol):
    """What the engine needs of `decoders/`."""

    config: ModelConfig

    def allocate(self, rows: int, capacity: int) -> Tensor: ...
    def condition(self, state: State) -> None: ...
    def prefill(self, state: State) -> None: ...
    def step(self, state: State) -> None: ...


def generate(
    decoder: Decoder,
    windows: list[Window],
    prompt: Tensor,
    conditions_of: Callable[[Window], Conditions],
    sampler: Sampler,
    progress: Progress | None = None,
) -> Tensor:
    """Tokens of a whole generation.

    Args:
        windows: from `plan_windows`; the last one ends at T.
        prompt: int64 [B, K, P], P frames that are known already.
        conditions_of: the conditions of a window; the same object where they do not change.
        progress: called after every step with (steps done, steps of all windows). What it raises ends the generation.

    Returns:
        int64 [B, K, T], the prompt included.
    """
    config = decoder.config
    batch, num_codebooks, _ = prompt.shape
    patterns = [build_pattern(config.pattern, num_codebooks, w.length) for w in windows]
    steps = [p.num_steps - p.first_step(w.prompt) for p, w in zip(patterns, windows, strict=True)]
    done, total = 0, sum(steps)
    codes = torch.full((batch, num_codebooks, windows[-1].end), UNKNOWN, dtype=torch.int64, device=prompt.device)
    codes[:, :, : prompt.shape[2]] = prompt
    state: State | None = None
    for window, pattern in zip(windows, patterns, strict=True):
        state = _prepare(decoder, state, conditions_of(window), sampler, max(p.num_steps for p in patterns))
        offset = window.start * columns_per_frame(config.pattern, num_codebooks)
        state.start_window(pattern, codes[:, :, window.start : window.end], window.prompt, offset)
        while not state.done:
            run = decoder.step if state.lengths[0] else decoder.prefill
            run(state)
            done += 1
            if progress is not None:
                progress(done, total)
        codes[:, :, window.start : window.end] = state.codes()
    return codes


def _prepare(decoder: Decoder, state: State | None, conditions: Conditions, sampler: Sampler, num_steps: int) -> State:
    """The state for a window: the last one where it fits, with new conditions where they changed."""
    capacity = max(conditions.prefix_lengths()) + num_steps - 1  # the last column is written, never read
    fits = state is not None and state.capacity >= capacity and len(state.lengths) == conditions.num_rows
    if state is not None and fits and state.conditions is conditions:
        return state
    kv = state.kv if state is not None and fits else decoder.allocate(conditions.num_rows, capacity)
    state = State(decoder.config, kv, [0] * conditions.num_rows, conditions, sampler)
    decoder.condition(state)
    return state
