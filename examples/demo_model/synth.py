"""Synthetic chip-tune with exact labels: what the demo model is trained on, and the ground truth for judging it.

Mono, 16 kHz. Everything is locked to the codec's frames of 320 samples (20 ms): notes start on a frame with their phase
at zero and last whole frames, and pitches are tuned (just intonation) to multiples of 25 Hz, so a held note repeats
after one or two frames and crosses zero at every frame border. The same event therefore gives the same samples, and
nearly the same tokens, wherever it stands. Audio is float32 [samples] in (-1, 1). It does not know the codec, the
language model or the captions (those are in captions.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from random import Random

import numpy as np
from numpy.typing import NDArray

Wave = NDArray[np.float32]

RATE = 16000  # samples per second
FRAME = 320  # samples in a codec frame, 20 ms
BEATS = 4  # in a bar
STEP = 8  # frames in a step of the melody, 160 ms at every tempo: a beat has four, three or two of them
STEPS = 192  # in a melody, 30.72 s: whole rounds of the accompaniment at every tempo

VALUES: dict[str, tuple[str, ...]] = {
    "tempo": ("slow", "medium", "fast"),
    "mode": ("major", "minor"),
    "instrument": ("chip", "bell", "flute"),
    "brightness": ("dark", "bright"),
    "drums": ("off", "rock", "dance"),
    "density": ("sparse", "dense"),
    "loudness": ("soft", "loud"),
}
"""Every label and the values that it may have."""

_FRAMES_PER_BEAT = {"slow": 32, "medium": 24, "fast": 16}
_GAIN = {"soft": 0.5, "loud": 1.0}  # 6.02 dB to the bit; at 0.25 soft songs share a few codes: too little energy
_MOODS = {
    ("major", "slow"): "calm",
    ("major", "medium"): "happy",
    ("major", "fast"): "playful",
    ("minor", "slow"): "sad",
    ("minor", "medium"): "mysterious",
    ("minor", "fast"): "tense",
}

# Five notes a mode over the same 600 Hz (about D5), and on upwards. The minor third is 7/6 and the minor seventh 7/4:
# the usual 6/5 and 9/5 would repeat only every five frames, and 7/6 lies further from the major third.
SCALES: dict[str, tuple[tuple[str, int], ...]] = {
    "major": tuple(zip("d5 e5 f#5 a5 b5 d6 e6 f#6".split(), (600, 675, 750, 900, 1000, 1200, 1350, 1500), strict=True)),
    "minor": tuple(zip("d5 f5 g5 a5 c6 d6 f6 g6".split(), (600, 700, 800, 900, 1050, 1200, 1400, 1600), strict=True)),
}
"""The notes that a melody may have, from the lowest on: name and Hz."""
# Bass and pad; thirds that are not on the 25 Hz grid are left out.
_CHORDS: dict[str, tuple[int, tuple[int, ...]]] = {
    "I": (150, (300, 375, 450)),
    "IV": (200, (300, 400, 500)),
    "V": (225, (450, 675)),
    "vi": (250, (300, 375, 500)),
    "i": (150, (300, 350, 450)),
    "III": (175, (350, 525)),
    "iv": (200, (300, 400)),
    "v": (225, (450, 525, 675)),
}
_PROGRESSIONS = {
    "major": (("I", "vi", "IV", "V"), ("I", "V", "vi", "IV"), ("I", "IV", "V", "I")),
    "minor": (("i", "III", "iv", "v"), ("i", "iv", "v", "i"), ("i", "v", "III", "iv")),
}
# How likely a note of the melody begins on a step that is a beat, and on any other: 2.7 to 3.1 and 5.2 to 5.3 notes a
# second, whatever the tempo.
_ONSETS = {"sparse": (0.6, 0.4), "dense": (0.9, 0.8)}
# Beats of the bar, halves between them. One hit at a time and at least eight frames apart: drums never overlap.
_DRUMS: dict[str, dict[str, tuple[float, ...]]] = {
    "off": {},
    "rock": {"kick": (0, 2), "snare": (1, 3), "hat": (0.5, 1.5, 2.5, 3.5)},
    "dance": {"kick": (0, 1, 2, 3), "hat": (0.5, 1.5, 2.5, 3.5)},
}
_DRUM_FRAMES = {"kick": 6, "snare": 6, "hat": 2}

# (frequency as a multiple of the note's, amplitude); the bell's are those of a struck bar, later put on the 50 Hz grid.
_PARTIALS: dict[str, tuple[tuple[float, float], ...]] = {
    "bass": tuple((n, n**-1.5) for n in range(1, 17)),
    "pad": ((1, 1.0), (2, 0.25), (4, 0.1)),
    "chip": tuple((n, 1 / n) for n in range(1, 13, 2)),
    "bell": ((1, 1.0), (2.76, 0.6), (5.4, 0.4)),
    "flute": ((1, 1.0), (2, 0.2), (3, 0.12), (4, 0.1), (5, 0.1), (6, 0.08)),
}
_LEVEL = {"bass": 0.12, "pad": 0.07, "chip": 0.2, "bell": 0.26, "flute": 0.15, "kick": 0.36, "snare": 0.3, "hat": 0.16}
_CUTOFF = {"dark": 1200.0, "bright": 5000.0}  # Hz
_NOISE_BAND = {  # Hz
    ("snare", "dark"): (500.0, 1800.0),
    ("snare", "bright"): (900.0, 5500.0),
    ("hat", "dark"): (1200.0, 2100.0),
    ("hat", "bright"): (4500.0, 7600.0),
}


@dataclass(frozen=True)
class Labels:
    """What a listener could say of a song; VALUES lists what each may be. ValueError for anything else."""

    tempo: str
    mode: str
    instrument: str
    brightness: str
    drums: str
    density: str
    loudness: str

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) not in VALUES[field.name]:
                raise ValueError(f"{field.name} must be one of {', '.join(VALUES[field.name])}, not {value!r}")

    @property
    def beat(self) -> int:
        """Frames in a beat (a quarter note)."""
        return _FRAMES_PER_BEAT[self.tempo]

    @property
    def bpm(self) -> float:
        """Beats per minute, exact: 93.75, 125 or 187.5."""
        return 60 * RATE / (self.beat * FRAME)

    @property
    def mood(self) -> str:
        """One word, from mode and tempo."""
        return _MOODS[self.mode, self.tempo]


@dataclass(frozen=True)
class Note:
    """One event. start and length in frames from the beginning; hz is empty for drums, a chord for pads."""

    voice: str
    start: int
    length: int
    hz: tuple[int, ...] = ()


@dataclass(frozen=True)
class Song:
    """A melody over chords; each of them is repeated, as often as a rendering needs.

    Attributes:
        melody: for each step of STEP frames the note of SCALES that begins there, None where none does.
        chords: one a bar.
    """

    labels: Labels
    melody: tuple[int | None, ...] = ()
    chords: tuple[str, ...] = ()

    @property
    def loop(self) -> int:
        """Frames in a round of the chords."""
        return len(self.chords) * BEATS * self.labels.beat


def compose(seed: int) -> Song:
    """A song with labels drawn at random; half of all songs have no drums, the rest is uniform. Pure in `seed`."""
    rng = Random(f"labels {seed}")  # a string: Random(-1) and Random(1) would be the same
    drawn = {name: rng.choice(values) for name, values in VALUES.items()}
    drawn["drums"] = rng.choice(("off", "off", "rock", "dance"))
    return song_from(Labels(**drawn), seed)


def song_from(labels: Labels, seed: int) -> Song:
    """A song with these labels; chords and melody are drawn. Pure in its arguments.

    Any note may follow any other (in a scale of five they get along) and nothing comes twice: what a melody will be is
    told by a caption that spells it, and by nothing else. 64 steps, the model's window, hold 100 nats where the song is
    sparse and 132 where it is dense; all the labels together hold 6.
    """
    rng = Random(f"song {seed}")
    chords = rng.choice(_PROGRESSIONS[labels.mode])
    (on_beat, between), notes = _ONSETS[labels.density], range(len(SCALES[labels.mode]))
    last = rng.choice(notes)
    melody: list[int | None] = [last]
    for step in range(1, STEPS):
        begins = rng.random() < (between if step * STEP % labels.beat else on_beat)
        if begins:
            last = rng.choice([note for note in notes if note != last])
        melody.append(last if begins else None)
    return Song(labels, tuple(melody), chords)


def accompaniment(song: Song) -> list[Note]:
    """Pad, bass and drums of one round of the chords."""
    beat, bar, notes = song.labels.beat, BEATS * song.labels.beat, []
    for i, chord in enumerate(song.chords):
        root, pad = _CHORDS[chord]
        notes.append(Note("pad", i * bar, bar, pad))
        notes += [Note("bass", i * bar + each * beat, beat, (root,)) for each in range(BEATS)]
        for drum, beats in _DRUMS[song.labels.drums].items():
            notes += [Note(drum, i * bar + int(each * beat), _DRUM_FRAMES[drum]) for each in beats]
    return notes


def lead(song: Song) -> list[Note]:
    """The melody's notes; each lasts until the next one begins."""
    begun = [(step, note) for step, note in enumerate(song.melody) if note is not None]
    ends = [*(step for step, _ in begun[1:]), len(song.melody)]
    scale, voice = SCALES[song.labels.mode], song.labels.instrument
    return [
        Note(voice, step * STEP, (end - step) * STEP, (scale[note][1],))
        for (step, note), end in zip(begun, ends, strict=True)
    ]


