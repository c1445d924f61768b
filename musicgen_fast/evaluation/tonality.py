"""Tonality of a waveform: a chroma vector from spectral peaks, and the key that fits it. No training, no labels.

Takes [n] or [C, n] at a sample rate, whole clips: no chords over time. Pitch classes count from C = 0 in equal
temperament at A4 = 440 Hz. Profiles of the keys: Krumhansl and Kessler 1982.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .spectra import levelled, mono, spectrogram

PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
MODES = ("major", "minor")
# Probe-tone ratings of Krumhansl and Kessler (1982), tonic first.
_PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
_RANGE_HZ = (60.0, 1400.0)  # above, third and fifth partials of the chords blur the thirds
_WINDOW_SECONDS = 0.256
_PEAK_FLOOR = 10 ** (-40 / 20)  # peaks more than 40 dB below their frame's largest are side lobes and noise


@dataclass(frozen=True)
class Key:
    """The best of the 24 keys.

    Attributes:
        tonic: 0..11, see `PITCH_CLASSES`.
        mode: 'major' or 'minor'.
        correlation: -1..1, of the chroma with the key's profile; 0 for silence.
        margin: best major minus best minor correlation: its sign is the mode, its size how sure that is.
    """

    tonic: int
    mode: str
    correlation: float
    margin: float

    @property
    def name(self) -> str:
        """Such as 'A minor'."""
        return f"{PITCH_CLASSES[self.tonic]} {self.mode}"


def chroma(wav: Any, sample_rate: int) -> Tensor:
    """Float64 [12], sum 1: spectral peaks between 60 and 1400 Hz, by the root of their magnitude; zeros for silence.

    Of wav [n] or [C, n] at `sample_rate` Hz. A peak between two semitones is shared between them in proportion.
    """
    signal = levelled(mono(wav, sample_rate))
    n_fft = 1 << round(math.log2(_WINDOW_SECONDS * sample_rate))
    magnitude = spectrogram(signal, n_fft, n_fft // 2).double()
    left, middle, right = magnitude[:-2], magnitude[1:-1], magnitude[2:]
    floor = torch.maximum(magnitude.amax(0) * _PEAK_FLOOR, torch.tensor(1e-6, dtype=torch.float64))
    peaks = (middle > left) & (middle >= right) & (middle > floor)
    bins, frames = peaks.nonzero(as_tuple=True)
    low, mid, high = (part[bins, frames].clamp(min=1e-12).log() for part in (left, middle, right))
    offset = 0.5 * (low - high) / (low - 2 * mid + high).clamp(max=-1e-9)  # vertex of a parabola through the logs
    hertz = (bins + 1 + offset) * sample_rate / n_fft
    inside = (hertz >= _RANGE_HZ[0]) & (hertz <= _RANGE_HZ[1])
    pitch = 69 + 12 * (hertz[inside] / 440).log2()
    weight = middle[bins, frames][inside].sqrt()
    lower = pitch.floor()
    share = pitch - lower
    total = torch.zeros(12, dtype=torch.float64)
    total.index_add_(0, lower.long() % 12, weight * (1 - share))
    total.index_add_(0, (lower.long() + 1) % 12, weight * share)
    return total / total.sum().clamp(min=1e-12)


def key_correlations(chroma_vector: Tensor) -> Tensor:
    """Pearson correlations [2, 12] of chroma [12] with the profiles: (major, minor) x tonic; zeros if it is flat."""
    centred = chroma_vector.double() - chroma_vector.double().mean()
    rows = []
    for mode in MODES:
        profile = torch.tensor(_PROFILES[mode], dtype=torch.float64)
        profile = profile - profile.mean()
        turned = torch.stack([profile.roll(tonic) for tonic in range(12)])
        rows.append(turned @ centred / (profile.norm() * centred.norm()).clamp(min=1e-9))
    return torch.stack(rows)


def key(wav: Any, sample_rate: int) -> Key:
    """The key of wav [n] or [C, n] at `sample_rate` Hz by its chroma (Krumhansl-Schmuckler)."""
    return key_of_chroma(chroma(wav, sample_rate))


def key_of_chroma(chroma_vector: Tensor) -> Key:
    """The key of chroma [12]."""
    correlations = key_correlations(chroma_vector)
    mode, tonic = divmod(int(correlations.argmax()), 12)
    best = correlations.amax(1)
    return Key(tonic, MODES[mode], float(correlations.max()), float(best[0] - best[1]))
