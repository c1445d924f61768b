"""Synthetic sounds [n] at 16 kHz whose tempo, key, drums and brightness are known, for the tests of evaluation/."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

RATE = 16000
MAJOR, MINOR = (0, 4, 7), (0, 3, 7)
# Roots (semitones above the tonic) and triads of a cadence that names its key: I IV V I and i iv v i.
CADENCES = {
    "major": ((0, MAJOR), (5, MAJOR), (7, MAJOR), (0, MAJOR)),
    "minor": ((0, MINOR), (5, MINOR), (7, MINOR), (0, MINOR)),
}


def noise(seconds: float, seed: int = 0) -> Tensor:
    return torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(seed))


def note(hertz: float, seconds: float, partials: int = 4, decay: float = 4.0) -> Tensor:
    """A decaying tone, partial p at 1 / p; partials above 7.5 kHz are left out."""
    time = torch.arange(int(seconds * RATE)) / RATE
    tone = sum(torch.sin(2 * math.pi * hertz * p * time) / p for p in range(1, partials + 1) if hertz * p < 7500)
    attack = (time / 0.005).clamp(max=1)
    return tone * attack * torch.exp(-decay * time)


def place(sounds: Iterable[tuple[float, Tensor]], seconds: float) -> Tensor:
    """Sounds added up at their times (s)."""
    total = torch.zeros(int(seconds * RATE))
    for start, sound in sounds:
        first = round(start * RATE)
        part = sound[: max(len(total) - first, 0)]
        total[first : first + len(part)] += part
    return total


def clicks(bpm: float, seconds: float = 6.0, per_beat: int = 1, seed: int = 0) -> Tensor:
    """Short noise bursts at every beat, softer ones (0.5) in between, starting off the grid."""
    burst = noise(0.02, seed) * torch.linspace(1, 0, int(0.02 * RATE))
    step = 60 / bpm / per_beat
    times = [(i, 0.1 + i * step) for i in range(int((seconds - 0.1) / step))]
    return place([(t, burst * (1.0 if i % per_beat == 0 else 0.5)) for i, t in times], seconds)


def chords(tonic: int, mode: str, seconds: float = 4.0, partials: int = 4) -> Tensor:
    """The cadence of a key, tonic 0 = C, around middle C."""
    each = seconds / 4
    sounds = []
    for i, (root, triad) in enumerate(CADENCES[mode]):
        for step in triad:
            pitch = 48 + tonic + root % 12 + step
            sounds.append((i * each, note(440 * 2 ** ((pitch - 69) / 12), each, partials, decay=1.5)))
    return place(sounds, seconds)


def drum_loop(bpm: float = 120.0, seconds: float = 4.0, seed: int = 0) -> Tensor:
    """Kick on the beats (a falling sine), hat on the eighths (high-passed noise)."""
    time = torch.arange(int(0.15 * RATE)) / RATE
    kick = torch.sin(2 * math.pi * (50 * time + 60 * (1 - torch.exp(-30 * time)) / 30)) * torch.exp(-20 * time)
    hat = torch.diff(noise(0.05, seed), n=2, append=torch.zeros(2)) * torch.exp(-60 * time[: int(0.05 * RATE)])
    beat = 60 / bpm
    beats = [(i * beat, kick) for i in range(int(seconds / beat) + 1)]
    eighths = [(i * beat / 2, 0.15 * hat) for i in range(int(2 * seconds / beat) + 1)]
    return place(beats + eighths, seconds)


def piece(
    bpm: float, tonic: int, mode: str, *, drums: bool, bright: bool, dense: bool, gain: float, seed: int
) -> Tensor:
    """6 s of a cadence, a melody on its scale (1 or 4 notes a beat) and drums, at a level: labels for classifiers."""
    generator = torch.Generator().manual_seed(seed)
    scale = (0, 2, 4, 5, 7, 9, 11) if mode == "major" else (0, 2, 3, 5, 7, 8, 10)
    beat, seconds = 60 / bpm, 6.0
    step = beat / (2 if dense else 1)
    partials = 12 if bright else 2
    melody = []
    for i in range(int(seconds / step)):
        degree = scale[int(torch.randint(7, (), generator=generator))]
        melody.append((i * step, 0.7 * note(440 * 2 ** ((60 + tonic + degree - 69) / 12), 0.5, partials, decay=8.0)))
    bars = [
        (i * 4 * beat, chords_of(tonic, mode, i % 4, 4 * beat, partials)) for i in range(int(seconds / 4 / beat) + 1)
    ]
    total = place(melody + bars, seconds)
    if drums:
        total = total + drum_loop(bpm, seconds, seed)
    return gain * total


def chords_of(tonic: int, mode: str, index: int, seconds: float, partials: int) -> Tensor:
    """One chord of the cadence."""
    root, triad = CADENCES[mode][index]
    pitches = [48 + tonic + root % 12 + step for step in triad]
    return 0.5 * sum((note(440 * 2 ** ((p - 69) / 12), seconds, partials, decay=1.0) for p in pitches), torch.zeros(()))
