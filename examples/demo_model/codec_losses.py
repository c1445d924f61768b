"""What the demo codec is trained to lower: log-mel, spectral convergence and waveform errors, each with a floor.

Waveforms are [B, n] at one rate; everything is computed in float32 whatever comes in. The scales agree with those of
`musicgen_fast.evaluation.distance`, which judges the result (here per item and differentiable). It holds no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from musicgen_fast.evaluation.distance import LOG_FLOOR, RESOLUTIONS
from musicgen_fast.evaluation.spectra import mel_filters

_SC_FLOOR = 1e-2  # least root-mean-square of the frames' magnitudes that an error is divided by: about -35 dB
_WAVE_FLOOR = 1e-2  # the same for the waveform's own level; without one near-silent crops reached ratios of 755
_TINY = 1e-16


@dataclass(frozen=True)
class Weights:
    """Of the parts of the loss; commitment counts in units of the latents' variance when the codebooks began."""

    mel: float = 1.0
    convergence: float = 0.5
    wave: float = 0.5
    commitment: float = 0.1


class CodecLoss:
    """The parts of the loss of an estimate against its reference, means over the batch."""

    def __init__(self, sample_rate: int, resolutions: tuple[int, ...] = RESOLUTIONS) -> None:
        # Window, filters transposed to [bins, bands], and the factor to a window of unit energy. Made once.
        self._scales = []
        for n_fft in resolutions:
            window = torch.hann_window(n_fft)
            filters = mel_filters(n_fft, sample_rate, min(max(n_fft // 8, 16), 80))
            self._scales.append((n_fft, window / window.sum(), filters * (n_fft / 2 / (0.375 * n_fft) ** 0.5)))

    def __call__(self, reference: Tensor, estimate: Tensor) -> dict[str, Tensor]:
        """reference, estimate [B, n] -> 'mel' (nepers), 'convergence' and 'wave' (ratios, about 1 for silence)."""
        reference, estimate = reference.float(), estimate.float()
        mel = convergence = reference.new_zeros(())
        for n_fft, window, filters in self._scales:
            wanted, found = _magnitudes(torch.cat((reference, estimate)), n_fft, window).chunk(2)
            logs = [(filters @ x).clamp(min=LOG_FLOOR).log() for x in (wanted, found)]
            mel = mel + (logs[0] - logs[1]).abs().mean()
            least = _SC_FLOOR * wanted.shape[-1] ** 0.5
            convergence = convergence + (_norm(wanted - found) / _norm(wanted).clamp(min=least)).mean()
        count = len(self._scales)
        return {"mel": mel / count, "convergence": convergence / count, "wave": _wave(reference, estimate)}


def _magnitudes(x: Tensor, n_fft: int, window: Tensor) -> Tensor:
    spectrum = torch.stft(x, n_fft, n_fft // 4, window=window, center=True, pad_mode="constant", return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square() + _TINY).sqrt()  # abs() has no gradient at zero


def _norm(x: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return (x.flatten(1).square().sum(1) + _TINY).sqrt()


def _wave(reference: Tensor, estimate: Tensor) -> Tensor:
    """Mean of the relative L1 and L2 errors: soft clips count as much as loud ones."""
    error = reference - estimate
    first = error.abs().mean(1) / reference.abs().mean(1).clamp(min=_WAVE_FLOOR)
    second = _norm(error) / _norm(reference).clamp(min=_WAVE_FLOOR * reference.shape[1] ** 0.5)
    return (first + second).mean() / 2