def render(song: Song, frames: int) -> Wave:
    """The song's first `frames` frames: float32 [frames * FRAME]."""
    if frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    wav = mixed(accompaniment(song), song.loop, song.labels.brightness, frames)
    wav += mixed(lead(song), len(song.melody) * STEP, song.labels.brightness, frames)
    return wav * np.float32(_GAIN[song.labels.loudness])


def mixed(notes: Sequence[Note], length: int, brightness: str, frames: int) -> Wave:
    """The notes at the level of a loud song, float32 [frames * FRAME]; they are repeated every `length` frames."""
    part = np.zeros(length * FRAME, np.float32)
    for note in notes:
        begin, samples = note.start * FRAME, note_samples(note.voice, brightness, note.hz, note.length)
        part[begin : begin + samples.size] += samples
    return np.resize(part, frames * FRAME)  # np.resize repeats what it is given; of nothing it makes zeros


@lru_cache(maxsize=4096)  # one takes 1.4 ms to make
def note_samples(voice: str, brightness: str, hz: tuple[int, ...], length: int) -> Wave:
    """One note at the level of a loud song, float32 [length * FRAME]. Shared between callers, so read-only."""
    made = _drum(voice, brightness, length) if voice in _DRUM_FRAMES else _tone(voice, brightness, hz, length)
    samples = (_LEVEL[voice] * made).astype(np.float32)
    samples.flags.writeable = False
    return samples


