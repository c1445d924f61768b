"""What the features read off synthetic sounds whose tempo, key, drums, brightness and level are known."""

from __future__ import annotations

import math

import pytest
import torch

from musicgen_fast.evaluation import (
    ATTRIBUTE_FEATURES,
    brightness,
    chroma,
    clip_features,
    density,
    drums,
    key,
    level,
    onset_envelope,
    onsets,
    tempo,
)

from .evaluation_signals import RATE, chords, clicks, drum_loop, noise, note, place

CANDIDATES = (75.0, 125.0, 187.5)


@pytest.mark.parametrize("per_beat", [1, 2, 4])
@pytest.mark.parametrize("bpm", CANDIDATES)
def test_tempo_among_candidates(bpm, per_beat):
    """Beats alone, or with softer eighths or sixteenths in between."""
    found = tempo(clicks(bpm, per_beat=per_beat), RATE, CANDIDATES)
    assert found.choice == CANDIDATES.index(bpm)
    others = [s for i, s in enumerate(found.scores) if i != found.choice]
    assert found.scores[found.choice] > 5 * max(others)


@pytest.mark.parametrize("bpm", [64, 80, 97, 113, 140, 166, 200])
def test_tempo_without_candidates(bpm):
    found = tempo(clicks(bpm), RATE)
    assert found.bpm == pytest.approx(bpm, rel=0.01)
    assert found.choice is None and found.scores == ()


@pytest.mark.parametrize("bpm", [60, 100, 170])
def test_tempo_of_eighths_is_right_up_to_an_octave(bpm):
    ratio = math.log2(tempo(drum_loop(bpm, 6.0), RATE).bpm / bpm)
    assert abs(ratio - round(ratio)) < 0.02 and abs(ratio) < 1.1


def test_tempo_at_another_rate_and_level():
    wav = clicks(125.0).repeat_interleave(2)  # 32 kHz
    found = tempo(0.01 * torch.stack([wav, wav]), 2 * RATE, CANDIDATES)
    assert found.choice == 1 and found.bpm == pytest.approx(125.0, rel=0.01)


def test_onsets_stand_where_they_were_put():
    times = [0.5, 0.9, 1.7, 2.0, 2.6]
    fading = [(t, note(220 * (i + 2), 0.6, decay=15)) for i, t in enumerate(times)]  # an end cut off is a click
    found = onsets(place(fading, 3.2), RATE)
    assert found.tolist() == pytest.approx(times, abs=0.025)


@pytest.mark.parametrize("per_beat", [1, 2, 4])
def test_density(per_beat):
    assert density(clicks(120, 5.0, per_beat), RATE) == pytest.approx(2 * per_beat, rel=0.1)


def test_sustained_sound_has_few_onsets():
    time = torch.arange(3 * RATE) / RATE
    assert density(torch.sin(2 * math.pi * 300 * time), RATE) < 0.7
    assert float(onset_envelope(torch.zeros(RATE), RATE).max()) == 0.0


@pytest.mark.parametrize("mode", ["major", "minor"])
def test_key_of_cadences(mode):
    for tonic in range(12):
        found = key(chords(tonic, mode), RATE)
        assert (found.tonic, found.mode) == (tonic, mode)
        assert found.correlation > 0.8 and abs(found.margin) > 0.05
        assert (found.margin > 0) == (mode == "major")
    assert found.name == f"B {mode}"


def test_chroma_of_one_note():
    found = chroma(note(440.0, 2.0, partials=1), RATE)
    assert int(found.argmax()) == 9 and float(found[9]) > 0.9 and float(found.sum()) == pytest.approx(1)
    between = chroma(note(440.0 * 2 ** (1 / 24), 2.0, partials=1), RATE)  # a quarter tone above A
    assert float(between[9]) == pytest.approx(0.5, abs=0.06) and float(between[10]) == pytest.approx(0.5, abs=0.06)
    assert not chroma(torch.zeros(RATE), RATE).any()


def test_drums_are_heard_with_and_without_harmony():
    bright = chords(2, "minor", partials=12)
    assert drums(drum_loop(), RATE).present
    assert drums(drum_loop() + bright, RATE).present
    assert not drums(bright, RATE).present
    assert not drums(noise(3.0), RATE).present  # no bursts
    assert not drums(torch.zeros(RATE), RATE).present


