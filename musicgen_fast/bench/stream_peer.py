"""Streaming with transformers, as its users do it: every so often decode all tokens so far, play what is new.

Tokens int64 [B * K, columns] with the delay pattern, as its `generate` holds them; sound [C, n]. It has no streaming
codec and no windows: what runs longer than the model's window goes on in one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .machine import synchronize
from .stream import StreamJob
from .transformers_folder import load_folder, tokenizer_of, write_folder

__all__ = ["TransformersPlayer"]

# The codec looks 4 frames ahead: the end of a decode changes once more tokens come. The streamer that transformers once
# showed kept (50 - 4) // 6 = 7 frames back at a second a chunk.
HELD_BACK = 7


class TransformersPlayer:
    """`MusicgenForConditionalGeneration`, of the same weights. See `stream_worker.Player`."""

    def __init__(self, job: StreamJob):
        self.job, self.folder = job, Path(job.folder) / job.precision
        self.sample_rate, self.window = 0, None
        self.step_ms: list[float] = []
        self.changes: list[int] = []
        self.tokens: Tensor | None = None  # int64 [K, T] of the last stream, as far as it came

    def prepare(self) -> None:
        """Write the model as transformers reads it, in the precision asked for; once for all rounds."""
        dtype = self.job.dtype  # AbsentError for one that it has not
        if not (self.folder / "generation_config.json").is_file():  # written last
            write_folder(self.folder, self.job.model, dtype)
        self.tokenizer = tokenizer_of(self.job.model, self.folder)

    def load(self) -> None:
        self.model = load_folder(self.folder, self.job.dtype, self.job.device)
        self.sample_rate = self.model.config.audio_encoder.sampling_rate
        self.frame_rate = self.model.config.audio_encoder.frame_rate
        channels, books = self.model.decoder.config.audio_channels, self.model.decoder.num_codebooks
        self.delays = [k // channels for k in range(books)]

    @torch.no_grad()
    def play(self, text: str, take: Callable[[Tensor], bool]) -> None:
        """Every chunk to `take`, in the thread that generates: what a queue to another one adds is left out."""
        from transformers import StoppingCriteriaList

        frames = max(1, int(self.job.seconds * self.frame_rate))
        listener = Listener(self, frames, max(1, round(self.job.peer_chunk * self.frame_rate)), take)
        self.step_ms = listener.step_ms
        ids = torch.tensor([self.tokenizer.ids(text)], device=self.job.device)
        try:
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=250,
                guidance_scale=3.0,
                max_new_tokens=frames + max(self.delays),
                # Not `streamer=`: transformers 5 takes it in `generate` of this class and never hands it a token. A
                # criterion is called after every column, with all of them, in every version.
                stopping_criteria=StoppingCriteriaList([listener]),
            )
        except Enough:
            pass
        self.tokens = listener.tokens

    def decode(self, tokens: Tensor) -> Tensor:
        """Sound float32 [C, n] of int64 [K, t], on the CPU."""
        channels = self.model.decoder.config.audio_channels
        parts = [
            self.model.audio_encoder.decode(tokens[None, None, c::channels], [None]).audio_values
            for c in range(channels)
        ]  # stereo: left and right books take turns
        audio: Tensor = torch.cat(parts, dim=1)[0]
        return audio.float().cpu()


class Enough(Exception):
    """Ends `generate`: all frames are there, or the listener left. Stopping it would have it decode everything again,
    after the last chunk."""


class Listener:
    """A stopping criterion that never stops: it sees the columns, and after every `every` of them makes sound."""

    def __init__(self, player: TransformersPlayer, frames: int, every: int, take: Callable[[Tensor], bool]):
        self.player, self.frames, self.every, self.take = player, frames, every, take
        self.step_ms: list[float] = []
        self.tokens: Tensor | None = None
        self.given = 0  # samples
        self._left: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """`input_ids` [K, columns], the first one a start token."""
        synchronize(self.player.job.device)
        if self._left is not None:
            self.step_ms.append(1000 * (perf_counter() - self._left))
        columns = input_ids.shape[1] - 1
        ready = min(self.frames, columns - max(self.player.delays))
        last = ready == self.frames
        if last or (columns % self.every == 0 and ready > HELD_BACK):
            self._decode(input_ids[:, 1:], ready, last)
        self._left = perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def _decode(self, columns: Tensor, ready: int, last: bool) -> None:
        """Undo the delays, decode all frames, give away what is new."""
        self.tokens = torch.stack([columns[k, d : d + ready] for k, d in enumerate(self.player.delays)])
        audio = self.player.decode(self.tokens)
        until = audio.shape[1] if last else audio.shape[1] // ready * (ready - HELD_BACK)
        new, self.given = audio[:, self.given : until], until
        if not self.take(new) or last:
            raise Enough
