"""examples/demo_model: the labels of a synthetic song against its samples, and its captions against its labels."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest

from examples.demo_model.captions import _MEANING, GROUP, GROUPS, caption, demands, melody_from, spelled
from examples.demo_model.melody import agreement, heard, sounding
from examples.demo_model.synth import (
    FRAME,
    RATE,
    SCALES,
    STEP,
    STEPS,
    VALUES,
    Labels,
    Note,
    accompaniment,
    compose,
    lead,
    mixed,
    note_samples,
    render,
    song_from,
)

FRAMES = 550
SEEDS = range(150)
LEADS = VALUES["instrument"]
# Every pitch of a lead, of the pad and of the bass.
PITCHES = {
    "chip": (600, 675, 700, 750, 800, 900, 1000, 1050, 1200, 1350, 1400, 1500, 1600),
    "pad": (300, 350, 375, 400, 450, 500, 525, 675),
    "bass": (150, 175, 200, 225, 250),
}
PITCHES |= {"bell": PITCHES["chip"], "flute": PITCHES["chip"]}


@pytest.fixture(scope="module")
def clips() -> list[tuple[Labels, np.ndarray]]:
    return [(song.labels, render(song, FRAMES)) for song in map(compose, SEEDS)]


def by_value(clips: list[tuple[Labels, np.ndarray]], name: str, measure) -> dict[str, list[float]]:
    """The measure of every clip, by the clip's value of the label `name`."""
    found: dict[str, list[float]] = {value: [] for value in VALUES[name]}
    for labels, samples in clips:
        found[getattr(labels, name)].append(measure(samples))
    return found


