"""Codec figures and Frechet distances against closed forms, and the basic-pitch embedder where it is installed."""

from __future__ import annotations

import builtins
import importlib.util
import math

import numpy as np
import pytest
import torch

from musicgen_fast.evaluation import (
    BasicPitchEmbedder,
    basic_pitch_frechet_distance,
    codebook_perplexity,
    codec_figures,
    embedding_distance,
    frechet,
    frechet_distance,
    log_mel_distance,
    mu_law,
    si_snr,
    spectral_convergence,
)
from musicgen_fast.evaluation.spectra import mel_filters

from .evaluation_signals import RATE, chords, drum_loop, noise

# -- pairs of waveforms ------------------------------------------------------------------------------------------------


def test_equal_sounds_have_no_distance():
    wav = chords(0, "major")
    found = codec_figures([wav, wav], [wav, wav.clone()], RATE)
    assert (found.spectral_convergence, found.log_mel, found.si_snr) == (0.0, 0.0, 100.0)


@pytest.mark.parametrize("gain", [0.5, 0.9, 1.25])
def test_a_gain_reads_as_itself(gain):
    wav = noise(1.0)
    assert spectral_convergence(wav, gain * wav, RATE) == pytest.approx(abs(1 - gain), rel=1e-4)
    assert log_mel_distance(wav, gain * wav, RATE) == pytest.approx(abs(math.log(gain)), rel=1e-3)
    assert si_snr(wav, gain * wav, RATE) > 90


def test_silence_stays_finite():
    wav, silence = 0.1 * noise(1.0), torch.zeros(RATE)
    assert spectral_convergence(wav, silence, RATE) == pytest.approx(1.0)
    assert spectral_convergence(silence, silence, RATE) == 0.0
    assert spectral_convergence(1e-6 * wav, 1e-4 * wav, RATE) < 0.1  # the bare ratio is 99
    assert spectral_convergence(1e-6 * wav, 1e-4 * wav, RATE, floor=0.0) == pytest.approx(99, rel=1e-3)
    assert si_snr(silence, wav, RATE) == si_snr(wav, silence, RATE) == -100.0
    assert log_mel_distance(silence, 1e-6 * wav, RATE) == 0.0  # both below the floor
    assert log_mel_distance(silence, wav, RATE) > 3


@pytest.mark.parametrize("decibel", [-5.0, 0.0, 20.0])
def test_si_snr_of_orthogonal_noise(decibel):
    time = torch.arange(RATE, dtype=torch.float64) / RATE
    signal, other = (torch.sin(2 * math.pi * f * time) for f in (440, 1000))
    mixed = signal + 10 ** (-decibel / 20) * other
    assert si_snr(signal, 3 * mixed + 0.1, RATE) == pytest.approx(decibel, abs=0.01)


def test_more_bits_are_nearer():
    wav = 0.3 * chords(0, "minor") / chords(0, "minor").abs().max()
    found = [codec_figures([wav], [mu_law(wav, bits)], RATE) for bits in (2, 4, 6, 8)]
    for name, sign in (("spectral_convergence", 1), ("log_mel", 1), ("si_snr", -1)):
        values = [sign * getattr(row, name) for row in found]
        assert values == sorted(values, reverse=True), name


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_mu_law_levels(bits):
    wav = torch.linspace(-1.2, 1.2, 20001)
    coded = mu_law(wav, bits)
    levels = coded.unique()
    assert len(levels) == 2**bits and coded.dtype == wav.dtype
    assert levels[0] == -1.0 and levels[-1] == 1.0
    torch.testing.assert_close(levels, -levels.flip(0))
    torch.testing.assert_close(mu_law(coded, bits), coded)


def test_mu_law_8_bits_is_the_usual_curve():
    compressed = (torch.arange(256, dtype=torch.float64) / 255) * 2 - 1
    usual = compressed.sign() * (256 ** compressed.abs() - 1) / 255
    torch.testing.assert_close(mu_law(torch.linspace(-1, 1, 100001, dtype=torch.float64), 8).unique(), usual)


def test_perplexity_by_hand():
    tokens = torch.tensor([[[0, 1, 2, 3], [5, 5, 5, 5]], [[0, 1, 2, 3], [5, 5, 5, 5]]])
    assert codebook_perplexity(tokens, 8).tolist() == pytest.approx([4.0, 1.0])
    three_to_one = torch.tensor([[[0, 0, 0, 1]]])
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert codebook_perplexity(three_to_one, 2).tolist() == pytest.approx([expected])


