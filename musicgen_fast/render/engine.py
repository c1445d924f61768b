"""Pieces side by side in the slots of one model: each enters alone, at any step, and leaves when it is done.

The codec runs beside, in threads of its own, piece by piece in chunks of a fixed length; so what comes out for a piece
depends on nothing but the piece. Windows begin with a prefill: it takes the time of a few steps where the next window's
cache, filled step by step (`shadow.py`), would take a second set of keys and values. Knows nothing of folders, ledgers
and attempts: keys in, `Result`s out. Shapes: tokens int64 [K, T], wav float32 [C, n].
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..beside import beside
from ..codec_stream import StreamingDecoder
from ..decoders.cpu import CpuDecoder
from ..musicgen import MusicGen
from ..slot_engine import RequestError, SlotEngine
from .item import Item
from .requests import request_of

__all__ = ["Engine", "Result", "is_out_of_memory"]

_log = logging.getLogger("musicgen_fast.render")
_CHUNK_SECONDS = 10.0  # of the codec: its activations take 25 MB a second
_TOO_BIG = (MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Result:
    """What became of a piece: made (`wav`), failed (`error`), or put back for want of memory (neither).

    `final`: of `Session.fail`; None where the error itself tells. `suspect`: it was one of several when something went
    wrong that ended them all; it comes again alone, which tells whose fault it was.
    """

    key: str
    wav: Tensor | None = None
    tokens: Tensor | None = None
    error: Exception | None = None
    final: bool | None = None
    suspect: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Running:
    """A piece in a slot."""

    key: str
    prompt: Tensor
    since: float


class Engine:
    """A model whose slots pieces come to.

    Attributes:
        limit: pieces at once; halved where the memory did not do.
        busy, room: slots in use, and slots that could have been, summed over the steps for which pieces waited.
        halved: what it was halved to, if so. lost: why the device can do no more, if so.
    """

    shares_process = True  # a piece that kills its process kills this one

    def __init__(self, model: MusicGen, limit: int, frames: int, timeout: float | None = None) -> None:
        """`frames`: of the longest window that will come. `timeout`: seconds for a piece, looked at between steps."""
        self.model, self.limit, self._frames, self._timeout = model, limit, frames, timeout
        self.busy = self.room = 0
        self.halved: int | None = None
        self.lost: Exception | None = None
        self._alone = self._closed = False
        self._threads = torch.get_num_threads()
        pinned = isinstance(model.lm.decoder, CpuDecoder)
        # One thread for each piece of torch's work on a CPU: how many there are shows in the last bits of its sums.
        # The decoder has threads of its own, whose number shows nowhere.
        if pinned:
            torch.set_num_threads(1)
        # Two where there are two cores: of a small model the codec is half of the work, and at the end all of it.
        cooks = min(self._threads, max(2, min(4, self._threads // 4))) if pinned else 1
        self._cooks = ThreadPoolExecutor(cooks, "codec", torch.set_num_threads, (1 if pinned else self._threads,))
        self._cooking: dict[Future[Tensor], tuple[_Running, Tensor]] = {}
        self._most_cooking = 2 * limit + cooks
        self._running: dict[int, _Running] = {}
        self._put_back: list[Result] = []
        self._open()

    def _open(self) -> None:
        device = self.model.device
        decoder = self.model.lm.decoder
        self._slots = SlotEngine(decoder, self.limit, self._frames, device=device, shadow=False)
        reserve = getattr(decoder, "reserve", None)
        if reserve is not None:  # the CUDA decoder's memory: growing into it would take the old and the new at once
            try:
                reserve(2 * self.limit, self._slots.slots.num_steps)
            except torch.OutOfMemoryError as error:
                if self.limit > 1:  # a single piece says it when it comes
                    self._halve(error)

    @property
    def sample_rate(self) -> int:
        return self.model.sample_rate

    @property
    def running(self) -> int:
        """Pieces in slots."""
        return len(self._running)

    @property
    def pending(self) -> int:
        """Pieces in slots or with the codec."""
        return len(self._running) + len(self._cooking) + len(self._put_back)

    def takes(self, alone: bool = False) -> bool:
        """Whether a piece can be admitted, or one that must be alone."""
        if not self.pending:
            return True
        return not alone and not self._alone and self.running < self.limit

    def admit(self, key: str, item: Item, recording: Path | None = None, alone: bool = False) -> None:
        """Put a piece into a slot. What goes wrong with it comes out of `step`."""
        self._alone, began = alone, time.monotonic()
        try:
            request = request_of(self.model, item, recording)
            (number,) = self._slots.admit(request)
        except _TOO_BIG as error:
            self._put_back += self._crowded([key], error)
        except Exception as error:
            self._put_back.append(Result(key, error=error, final=isinstance(error, (ImportError, OSError)) or None))
        else:
            self._running[number] = _Running(key, request.prompt, began)

    @torch.no_grad()
    def step(self, waiting: bool = False) -> list[Result]:
        """One step of all pieces, and what the codec has finished since the last one.

        Where nothing runs it waits for the codec. `waiting`: more pieces want a slot; these steps count as occupancy.
        """
        results, self._put_back = self._put_back, []
        if self._running:
            if waiting:
                self.busy += len(self._running)
                self.room += self.limit
            results += self._advance()
            results += self._late()
        return results + self._cooked(block=not results and not self._running)

    def _advance(self) -> list[Result]:
        try:
            ended = self._slots.step(whole=True)
        except RequestError as error:
            cause = error.__cause__
            gone = [self._running.pop(number) for number in error.requests]
            if isinstance(cause, _TOO_BIG):
                return self._crowded([piece.key for piece in gone], cause)
            return [Result(piece.key, error=cause if isinstance(cause, ValueError) else error) for piece in gone]
        except Exception as error:  # whose fault it is nobody knows, and the slots are half a step apart
            return self._start_over(error)
        for number, frames in ended.items():
            self._cook(self._running.pop(number), frames)
        return []

    def _crowded(self, keys: list[str], error: Exception) -> list[Result]:
        """Pieces for which there was no room: they come again when others have left; a single one is too large."""
        if not self._running and self.limit == 1:
            self._rebuild()
            return [Result(key, error=error, final=False) for key in keys]
        self._halve(error)
        return [Result(key) for key in keys]

    def _halve(self, error: Exception) -> None:
        before, self.limit = self.limit, max(1, self.limit // 2)
        self.halved = self.limit
        _log.warning("no memory for %d pieces at once, going on with %d: %s", before, self.limit, error)
        if not self._running:
            self._rebuild()

    def _start_over(self, error: Exception) -> list[Result]:
        """After an error in the middle of a step: every piece that ran goes back, or failed if it was that kind."""
        gone = list(self._running.values())
        self._running.clear()
        if isinstance(error, _TOO_BIG) and len(gone) > 1:
            self._halve(error)
            return [Result(piece.key) for piece in gone]
        try:
            self._rebuild()
        except Exception as lost:
            self.lost = lost
        return [Result(piece.key, error=error, final=False, suspect=len(gone) > 1) for piece in gone]

    def _rebuild(self) -> None:
        """New slots: the caches that the old ones keep are freed."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # a device that is lost says so here
            torch.cuda.empty_cache()
        self._open()

    def _late(self) -> list[Result]:
        if self._timeout is None:
            return []
        now = time.monotonic()
        late = {number: piece for number, piece in self._running.items() if now - piece.since > self._timeout}
        for number in late:
            self._slots.cancel(number)
            del self._running[number]
        return [Result(p.key, error=TimeoutError(f"took longer than {self._timeout:g} s")) for p in late.values()]

    # -- codec --------------------------------------------------------------------------------------------------------

    def _cook(self, piece: _Running, frames: Tensor) -> None:
        while len(self._cooking) >= self._most_cooking:  # tokens are small, but pieces should become files
            wait(self._cooking, return_when=FIRST_COMPLETED)
            self._put_back += self._cooked(block=False)
        tokens = torch.cat([piece.prompt, frames], dim=1)
        self._cooking[self._cooks.submit(self._decode, tokens)] = (piece, tokens)

    def _decode(self, tokens: Tensor) -> Tensor:
        """wav [C, n] on the CPU, in chunks of a fixed length; on a GPU beside the steps of the others."""
        with beside(tokens.device, tokens):
            return self._decoded(tokens)

    def _decoded(self, tokens: Tensor) -> Tensor:
        codec = self.model.compression_model
        chunk = int(_CHUNK_SECONDS * codec.frame_rate)
        if tokens.shape[1] <= chunk:
            return codec.decode(tokens[None])[0].float().cpu()  # a stream of one chunk takes a fifth longer
        stream = StreamingDecoder(codec)
        parts = []
        for part in tokens[None].split(chunk, dim=2):
            if self._closed:  # nobody waits for it: the process must not, either
                raise CancelledError
            parts.append(stream.push(part))
        return torch.cat([*parts, stream.finish()], dim=2)[0].float().cpu()

    def _cooked(self, block: bool) -> list[Result]:
        if block and self._cooking:
            wait(self._cooking, timeout=0.5, return_when=FIRST_COMPLETED)  # a Ctrl-C is heard in between
        results = []
        for future in [future for future in self._cooking if future.done()]:
            piece, tokens = self._cooking.pop(future)
            error = future.exception()
            if error is None:
                facts = {"seconds_taken": time.monotonic() - piece.since, "batch": self.limit}
                results.append(Result(piece.key, future.result(), tokens.cpu(), facts=facts))
            elif isinstance(error, Exception):
                results.append(Result(piece.key, error=error, final=False if is_out_of_memory(error) else None))
            else:
                raise error
        return results

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Drop what runs, and give torch its threads back."""
        self._closed = True
        self._slots.close()
        self._running.clear()
        self._cooks.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(self._threads)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, _TOO_BIG)
