"""What happened to each piece: JSON lines that are only ever appended, and what a new run concludes from them.

The order of the lines counts, never their clocks. A line that a crash cut off is taken away when the file is opened for
writing; a damaged line elsewhere is passed over and reported. A result is on disk before `finish` returns. Pieces are
told apart by key and fingerprint, so a changed piece is a new one. Knows nothing of audio.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["History", "Ledger", "State", "ledger_paths", "read_ledgers", "sync_folder"]

_log = logging.getLogger("musicgen_fast.render")
_MAX_LINE = 2**20  # bytes; ours have about a thousand
_MAX_ERROR = 2000  # characters of a message


@dataclass
class State:
    """What the ledgers say of a piece.

    Attributes:
        done: the last line that calls it done. failed: the last that calls it failed, since then.
        attempts: the number of the last attempt that failed, 0 if none. final: trying again is of no use.
        lost: runs that died while it was under way. lost_alone: those where nothing else was.
    """

    done: dict[str, Any] | None = None
    failed: dict[str, Any] | None = None
    attempts: int = 0
    final: bool = False
    lost: int = 0
    lost_alone: int = 0
    open: dict[str, Any] | None = None  # a start without an end so far

    def apply(self, line: dict[str, Any]) -> None:
        """The next line about this piece, in the order of its file."""
        status = line["status"]
        if status == "started":
            self.close()
            self.open = line
        elif status == "done":
            self.done, self.failed, self.open = line, None, None
            self.attempts, self.final, self.lost, self.lost_alone = 0, False, 0, 0
        elif status == "failed":
            self.open, self.failed = None, line
            self.attempts, self.final = _whole(line.get("attempt"), 1), line.get("final") is True
        elif status == "stopped":  # ended by no fault of its own
            self.open = None

    def close(self) -> None:
        """The run that started it is over."""
        if self.open is not None:
            self.lost += 1
            if self.open.get("alone") is True:
                self.lost_alone += 1
                self.attempts = max(self.attempts, _whole(self.open.get("attempt"), 1))
            self.open = None


@dataclass
class History:
    """All ledgers of a folder. `garbage`: (file, line, how it begins) of lines that are none of ours."""

    states: dict[tuple[str, str], State] = field(default_factory=dict)
    garbage: list[tuple[str, int, str]] = field(default_factory=list)

    def of(self, key: str, fingerprint: str) -> State:
        return self.states.get((key, fingerprint)) or State()

    def done_keys(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of finished pieces by key, whatever their fingerprint."""
        found: dict[str, list[dict[str, Any]]] = {}
        for (key, _), state in self.states.items():
            if state.done is not None:
                found.setdefault(key, []).append(state.done)
        return found


def ledger_paths(folder: Path) -> list[Path]:
    """The ledgers of all runs in a folder, sharded or not."""
    return sorted(path for path in folder.glob("ledger*.jsonl") if path.is_file())


def read_ledgers(paths: Iterable[Path]) -> History:
    """Everything that these files say; OSError where one cannot be read. Writes nothing."""
    history = History()
    for path in paths:
        states: dict[tuple[str, str], State] = {}
        for number, line in enumerate(_complete_lines(path), 1):
            entry = _entry(line)
            if entry is None:
                history.garbage.append((str(path), number, repr(line[:60])))
            elif "key" in entry:
                states.setdefault((entry["key"], entry["fingerprint"]), State()).apply(entry)
        for identity, state in states.items():
            state.close()
            _join(history.states.setdefault(identity, State()), state)
    for name, number, start in history.garbage:
        _log.warning("%s, line %d is damaged and was passed over: %s", name, number, start)
    return history


def _join(whole: State, part: State) -> None:
    """Ledgers of two shards: files have no common order, so a piece is done if any of them says so."""
    whole.done = part.done or whole.done
    whole.failed = part.failed or whole.failed
    whole.attempts, whole.final = max(whole.attempts, part.attempts), whole.final or part.final
    whole.lost, whole.lost_alone = whole.lost + part.lost, whole.lost_alone + part.lost_alone


