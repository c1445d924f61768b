"""A clip as a list of named numbers: what rhythm, tonality, spectrum and level say about it, for small classifiers.

Takes [n] or [C, n] at a sample rate of 10 kHz or more, at least 2 s. Knows nothing of labels; `ATTRIBUTE_FEATURES` only
says which numbers an attribute of that name is usually read from. Every number is finite, for silence too, and all but
those of loudness stay the same when the clip gets louder. Centroid, rolloff and flatness go back to Tzanetakis and
Cook 2002.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..loudness import loudness
from .rhythm import KICK_HZ, MID_HZ, NOISE_HZ, Pulse, drums, envelope_rate, onset_envelopes, onset_times
from .spectra import FLOOR_DB, decibels, frequencies, levelled, mel_filters, mono, rms, spectrogram
from .tonality import chroma, key_correlations

TEMPO_CANDIDATES = (75.0, 125.0, 187.5)  # BPM; no two are octaves of each other
SHAPE_BANDS = 12
_HIGH_HZ = 2000.0
# Where onsets are counted, Hz: everywhere, between kick and cymbals, and in bands that lead or drums dominate.
_RANGES = {"all": (30.0, 8000.0), "note": (150.0, 3500.0), "lead": (500.0, 2200.0)}
_RANGES |= {"kick": KICK_HZ, "mid": MID_HZ, "noise": NOISE_HZ}
_MULTIPLES = {"half": 0.5, "quarter": 1.0, "eighth": 2.0, "sixteenth": 4.0}  # of the beat's frequency
_EVIDENCE = tuple(f"{band}_{part}" for band in ("kick", "mid", "noise") for part in ("level", "burst"))
_EVIDENCE = (*_EVIDENCE, "mid_flatness", "noise_flatness")
_COUNTS = tuple(f"{band}_{part}" for band in _RANGES for part in ("rate", "beat", *_MULTIPLES))
_TOP_HZ = 8000.0  # spectra are read up to here, so that a clip at 32 kHz measures like the same one at 16 kHz

ATTRIBUTE_FEATURES: dict[str, tuple[str, ...]] = {
    "tempo": tuple(f"pulse_{i}" for i in range(len(TEMPO_CANDIDATES))),
    "mode": (
        *("key_margin", "major_correlation", "third_balance", "sixth_balance", "seventh_balance"),
        *(f"chroma_{i}" for i in range(12)),  # tells much where all music has one tonic, nothing where it varies
    ),
    "drums": (*_EVIDENCE, *_COUNTS, "flux_mean"),
    "brightness": ("centroid", "high_ratio", "rolloff"),
    "density": (*_COUNTS, *_EVIDENCE, "flux_mean"),
    "loudness": ("rms_db", "lufs"),
    "instrument": (
        *(f"shape_{i}" for i in range(SHAPE_BANDS)),
        *(f"motion_{i}" for i in range(SHAPE_BANDS)),
        "centroid",
        "flatness",
        "flux_mean",
        "flux_peak",
    ),
}


def brightness(wav: Any, sample_rate: int) -> dict[str, float]:
    """Where the energy of wav [n] or [C, n] at `sample_rate` Hz lies, below 8 kHz.

    Returns:
        centroid: octaves above 1 kHz of the power-weighted mean frequency, power compressed to magnitude.
        high_ratio: dB, power above 2 kHz over all power.
        rolloff: octaves above 1 kHz of the frequency below which 85 % of the magnitude lies.
        flatness: dB, geometric over arithmetic mean of the power between 100 Hz and 8 kHz (0: white).
    """
    power, hertz = _mean_power(levelled(mono(wav, sample_rate)), sample_rate)
    magnitude = power.sqrt()
    total = float(magnitude.sum())
    if total < 1e-9:
        return {"centroid": 0.0, "high_ratio": FLOOR_DB, "rolloff": 0.0, "flatness": FLOOR_DB}
    centroid = float((magnitude * hertz).sum()) / total
    rolloff = float(hertz[int((magnitude.cumsum(0) < 0.85 * total).sum())])
    audible = power[hertz >= 100].clamp(min=1e-12)
    return {
        "centroid": math.log2(max(centroid, 50.0) / 1000),
        "high_ratio": float(decibels(power[hertz >= _HIGH_HZ].sum() / power.sum())),
        "rolloff": math.log2(max(rolloff, 50.0) / 1000),
        "flatness": float(decibels(audible.log().mean().exp() / audible.mean())),
    }


def level(wav: Any, sample_rate: int) -> dict[str, float]:
    """Of wav [n] or [C, n] at `sample_rate` Hz, `rms_db`: dB re full scale (a full-scale sine: -3.01); `lufs`: loudness
    of ITU-R BS.1770. Both at least -100."""
    signal = mono(wav, sample_rate)
    measured = loudness(signal, sample_rate)
    return {"rms_db": float(decibels(rms(signal) ** 2)), "lufs": max(measured, FLOOR_DB)}


def spectral_shape(wav: Any, sample_rate: int) -> dict[str, float]:
    """`shape_0..11`: dB of 12 mel bands (80 Hz .. 8 kHz) about their own mean, averaged over time; `motion_0..11`:
    their standard deviations over time, dB. Of wav [n] or [C, n] at `sample_rate` Hz."""
    signal = levelled(mono(wav, sample_rate))
    n_fft = _n_fft(sample_rate)
    filters = mel_filters(n_fft, sample_rate, SHAPE_BANDS, 80.0, _TOP_HZ)
    bands = decibels(filters @ spectrogram(signal, n_fft, n_fft // 2).square()).clamp(min=-80)
    shape = bands.mean(1) - bands.mean()
    motion = bands.std(1, correction=0)
    numbers = {f"shape_{i}": float(shape[i]) for i in range(SHAPE_BANDS)}
    return {**numbers, **{f"motion_{i}": float(motion[i]) for i in range(SHAPE_BANDS)}}


def clip_features(wav: Any, sample_rate: int, candidates: Sequence[float] = TEMPO_CANDIDATES) -> dict[str, float]:
    """Every number that `ATTRIBUTE_FEATURES` names, of one clip: wav [n] or [C, n] at `sample_rate` Hz.

    Args:
        candidates: tempi in BPM; `pulse_i` is the log of the share that candidate i has of all pulse strength.

    Raises:
        ValueError: less than 2 s, below 10 kHz, samples that are not finite.
    """
    signal = mono(wav, sample_rate, 2.0)
    evidence = drums(signal, sample_rate)
    return {
        **_rhythm(signal, sample_rate, candidates),
        **_mode(chroma(signal, sample_rate)),
        **{name: getattr(evidence, name) for name in _EVIDENCE},
        **brightness(signal, sample_rate),
        **level(signal, sample_rate),
        **spectral_shape(signal, sample_rate),
    }


def _rhythm(signal: Tensor, sample_rate: int, candidates: Sequence[float]) -> dict[str, float]:
    """Tempo, and what happens how often in each band.

    Logs: `<band>_rate`, base 2, of onsets a second; `<band>_beat` the same a beat of the best candidate; `<band>_half`
    .. `_sixteenth` natural, of the pulse's strength (0..1, from 1e-3) at so many times that beat's frequency.
    """
    if len(candidates) < 2:
        raise ValueError(f"the tempo features compare at least two candidates, got {list(candidates)}")
    rate, seconds = envelope_rate(sample_rate), len(signal) / sample_rate
    envelopes = dict(zip(_RANGES, onset_envelopes(signal, sample_rate, list(_RANGES.values())), strict=True))
    pulse = Pulse(envelopes["all"], rate)
    scores = [pulse.score(bpm) + 1e-3 for bpm in candidates]
    beat = candidates[max(range(len(scores)), key=scores.__getitem__)] / 60
    numbers = {f"pulse_{i}": math.log(score / sum(scores)) for i, score in enumerate(scores)}
    for band, envelope in envelopes.items():
        numbers[f"{band}_rate"] = math.log2((len(onset_times(envelope, rate)) + 0.5) / seconds)
        numbers[f"{band}_beat"] = numbers[f"{band}_rate"] - math.log2(beat)
        here = Pulse(envelope, rate)
        numbers |= {f"{band}_{name}": math.log(here.at(times * beat) + 1e-3) for name, times in _MULTIPLES.items()}
    return numbers | {
        "flux_mean": float(envelopes["all"].mean()),
        "flux_peak": float(envelopes["all"].quantile(0.98)),
    }


def _mode(chroma_vector: Tensor) -> dict[str, float]:
    """The balance of the degrees in which major and minor differ, over the tonic that fits best in either mode."""
    correlations = key_correlations(chroma_vector)
    tonic = int(correlations.amax(0).argmax())
    degrees = chroma_vector.roll(-tonic)

    def balance(major: int, minor: int) -> float:
        return float((degrees[major] - degrees[minor]) / (degrees[major] + degrees[minor]).clamp(min=1e-6))

    best = correlations.amax(1)
    return {
        "key_margin": float(best[0] - best[1]),
        "major_correlation": float(best[0]),
        "third_balance": balance(4, 3),
        "sixth_balance": balance(9, 8),
        "seventh_balance": balance(11, 10),
        **{f"chroma_{i}": float(chroma_vector[i]) for i in range(12)},
    }


def _n_fft(sample_rate: int) -> int:
    """About 64 ms, a power of two: 1024 at 16 kHz."""
    return 1 << round(math.log2(0.064 * sample_rate))


def _mean_power(signal: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
    """(float64 power [bins], Hz [bins]) averaged over time, up to 8 kHz."""
    n_fft = _n_fft(sample_rate)
    hertz = frequencies(n_fft, sample_rate).double()
    inside = hertz <= _TOP_HZ
    power = spectrogram(signal, n_fft, n_fft // 2).double().square().mean(1)
    return power[inside], hertz[inside]
