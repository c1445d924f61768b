"""Chromagrams against audiocraft's, their lengths, and what is asked of demucs (a stand-in: no weights here)."""

from __future__ import annotations

import random
import sys
import types

import pytest
import torch

from musicgen_fast.conditioning.melody import (
    ChromaExtractor,
    chroma_filters,
    fit_length,
    load_demucs,
    melody_chroma,
    null_chroma,
    separate_stems,
)
from musicgen_fast.config import MelodyConfig

from .oracle import audiocraft_lm as ac

CONFIG = MelodyConfig()
RATE = CONFIG.sample_rate
SOFT = MelodyConfig(argmax=False)


def _music(samples: int, seed: int = 0) -> torch.Tensor:
    """[samples]: a new random chord every 0.2 s, and noise."""
    generator = torch.Generator().manual_seed(seed)
    pitches = 110 * 2 ** (torch.randint(0, 48, (samples // 6400 + 1, 3), generator=generator) / 12)
    hertz = pitches.repeat_interleave(6400, 0)[:samples]
    phase = torch.cumsum(hertz.double() / RATE, 0).float()
    return (phase % 1 - 0.5).sum(1) / 4 + 0.02 * torch.randn(samples, generator=generator)


# -- the filter bank and the extractor ------------------------------------------------------------------------------


def test_filters_equal_librosas():
    bank = chroma_filters(RATE, 16384)
    assert bank.shape == (12, 8193) and bank.dtype == torch.float32
    # of librosa 0.11.0, filters.chroma(sr=32000, n_fft=16384, tuning=0): each bin's sum and some entries
    sums = [318.45, 321.226, 327.774, 334.178, 340.417, 346.498, 352.387, 358.085, 363.617, 368.943, 373.53, 354.84]
    torch.testing.assert_close(bank.sum(1), torch.tensor(sums), rtol=0, atol=1e-3)
    entries = {(0, 134): 0.66991961, (9, 225): 0.86614764, (9, 451): 0.98201352, (4, 169): 0.76454383}
    for (pitch, bin_), value in entries.items():
        assert bank[pitch, bin_].item() == pytest.approx(value, abs=1e-7)


@ac.needs_audiocraft
@pytest.mark.parametrize("argmax", [True, False])
@pytest.mark.parametrize("samples", [1, 1001, 16383, 16384, 16385, 50000, 128000])
def test_chroma_equals_audiocrafts(samples, argmax):
    ac.load()
    from audiocraft.modules.chroma import ChromaExtractor as Theirs

    theirs = Theirs(sample_rate=RATE, n_chroma=12, radix2_exp=14, argmax=argmax)
    wav = torch.stack([_music(samples), torch.zeros(samples), 1e-4 * _music(samples, seed=1)])
    expected = theirs(wav)
    actual = ChromaExtractor(CONFIG if argmax else SOFT)(wav)
    assert actual.dtype == torch.float32 and actual.shape == (3, max(samples, 16384) // 4096 + 1, 12)
    if argmax:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_pitch_lands_in_its_bin():
    extractor, time = ChromaExtractor(CONFIG), torch.arange(RATE) / RATE
    for pitch, hertz in {0: 261.63, 4: 329.63, 7: 392.0, 9: 440.0, 11: 987.77}.items():
        chroma = extractor(torch.sin(2 * torch.pi * hertz * time)[None])
        assert chroma[0, :, pitch].all() and chroma.sum() == chroma.shape[1]


def test_thirty_seconds_are_235_frames():
    assert CONFIG.chroma_length == 235
    assert ChromaExtractor(CONFIG)(torch.zeros(1, 30 * RATE)).shape == (1, 235, 12)


def test_the_extractor_wants_a_batch_of_mono():
    with pytest.raises(ValueError, match=r"mono waveforms \[B, T\], got shape \(1, 2, 100\)"):
        ChromaExtractor(CONFIG)(torch.zeros(1, 2, 100))


def test_fit_length():
    chroma = torch.arange(5.0)[:, None].expand(5, 12)
    assert fit_length(chroma, 3)[:, 0].tolist() == [0, 1, 2]
    assert fit_length(chroma, 5)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert fit_length(chroma, 12)[:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    with pytest.raises(ValueError, match="at least one frame"):
        fit_length(chroma[:0], 3)


def test_no_melody_is_the_chroma_of_silence():
    for config in (CONFIG, SOFT):
        null = null_chroma(config)
        assert torch.equal(null, ChromaExtractor(config)(torch.zeros(1, 30 * RATE))[0])
        assert torch.equal(melody_chroma(None, 0, config), null)
        assert torch.equal(melody_chroma(torch.ones(1, 1), RATE, config), null)
    assert null_chroma(CONFIG)[:, 0].all() and null_chroma(CONFIG)[:, 1:].sum() == 0
    assert null_chroma(SOFT).sum() == 0


# -- the whole path -------------------------------------------------------------------------------------------------


@ac.needs_audiocraft
@pytest.mark.parametrize("seconds", [0.9, 2.0, 31.0])
def test_melody_chroma_equals_audiocrafts_conditioner_on_the_mix(seconds):
    """Short ones start over, long ones are cut; the oracle's conditioner takes the mix for the stem."""
    conditioner = ac.build_lm("melody").condition_provider.conditioners["self_wav"]
    conditioner.match_len_on_eval = True
    import audiocraft.modules.conditioners as theirs

    wav = torch.stack([_music(int(seconds * RATE)), _music(int(seconds * RATE), seed=2)])
    condition = theirs.WavCondition(wav[None], torch.tensor([wav.shape[-1]]), [RATE], [None], [None])
    expected = conditioner._get_wav_embedding(condition)[0]
    assert expected.shape == (conditioner.chroma_len, 12)
    config = MelodyConfig(duration=conditioner.duration)
    assert torch.equal(melody_chroma(wav, RATE, config, separate=False), expected)
    assert expected.argmax(-1).unique().numel() > 1


def test_other_rates_and_channels():
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(44100 * 2) / 44100)
    chroma = melody_chroma(torch.stack([tone, 0.5 * tone]), 44100, CONFIG, separate=False)
    assert chroma.shape == (235, 12) and chroma[:, 9].all()


@pytest.mark.parametrize(
    ("wav", "message"),
    [
        (torch.zeros(32000), r"\[channels, samples\], got shape \(32000,\)"),
        (torch.zeros(1, 0), r"got shape \(1, 0\)"),
        (torch.full((1, 100), float("nan")), "NaN"),
        (torch.full((1, 100), float("inf")), "infinite"),
    ],
)
def test_waveforms_that_are_none(wav, message):
    with pytest.raises(ValueError, match=message):
        melody_chroma(wav, RATE, CONFIG, separate=False)


# -- demucs ---------------------------------------------------------------------------------------------------------


class FakeModel(torch.nn.Module):
    """Four "stems" of the mix; its sources are not in htdemucs' order, so that indices must be looked up."""

    sources, samplerate, audio_channels = ["vocals", "drums", "other", "bass"], RATE, 2


@pytest.fixture
def fake_demucs(monkeypatch):
    """A demucs that separates by scaling, and draws its shift as the real one does; returns the list of its calls."""
    calls: list = []

    def get_model(name):
        calls.append(("get_model", name))
        return FakeModel()

    def apply_model(model, mix, device=None):
        shift = random.randint(0, model.samplerate // 2)
        calls.append(("apply_model", tuple(mix.shape), torch.device(device), shift, torch.is_grad_enabled()))
        gains = torch.tensor([1.0, 100.0, 0.5, 100.0])[None, :, None, None]
        return mix[:, None].roll(shift, -1) * gains

    def convert_audio(wav, from_rate, to_rate, channels):
        assert from_rate == to_rate == RATE
        calls.append(("convert_audio", tuple(wav.shape), channels))
        return wav.mean(-2, keepdim=True) if channels == 1 else wav.expand(*wav.shape[:-2], channels, wav.shape[-1])

    for name, attributes in {
        "demucs": {},
        "demucs.pretrained": {"get_model": get_model},
        "demucs.apply": {"apply_model": apply_model},
        "demucs.audio": {"convert_audio": convert_audio},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_stems_are_vocals_and_other(fake_demucs):
    wav = _music(RATE)[None]
    stems = separate_stems(wav, RATE, seed=3)
    shift = random.Random(3).randint(0, RATE // 2)
    assert torch.equal(stems, wav.roll(shift, -1) * 1.5)
    assert fake_demucs == [
        ("get_model", "htdemucs"),
        ("convert_audio", (1, 1, RATE), 2),
        ("apply_model", (1, 2, RATE), torch.device("cpu"), shift, False),
        ("convert_audio", (1, 2, RATE), 1),
    ]


def test_a_given_model_is_not_loaded_again(fake_demucs):
    separate_stems(_music(RATE)[None], RATE, demucs=load_demucs())
    assert [call[0] for call in fake_demucs].count("get_model") == 1


def test_the_shift_comes_from_the_seed_or_from_the_global_generator(fake_demucs):
    wav = _music(RATE)[None]
    random.seed(8)
    expected = random.randint(0, RATE // 2)
    random.seed(8)
    separate_stems(wav, RATE)
    assert fake_demucs[-2][3] == expected

    state = random.getstate()
    first, second, other = (separate_stems(wav, RATE, seed=seed) for seed in (3, 3, 4))
    assert random.getstate() == state
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_the_global_generator_survives_a_failing_separation(fake_demucs, monkeypatch):
    def apply_model(model, mix, device=None):
        random.random()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sys.modules["demucs.apply"], "apply_model", apply_model)
    state = random.getstate()
    with pytest.raises(RuntimeError, match="out of memory"):
        separate_stems(_music(100)[None], RATE, seed=1)
    assert random.getstate() == state


def test_melody_chroma_separates_mono_at_the_models_rate(fake_demucs):
    wav = torch.stack([_music(48000), _music(48000, seed=1)])
    chroma = melody_chroma(wav, 48000, CONFIG, seed=5)
    assert chroma.shape == (235, 12)
    assert ("convert_audio", (1, 1, RATE), 2) in fake_demucs  # 1 s at 32 kHz, one channel
    assert torch.equal(chroma, melody_chroma(wav, 48000, CONFIG, seed=5, extractor=ChromaExtractor(CONFIG)))


def test_without_demucs_the_error_says_what_to_do(monkeypatch):
    for name in ("demucs", "demucs.pretrained", "demucs.apply"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "musicgen-fast\[melody\]", or pass separate=False'):
        melody_chroma(_music(RATE)[None], RATE, CONFIG)
    with pytest.raises(ImportError, match="separate=False"):
        separate_stems(_music(RATE)[None], RATE, demucs=FakeModel())
    assert melody_chroma(_music(RATE)[None], RATE, CONFIG, separate=False).shape == (235, 12)