def _complete_lines(path: Path) -> Iterable[bytes]:
    """Lines without their ends; the last one, if nothing ends it, only where it is whole."""
    with open(path, "rb") as file:
        while line := file.readline(_MAX_LINE):
            if line.endswith(b"\n"):
                yield line[:-1]
            elif len(line) < _MAX_LINE:
                if _entry(line) is not None:
                    yield line
            else:  # no line of ours: pass over the rest of it
                yield line
                while (rest := file.readline(_MAX_LINE)) and not rest.endswith(b"\n"):
                    pass


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("status"), str):
        return None
    if entry["status"] == "run":
        return entry
    return entry if isinstance(entry.get("key"), str) and isinstance(entry.get("fingerprint"), str) else None


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default


class Ledger:
    """A ledger that is written to, by one process and any of its threads. Closes as a context manager."""

    def __init__(self, path: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Opens or makes the file, takes away a torn last line, and notes that a run begins (`facts`: what it is).

        OSError: the file cannot be written to.
        """
        self.path = path
        self._lock = threading.Lock()
        self._began = time.monotonic()
        new = not path.exists()
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        self._file = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
        try:
            self._size = _whole_end(self._file)
            os.ftruncate(self._file, self._size)
            if self._size and _read_at(self._file, self._size - 1) != b"\n":
                os.lseek(self._file, self._size, os.SEEK_SET)
                self._write(b"\n", sync=False)
            os.lseek(self._file, self._size, os.SEEK_SET)
            self._append({"status": "run", **(facts or {})}, sync=True)
            if new:
                sync_folder(path.parent)
        except BaseException:
            os.close(self._file)
            raise

    def start(self, key: str, fingerprint: str, attempt: int, alone: bool = False) -> None:
        """A piece enters the engine. Not synced: this line matters when the process dies, not when the machine does."""
        told: dict[str, Any] = {"status": "started", "key": key, "fingerprint": fingerprint, "attempt": attempt}
        self._append(told | ({"alone": True} if alone else {}), sync=False)

    def done(self, key: str, fingerprint: str, **facts: Any) -> dict[str, Any]:
        """Its files are on disk. Returns the line."""
        return self._append({"status": "done", "key": key, "fingerprint": fingerprint, **facts}, sync=True)

    def fail(
        self, key: str, fingerprint: str, attempt: int, error: BaseException | str, final: bool = False, **facts: Any
    ) -> dict[str, Any]:
        """An attempt failed. `final`: another one would fail as well. Returns the line."""
        kind = type(error).__name__ if isinstance(error, BaseException) else "Error"
        told = {"error_type": kind, "error": str(error)[:_MAX_ERROR], "final": final}
        line = {"status": "failed", "key": key, "fingerprint": fingerprint, "attempt": attempt, **told, **facts}
        return self._append(line, sync=True)

    def stop(self, key: str, fingerprint: str) -> None:
        """A piece left the engine unfinished, by no fault of its own: an interrupt, a full disk."""
        self._append({"status": "stopped", "key": key, "fingerprint": fingerprint}, sync=False)

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _append(self, line: dict[str, Any], sync: bool) -> dict[str, Any]:
        line = {**line, "t": round(time.monotonic() - self._began, 3), "time": round(time.time(), 3)}
        with self._lock:
            self._write(json.dumps(line, ensure_ascii=True, allow_nan=False).encode() + b"\n", sync)
        return line

    def _write(self, data: bytes, sync: bool) -> None:
        """All of `data`, or nothing: a full disk leaves no half line behind."""
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            if sync:
                os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            raise
        self._size += len(data)


def _whole_end(descriptor: int) -> int:
    """Bytes up to the end of the last whole line; what stands behind it was cut off, or is a line without its end."""
    size = os.fstat(descriptor).st_size
    tail = _read_at(descriptor, max(size - _MAX_LINE, 0))
    last = tail[tail.rfind(b"\n") + 1 :]
    return size if not last or _entry(last) is not None else size - len(last)


def _read_at(descriptor: int, begin: int) -> bytes:
    """From `begin` to the end."""
    os.lseek(descriptor, begin, os.SEEK_SET)
    data = b""
    while block := os.read(descriptor, _MAX_LINE):
        data += block
    return data


def sync_folder(folder: Path) -> None:
    """Make new names in a folder last through a loss of power; systems that cannot open folders do without."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)
