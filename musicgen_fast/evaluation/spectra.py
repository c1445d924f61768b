"""What the measuring functions share: checked mono waveforms, magnitude spectrograms, mel filters, decibels.

Takes waveforms [n] or [C, n] (mixed to mono) as torch or numpy, at any sample rate; knows nothing of music.
Spectrograms are float32 [bins, frames], frames centred on multiples of the hop, the ends padded with silence.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MIN_SECONDS = 0.5
MIN_RATE = 4000  # Hz; as in `loudness`
FLOOR_DB = -100.0


def mono(wav: Any, sample_rate: int, min_seconds: float = MIN_SECONDS) -> Tensor:
    """Float32 [n] on the CPU of a waveform [n] or [C, n], torch or numpy.

    Raises:
        ValueError: another shape, a sample that is not finite, fewer than `min_seconds`, a rate below 4000 Hz.
    """
    signal = torch.as_tensor(wav).detach().cpu()
    if signal.dim() not in (1, 2) or not signal.is_floating_point():
        raise ValueError(f"a waveform must be floats [n] or [C, n], got {signal.dtype} {list(signal.shape)}")
    signal = signal.float()
    if signal.dim() == 2:
        signal = signal.mean(0)
    if sample_rate < MIN_RATE:
        raise ValueError(f"sample_rate must be at least {MIN_RATE} Hz, got {sample_rate}")
    if len(signal) < min_seconds * sample_rate:
        raise ValueError(f"{len(signal) / sample_rate:.3f} s of sound are too few, need {min_seconds} s")
    if not bool(torch.isfinite(signal).all()):
        raise ValueError("the waveform has samples that are not finite")
    return signal


def spectrogram(signal: Tensor, n_fft: int, hop: int) -> Tensor:
    """Magnitudes [n_fft / 2 + 1, frames] of signal [n] under a Hann window; a sine of amplitude a peaks at a / 2."""
    window = torch.hann_window(n_fft)
    frames = torch.stft(signal, n_fft, hop, window=window, center=True, pad_mode="constant", return_complex=True)
    return frames.abs() / window.sum()


def frequencies(n_fft: int, sample_rate: int) -> Tensor:
    """Float32 [n_fft / 2 + 1] Hz of the bins."""
    return torch.arange(n_fft // 2 + 1, dtype=torch.float32) * (sample_rate / n_fft)


@lru_cache(maxsize=32)
def mel_filters(n_fft: int, sample_rate: int, bands: int, low: float = 0.0, high: float | None = None) -> Tensor:
    """Triangles [bands, n_fft / 2 + 1] evenly spaced in mel = 2595 log10(1 + Hz / 700), peak 1.

    A triangle narrower than the bins' spacing could fall between two bins: it then takes its nearest bin alone.
    """
    top = sample_rate / 2 if high is None else min(high, sample_rate / 2)
    first, last = (2595 * math.log10(1 + f / 700) for f in (low, top))
    corners = 700 * (10 ** (torch.linspace(first, last, bands + 2, dtype=torch.float64) / 2595) - 1)
    hertz = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * (sample_rate / n_fft)
    left, centre, right = (corners[i : i + bands, None] for i in range(3))
    weights = torch.minimum((hertz - left) / (centre - left), (right - hertz) / (right - centre)).clamp(min=0)
    nearest = (hertz - centre).abs().argmin(1)
    empty = weights.sum(1) == 0
    weights[empty, nearest[empty]] = 1.0
    return weights.float()


def decibels(power: Tensor | float) -> Tensor:
    """10 log10 of a power, at least -100 dB: silence stays finite."""
    return 10 * torch.as_tensor(power, dtype=torch.float64).clamp(min=10 ** (FLOOR_DB / 10)).log10()


def rms(signal: Tensor) -> float:
    """Root mean square, full scale = 1."""
    return math.sqrt(float(signal.double().square().mean()))


def levelled(signal: Tensor) -> Tensor:
    """The signal at RMS 1, so that what is measured on it does not depend on loudness; silence stays silence."""
    level = rms(signal)
    return signal / level if level > 1e-6 else torch.zeros_like(signal)
