"""Synthetic chip-tune with exact labels: what the demo model is trained on, and the ground truth for judging it.

Mono, 16 kHz. Everything is locked to the codec's frames of 320 samples (20 ms): notes start on a frame with their phase
at zero and last whole frames, and pitches are tuned (just intonation) to multiples of 25 Hz, so a held note repeats
after one or two frames and crosses zero at every frame border. The same event therefore gives the same samples, and
nearly the same tokens, wherever it stands. Audio is float32 [samples] in (-1, 1).
It does not know the codec, the language model or the captions (those are in captions.py).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from random import Random

import numpy as np
from numpy.typing import NDArray

Wave = NDArray[np.float32]

RATE = 16000  # samples per second
FRAME = 320  # samples in a codec frame, 20 ms
BARS = 4  # bars in the loop that a song repeats
SIXTEENTHS = 16  # in a bar

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

_FRAMES_PER_SIXTEENTH = {"slow": 10, "medium": 6, "fast": 4}
_GAIN = {"soft": 0.5, "loud": 1.0}  # to the bit 6.02 dB; at 0.25 soft songs share a few codes: too little energy
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
_SCALE: dict[str, tuple[int, ...]] = {
    "major": (600, 675, 750, 900, 1000, 1200, 1350, 1500),
    "minor": (600, 700, 800, 900, 1050, 1200, 1400, 1600),
}
# Bass, pad and the steps of _SCALE that belong to the chord; thirds that are not on the 25 Hz grid are left out.
_CHORDS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "I": (150, (300, 375, 450), (0, 2, 3, 5, 7)),
    "IV": (200, (300, 400, 500), (0, 4, 5)),
    "V": (225, (450, 675), (1, 3, 6)),
    "vi": (250, (300, 375, 500), (0, 2, 4, 5, 7)),
    "i": (150, (300, 350, 450), (0, 1, 3, 5, 6)),
    "III": (175, (350, 525), (1, 4, 6)),
    "iv": (200, (300, 400), (0, 2, 5, 7)),
    "v": (225, (450, 525, 675), (3, 4)),
}
_PROGRESSIONS = {
    "major": (("I", "vi", "IV", "V"), ("I", "V", "vi", "IV"), ("I", "IV", "V", "I")),
    "minor": (("i", "III", "iv", "v"), ("i", "iv", "v", "i"), ("i", "v", "III", "iv")),
}
_EIGHTHS = tuple(range(0, SIXTEENTHS, 2))
# Onsets of the lead in a bar. They depend on the tempo so that density means notes per second (at most 2.4 against at
# least 3.7), not notes per bar.
_RHYTHMS: dict[tuple[str, str], tuple[tuple[int, ...], ...]] = {
    ("sparse", "slow"): ((0, 4, 8, 12), (0, 4, 8)),
    ("sparse", "medium"): ((0, 4, 8, 12), (0, 8, 12)),
    ("sparse", "fast"): ((0, 8), (0, 8, 12)),
    ("dense", "slow"): (tuple(range(SIXTEENTHS)), (0, 2, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15)),
    ("dense", "medium"): (_EIGHTHS, (0, 2, 3, 4, 6, 8, 10, 11, 12, 14)),
    ("dense", "fast"): (_EIGHTHS, (0, 2, 4, 8, 10, 12)),
}
_CONTOURS = ((0, 1, 2, 1), (0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (0, 2, 0, 2), (1, 0, 1, 2))
# One hit at a time and at least eight frames apart, so that drums never overlap each other.
_DRUMS: dict[str, dict[str, tuple[int, ...]]] = {
    "off": {},
    "rock": {"kick": (0, 8), "snare": (4, 12), "hat": (2, 6, 10, 14)},
    "dance": {"kick": (0, 4, 8, 12), "hat": (2, 6, 10, 14)},
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
    def sixteenth(self) -> int:
        """Frames in a sixteenth note."""
        return _FRAMES_PER_SIXTEENTH[self.tempo]

    @property
    def bpm(self) -> float:
        """Beats (quarter notes) per minute, exact: 75, 125 or 187.5."""
        return 60 * RATE / (4 * self.sixteenth * FRAME)

    @property
    def mood(self) -> str:
        """One word, from mode and tempo."""
        return _MOODS[self.mode, self.tempo]


@dataclass(frozen=True)
class Note:
    """One event. start and length in frames from the beginning of the loop; hz is empty for drums, a chord for pads."""

    voice: str
    start: int
    length: int
    hz: tuple[int, ...] = ()


@dataclass(frozen=True)
class Song:
    """Labels, the notes of a loop of `loop` frames, and the frame of the loop that a rendering begins with."""

    labels: Labels
    loop: int
    start: int
    notes: tuple[Note, ...]


def compose(seed: int) -> Song:
    """A song with labels drawn at random; half of all songs have no drums, the rest is uniform. Pure in `seed`."""
    rng = Random(f"labels {seed}")  # a string: Random(-1) and Random(1) would be the same
    drawn = {name: rng.choice(values) for name, values in VALUES.items()}
    drawn["drums"] = rng.choice(("off", "off", "rock", "dance"))
    return song_from(Labels(**drawn), seed)


def song_from(labels: Labels, seed: int) -> Song:
    """A song with these labels: chords, two motifs (A A B A) and the start are drawn. Pure in its arguments.

    Half of all songs start with the loop, the others on any of its sixteenths.
    """
    rng = Random(f"song {seed}")
    bar = SIXTEENTHS * labels.sixteenth
    chords = rng.choice(_PROGRESSIONS[labels.mode])
    motif_a, motif_b = _motif(rng, labels), _motif(rng, labels)
    notes: list[Note] = []
    for i, (chord, motif) in enumerate(zip(chords, (motif_a, motif_a, motif_b, motif_a), strict=True)):
        notes += _bar(labels, i * bar, chord, motif)
    start = rng.choice((0, rng.randrange(BARS * SIXTEENTHS))) * labels.sixteenth
    return Song(labels, BARS * bar, start, tuple(notes))


def _motif(rng: Random, labels: Labels) -> tuple[tuple[int, int], ...]:
    """(sixteenth, step of the scale) of each note in a bar, before it meets a chord."""
    rhythm = rng.choice(_RHYTHMS[labels.density, labels.tempo])
    contour, base = rng.choice(_CONTOURS), rng.choice((0, 2, 4))
    return tuple((onset, base + contour[i % len(contour)]) for i, onset in enumerate(rhythm))


def _bar(labels: Labels, start: int, chord: str, motif: tuple[tuple[int, int], ...]) -> list[Note]:
    unit = labels.sixteenth
    root, pad, tones = _CHORDS[chord]
    notes = [Note("pad", start, SIXTEENTHS * unit, pad)]
    notes += [Note("bass", start + beat * 4 * unit, 4 * unit, (root,)) for beat in range(4)]
    ends = [onset for onset, _ in motif[1:]] + [SIXTEENTHS]
    for (onset, step), end in zip(motif, ends, strict=True):
        if onset % 4 == 0:  # on the beat: the nearest note of the chord
            step = min(tones, key=lambda tone: (abs(tone - step), tone))
        hz = _SCALE[labels.mode][step]
        notes.append(Note(labels.instrument, start + onset * unit, (end - onset) * unit, (hz,)))
    for drum, onsets in _DRUMS[labels.drums].items():
        notes += [Note(drum, start + onset * unit, _DRUM_FRAMES[drum]) for onset in onsets]
    return notes


def render(song: Song, frames: int) -> Wave:
    """`frames` frames of the song from its start, the loop repeating as often as needed: float32 [frames * FRAME]."""
    if frames < 1:
        raise ValueError(f"frames must be at least 1, not {frames}")
    loop = np.zeros(song.loop * FRAME, np.float32)
    for note in song.notes:
        begin, samples = note.start * FRAME, note_samples(note.voice, song.labels.brightness, note.hz, note.length)
        loop[begin : begin + samples.size] += samples
    loop *= np.float32(_GAIN[song.labels.loudness])
    return np.resize(np.roll(loop, -song.start * FRAME), frames * FRAME)  # np.resize repeats what it is given


@lru_cache(maxsize=4096)  # all there is comes to 918 waves, 36 MB; one takes 1.4 ms to make
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
        levels = np.minimum(border / 2, 1.0)
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
