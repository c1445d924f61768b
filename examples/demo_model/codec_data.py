"""What the demo codec hears: synthetic songs made on the fly, and the tracks of `immich_memories_music` if installed.

Waveforms are float32 at 16 kHz; crops begin and end on the songs' 20 ms frames. What is drawn depends on (seed, step)
alone, so that a resumed run hears what an uninterrupted one would. Held out: songs of negative seeds, and the first
track of each of the package's five moods. It knows nothing of the codec.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from .synth import FRAME, RATE, compose, render

_SEEDS = 2**31


class Crops:
    """Batches of crops of `frames` frames, `share` of them (0..1) from the tracks, if there are any."""

    def __init__(self, frames: int, tracks: Sequence[Tensor] = (), share: float = 0.2, seed: int = 0) -> None:
        self.frames, self.seed = frames, seed
        self.tracks = [track for track in tracks if len(track) >= frames * FRAME]
        self.share = share if self.tracks else 0.0

    def batch(self, step: int, size: int) -> Tensor:
        """Float32 [size, 1, frames * FRAME]; the same for the same seed and step."""
        rng = Random(f"crops {self.seed} {step}")
        return torch.stack([self._crop(rng) for _ in range(size)])[:, None]

    def _crop(self, rng: Random) -> Tensor:
        if rng.random() >= self.share:
            song = compose(rng.randrange(_SEEDS))
            start = rng.randrange(song.loop)
            return torch.from_numpy(render(song, start + self.frames)[start * FRAME :].copy())
        track = rng.choices(self.tracks, [len(t) for t in self.tracks])[0]
        start = rng.randrange(len(track) // FRAME - self.frames + 1) * FRAME
        return track[start : start + self.frames * FRAME]


def held_out_songs(count: int, frames: int) -> Tensor:
    """Float32 [count, frames * FRAME]: songs of seeds -1, -2, ..., which `Crops` never draws."""
    return torch.stack([torch.from_numpy(render(compose(-1 - i), frames).copy()) for i in range(count)])


def held_out_excerpts(tracks: Sequence[Tensor], count: int, frames: int) -> Tensor:
    """Float32 [count, frames * FRAME], evenly from the tracks, evenly over their length."""
    rows, each = [], -(-count // len(tracks))
    for i in range(count):
        track, part = tracks[i % len(tracks)], i // len(tracks)
        start = (len(track) // FRAME - frames) * (part + 1) // (each + 1) * FRAME
        rows.append(track[start : start + frames * FRAME])
    return torch.stack(rows)


def read_tracks() -> tuple[list[Tensor], list[Tensor]]:
    """Tracks for training and held-out ones, each float32 [n] mono; both empty if the package is not installed."""
    spec = importlib.util.find_spec("immich_memories_music")
    if spec is None or not spec.submodule_search_locations:
        return [], []
    train, held = [], []
    for mood in sorted(p for p in (Path(spec.submodule_search_locations[0]) / "tracks").iterdir() if p.is_dir()):
        files = sorted(p for p in mood.iterdir() if p.suffix in (".opus", ".ogg", ".flac", ".mp3", ".wav"))
        held += [_read(path) for path in files[:1]]
        train += [_read(path) for path in files[1:]]
    return train, held


def _read(path: Path) -> Tensor:
    import julius
    import soundfile

    wav, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = torch.from_numpy(np.ascontiguousarray(wav.mean(1)))
    return julius.resample_frac(mono, rate, RATE).clamp(-1, 1)