def test_drum_evidence_names_its_band():
    time = torch.arange(4 * RATE) / RATE
    burst = torch.sin(2 * math.pi * 60 * time[: RATE // 5]) * torch.exp(-20 * time[: RATE // 5])
    kicks = drums(place([(0.5 * i, burst) for i in range(8)], 4.0), RATE)
    hats = drums(place([(0.5 * i, torch.diff(noise(0.05), n=2)) for i in range(8)], 4.0), RATE)
    assert kicks.kick_level > kicks.noise_level + 20 and kicks.kick_burst > 20 and not kicks.present
    assert hats.noise_level > hats.kick_level + 20 and hats.noise_burst > 20 and hats.noise_flatness > 0.3


def test_a_sine_reads_0_db_in_its_band():
    time = torch.arange(3 * RATE) / RATE
    assert drums(torch.sin(2 * math.pi * 6000 * time), RATE).noise_level == pytest.approx(0.0, abs=0.1)


def test_brightness_rises_with_the_cutoff():
    spectrum = torch.fft.rfft(noise(3.0))
    hertz = torch.fft.rfftfreq(3 * RATE, 1 / RATE)
    found = [brightness(torch.fft.irfft(spectrum * (hertz < f)), RATE) for f in (500, 1000, 3000, 7000)]
    for name in ("centroid", "rolloff", "high_ratio", "flatness"):
        values = [row[name] for row in found]
        assert values == sorted(values), name
    # white noise up to f has its mean at f / 2 and 85 % of its magnitude below 0.85 f
    assert found[3]["centroid"] == pytest.approx(math.log2(3.5), abs=0.05)
    assert found[3]["rolloff"] == pytest.approx(math.log2(0.85 * 7), abs=0.05)
    assert found[2]["high_ratio"] == pytest.approx(10 * math.log10(1 / 3), abs=0.3)


def test_level_in_db():
    time = torch.arange(3 * RATE) / RATE
    sine = torch.sin(2 * math.pi * 997 * time)
    assert level(sine, RATE)["rms_db"] == pytest.approx(-3.01, abs=0.01)
    assert level(sine, RATE)["lufs"] == pytest.approx(-3.01, abs=0.1)
    quiet = level(0.1 * sine, RATE)
    assert quiet["rms_db"] == pytest.approx(-23.01, abs=0.01) and quiet["lufs"] == pytest.approx(-23.01, abs=0.1)


def test_only_loudness_follows_the_level():
    wav = drum_loop(125.0, 4.0) + chords(0, "major")
    loud, soft = clip_features(wav, RATE), clip_features(0.05 * wav, RATE)
    assert soft["rms_db"] == pytest.approx(loud["rms_db"] + 20 * math.log10(0.05), abs=1e-3)
    for name in loud.keys() - {"rms_db", "lufs"}:
        assert soft[name] == pytest.approx(loud[name], abs=1e-2), name


@pytest.mark.parametrize("wav", [torch.zeros(2 * RATE), torch.eye(1, 2 * RATE)[0], noise(2.0)], ids=str)
def test_every_named_feature_is_finite(wav):
    found = clip_features(wav, RATE)
    assert set(found) == {name for names in ATTRIBUTE_FEATURES.values() for name in names}
    assert all(math.isfinite(value) for value in found.values())


def test_numpy_and_stereo_are_taken():
    wav = chords(0, "major")
    assert clip_features(torch.stack([wav, wav]).numpy(), RATE) == pytest.approx(clip_features(wav, RATE))


def test_wrong_input_is_named():
    for wrong, message in (
        (torch.zeros(RATE), "too few"),
        (torch.zeros(1, 1, 3 * RATE), "waveform"),
        (torch.zeros(3 * RATE, dtype=torch.int16), "waveform"),
        (torch.full((3 * RATE,), math.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_features(wrong, RATE)
    with pytest.raises(ValueError, match="sample_rate"):
        key(torch.zeros(RATE), 1000)
    with pytest.raises(ValueError, match="10000"):
        drums(torch.zeros(8000), 8000)
    with pytest.raises(ValueError, match="candidates"):
        clip_features(torch.zeros(3 * RATE), RATE, (120.0,))