@pytest.mark.parametrize("n_fft", [128, 2048])
def test_mel_filters_cover_the_band(n_fft):
    filters = mel_filters(n_fft, RATE, 16)
    assert filters.shape == (16, n_fft // 2 + 1) and float(filters.max()) <= 1
    assert (filters.sum(1) > 0).all() and (filters.argmax(1).diff() > 0).all()


def test_wrong_pairs_are_named():
    wav = noise(1.0)
    with pytest.raises(ValueError, match="cut both"):
        si_snr(wav, wav[:-1], RATE)
    with pytest.raises(ValueError, match="1 references for 0"):
        codec_figures([wav], [], RATE)
    with pytest.raises(ValueError, match="bits"):
        mu_law(wav, 0)
    with pytest.raises(ValueError, match="tokens"):
        codebook_perplexity(torch.zeros(2, 2), 8)
    with pytest.raises(ValueError, match="0..7"):
        codebook_perplexity(torch.full((1, 1, 1), 8), 8)


# -- sets of embeddings ------------------------------------------------------------------------------------------------


def test_frechet_of_diagonal_gaussians():
    """Independent axes add up: sum of (m1 - m2)^2 + (s1 - s2)^2."""
    m1, m2 = np.array([0.0, 1.0, -2.0]), np.array([1.0, 1.0, 0.0])
    s1, s2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 2.0, 0.5])
    found = frechet_distance(m1, np.diag(s1**2), m2, np.diag(s2**2))
    assert found == pytest.approx(1 + 4 + 4 + 0.25)


def test_frechet_against_a_matrix_square_root():
    """Covariances that do not commute, in two dimensions: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M))."""
    c1, c2 = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    root_trace = math.sqrt(np.trace(c1 @ c2) + 2 * math.sqrt(np.linalg.det(c1 @ c2)))
    expected = np.trace(c1) + np.trace(c2) - 2 * root_trace
    zero = np.zeros(2)
    assert frechet_distance(zero, c1, zero, c2) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(zero, c2, zero, c1) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(zero, c1, zero, c1) == pytest.approx(0.0, abs=1e-12)


def test_embeddings_of_one_law_are_near_and_move_with_their_mean():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(6, 6))
    first, second = (rng.normal(size=(4000, 6)) @ mix for _ in range(2))
    scale = np.trace(mix @ mix.T)
    assert embedding_distance(first, second) < 0.01 * scale
    moved = embedding_distance(first, first + np.arange(6.0))
    assert moved == pytest.approx(55.0, rel=1e-6)
    doubled = embedding_distance(first, 2 * first - first.mean(0))
    assert doubled == pytest.approx(np.trace(np.cov(first, rowvar=False)), rel=1e-6)


def test_components_keep_the_widest_axes():
    rng = np.random.default_rng(1)
    first = rng.normal(size=(50, 200)) * np.r_[10.0, 5.0, np.full(198, 0.01)]
    turned = np.linalg.qr(rng.normal(size=(200, 200)))[0]
    other = first + np.r_[3.0, 4.0, np.full(198, 1.0)]
    assert embedding_distance(first @ turned, other @ turned, 2) == pytest.approx(25, rel=0.05)
    assert embedding_distance(first @ turned, first @ turned, 2) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="50 components"):
        embedding_distance(first, first, 50)


def test_wrong_embeddings_are_named():
    good = np.eye(3)
    for wrong in (np.eye(3)[:1], np.zeros(3), np.full((3, 3), np.nan)):
        with pytest.raises(ValueError, match="two finite rows"):
            embedding_distance(good, wrong)
    with pytest.raises(ValueError, match="3 and 2"):
        embedding_distance(good, good[:, :2])
    with pytest.raises(ValueError, match="shapes"):
        frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2))


def test_what_to_install_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps basic-pitch"):
        BasicPitchEmbedder()
    load = builtins.__import__

    def without(name, *args, **options):
        if name == "onnxruntime":
            raise ImportError(name)
        return load(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        BasicPitchEmbedder(tmp_path / "nmp.onnx")


def test_windows_are_pooled_and_sets_compared():
    """The embedder around a stand-in for the network: its shapes, its windows, and order of distances."""

    class Session:
        def run(self, names, inputs):
            (windows,) = inputs.values()
            assert windows.shape[1:] == (43844, 1) and windows.dtype == np.float32
            frames = np.abs(windows[:, : 172 * 88, 0]).reshape(len(windows), 172, 88)
            return [np.concatenate([frames] * 3, 2), frames, 2 * frames]

    embed = object.__new__(frechet.BasicPitchEmbedder)
    embed._session, embed._input = Session(), "wav"
    assert embed(noise(1.0), RATE).shape == (1, 880)
    assert embed(noise(5.0), RATE).shape == (2, 880)
    sets = [[0.1 * scale * noise(4.5, seed + 10 * i) for i in range(4)] for seed, scale in ((0, 1), (1, 1), (2, 3))]
    near, far = (basic_pitch_frechet_distance(sets[0], s, RATE, components=4, embedder=embed) for s in sets[1:])
    assert 0 < near < 0.5 * far


def test_music_is_nearer_to_music_than_to_noise():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if importlib.util.find_spec("basic_pitch") is None:
        pytest.skip("basic-pitch is not installed")
    first, second = (
        [0.2 * chords(t, m, 4.2) for t in tonics for m in ("major", "minor")] for tonics in ((0, 4), (2, 7))
    )
    hiss = [0.1 * noise(4.2, i) + 0.1 * drum_loop(120, 4.2, i) for i in range(4)]
    embed = BasicPitchEmbedder()
    near, far = (basic_pitch_frechet_distance(first, x, RATE, components=4, embedder=embed) for x in (second, hiss))
    assert near < far
