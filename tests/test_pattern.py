"""Codebook patterns as tables: audiocraft's layouts cell for cell, and the round trip of codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from musicgen_fast.config import PatternConfig
from musicgen_fast.pattern import UNKNOWN, build_pattern, columns_per_frame

from .oracle import audiocraft_lm as ac

# (our configuration, codebooks, audiocraft's provider and options)
LAYOUTS = [
    (PatternConfig(), 4, "delay", {}),
    (PatternConfig(delays=(0, 0, 1, 1, 2, 2, 3, 3)), 8, "delay", {"delays": ac.STEREO_DELAYS}),
    (PatternConfig(delays=(0, 2, 5)), 3, "delay", {"delays": [0, 2, 5]}),
    (PatternConfig(flatten_first=3), 4, "delay", {"flatten_first": 3}),
    (PatternConfig(empty_initial=2, flatten_first=1), 4, "delay", {"empty_initial": 2, "flatten_first": 1}),
    (PatternConfig(kind="parallel"), 4, "parallel", {}),
    (PatternConfig(kind="unroll"), 4, "unroll", {}),
    (PatternConfig(kind="unroll", flattening=(0, 1, 1)), 3, "unroll", {"flattening": [0, 1, 1]}),
    (PatternConfig(kind="unroll", flattening=(0, 2, 2), delays=(0, 3, 3)), 3, "unroll",
     {"flattening": [0, 2, 2], "delays": [0, 3, 3]}),
    (PatternConfig(kind="coarse_first"), 4, "coarse_first", {}),
    (PatternConfig(kind="coarse_first", delays=(0, 1, 2)), 4, "coarse_first", {"delays": [0, 1, 2]}),
    (PatternConfig(kind="musiclm"), 4, "musiclm", {}),
    (PatternConfig(kind="musiclm", group_by=4), 8, "musiclm", {"group_by": 4}),
]  # fmt: skip


@ac.needs_audiocraft
@pytest.mark.parametrize("frames", [1, 2, 5, 12])
@pytest.mark.parametrize("config,codebooks,provider,options", LAYOUTS)
def test_layout_is_audiocrafts(config, codebooks, provider, options, frames):
    theirs = ac.pattern_provider(provider, codebooks, **options).get_pattern(frames)
    expected = np.full((len(theirs.layout), codebooks), -1)
    for step, cells in enumerate(theirs.layout):
        for t, q in cells:
            if t < frames:
                expected[step, q] = t
    ours = build_pattern(config, codebooks, frames)
    assert np.array_equal(ours.table, expected)
    first = [theirs.get_first_step_with_timesteps(t) for t in range(frames)]
    assert [ours.first_step(t) for t in range(frames)] == first


@pytest.mark.parametrize("config,codebooks", [layout[:2] for layout in LAYOUTS])
def test_codes_come_back(config, codebooks):
    codes = torch.randint(0, 99, (2, codebooks, 11))
    pattern = build_pattern(config, codebooks, 11)
    sequence = pattern.build(codes, 100)
    assert torch.equal(pattern.revert(sequence), codes)
    assert (sequence == 100).sum() == 2 * (pattern.table < 0).sum()
    codes[:, :, 7:] = UNKNOWN
    assert (pattern.build(codes, 100) == UNKNOWN).sum() == 2 * codebooks * 4


@pytest.mark.parametrize(
    "config,codebooks,passes",
    [(PatternConfig(), 4, 13), (PatternConfig(kind="parallel"), 4, 10), (PatternConfig(kind="unroll"), 4, 40),
     (PatternConfig(kind="musiclm"), 4, 40), (PatternConfig(kind="coarse_first"), 4, 20),
     (PatternConfig(flatten_first=2), 4, 19), (PatternConfig(empty_initial=2), 4, 13)],
)  # fmt: skip
def test_number_of_passes(config, codebooks, passes):
    pattern = build_pattern(config, codebooks, 10)
    assert pattern.num_steps - pattern.first_step(0) == passes


def test_columns_per_frame():
    assert columns_per_frame(PatternConfig(), 4) == columns_per_frame(PatternConfig(kind="parallel"), 4) == 1
    assert (
        columns_per_frame(PatternConfig(kind="unroll"), 4) == columns_per_frame(PatternConfig(kind="musiclm"), 4) == 4
    )
    assert columns_per_frame(PatternConfig(kind="unroll", flattening=(0, 1, 1)), 3) == 2


@pytest.mark.parametrize("config,codebooks,message", [
    (PatternConfig(kind="spiral"), 4, "spiral.*coarse_first"),
    (PatternConfig(delays=(0, 1)), 4, "4 ascending delays"),
    (PatternConfig(delays=(3, 2, 1, 0)), 4, "ascending"),
    (PatternConfig(empty_initial=-1), 4, "first special step"),
    (PatternConfig(kind="musiclm", group_by=3), 4, "divide"),
    (PatternConfig(kind="coarse_first"), 1, "at least 2"),
    (PatternConfig(kind="unroll", flattening=(0, 1, 1, 1), delays=(0, 1, 2, 3)), 4, "share their delay"),
])  # fmt: skip
def test_patterns_that_cannot_be(config, codebooks, message):
    with pytest.raises(ValueError, match=message):
        build_pattern(config, codebooks, 10)


def test_frames_outside():
    with pytest.raises(ValueError, match="outside"):
        build_pattern(PatternConfig(), 4, 10).first_step(10)
