"""One run per folder, or one per shard of it: `flock` on a file that names its holder.

The system lets go of a lock when its process ends, however it ends, so none is ever stale. Runs of shards share the
folder's lock and hold one of their own; a run of the whole wants the folder's for itself.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["FolderLock", "FolderLockedError"]

_FOLDER = ".musicgen_fast.lock"


class FolderLockedError(RuntimeError):
    """Another run works in the folder; the message says which."""


class FolderLock:
    """Holds the lock of `folder` from construction to `close`; a context manager.

    Args:
        shard: the name of a shard, '' for the whole.
        first: called while no other run can be in the folder: what dead runs left behind is nobody's then. Not called
            where other shards are at work.

    Raises:
        FolderLockedError: another run is at work. OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, shard: str = "", first: Callable[[], None] | None = None) -> None:
        self._folder = folder
        with ExitStack() as files:
            common = self._open(_FOLDER, files)
            own = self._open(f".musicgen_fast-{shard}.lock", files) if shard else common
            alone = _try(common, exclusive=True)
            if not alone and not shard:
                raise FolderLockedError(self._message())
            if alone and first is not None:
                first()
            if shard and not (_share(common) and _try(own, exclusive=True)):
                raise FolderLockedError(self._message(shard))
            _sign(own)
            self._files = files.pop_all()

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _open(self, name: str, files: ExitStack) -> int:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(self._folder / name, flags, 0o666)
        files.callback(os.close, descriptor)
        return descriptor

    def _message(self, shard: str = "") -> str:
        names = {_FOLDER, f".musicgen_fast-{shard}.lock"}
        if not shard:
            names |= {path.name for path in self._folder.glob(".musicgen_fast*.lock")}
        told = "; ".join(filter(None, (_holder(self._folder / name) for name in sorted(names))))
        what = f"shard {shard} of {self._folder}" if shard else str(self._folder)
        return f"another run works on {what} ({told or 'it does not say which'}); wait for it, or choose another folder"


def _share(descriptor: int) -> bool:
    """The lock, shared. A run that is just beginning has it for itself for a moment, so this waits."""
    until = time.monotonic() + 10
    while not _try(descriptor, exclusive=False):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def _try(descriptor: int, exclusive: bool) -> bool:
    """Whether the lock was free. A lock that this file has already is changed to the other kind."""
    if fcntl is None:  # Windows: locks of single bytes, which know no sharing
        import msvcrt

        try:
            if exclusive:
                os.lseek(descriptor, 2**30, os.SEEK_SET)  # far behind the text: a locked byte cannot be read
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(descriptor: int) -> None:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text.encode())


def _holder(path: Path) -> str:
    """Who holds the lock of a file for itself; '' for nobody."""
    try:
        with open(path, "rb") as file:
            if fcntl is not None and _try(file.fileno(), exclusive=False):
                return ""
            told = json.loads(file.read(4096))
        return f"process {int(told['pid'])} on {str(told['host'])[:80]} since {str(told['since'])[:40]}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
