"""How far a codec's sound is from its original: spectral convergence, log-mel, SI-SNR, codebook use, and a yardstick.

Compares pairs of waveforms of one length, [n] or [C, n] (mixed to mono), sample by sample: a delay counts as error.
Not perceptual metrics. For distances between sets of clips see `frechet`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .likelihood import token_counts
from .spectra import mel_filters, mono, spectrogram

RESOLUTIONS = (128, 256, 512, 1024, 2048)  # n_fft; hop = n_fft / 4
LOG_FLOOR = 1e-3
_MIN_SECONDS = 0.1
_ENERGY_FLOOR = 1e-3  # of `spectral_convergence`: a full-scale sine's magnitude is 0.5


@dataclass(frozen=True)
class CodecFigures:
    """Means over clips.

    Attributes:
        spectral_convergence: ratio, 0 equal, about 1 for silence.
        log_mel: nepers (natural log of magnitude).
        si_snr: dB.
    """

    spectral_convergence: float
    log_mel: float
    si_snr: float


def codec_figures(references: Sequence[Any], estimates: Sequence[Any], sample_rate: int) -> CodecFigures:
    """The three figures of pairs of `references` and `estimates`, [n] or [C, n] at `sample_rate` Hz; means over pairs.

    For each see `spectral_convergence`, `log_mel_distance`, `si_snr`. ValueError for none, for other numbers or
    lengths, and for samples that are not finite.
    """
    if len(references) != len(estimates) or not len(references):
        raise ValueError(f"{len(references)} references for {len(estimates)} estimates")
    pairs = list(zip(references, estimates, strict=True))
    rows = [
        (spectral_convergence(r, e, sample_rate), log_mel_distance(r, e, sample_rate), si_snr(r, e, sample_rate))
        for r, e in pairs
    ]
    return CodecFigures(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))


def spectral_convergence(
    reference: Any,
    estimate: Any,
    sample_rate: int,
    *,
    floor: float = _ENERGY_FLOOR,
    resolutions: Sequence[int] = RESOLUTIONS,
) -> float:
    """Norm of the difference of magnitude spectrograms over the norm of the reference's, mean over resolutions.

    `reference` and `estimate` are [n] or [C, n] at `sample_rate` Hz (Arik et al. 2018).
    `floor`: the reference's norm counts as at least this a frame (a full-scale sine's is 0.6 a frame, as `spectrogram`
    scales it), so that near-silence reads small, where the bare ratio reaches hundreds.
    """
    first, second = _pair(reference, estimate, sample_rate)
    ratios = []
    for n_fft in resolutions:
        wanted, found = (spectrogram(x, n_fft, n_fft // 4).double() for x in (first, second))
        least = floor * wanted.shape[1] ** 0.5
        ratios.append(float((wanted - found).norm()) / max(float(wanted.norm()), least))
    return sum(ratios) / len(ratios)


def log_mel_distance(
    reference: Any,
    estimate: Any,
    sample_rate: int,
    *,
    floor: float = LOG_FLOOR,
    resolutions: Sequence[int] = RESOLUTIONS,
) -> float:
    """Mean absolute difference of natural logs of mel magnitudes, mean over resolutions (FFT sizes in samples).

    `reference` and `estimate` are [n] or [C, n] at `sample_rate` Hz. Near audiocraft's
    `MultiScaleMelSpectrogramLoss`; several resolutions as in Yamamoto et al. 2020.
    n_fft / 8 bands (16 at 128, at most 80) from 0 Hz to half the rate. Magnitudes are those of an FFT whose window has
    unit energy (white noise of RMS r reads r per bin), summed over triangles of peak 1; `floor` is added to none, only
    the smaller is lifted to it.
    """
    first, second = _pair(reference, estimate, sample_rate)
    total = 0.0
    for n_fft in resolutions:
        filters = mel_filters(n_fft, sample_rate, min(max(n_fft // 8, 16), 80)).double()
        scale = n_fft / 2 / (0.375 * n_fft) ** 0.5  # from a window of sum 1 to one of energy 1
        bands = [filters @ spectrogram(x, n_fft, n_fft // 4).double() * scale for x in (first, second)]
        total += float((bands[0].clamp(min=floor).log() - bands[1].clamp(min=floor).log()).abs().mean())
    return total / len(resolutions)


def si_snr(reference: Any, estimate: Any, sample_rate: int) -> float:
    """Scale-invariant signal-to-noise ratio in dB (Le Roux et al. 2019), means removed, within +-100.

    Waveforms [n] or [C, n] at `sample_rate` Hz. The estimate is split into its projection on the reference and the
    rest. A silent reference or estimate reads -100.
    """
    first, second = (x.double() - x.double().mean() for x in _pair(reference, estimate, sample_rate))
    energy = float(first.square().sum())
    if energy < 1e-12 or float(second.square().sum()) < 1e-12:
        return -100.0
    target = first * (float(first @ second) / energy)
    kept, lost = float(target.square().sum()), float((second - target).square().sum())
    return min(max(10 * (math.log10(kept + 1e-300) - math.log10(lost + 1e-300)), -100.0), 100.0)


def codebook_perplexity(tokens: Tensor, vocab: int) -> Tensor:
    """Float64 [K]: exp of the entropy of each codebook's token frequencies in tokens [B, K, T]; 1 (one token) .. V.

    V is `vocab`; ValueError for other shapes and for tokens outside of 0..V-1.
    """
    if tokens.dim() != 3 or tokens.is_floating_point() or tokens.numel() == 0:
        raise ValueError(f"tokens must be integers [B, K, T], at least one, got {tokens.dtype} {list(tokens.shape)}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
        raise ValueError(f"tokens must lie in 0..{vocab - 1}")
    counts = token_counts(tokens, vocab)
    share = counts / counts.sum(1, keepdim=True)
    return torch.special.entr(share).sum(1).exp()


def mu_law(wav: Tensor, bits: int) -> Tensor:
    """`wav` (any shape, clipped to +-1) through a mu-law coder of 2**bits levels, mu = 2**bits - 1.

    The yardstick: what b bits a sample sound like without any codec. Levels are evenly spaced from -1 to 1, ends
    included, in the compressed domain; 8 bits are the usual companding curve with mu = 255 (ITU-T G.711). ValueError
    for `bits` outside of 1..16.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must lie in 1..16, got {bits}")
    mu = float(2**bits - 1)
    signal = wav.clamp(-1, 1).double()
    steepness = torch.tensor(mu, dtype=torch.float64, device=wav.device).log1p()
    compressed = signal.sign() * (mu * signal.abs()).log1p() / steepness
    level = ((compressed + 1) / 2 * mu).round() / mu * 2 - 1
    return (level.sign() * (level.abs() * steepness).expm1() / mu).to(wav.dtype)


def _pair(reference: Any, estimate: Any, sample_rate: int) -> tuple[Tensor, Tensor]:
    first, second = mono(reference, sample_rate, _MIN_SECONDS), mono(estimate, sample_rate, _MIN_SECONDS)
    if len(first) != len(second):
        raise ValueError(f"waveforms of {len(first)} and {len(second)} samples: cut both to the shorter one")
    return first, second
