"""What a user sees while pieces are made: a bar on a terminal, else a line now and then, or JSON lines for programs.

Counts pieces and seconds of audio; what earlier runs made counts for neither speed nor time left. Times are those of a
clock that never jumps. Called by several threads.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import IO, Any

__all__ = ["MODES", "Progress"]

MODES = ("bar", "lines", "json", "none")


class Progress:
    """Progress of a run.

    Args:
        pieces, seconds: to be made in this run, and their audio.
        skipped, failed: of earlier runs, which are left alone.
        mode: of MODES; None is a bar on a terminal and lines elsewhere.
        every: seconds between two lines.
    """

    def __init__(
        self, pieces: int, seconds: float, *, skipped: int = 0, failed: int = 0, mode: str | None = None,
        stream: IO[str] | None = None, every: float = 10.0, clock: Any = time.monotonic,
    ) -> None:  # fmt: skip
        self.pieces, self.seconds = pieces, seconds
        self.skipped, self.failed_before = skipped, failed
        self.done, self.failed, self.audio_seconds, self._settled = 0, 0, 0.0, 0.0
        self._stream = sys.stderr if stream is None else stream
        self._mode = mode or _pick(self._stream)
        if self._mode not in MODES:
            raise ValueError(f"unknown progress {mode!r}; choose one of {', '.join(MODES)}")
        self._every, self._clock = every, clock
        self._began = self._told = clock()
        self._lock = threading.RLock()
        self._bar: Any = None
        if self._mode == "bar":
            from tqdm import tqdm

            self._bar = tqdm(total=pieces, unit="piece", dynamic_ncols=True, file=self._stream)
        self._say("start")

    def begin(self) -> None:
        """The model is loaded: speed and time left count from here."""
        self._began = self._told = self._clock()

    def finished(self, key: str, seconds: float, path: str = "") -> None:
        """A piece is on disk: `seconds` of audio."""
        with self._lock:
            self.done += 1
            self.audio_seconds += seconds
            self._settled += seconds
            self._item({"key": key, "status": "done", "audio_seconds": round(seconds, 3), "path": path})

    def gave_up(self, key: str, seconds: float, error: str) -> None:
        """A piece failed for good; `seconds` is what it would have had."""
        with self._lock:
            self.failed += 1
            self._settled += seconds
            self._item({"key": key, "status": "failed", "error": error})
            if self._mode in ("bar", "lines"):
                self._line(f"failed: {_visible(key)}: {_visible(error)}")

    def close(self) -> None:
        """The last words. Harmless when called again."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
            if self._mode != "none":
                self._say("end")
                self._mode = "none"

    @property
    def elapsed(self) -> float:
        return max(self._clock() - self._began, 1e-9)

    def told(self) -> dict[str, Any]:
        """Where things stand. `eta` in seconds, None before anything is made."""
        speed = self.audio_seconds / self.elapsed
        left = max(self.seconds - self._settled, 0.0)
        return {
            "done": self.done,
            "failed": self.failed + self.failed_before,
            "skipped": self.skipped,
            "pieces": self.pieces + self.skipped + self.failed_before,
            "audio_seconds": round(self.audio_seconds, 3),
            "elapsed": round(self.elapsed, 3),
            "audio_seconds_per_second": round(speed, 3),
            "eta": round(left / speed, 1) if speed else None,
        }

    def _item(self, what: dict[str, Any]) -> None:
        if self._mode == "json":
            self._say("item", what)
        elif self._bar is not None:
            told = self.told()
            self._bar.set_postfix_str(
                f"{told['audio_seconds_per_second']:.1f} s audio/s, {told['failed']} failed, ETA {_clock(told['eta'])}",
                refresh=False,
            )
            self._bar.update(1)
        elif self._clock() - self._told >= self._every:
            self._told = self._clock()
            self._say("progress")

    def _say(self, event: str, more: dict[str, Any] | None = None) -> None:
        told = self.told()
        if self._mode == "json":
            self._line(json.dumps({"event": event, **(more or {}), **({} if event == "item" else told)}))
        elif self._mode == "lines":
            settled = told["done"] + told["failed"] + told["skipped"]
            self._line(
                f"{settled}/{told['pieces']} pieces, {told['skipped']} of them done before, {told['failed']} failed, "
                f"{told['audio_seconds_per_second']:.1f} s of audio per second, "
                + (f"{_clock(told['eta'])} left" if event != "end" else f"took {_clock(told['elapsed'])}")
            )

    def _line(self, text: str) -> None:
        try:
            if self._bar is not None:
                self._bar.clear()
            print(text, file=self._stream, flush=True)
            if self._bar is not None:
                self._bar.refresh()
        except (OSError, ValueError):  # whoever listened is gone; the rendering goes on
            self._mode, self._bar = "none", None


def _pick(stream: IO[str]) -> str:
    off = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
    return "bar" if stream.isatty() and not off else "lines"


def _visible(text: str) -> str:
    """One line of ASCII without control characters: ids come from strangers, and terminals obey."""
    return ascii(text[:200])[1:-1]


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
