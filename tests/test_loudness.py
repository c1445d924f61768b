"""Loudness and normalisation (`musicgen_fast.loudness`) against formulas, a float64 recursion and audiocraft."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch

from musicgen_fast import loudness as levels
from musicgen_fast.audio import audio_read, audio_write, normalize_audio, normalize_loudness

from .sounds import RATE, STRATEGIES, load_audiocraft_utils, noise, sine

TORCHAUDIO_LUFS = {16000: -12.3559251006, 32000: -12.3680949807, 44100: -12.3701107734}


def recursion(wav: torch.Tensor, rate: int) -> list[float]:
    """K-weighting of one channel as the textbook difference equation, in Python floats."""
    signal = wav.tolist()
    for b, a in levels.k_weighting(rate):
        x1 = x2 = y1 = y2 = 0.0
        out = []
        for x in signal:
            y = (b[0] * x + b[1] * x1 + b[2] * x2 - a[1] * y1 - a[2] * y2) / a[0]
            x2, x1, y2, y1 = x1, x, y1, y
            out.append(y)
        signal = out
    return signal


@pytest.mark.parametrize("rate", [8000, 11025, 32000])
def test_loudness_equals_the_recursion(rate):
    """Silence, a faint part and a loud part, so that both gates bite; 7 s is two pieces of the FFT filter."""
    seconds = 7 if rate == 8000 else 1.7
    wav = noise(2, seconds, 0.2, rate).double()
    wav += sine(20, seconds, rate, 0.4)  # deep, so that the slow tail of the high-pass counts where pieces meet
    wav[:, : int(0.4 * wav.shape[1])] *= 0.02
    wav[:, : int(0.45 * rate)] = 0
    gate, step = round(0.4 * rate), round(round(0.4 * rate) * 0.25)
    filtered = np.array([recursion(channel, rate) for channel in wav])
    starts = range(0, wav.shape[1] - gate + 1, step)
    power = np.array([(filtered[:, at : at + gate] ** 2).mean(1).sum() for at in starts])
    loud = -0.691 + 10 * np.log10(power + 1e-99)
    kept = loud > -70
    relative = -0.691 + 10 * np.log10(power[kept].mean()) - 10
    both = kept & (loud > relative)
    assert 0 < both.sum() < kept.sum() < len(power)
    expected = -0.691 + 10 * np.log10(power[both].mean())
    assert levels.loudness(wav, rate) == pytest.approx(expected, abs=1e-9)


def test_loudness_anchor():
    """BS.1770: a full-scale 997 Hz sine in one channel reads -3.01 LUFS, and in both channels 3.01 more."""
    for rate in (16000, 32000, 44100, 48000):
        tone = sine(997, 3.0, rate)
        assert levels.loudness(tone, rate) == pytest.approx(-3.01, abs=0.1)
        assert levels.loudness(tone / 10, rate) - levels.loudness(tone, rate) == pytest.approx(-20, abs=1e-6)
    both = torch.stack([tone, tone])
    assert levels.loudness(both, rate) - levels.loudness(tone, rate) == pytest.approx(10 * math.log10(2), abs=1e-6)
    surround = torch.zeros(5, len(tone))
    surround[4] = tone
    gain = levels.loudness(surround, rate) - levels.loudness(tone, rate)
    assert gain == pytest.approx(10 * math.log10(1.41), abs=1e-6)


def test_k_weighting_is_close_to_the_table_of_bs1770():
    """The recommendation lists coefficients for 48 kHz; the filters of torchaudio stay within 0.045 dB of them."""
    table = (
        ((1.53512485958697, -2.69169618940638, 1.19839281085285), (1.0, -1.69065929318241, 0.73248077421585)),
        ((1.0, -2.0, 1.0), (1.0, -1.99004745483398, 0.99007225036621)),
    )
    z = np.exp(-2j * np.pi * np.array([20, 50, 100, 300, 997, 2000, 5000, 20000]) / 48000)

    def decibels(filters):
        return sum(20 * np.log10(abs(np.polyval(b[::-1], z) / np.polyval(a[::-1], z))) for b, a in filters)

    assert abs(decibels(table) - decibels(levels.k_weighting(48000))).max() < 0.045


def test_loudness_equals_torchaudio():
    """Two partials, the right channel half as loud; the numbers are torchaudio 2.11's, computed in float64."""
    for rate, expected in TORCHAUDIO_LUFS.items():
        left = sine(220, 2.0, rate, 0.3) + sine(3000, 2.0, rate, 0.1)
        assert levels.loudness(torch.stack([left, left / 2]), rate) == pytest.approx(expected, abs=1e-6)