def _tone(voice: str, brightness: str, hz: tuple[int, ...], length: int) -> NDArray[np.float64]:
    """Sum of partials of mean square 1/2 at envelope 1, so that neither brightness nor chord size alters the level."""
    seconds = np.arange(length * FRAME) / RATE
    levels = _envelope(voice, length)
    total, power = np.zeros(length * FRAME), 0.0
    for note in hz:
        for i, (ratio, amplitude) in enumerate(_PARTIALS[voice]):
            partial = ratio * note
            if voice == "bell":
                partial = note if i == 0 else round(partial / 50) * 50
            if partial >= 0.46 * RATE:
                continue
            amplitude /= 1 + (partial / _CUTOFF[brightness]) ** 4
            # A bell's upper partials die away first.
            shape = levels ** (1 + 2 * i) if voice == "bell" else levels
            knots = np.interp(np.arange(length * FRAME) / FRAME, np.arange(length + 1), shape)
            total += amplitude * knots * np.sin(2 * np.pi * partial * seconds)
            power += amplitude**2
    return total / power**0.5


def _envelope(voice: str, length: int) -> NDArray[np.float64]:
    """Level at each of the length + 1 frame borders, straight lines between; constant soon, so that frames repeat."""
    border = np.arange(length + 1)
    if voice == "pad":  # every partial is zero at the borders: it can be switched on and off there without a click
        return np.ones(length + 1)
    if voice == "bell":
        levels = np.maximum(2.0 ** (-border / 5), 0.15)
    elif voice == "flute":
        levels = np.minimum(0.5 + border / 4, 1.0)
    else:  # chip and bass: an accent of five frames
        levels = np.maximum(1 - border / 8, 0.4)
    levels[-1] = 0.0
    return levels


def _drum(voice: str, brightness: str, length: int) -> NDArray[np.float64]:
    """A hit with peak 1 that ends at zero."""
    seconds = np.arange(length * FRAME) / RATE
    fade = 1 - np.arange(length * FRAME) / (length * FRAME)
    body = np.sin(2 * np.pi * (50 * seconds + 3.5 * (1 - np.exp(-seconds / 0.025))))  # 190 Hz falling to 50
    if voice != "kick":
        spectrum = np.fft.rfft(_shift_register_noise(length * FRAME))
        hz = np.fft.rfftfreq(length * FRAME, 1 / RATE)
        low, high = _NOISE_BAND[voice, brightness]
        noise = np.fft.irfft(spectrum * ((hz > low) & (hz < high)), length * FRAME)
        noise /= np.abs(noise).max()
        body = noise if voice == "hat" else 0.7 * noise + 0.3 * body
    hit = body * fade * np.exp(-seconds / (0.02 if voice == "hat" else 0.08))
    return hit / np.abs(hit).max()


def _shift_register_noise(count: int) -> NDArray[np.float64]:
    """+-1 from a 15 bit linear feedback shift register, as game consoles made noise: the same on every machine."""
    state, out = 1, np.empty(count)
    for i in range(count):
        bit = (state ^ (state >> 1)) & 1
        state = (state >> 1) | (bit << 14)
        out[i] = 2.0 * (state & 1) - 1
    return out
