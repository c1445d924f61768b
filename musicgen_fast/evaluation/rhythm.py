"""Rhythm of a waveform: onset envelope, tempo, density of onsets, evidence of drums. No training, no labels.

Takes [n] or [C, n] at a sample rate. All figures are independent of loudness. The envelope is half-wave rectified
spectral flux of compressed mel bands, 100 frames a second. Tempo joins two views of it: the autocorrelation, which also
answers at multiples of the beat's period, and the spectrum, which also answers at multiples of its frequency; their
product is large only where both see a pulse (Peeters 2007).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .spectra import decibels, frequencies, levelled, mel_filters, mono, spectrogram

FRAMES_PER_SECOND = 100
_WINDOW_SECONDS = 0.032
_BANDS = 32
_COMPRESSION = 30.0  # log(1 + c x): partials 30 dB below the clip's level still count
_LEVELS = (
    (1.0, 1.0),
    (2.0, 0.5),
    (4.0, 0.25),
)  # (multiple of the beat's frequency, weight): beats, eighths, sixteenths
_BPM_RANGE = (55.0, 215.0)
_BPM_CENTRE, _BPM_OCTAVES = 120.0, 1.0  # where and how widely listeners tap: the choice between octaves
KICK_HZ, MID_HZ, NOISE_HZ = (30.0, 120.0), (800.0, 2400.0), (4500.0, 8000.0)
_MAX_BURST = 60.0  # dB; what lies deeper is rounding


@dataclass(frozen=True)
class Tempo:
    """`bpm`: beats a minute. `scores`: pulse strength, 0..1.75, per candidate, in their order. `choice`: the
    index of the best candidate, None where none were given."""

    bpm: float
    scores: tuple[float, ...] = ()
    choice: int | None = None


@dataclass(frozen=True)
class Drums:
    """Evidence of drums in three bands: kick 30..120 Hz, mid 0.8..2.4 kHz, noise 4.5..8 kHz (less where the rate ends).

    Attributes:
        kick_level, mid_level, noise_level: dB re the clip's RMS, level that the loudest 5 % of the frames exceed.
        kick_burst, mid_burst, noise_burst: dB, 0 to 60, from the quietest 30 % of the frames to that level; none for a
            drone.
        mid_flatness, noise_flatness: 0 (tonal) .. 1 (noise), geometric over arithmetic mean power of the band in those
            loud frames.
        present: the untrained verdict: noise that is loud, flat and comes in bursts (cymbals, snares; no lone kick).
    """

    kick_level: float
    kick_burst: float
    mid_level: float
    mid_burst: float
    mid_flatness: float
    noise_level: float
    noise_burst: float
    noise_flatness: float

    @property
    def present(self) -> bool:
        """The verdict from the noise band alone: loud (above -50 dB), in bursts (6 dB) and flat (0.3)."""
        return self.noise_level > -50 and self.noise_burst > 6 and self.noise_flatness > 0.3


def onset_envelope(wav: Any, sample_rate: int, low: float = 30.0, high: float = 8000.0) -> Tensor:
    """Float64 [M]: spectral flux, mean over 32 mel bands from `low` to `high` Hz, one value each 10 ms, never negative.

    Of wav [n] or [C, n] at `sample_rate` Hz. Frame m is the rise from 20 ms before to m x 10 ms (unit: nepers of the
    compressed magnitude). Exact multiples of 10 ms need a sample rate that 100 divides; see `envelope_rate`.
    """
    return onset_envelopes(wav, sample_rate, [(low, high)])[0]


def onset_envelopes(wav: Any, sample_rate: int, ranges: Sequence[tuple[float, float]]) -> list[Tensor]:
    """`onset_envelope` in several ranges (low, high) of Hz, from one spectrogram."""
    n_fft = _n_fft(sample_rate)
    magnitude = spectrogram(levelled(mono(wav, sample_rate)), n_fft, _hop(sample_rate))
    envelopes = []
    for low, high in ranges:
        bands = torch.log1p(_COMPRESSION * (mel_filters(n_fft, sample_rate, _BANDS, low, high) @ magnitude)).double()
        flux = (bands[:, 2:] - bands[:, :-2]).clamp(min=0).mean(0)
        envelopes.append(torch.nn.functional.pad(flux, (2, 0)))
    return envelopes


def envelope_rate(sample_rate: int) -> float:
    """Frames a second of `onset_envelope`, exactly."""
    return sample_rate / _hop(sample_rate)


def tempo(wav: Any, sample_rate: int, candidates: Sequence[float] = ()) -> Tempo:
    """The tempo of wav [n] or [C, n] at `sample_rate` Hz, at least 2 s; tempi within 1 % of a candidate are its own.

    Octaves: a candidate is scored by the pulses at its beat, eighths and sixteenths together, so a pattern of eighths
    alone still finds its beat among candidates that are no octaves of each other. The free estimate of `bpm`, 55..215,
    prefers the octave near 120 and is as ambiguous as listeners are.
    """
    envelope = onset_envelope(mono(wav, sample_rate, 2.0), sample_rate)
    pulse = Pulse(envelope, envelope_rate(sample_rate))
    scores = tuple(pulse.score(bpm) for bpm in candidates)
    low, high = _BPM_RANGE
    grid = [low * (high / low) ** (i / 400) for i in range(401)]  # steps of 0.34 %
    preferred = [pulse.score(bpm) * _preference(bpm) for bpm in grid]
    best = max(range(len(grid)), key=preferred.__getitem__)
    choice = max(range(len(scores)), key=scores.__getitem__) if scores else None
    return Tempo(pulse.refined(grid[best]), scores, choice)


def onsets(wav: Any, sample_rate: int) -> Tensor:
    """Float64 [number] seconds of the onsets, in any band, of wav [n] or [C, n] at `sample_rate` Hz."""
    return onset_times(onset_envelope(wav, sample_rate), envelope_rate(sample_rate))


def onset_times(envelope: Tensor, rate: float) -> Tensor:
    """Float64 [number] seconds: peaks within 50 ms of an envelope [M] at `rate` that stand out of their second."""
    peak = torch.nn.functional.max_pool1d(envelope[None, None], 11, 1, 5)[0, 0]
    around = torch.nn.functional.avg_pool1d(envelope[None, None], 101, 1, 50, count_include_pad=False)[0, 0]
    strong = 0.2 * float(envelope.quantile(0.99))
    taken = (envelope == peak) & (envelope > 1.2 * around + strong) & (envelope > 0.02)
    return taken.nonzero()[:, 0].double() / rate


def density(wav: Any, sample_rate: int) -> float:
    """Onsets a second of wav [n] or [C, n] at `sample_rate` Hz."""
    return len(onsets(wav, sample_rate)) / (len(mono(wav, sample_rate)) / sample_rate)


def drums(wav: Any, sample_rate: int) -> Drums:
    """Evidence of drums in wav [n] or [C, n] at `sample_rate` Hz; ValueError below 10 kHz: no noise band."""
    if sample_rate < 10000:
        raise ValueError(f"drum evidence needs a sample rate of at least 10000 Hz, got {sample_rate}")
    n_fft = _n_fft(sample_rate)
    power = spectrogram(levelled(mono(wav, sample_rate)), n_fft, _hop(sample_rate)).double().square()
    hertz = frequencies(n_fft, sample_rate)
    kick, mid, noise = (_bursts(power[(hertz >= f[0]) & (hertz <= f[1])]) for f in (KICK_HZ, MID_HZ, NOISE_HZ))
    return Drums(*kick[:2], *mid, *noise)


def _bursts(power: Tensor) -> tuple[float, float, float]:
    """(level dB, burst dB, flatness of the loud frames) of a band's power [bins, frames]."""
    level = decibels(power.sum(0) * 4 / 3)  # a sine of power 1 spreads 3 / 4 over the bins of a Hann window
    high, low = float(level.quantile(0.95)), float(level.quantile(0.30))
    loud = power[:, level >= high].clamp(min=1e-12)
    flatness = float((loud.log().mean(0).exp() / loud.mean(0)).mean())
    heard = high > -70  # below, side lobes and rounding are all there is, and they are flat
    return high, min(high - low, _MAX_BURST), flatness if heard else 0.0


