"""Batches for the demo's language model: crops of a token set on the frame grid, with captions drawn anew every time.

tokens int64 [B, K, T]; captions as ids and mask int64 [B, N], padded at the right; keep float32 [B], 0 where a caption
is to be dropped; spelled int64 [B, T], the place in ids of the note or the "-" of each frame's step, -1 where the
caption spells none. What is drawn depends on (seed, step) alone, so that a resumed run sees what an uninterrupted one
would. It knows neither audio nor the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musicgen_fast.conditioning.text import TextTokenizer

from .captions import caption
from .synth import SCALES, STEP
from .tokens import TokenSet

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # tokens, ids, mask, keep, spelled


class Batches:
    """Every row of a token set once an epoch.

    Args:
        frames: T of a crop; ValueError where the clips are shorter.
        aligned: share of crops that begin where the song does. Of the others, half begin on a step of the melody and
            half on any frame.
        drop: share of captions that are dropped.
        spelling: captions may spell melodies.
    """

    def __init__(
        self,
        data: TokenSet,
        tokenizer: TextTokenizer,
        *,
        size: int = 16,
        frames: int = 512,
        seed: int = 0,
        aligned: float = 0.5,
        drop: float = 0.15,
        spelling: bool = True,
    ) -> None:
        self.room = data.tokens.shape[2] - frames
        if self.room < 0:
            raise ValueError(f"clips of {data.tokens.shape[2]} frames are shorter than crops of {frames}")
        self.data, self.tokenizer, self.size, self.frames, self.seed = data, tokenizer, size, frames, seed
        self.aligned, self.drop, self.spelling = aligned, drop, spelling
        names = ["-", *(name for scale in SCALES.values() for name, _ in scale)]
        self._notes = torch.tensor(sorted({tokenizer.ids(name)[0] for name in names}))
        self._order: tuple[int, Any] = (-1, None)  # (epoch, permutation)

    def batch(self, step: int) -> Batch:
        """What training step `step` sees."""
        rng = Random(f"crops {self.seed} {step}")
        crops, texts, phases = [], [], []
        for place in range(step * self.size, (step + 1) * self.size):
            row = self._row(place)
            start = self._start(rng)
            crops.append(np.asarray(self.data.tokens[row, :, start : start + self.frames], dtype=np.int64))
            song = self.data.songs[row] if self.spelling else replace(self.data.songs[row], melody=())
            texts.append(caption(song, rng.randrange(2**40), start))
            phases.append(start % STEP)
        keep = torch.tensor([float(rng.random() >= self.drop) for _ in crops])
        ids, mask = self.ids(texts)
        return torch.from_numpy(np.stack(crops)), ids, mask, keep, self._spelled(ids, phases)

    def first(self, count: int, captions: bool, frames: int | None = None) -> Batch:
        """The beginnings of the first `count` clips with their own captions, or with all of them dropped; as long as
        the crops, or `frames`."""
        tokens = torch.from_numpy(np.asarray(self.data.tokens[:count, :, : frames or self.frames], dtype=np.int64))
        ids, mask = self.ids(self.data.captions[:count])
        spelled = self._spelled(ids, [0] * len(tokens))[:, : tokens.shape[2]]
        return tokens, ids, mask, torch.full((len(tokens),), float(captions)), spelled

    def ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of texts."""
        rows = [self.tokenizer.ids(text) for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])

    def _spelled(self, ids: Tensor, phases: Sequence[int]) -> Tensor:
        """Where each frame's note stands in the captions, [B, T]; `phases`: frames of the first step that are cut."""
        found = torch.full((len(ids), self.frames), -1)
        for row, notes, phase in zip(found, torch.isin(ids, self._notes), phases, strict=True):
            places = notes.nonzero()[:, 0].repeat_interleave(STEP)[phase : phase + self.frames]
            row[: len(places)] = places
        return found

    def _start(self, rng: Random) -> int:
        if rng.random() < self.aligned:
            return 0
        start = rng.randint(0, self.room)
        return start // STEP * STEP if rng.random() < 0.5 else start

    def _row(self, place: int) -> int:
        """The row of the `place`-th crop of a run."""
        epoch, position = divmod(place, len(self.data.tokens))
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = epoch, rng.permutation(len(self.data.tokens))
        return int(self._order[1][position])


class Mixed:
    """Long crops, and now and then a batch of beginnings: there the caption has something to say.

    The labels hold some 6 nats, and after half a second the sound itself has told most of them: who trains on long
    crops alone learns to read the past and the melody, and to ignore the labels. Of several widths, since brightness is
    heard in the first frame, and the tempo in the first beat.

    Args:
        short: beginnings of songs, of one width each; they take turns.
        share: of the steps that take them, 0..1.
    """

    def __init__(self, long: Batches, short: Sequence[Batches], share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"the share of beginnings must be from 0 to 1, not {share}")
        self.data, self.long, self.short, self.share = long.data, long, short, share

    def batch(self, step: int) -> Batch:
        """What training step `step` sees."""
        before, after = int(step * self.share), int((step + 1) * self.share)
        if after == before:
            return self.long.batch(step - before)
        return self.short[before % len(self.short)].batch(before // len(self.short))