def test_loudness_edges():
    assert levels.loudness(torch.zeros(2, RATE), RATE) == -math.inf
    assert levels.loudness(torch.zeros(2, 0), RATE) == -math.inf
    tone = sine(997, 0.399)
    assert levels.loudness(tone, RATE) == pytest.approx(levels.loudness(sine(997, 0.4), RATE), abs=0.05)
    assert math.isfinite(levels.loudness(tone[:1] + 0.5, RATE))
    assert levels.loudness(tone.half(), RATE) == pytest.approx(levels.loudness(tone, RATE), abs=0.01)
    with pytest.raises(ValueError, match="channels <= 5"):
        levels.loudness(noise(6), RATE)
    with pytest.raises(ValueError, match="4000 Hz"):
        levels.loudness(tone, 2000)


def test_opposite_channels_survive_rms():
    """The mono mix of such stereo is silent, so there is no RMS to scale by."""
    wav = torch.stack([sine(440), -sine(440)]).float() * 0.5
    assert torch.equal(normalize_audio(wav, strategy="rms"), wav)


def test_levels_by_formula():
    wav = noise(2, 1.0, 0.05)
    assert normalize_audio(wav).abs().max().item() == pytest.approx(10 ** (-1 / 20), rel=1e-6)
    assert normalize_audio(wav, False) is wav  # would be louder
    assert normalize_audio(4 * wav, False, "peak", 6).abs().max().item() == pytest.approx(10 ** (-6 / 20), rel=1e-6)
    clipped = normalize_audio(wav, strategy="clip", peak_clip_headroom_db=40)
    assert torch.equal(clipped, wav.clamp(-0.01, 0.01))
    mono = normalize_audio(wav, strategy="rms").mean(0)
    assert mono.square().mean().sqrt().item() == pytest.approx(10 ** (-18 / 20), rel=1e-5)
    assert normalize_audio(wav[0], strategy="rms").square().mean().sqrt().item() == pytest.approx(10**-0.9, rel=1e-5)
    for headroom in (14, 23):
        loud = normalize_loudness(wav, RATE, headroom)
        assert levels.loudness(loud, RATE) == pytest.approx(-headroom, abs=1e-4)
        assert torch.equal(normalize_loudness(wav, RATE, headroom, True), loud.tanh())
    faint = wav * (1.9e-3 / wav.square().mean().sqrt())
    assert normalize_loudness(faint, RATE) is faint
    rumble = sine(0.5, 1.0, level=0.01).float()  # above the energy floor, gated away by BS.1770
    assert normalize_loudness(rumble, RATE) is rumble
    with pytest.raises(ValueError, match="sample_rate"):
        normalize_audio(wav, strategy="loudness")


def test_clipping_is_logged(tmp_path, caplog):
    wav = torch.zeros(1, 1000)
    wav[0, :10] = 1.0
    with caplog.at_level(logging.WARNING):
        audio_write(tmp_path / "song", wav, RATE, strategy="rms", rms_headroom_db=6)
        (record,) = caplog.records
        assert record.name == "musicgen_fast.audio" and record.levelno == logging.WARNING
        assert "song" in record.getMessage() and "1 %" in record.getMessage() and "5.01" in record.getMessage()
        caplog.clear()
        audio_write(tmp_path / "song", wav, RATE, strategy="rms", rms_headroom_db=6, log_clipping=False)
        audio_write(tmp_path / "song", wav, RATE, strategy="rms", rms_headroom_db=30)
        assert not caplog.records


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_silence_stays_silence(tmp_path, strategy, normalize):
    for seconds in (1.0, 0.01):
        path = audio_write(tmp_path / "a", torch.zeros(2, int(seconds * RATE)), RATE, strategy=strategy)
        assert not audio_read(path)[0].any()
    denormal = torch.full((2, 100), 1e-42)
    out = normalize_audio(denormal, normalize, strategy, sample_rate=RATE)
    assert out.isfinite().all() and out.abs().max() < 1e-30
    assert normalize_audio(torch.zeros(2, 0), normalize, strategy, sample_rate=RATE).shape == (2, 0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("strategy", ["peak", "clip", "rms", "loudness"])
def test_levels_equal_audiocraft(monkeypatch, strategy, normalize):
    reference = load_audiocraft_utils(monkeypatch, levels.loudness)
    for level in (0.02, 0.3, 1.5):
        wav = torch.randn(2, RATE, generator=torch.Generator().manual_seed(1)) * level
        for extra in ({}, {"peak_clip_headroom_db": 3, "rms_headroom_db": 10, "loudness_compressor": True}):
            theirs = reference.normalize_audio(wav.clone(), normalize, strategy, sample_rate=RATE, **extra)
            ours = normalize_audio(wav, normalize, strategy, sample_rate=RATE, **extra)
            assert torch.equal(ours, theirs) if strategy != "loudness" else torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strategy", ["peak", "clip", "rms", "loudness"])
def test_levels_on_cuda(tmp_path, strategy):
    wav = noise(2, 2.0)
    out = normalize_audio(wav.cuda(), strategy=strategy, sample_rate=RATE)
    assert out.is_cuda
    assert torch.allclose(out.cpu(), normalize_audio(wav, strategy=strategy, sample_rate=RATE), atol=1e-6)
    assert audio_read(audio_write(tmp_path / "a", wav.cuda(), RATE, strategy=strategy))[0].shape == wav.shape