def _n_fft(sample_rate: int) -> int:
    return 2 * round(_WINDOW_SECONDS * sample_rate / 2)


def _hop(sample_rate: int) -> int:
    return round(sample_rate / FRAMES_PER_SECOND)


def _preference(bpm: float) -> float:
    return math.exp(-0.5 * (math.log2(bpm / _BPM_CENTRE) / _BPM_OCTAVES) ** 2)


class Pulse:
    """Strength of periodic pulses in an envelope [M], at least 2 s, at `rate` frames a second."""

    def __init__(self, envelope: Tensor, rate: float):
        centred = envelope - envelope.mean()
        n = len(centred)
        self.rate = rate
        padded = 16 * n  # zero padding: the spectrum is read between its bins
        spectrum = torch.fft.rfft(centred * torch.hann_window(n, periodic=False, dtype=torch.float64), padded).abs()
        self.bins_per_hertz = padded / rate
        energy = float(centred.square().sum())
        self.spectrum = spectrum / math.sqrt(max(energy, 1e-12) * n / 8)  # a sinusoid: 1
        correlation = torch.fft.irfft(torch.fft.rfft(centred, 2 * n).abs().square())[:n]
        overlap = torch.arange(n, 0, -1, dtype=torch.float64) / n
        self.correlation = correlation / max(energy, 1e-12) / overlap.clamp(min=0.25)

    def at(self, hertz: float) -> float:
        """Product of both views at one frequency: 0 where either sees nothing."""
        lag = self.rate / hertz
        first, last = int(0.99 * hertz * self.bins_per_hertz), int(1.01 * hertz * self.bins_per_hertz) + 2
        if lag + 3 > len(self.correlation) or last > len(self.spectrum):
            return 0.0
        return max(self._correlation(lag), 0.0) * float(self.spectrum[first:last].max())

    def _correlation(self, lag: float) -> float:
        """Best value within a frame of `lag`: onsets are quantised to frames."""
        around = [lag - 1, lag - 0.5, lag, lag + 0.5, lag + 1]
        return max(self._interpolated(x) for x in around)

    def _interpolated(self, lag: float) -> float:
        i = int(lag)
        return float(self.correlation[i] + (lag - i) * (self.correlation[i + 1] - self.correlation[i]))

    def score(self, bpm: float) -> float:
        """0..1.75: pulses at the beat, its eighths and its sixteenths."""
        return sum(weight * self.at(multiple * bpm / 60) for multiple, weight in _LEVELS)

    def refined(self, bpm: float) -> float:
        """The nearest maximum of the spectrum within 2 %, at the level that is strongest."""
        multiple = max((m for m, _ in _LEVELS), key=lambda m: self.at(m * bpm / 60))
        centre = multiple * bpm / 60 * self.bins_per_hertz
        first, last = int(0.98 * centre), min(int(1.02 * centre) + 2, len(self.spectrum))
        best = first + int(self.spectrum[first:last].argmax())
        return 60 * best / self.bins_per_hertz / multiple
