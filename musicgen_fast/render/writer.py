"""Encoding and writing beside the model: threads that take pieces from a queue that cannot grow without end.

libsndfile and fsync leave Python's lock alone, so one thread keeps up with anything but MP3 on a fast GPU (0.6 s for
30 s of stereo). `submit` waits while the queue is full; what went wrong comes back piece by piece. Knows nothing of
ledgers: `store` does what there is to do with a piece.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .output import Piece

__all__ = ["Failure", "Writer"]


@dataclass(frozen=True)
class Failure:
    """A piece that could not be stored, and why."""

    piece: Piece
    error: BaseException


class Writer:
    """`threads` threads that call `store(piece)`, in the order of `submit`.

    Args:
        store: called for each piece; what it raises becomes a `Failure`.
        max_pieces, max_bytes: in the queue or in work; a single piece is always let in, however large.
    """

    def __init__(
        self, store: Callable[[Piece], None], threads: int = 1, max_pieces: int = 32, max_bytes: float = 2**30
    ) -> None:
        if threads < 1 or max_pieces < 1:
            raise ValueError(f"a writer needs a thread and a place in its queue, got {threads} and {max_pieces}")
        self._store, self._max_pieces, self._max_bytes = store, max_pieces, max_bytes
        self._queue: deque[Piece] = deque()
        self._pieces, self._bytes = 0, 0  # queued and in work
        self._failures: list[Failure] = []
        self._closed = False
        self._changed = threading.Condition()
        # daemons: a second Ctrl-C must not wait for an encoder; files appear whole or not at all
        self._threads = [threading.Thread(target=self._work, daemon=True, name="writer") for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Pieces that were submitted and are not stored."""
        return self._pieces

    @property
    def failed(self) -> bool:
        """Whether `failures` has something to tell."""
        return bool(self._failures)

    def submit(self, piece: Piece) -> None:
        """Queue a piece, waiting for room. RuntimeError after `close` or `stop`."""
        with self._changed:
            while not self._closed and not self._has_room(piece):
                self._changed.wait()
            if self._closed:
                raise RuntimeError("the writer is closed")
            self._queue.append(piece)
            self._pieces += 1
            self._bytes += piece.bytes
            self._changed.notify_all()

    def failures(self) -> list[Failure]:
        """Those since the last call."""
        with self._changed:
            found, self._failures = self._failures, []
            return found

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until everything submitted is stored or failed; whether that is so after `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pieces, timeout)

    def stop(self) -> list[Piece]:
        """Take no more and start no more; returns what was still queued. What is in work goes on: see `drain`."""
        with self._changed:
            self._closed = True
            dropped = list(self._queue)
            self._queue.clear()
            self._leave(*dropped)
            return dropped

    def close(self) -> None:
        """Store everything that was submitted, and end the threads."""
        self.drain()
        self.stop()
        for thread in self._threads:
            thread.join()

    def _has_room(self, piece: Piece) -> bool:
        if not self._pieces:
            return True
        return self._pieces < self._max_pieces and self._bytes + piece.bytes <= self._max_bytes

    def _leave(self, *pieces: Piece) -> None:
        self._pieces -= len(pieces)
        self._bytes -= sum(piece.bytes for piece in pieces)
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._closed:
                        return
                    self._changed.wait()
                piece = self._queue.popleft()
            failure = None
            try:
                self._store(piece)
            except BaseException as error:  # MemoryError too: the thread must live on, or `submit` would wait for ever
                failure = Failure(piece, error)
            with self._changed:
                if failure is not None:
                    self._failures.append(failure)
                self._leave(piece)
            del piece, failure  # not until the next one comes
