"""Does a clip play the notes that its caption spells? Read from the sound alone, without a model.

Clips are float [n] samples at synth.RATE. A note is heard where its frequency is the strongest of the scale's eight, in
the step's 160 ms; a step on which no note begins goes on with the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .synth import FRAME, RATE, SCALES, STEP


def heard(clip: NDArray[np.float32], mode: str) -> list[int]:
    """The strongest note of the mode's scale in each whole step of the clip."""
    length = STEP * FRAME
    steps = np.asarray(clip, np.float64)[: len(clip) // length * length].reshape(-1, length) * np.hanning(length)
    turns = np.outer(np.arange(length) / RATE, [hz for _, hz in SCALES[mode]])
    return np.abs(steps @ np.exp(-2j * np.pi * turns)).argmax(1).tolist()


def sounding(melody: Sequence[int | None]) -> list[int | None]:
    """The note that sounds in each step: the last one that began, None before the first."""
    last: int | None = None
    notes = []
    for note in melody:
        last = last if note is None else note
        notes.append(last)
    return notes


def agreement(clip: NDArray[np.float32], melody: Sequence[int | None], mode: str) -> float:
    """The share of the clip's steps, 0..1, in which the melody's note is heard; ValueError for less than a step."""
    pairs = list(zip(heard(clip, mode), sounding(melody), strict=False))
    if not pairs:
        raise ValueError(f"a clip of {len(clip)} samples has no step of {STEP * FRAME}")
    return sum(a == b for a, b in pairs) / len(pairs)
