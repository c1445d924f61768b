"""Sound while it is made: a generation's frames through the streaming codec, as chunks.

`Stream` is the iterator that `MusicGen.stream` returns: it makes a chunk when it is asked for one, and keeps nothing of
what it gave away. Shapes: tokens int64 [B, K, t], audio float [B, C, n], t frames of `hop` samples each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .codec import EnCodec, InterleaveStereo
from .codec_stream import StreamingDecoder
from .engine import Generation

FORMAT = 1
FIRST_FRAMES = 1  # of the first chunk; each is twice the last one until `chunk_seconds` are reached


@dataclass(frozen=True)
class Chunk:
    """A piece of a stream; the pieces follow each other without a gap.

    Attributes:
        audio: float [B, C, n], n = t * hop samples at the codec's rate, on the model's device.
        tokens: int64 [B, K, t], the frames of that audio.
        start_seconds: where it begins.
    """

    audio: Tensor
    tokens: Tensor
    start_seconds: float


@dataclass
class Finished:
    """What stays of a generation that has ended: its counters, and none of its memory."""

    steps_done: int
    steps_total: int | None
    done: bool = True

    def __next__(self) -> Tensor:
        raise StopIteration

    def close(self) -> None:
        pass

    def save(self) -> dict[str, Any]:
        raise AssertionError("there is nothing to save")


@dataclass
class Fade:
    """A fade-out: gain 1 until `first`, then a straight line to 0 at `end` (samples)."""

    first: int
    end: int

    def __call__(self, audio: Tensor, start: int) -> Tensor:
        """audio [B, C, n] that begins at sample `start`."""
        if start + audio.shape[2] <= self.first:
            return audio
        at = torch.arange(start, start + audio.shape[2], device=audio.device, dtype=torch.float32)
        return audio * ((self.end - at) / (self.end - self.first)).clamp(0, 1)


class Stream:
    """An iterator of `Chunk`s. Use it in a `with` block, or `close` it, to free its memory early.

    The tokens of all chunks together are those of `generate` with the same arguments; the audio is the codec's decode
    of them, within the rounding of float32. Nothing is made before it is asked for, so a slow consumer costs no memory.
    Without a seed it draws from torch's global generator as it goes: whoever draws in between changes what follows.

    Attributes: `steps_done`, `steps_total` (None: endless) of the language model; `seconds`, given away so far.

    Source: our own; transformers' streamers give tokens only.
    """

    def __init__(
        self,
        generation: Generation | Finished,
        codec: EnCodec | InterleaveStereo,
        prompt: Tensor,
        *,
        chunk_frames: int,
        request: dict[str, Any],
        fade: Fade | None = None,
        saved: dict[str, Any] | None = None,
    ) -> None:
        """What `MusicGen.stream` fills in.

        Args:
            generation, codec: what makes the frames, and what turns them into sound.
            prompt: int64 [B, K, P], the first frames of the sound.
            chunk_frames: of the largest chunks. fade: at the end; None for none.
            request: kept for `save`, and not read. saved: what `save` returned, to go on from.
        """
        self._generation: Generation | Finished = generation
        self._codec, self._request = codec, request
        self._chunk_frames, self._fade = chunk_frames, fade
        self._hop = round(codec.sample_rate / codec.frame_rate)
        self._decoder = StreamingDecoder(codec, len(prompt))
        self._target = min(FIRST_FRAMES, chunk_frames)
        self._given = 0  # frames
        self._tokens = [prompt] if prompt.shape[2] else []  # frames that are not given away yet
        self._fresh = list(self._tokens)  # of these, what the codec has not seen
        self._audio: list[Tensor] = []  # their samples, as far as they are there
        self._flushed = self._closed = False
        if saved is not None:
            self._restore(saved, prompt.device)

    @property
    def steps_done(self) -> int:
        """Steps (columns of tokens) that the language model has done."""
        return self._generation.steps_done

    @property
    def steps_total(self) -> int | None:
        """Steps that it will have done at the end; None: endless."""
        return self._generation.steps_total

    @property
    def sample_rate(self) -> int:
        """Samples a second of every chunk's audio."""
        return self._codec.sample_rate

    @property
    def seconds(self) -> float:
        """Seconds of sound given away so far."""
        return self._given / self._codec.frame_rate

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        if self._closed:
            raise StopIteration
        try:
            frames = self._fill()
        except BaseException:
            self.close()
            raise
        if frames == 0:
            self.close()
            raise StopIteration
        self._target = min(2 * self._target, self._chunk_frames)
        return self._take(frames)

    def _fill(self) -> int:
        """Generate and decode until a chunk is there; its frames, 0 at the end."""
        while (frames := self._ready()) < self._target and not self._flushed:
            # Decoding in pieces as large as the chunk: a push costs a fixed amount of dispatches.
            while self._waiting() < self._target + self._decoder.look_ahead and not self._generation.done:
                new = next(self._generation)
                if new.shape[2]:
                    self._tokens.append(new)
                    self._fresh.append(new)
            if self._fresh:
                self._audio.append(self._decoder.push(torch.cat(self._fresh, dim=2)))
                self._fresh = []
            if self._generation.done:
                self._audio.append(self._decoder.finish())
                self._flushed = True
        return min(frames, self._target) if not self._flushed else min(self._ready(), self._chunk_frames)

    def _waiting(self) -> int:
        """Frames that are known and not given away."""
        return sum(part.shape[2] for part in self._tokens)

    def _ready(self) -> int:
        """Frames whose samples are all there."""
        return sum(part.shape[2] for part in self._audio) // self._hop

    def _take(self, frames: int) -> Chunk:
        audio, self._audio = _cut(self._audio, frames * self._hop)
        tokens, self._tokens = _cut(self._tokens, frames)
        start, self._given = self._given, self._given + frames
        if self._fade is not None:
            audio = self._fade(audio, start * self._hop)
        return Chunk(audio, tokens, start / self._codec.frame_rate)

    def collect(self) -> tuple[Tensor, Tensor]:
        """All that is left, (audio [B, C, n], tokens [B, K, t]). ValueError for an endless stream or one that ended."""
        if self.steps_total is None:
            raise ValueError("an endless stream cannot be collected: give it a duration")
        chunks = list(self)
        if not chunks:
            raise ValueError("the stream has ended: there is nothing left to collect")
        return torch.cat([c.audio for c in chunks], dim=2), torch.cat([c.tokens for c in chunks], dim=2)

    def close(self) -> None:
        """End the stream and free what it holds; iterating stops. A second call does nothing."""
        self._closed = True
        self._generation.close()
        self._generation = Finished(self.steps_done, self.steps_total)
        self._tokens, self._fresh, self._audio = [], [], []

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Where the stream is, between two chunks, for `MusicGen.resume` here or elsewhere, on the same model.

        Tensors, numbers, strings, lists and dicts: fit for `torch.save` and `torch.load(weights_only=True)`.

        Raises:
            ValueError: the stream has ended or was closed.
        """
        if self._closed:
            raise ValueError("the stream has ended or was closed: there is nothing to go on from")
        return {
            "format": FORMAT,
            "request": self._request,
            "generation": None if self._generation.done else self._generation.save(),
            "steps": self._generation.steps_done,
            "codec": self._decoder.state(),
            "tokens": _copy(self._tokens),
            "fresh": _copy(self._fresh),
            "audio": _copy(self._audio),
            "target": self._target,
            "given": self._given,
            "flushed": self._flushed,
        }

    def _restore(self, saved: dict[str, Any], device: torch.device) -> None:
        self._decoder.restore(saved["codec"])
        for name in ("tokens", "fresh", "audio"):
            setattr(self, f"_{name}", [part.to(device) for part in saved[name]])
        self._target, self._given, self._flushed = saved["target"], saved["given"], saved["flushed"]


def _cut(parts: list[Tensor], count: int) -> tuple[Tensor, list[Tensor]]:
    """The first `count` positions of the joined parts along their last axis, and the rest."""
    joined = torch.cat(parts, dim=2)
    rest = joined[:, :, count:]
    # A copy: a view would keep the memory of all that was given away.
    return joined[:, :, :count].clone(), [rest.clone()] if rest.shape[2] else []


def _copy(parts: list[Tensor]) -> list[Tensor]:
    return [part.detach().to("cpu", copy=True) for part in parts]