def power(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Power spectrum of the whole clip and the frequencies in Hz."""
    return np.abs(np.fft.rfft(samples)) ** 2, np.fft.rfftfreq(samples.size, 1 / RATE)


def decibel(ratio: float) -> float:
    return 10 * float(np.log10(ratio))


def test_a_seed_gives_the_same_song_every_time() -> None:
    song = compose(11)
    first = render(song, 100)
    note_samples.cache_clear()
    assert compose(11) == song
    np.testing.assert_array_equal(render(song, 100), first)
    assert len({compose(seed) for seed in range(-100, 100)}) == 200


def test_the_songs_of_a_seed_do_not_drift_between_versions() -> None:
    """Known answers: a trained model is compared against songs of these seeds."""
    song = compose(0)
    assert tuple(asdict(song.labels).values()) == ("medium", "minor", "chip", "dark", "rock", "dense", "soft")
    assert (song.loop, song.chords, song.melody[:6]) == (384, ("i", "III", "iv", "v"), (0, 2, 4, 2, None, 7))


def test_samples_are_finite_float32_of_the_length_asked_for_and_do_not_clip(clips) -> None:
    for _, samples in clips:
        assert samples.dtype == np.float32 and samples.shape == (FRAMES * FRAME,)
        assert np.isfinite(samples).all()
        assert np.abs(samples).max() < 0.95


@pytest.mark.parametrize("brightness", VALUES["brightness"])
@pytest.mark.parametrize("voice", PITCHES)
def test_a_held_note_repeats_after_one_frame_or_two(voice: str, brightness: str) -> None:
    for hz in PITCHES[voice]:
        frames = note_samples(voice, brightness, (hz,), 40).reshape(40, FRAME)[16:39]  # after attack, before release
        period = 1 if hz % 50 == 0 else 2
        assert np.abs(frames).max() > 0.01
        np.testing.assert_allclose(frames[period:], frames[:-period], atol=2e-6)
        np.testing.assert_allclose(frames[:, 0], 0, atol=2e-6)  # so that it may be switched off here without a click


@pytest.mark.parametrize("voice", [*LEADS, "bass"])
def test_a_repeated_note_is_heard_anew(voice: str) -> None:
    """It fades out in its last frame, and all but the flute, which swells, begin with an accent."""
    hz = PITCHES[voice][0]
    level = np.abs(note_samples(voice, "bright", (hz,), 20)).reshape(20, FRAME).max(1)
    assert np.abs(note_samples(voice, "bright", (hz,), 20)[-8:]).max() < 0.05 * level[-2]
    assert level[0] < 0.8 * level[10] if voice == "flute" else level[0] > 1.5 * level[10]


def test_every_pitch_of_a_song_is_one_of_those() -> None:
    for song in map(compose, range(400)):
        for note in (*accompaniment(song), *lead(song)):
            assert set(note.hz) <= set(PITCHES.get(note.voice, ()))


@pytest.mark.parametrize("voice", ["kick", "chip", "bell"])
def test_the_same_event_gives_the_same_samples_on_any_frame(voice: str) -> None:
    hz = () if voice == "kick" else (675,)
    frames = mixed([Note(voice, 3, 6, hz), Note(voice, 20, 6, hz)], 40, "dark", 40).reshape(40, FRAME)
    assert np.abs(frames[3]).max() > 0.05
    np.testing.assert_array_equal(frames[3:9], frames[20:26])
    assert not frames[9:20].any()


def test_notes_keep_to_their_round_and_a_part_plays_one_at_a_time() -> None:
    for song in map(compose, SEEDS):
        everything = [(note, song.loop) for note in accompaniment(song)] + [(note, STEPS * STEP) for note in lead(song)]
        for part in (LEADS, ("bass",), ("pad",), ("kick", "snare", "hat")):
            notes = sorted((pair for pair in everything if pair[0].voice in part), key=lambda pair: pair[0].start)
            for (note, _), (after, _) in zip(notes, notes[1:], strict=False):
                assert note.start + note.length <= after.start
            assert all(note.length > 0 and note.start + note.length <= length for note, length in notes)


def test_a_song_repeats_after_whole_rounds_of_its_chords_and_its_melody() -> None:
    for song in map(compose, range(12)):
        assert STEPS * STEP % song.loop == 0
        whole = render(song, 2 * STEPS * STEP)
        np.testing.assert_array_equal(whole[: STEPS * STEP * FRAME], whole[STEPS * STEP * FRAME :])
        alone = mixed(accompaniment(song), song.loop, song.labels.brightness, 2 * song.loop)
        np.testing.assert_array_equal(alone[: song.loop * FRAME], alone[song.loop * FRAME :])


def test_a_melody_begins_with_a_note_and_never_plays_one_twice_in_a_row() -> None:
    for song in map(compose, SEEDS):
        notes = [note for note in song.melody if note is not None]
        assert len(song.melody) == STEPS and song.melody[0] is not None
        assert all(a != b for a, b in zip(notes, notes[1:], strict=False)) and set(notes) == set(range(8))


@pytest.mark.parametrize(("tempo", "bpm"), [("slow", 93.75), ("medium", 125), ("fast", 187.5)])
def test_the_onsets_that_are_heard_repeat_at_the_beat_of_the_tempo(tempo: str, bpm: float) -> None:
    for seed in range(24):
        song = song_from(replace(compose(seed).labels, tempo=tempo, drums="off"), seed)
        assert song.labels.bpm == bpm
        frames = mixed(accompaniment(song), song.loop, song.labels.brightness, STEPS * STEP)
        frames = frames.reshape(-1, 2 * FRAME)  # two: the period of some tones
        spectrum = np.abs(np.fft.rfft(frames, axis=1))
        rise = np.maximum(spectrum - np.roll(spectrum, 1, axis=0), 0).sum(1)
        rise -= rise.mean()
        beats = {each: round(30 / each * RATE / FRAME) for each in (187.5, 125, 93.75)}
        strength = {each: float(rise @ np.roll(rise, pairs)) for each, pairs in beats.items()}
        # Two fast beats are a slow one: the shortest of those that are as strong.
        found = next(each for each in strength if strength[each] > 0.7 * max(strength.values()))
        assert found == bpm, song.labels


def test_soft_is_loud_at_a_half_and_the_two_never_meet(clips) -> None:
    song = compose(3)
    soft, loud = (render(replace(song, labels=replace(song.labels, loudness=each)), 50) for each in ("soft", "loud"))
    np.testing.assert_array_equal(2 * soft, loud)
    level = by_value(clips, "loudness", lambda samples: decibel(np.mean(samples**2)))
    assert max(level["soft"]) + 0.5 < min(level["loud"])


def test_bright_songs_have_far_more_energy_above_2500_hz(clips) -> None:
    def top(samples: np.ndarray) -> float:
        spectrum, hz = power(samples)
        return decibel(spectrum[hz > 2500].sum() / spectrum.sum())

    share = by_value(clips, "brightness", top)
    assert max(share["dark"]) + 10 < min(share["bright"])


def test_only_songs_with_drums_have_anything_below_100_hz(clips) -> None:
    def bottom(samples: np.ndarray) -> float:
        spectrum, hz = power(samples)
        return decibel(spectrum[hz < 100].sum() / spectrum.sum())

    share = by_value(clips, "drums", bottom)
    assert max(share["off"]) + 6 < min(share["rock"] + share["dance"])


def test_rock_has_a_snare_on_the_second_beat_where_dance_has_a_kick() -> None:
    labels = compose(0).labels
    for seed in range(10):
        for drums, voice in (("rock", "snare"), ("dance", "kick")):
            song = song_from(replace(labels, drums=drums), seed)
            played = {note.voice for note in accompaniment(song) if note.start == labels.beat and not note.hz}
            assert played == {voice}


def test_major_and_minor_differ_in_the_pitches_that_sound(clips) -> None:
    def major(samples: np.ndarray) -> float:
        spectrum, hz = power(samples)
        energy = [
            sum(spectrum[np.abs(hz - f) < 2].sum() for f in group) for group in ((375, 500, 750), (350, 525, 700))
        ]
        return decibel(energy[0] / energy[1])

    balance = by_value(clips, "mode", major)
    assert min(balance["major"]) > 3 and max(balance["minor"]) < -3


def test_density_is_the_rate_of_the_melody_whatever_the_tempo() -> None:
    rate: dict[str, list[float]] = {"sparse": [], "dense": []}
    for song in map(compose, range(300)):
        rate[song.labels.density].append(len(lead(song)) / (STEPS * STEP * FRAME / RATE))
    assert max(rate["sparse"]) < 3.8 and min(rate["dense"]) > 4.4


def test_labels_are_balanced() -> None:
    songs = [compose(seed).labels for seed in range(2000)]
    for name, values in VALUES.items():
        counts = Counter(getattr(labels, name) for labels in songs)
        for value in values:
            expected = {"off": 0.5, "rock": 0.25, "dance": 0.25}.get(value, 1 / len(values))
            assert abs(counts[value] / 2000 - expected) < 0.05  # five standard errors at the least


def test_frames_are_few() -> None:
    """What makes the domain learnable: of 40 clips, most frames are a repetition of one already heard."""
    frames = [np.round(render(compose(seed), FRAMES).reshape(-1, FRAME) * 512).astype(np.int16) for seed in range(40)]
    distinct = {frame.tobytes() for clip in frames for frame in clip}
    assert len(distinct) < 0.45 * 40 * FRAMES


def test_what_is_not_possible_is_refused() -> None:
    labels = compose(0).labels
    with pytest.raises(ValueError, match="tempo must be one of slow, medium, fast, not 'brisk'"):
        replace(labels, tempo="brisk")
    with pytest.raises(ValueError, match="at least 1"):
        render(compose(0), 0)


def test_captions_say_only_what_is_true() -> None:
    for seed in range(2000):
        song = compose(seed)
        text = caption(song, seed)
        said = demands(text)
        assert said or text.split()[0] in ("a", "an"), text
        for name, allowed in said.items():
            assert getattr(song.labels, name) in allowed, (text, song.labels)


def test_captions_speak_of_everything_now_and_then_and_of_all_at_times() -> None:
    said = [set(demands(caption(compose(seed), seed))) for seed in range(1000)]
    for name in VALUES:
        assert 0.5 < np.mean([name in each for each in said]) < 0.9
    assert np.mean([len(each) == len(VALUES) for each in said]) > 0.25
    assert np.mean([len(each) <= 3 for each in said]) > 0.1


def test_captions_differ_by_seed_but_not_for_one() -> None:
    song = compose(5)
    texts = [caption(song, seed) for seed in range(50)]
    assert texts == [caption(song, seed) for seed in range(50)]
    assert len(set(texts)) > 40


def test_the_vocabulary_is_small() -> None:
    words = Counter(word for seed in range(3000) for word in caption(compose(seed), seed).replace(",", "").split())
    assert 50 < len(words) <= 110
    assert min(words.values()) >= 10  # no word too rare to be learnt
    assert all(word == word.lower() and word.isascii() for word in words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Slow bells with no drums", {"tempo": {"slow"}, "instrument": {"bell"}, "drums": {"off"}}),
        ("drums, in a minor key", {"drums": {"rock", "dance"}, "mode": {"minor"}}),
        ("a beat, a rock beat", {"drums": {"rock"}}),
        ("joyful", {"tempo": {"fast"}, "mode": {"major"}}),
        ("a song at 187.5 bpm", {"tempo": {"fast"}}),
        ("slow and fast", {"tempo": set()}),
        ("bells, notes 1 d5 - f5 a5 2 - g5", {"instrument": {"bell"}}),
        ("an orchestra, slowly", {}),
    ],
)
def test_demands_reads_prompts(text: str, expected: dict[str, set[str]]) -> None:
    assert demands(text) == expected


def test_no_phrase_begins_another() -> None:
    """Else `demands` could stop at the shorter one."""
    phrases = sorted(_MEANING)
    assert not [(a, b) for a, b in zip(phrases, phrases[1:], strict=False) if b.startswith(f"{a} ")]


# -- melodies ---------------------------------------------------------------------------------------------------------


def test_most_captions_spell_the_melody_from_the_frame_they_begin_with() -> None:
    spelling = 0
    for seed in range(300):
        song = compose(seed)
        for start in (0, 8 * STEP, 9 * STEP - 1):
            text, _, notes = caption(song, seed, start).partition(", notes ")
            assert text == caption(replace(song, melody=()), seed), "labels only"
            if not notes:
                continue
            found = notes.split()
            groups = [found[i : i + 1 + GROUP] for i in range(0, len(found), 1 + GROUP)]
            assert [group[0] for group in groups] == [str(i + 1) for i in range(len(groups))] and len(groups) <= GROUPS
            names = {name: i for i, (name, _) in enumerate(SCALES[song.labels.mode])}
            told = [names.get(name) for group in groups for name in group[1:]]
            assert told == list(song.melody[start // STEP :][: len(told)])
            spelling += start == 0
    assert 210 < spelling < 270


def test_spelling_a_melody_goes_round_at_its_end() -> None:
    song = compose(4)
    assert melody_from(song, (STEPS - 1) * STEP, 3) == (song.melody[-1], *song.melody[:2])
    assert spelled((0, None, 7, 1, 2), "minor") == "notes 1 d5 - g6 f5 2 g5"


def test_the_notes_of_a_melody_are_heard_in_the_sound_and_no_others() -> None:
    for song in map(compose, range(24)):
        wav = render(song, 64 * STEP)
        assert agreement(wav, song.melody, song.labels.mode) > 0.9
        assert agreement(wav, song.melody[7:], song.labels.mode) < 0.45
        assert len(heard(wav[:-1], song.labels.mode)) == 63
    assert sounding((None, 3, None, 5)) == [None, 3, 3, 5]
    with pytest.raises(ValueError, match="has no step of 2560"):
        agreement(wav[:2559], song.melody, "minor")
