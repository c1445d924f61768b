"""Levels: loudness of ITU-R BS.1770-4 and the normalisation strategies of audiocraft's `audio_write`.

Knows nothing of files. Takes float tensors [C, T] or [T] on any device, never changes them in place and treats silence
as silence (no strategy yields NaN). Only torch: K-weighting runs as blockwise FFT filtering in float64, in constant
memory, because a recursive filter in Python would need seconds for each second of sound.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import lru_cache

import torch

__all__ = ["STRATEGIES", "k_weighting", "loudness", "normalize_audio", "normalize_loudness"]

STRATEGIES = ("peak", "clip", "rms", "loudness", "none")

_BLOCK_SECONDS = 0.4  # gating block of BS.1770, with 75 % overlap
_OFFSET = -0.691  # dB, makes a 997 Hz sine read its own level
_ABSOLUTE_GATE = 10 ** ((-70.0 - _OFFSET) / 10)  # -70 LUFS as mean square
_RELATIVE_GATE = 0.1  # -10 LU
_CHANNEL_GAIN = (1.0, 1.0, 1.0, 1.41, 1.41)  # left, right, centre, surrounds
_MIN_RATE = 4000  # the shelf sits at 1500 Hz and must stay below half the rate
_TAIL_SECONDS = 0.25  # the slowest pole fades with 4.2 ms: exp(-60) is left after this

_log = logging.getLogger("musicgen_fast.audio")

Biquad = tuple[tuple[float, float, float], tuple[float, float, float]]


def k_weighting(sample_rate: int) -> tuple[Biquad, Biquad]:
    """The two biquads (b, a) of K-weighting: high shelf (+4 dB, 1500 Hz, Q 1/sqrt 2), then high-pass (38 Hz, Q 1/2).

    These are the numbers of `torchaudio.transforms.Loudness`, which audiocraft uses. The curve lies 0.04 dB below the
    coefficients that BS.1770 tabulates for 48 kHz, well inside the 0.1 LU that meters are allowed. ValueError for a
    `sample_rate` below 4000 Hz.
    """
    if sample_rate < _MIN_RATE:
        raise ValueError(f"loudness needs a sample rate of at least {_MIN_RATE} Hz, got {sample_rate}")
    amp = 10 ** (4.0 / 40)
    w = 2 * math.pi * 1500.0 / sample_rate
    cos, slope = math.cos(w), math.sqrt(2 * amp) * math.sin(w)  # 2 sqrt(A) alpha with alpha = sin(w) / (2 Q)
    up, down = amp + 1, amp - 1
    shelf = (
        (amp * (up + down * cos + slope), -2 * amp * (down + up * cos), amp * (up + down * cos - slope)),
        (up - down * cos + slope, 2 * (down - up * cos), up - down * cos - slope),
    )
    w = 2 * math.pi * 38.0 / sample_rate
    cos, alpha = math.cos(w), math.sin(w)
    high_pass = (((1 + cos) / 2, -(1 + cos), (1 + cos) / 2), (1 + alpha, -2 * cos, 1 - alpha))
    return shelf, high_pass


@lru_cache(maxsize=8)  # 2 to 5 ms for every short piece of a batch
def _response(sample_rate: int, n_fft: int, device: torch.device) -> torch.Tensor:
    """K-weighting as a complex frequency response [n_fft / 2 + 1]."""
    angle = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device=device) * (-2 * math.pi / n_fft)
    z = torch.polar(torch.ones_like(angle), angle)
    total = torch.ones_like(z)
    for b, a in k_weighting(sample_rate):
        total = total * (b[0] + z * (b[1] + z * b[2])) / (a[0] + z * (a[1] + z * a[2]))
    return total


def _block_energies(wav: torch.Tensor, sample_rate: int) -> Iterator[torch.Tensor]:
    """Mean squares [C, n] of the K-weighted gating blocks of wav [C, T], a few seconds at a time.

    Overlap-save: each piece starts `tail` samples early, and those first `tail` outputs, the only ones that the
    circular convolution spoils, are dropped. Sound shorter than one block counts as one block.
    """
    length = wav.shape[-1]
    size = min(round(_BLOCK_SECONDS * sample_rate), length)
    step = round(round(_BLOCK_SECONDS * sample_rate) * 0.25)
    tail = math.ceil(_TAIL_SECONDS * sample_rate)
    # 4 to 8 s: fits the cache, wastes at most a sixth on overlap; no more than a short sound needs.
    n_fft = 1 << (min(4 * sample_rate, tail + length) - 1).bit_length()
    response = _response(sample_rate, n_fft, wav.device)
    per_piece = (n_fft - tail - size) // step + 1
    count = (length - size) // step + 1
    for first in range(0, count, per_piece):
        blocks = min(per_piece, count - first)
        begin = first * step - tail
        end = first * step + (blocks - 1) * step + size
        piece = wav[..., max(begin, 0) : end].double()
        piece = torch.nn.functional.pad(piece, (max(-begin, 0), n_fft - (end - begin)))
        weighted = torch.fft.irfft(torch.fft.rfft(piece) * response, n_fft)[..., tail : end - begin]
        yield weighted.square().unfold(-1, size, step).mean(-1)


def loudness(wav: torch.Tensor, sample_rate: int) -> float:
    """Integrated loudness of wav [C, T] or [T] in LUFS (BS.1770-4, gates at -70 LUFS and -10 LU), C at most 5.

    `sample_rate` in Hz, at least 4000; ValueError below, and for other shapes.

    -inf where everything is below the absolute gate. Equals `torchaudio.transforms.Loudness` except that torchaudio
    clips the filtered signal to +-1, which reads 0.4 dB low for noise driven into clipping and 0.001 dB at -14 LUFS,
    and fails below 400 ms.
    """
    wav = wav.detach() if wav.dim() > 1 else wav.detach().reshape(1, -1)
    if wav.dim() > 2 or wav.shape[0] > len(_CHANNEL_GAIN):
        raise ValueError(f"loudness is defined for [channels <= 5, samples], got shape {tuple(wav.shape)}")
    if wav.shape[-1] == 0:
        return -math.inf
    if wav.device.type == "mps":  # no float64 there
        wav = wav.cpu()
    gain = torch.tensor(_CHANNEL_GAIN[: wav.shape[0]], dtype=torch.float64, device=wav.device)
    power = torch.cat([gain @ energies for energies in _block_energies(wav, int(sample_rate))])
    power = power[power > _ABSOLUTE_GATE]
    if power.numel() == 0:
        return -math.inf
    power = power[power > power.mean() * _RELATIVE_GATE]
    return _OFFSET + 10 * math.log10(power.mean().item())


def normalize_loudness(
    wav: torch.Tensor,
    sample_rate: int,
    loudness_headroom_db: float = 14,
    loudness_compressor: bool = False,
    energy_floor: float = 2e-3,
) -> torch.Tensor:
    """Scale wav [C, T] to -`loudness_headroom_db` LUFS, then bend peaks with tanh if `loudness_compressor`.

    `sample_rate` in Hz. Sound with an RMS below `energy_floor` comes back as it is, as does sound that BS.1770 gates
    away entirely (deep rumble). The result may exceed +-1; `normalize_audio` clips it. Source: audiocraft
    `normalize_loudness`.
    """
    if wav.numel() == 0 or wav.square().mean().sqrt().item() < energy_floor:
        return wav
    measured = loudness(wav, sample_rate)
    if math.isinf(measured):
        return wav
    out = wav * 10 ** ((-loudness_headroom_db - measured) / 20)
    return out.tanh() if loudness_compressor else out


def _clip(wav: torch.Tensor, log_clipping: bool, stem_name: str | None) -> torch.Tensor:
    """wav clamped to +-1; one warning with the share of samples cut and the highest peak."""
    largest = wav.abs().max().item()
    if largest <= 1:
        return wav
    if log_clipping:
        share = (wav.abs() > 1).float().mean().item()
        _log.warning("clipping %s: %.3g %% of the samples, peak %.3f", stem_name or "audio", 100 * share, largest)
    return wav.clamp(-1, 1)


def _rescale(wav: torch.Tensor, target: float, level: torch.Tensor, normalize: bool) -> torch.Tensor:
    """wav x target / level, also where that is louder if `normalize`; silence (level 0 or so) stays what it is."""
    factor = target / level
    if not torch.isfinite(factor) or not (normalize or factor < 1):
        return wav
    return wav * factor


def normalize_audio(
    wav: torch.Tensor,
    normalize: bool = True,
    strategy: str = "peak",
    peak_clip_headroom_db: float = 1,
    rms_headroom_db: float = 18,
    loudness_headroom_db: float = 14,
    loudness_compressor: bool = False,
    log_clipping: bool = False,
    sample_rate: int | None = None,
    stem_name: str | None = None,
) -> torch.Tensor:
    """wav [C, T] or [T] at the level that `strategy` asks for; a new tensor or, where nothing changes, wav itself.

    * peak: largest sample at -`peak_clip_headroom_db` dBFS.
    * clip: clamp to that level.
    * rms: RMS of the mono mix at -`rms_headroom_db` dBFS, then clamp to +-1.
    * loudness: to -`loudness_headroom_db` LUFS, peaks bent with tanh if `loudness_compressor`, see
      `normalize_loudness` (needs `sample_rate`, Hz), then clamp to +-1.
    * none (or ''): untouched; ValueError if a sample reaches +-1.

    `normalize=False` lets peak and rms only make sound quieter; clip and loudness ignore it. `log_clipping` warns where
    rms and loudness clamp, calling the sound `stem_name`. ValueError for an unknown strategy too. Numbers and semantics
    are those of audiocraft `normalize_audio`, but silence stays silence instead of turning into NaN.
    """
    if strategy not in (*STRATEGIES, ""):
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if strategy == "loudness" and sample_rate is None:
        raise ValueError("strategy 'loudness' needs sample_rate")
    if wav.numel() == 0:
        return wav
    ceiling = 10 ** (-peak_clip_headroom_db / 20)
    if strategy == "peak":
        return _rescale(wav, ceiling, wav.abs().max(), normalize)
    if strategy == "clip":
        return wav.clamp(-ceiling, ceiling)
    if strategy == "rms":
        mono = wav.mean(dim=-2) if wav.dim() > 1 else wav
        wav = _rescale(wav, 10 ** (-rms_headroom_db / 20), mono.square().mean().sqrt(), normalize)
        return _clip(wav, log_clipping, stem_name)
    if strategy == "loudness":
        assert sample_rate is not None
        wav = normalize_loudness(wav, sample_rate, loudness_headroom_db, loudness_compressor)
        return _clip(wav, log_clipping, stem_name)
    peak = wav.abs().max().item()
    if peak >= 1:
        raise ValueError(f"strategy 'none' needs samples within +-1, the peak is {peak:.3f}; use 'clip' or 'peak'")
    return wav
