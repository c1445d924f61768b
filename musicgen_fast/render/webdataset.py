"""Pieces in tar files that WebDataset reads: `key.wav`, `key.json` and `key.npz` side by side, some hundred to a shard.

A shard grows under a temporary name and appears whole; its pieces count as done from then on, so a crash costs at most
the shard that was open. A shard that was renamed just before a crash tells by its JSON files what is in it. Members
have no times and no owners: the same pieces in the same order give the same bytes.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..audio_encode import replacing
from .ledger import History, sync_folder
from .output import Piece, Settings, Stored, Written, encoded, ends_run
from .resume import Decision, Present

__all__ = ["TarShards", "check_unchanged", "remove_shards", "shards_present", "unrecorded"]

_log = logging.getLogger("musicgen_fast.render")
_NAME = re.compile(r"(?P<prefix>shard(?:-\d+-of-\d+)?)-(?P<number>\d{6,})\.tar")


class TarShards:
    """Writes pieces into tars below `folder`. Used by several threads at once: they encode side by side.

    Args:
        tag: of a run of one shard of the manifest, such as '3-of-16'; '' for the whole.
        max_pieces, max_bytes: a tar is closed when it has so many.
    """

    def __init__(
        self, folder: Path, settings: Settings, tag: str = "", max_pieces: int = 1000, max_bytes: float = 2**30
    ) -> None:
        self.folder, self.settings = folder, settings
        self._prefix = f"shard-{tag}" if tag else "shard"
        self._max_pieces, self._max_bytes = max_pieces, max_bytes
        self._lock = threading.Lock()
        self._number = 1 + max((n for prefix, n, _ in _shards(folder) if prefix == self._prefix), default=-1)
        self._files = ExitStack()
        self._tar: tarfile.TarFile | None = None
        self._pending: list[tuple[Piece, dict[str, Any]]] = []
        self._broken = ""

    def write(self, piece: Piece) -> list[Stored]:
        """Add a piece; returns those of the shard that it filled.

        An OSError of the tar ends the run: nobody knows what of it reached the disk, and `abort` gives it up.
        """
        contents, facts = encoded(piece, self.settings)
        with self._lock, self._breaking():
            tar = self._tar or self._open()
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"{piece.task.stem}.{suffix}")
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))
            self._pending.append((piece, facts))
            full = len(self._pending) >= self._max_pieces or tar.offset >= self._max_bytes
            return self._finish() if full else []

    def close(self) -> list[Stored]:
        """Close the open shard, however full; returns its pieces."""
        with self._lock, self._breaking():
            return self._finish() if self._tar is not None else []

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """An error in here breaks the open shard for good."""
        name = self._name()
        if self._broken:
            raise OSError(errno.EIO, self._broken)
        try:
            yield
        except OSError as error:
            self._broken = f"cannot write {self.folder / name}: {error.strerror or error}"
            raise OSError(error.errno if ends_run(error) else errno.EIO, self._broken) from error

    def abort(self) -> list[Piece]:
        """Drop the open shard; returns the pieces that were in it."""
        with self._lock:
            self._tar = None
            self._files.__exit__(_Dropped, _Dropped(), None)
            dropped, self._pending = [piece for piece, _ in self._pending], []
            return dropped

    def _open(self) -> tarfile.TarFile:
        file: BinaryIO = self._files.enter_context(_unless_dropped(self.folder / self._name()))
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)
        return self._tar

    def _name(self) -> str:
        return f"{self._prefix}-{self._number:06d}.tar"

    def _finish(self) -> list[Stored]:
        assert self._tar is not None
        name = self._name()
        self._tar.close()
        self._files.close()
        sync_folder(self.folder)
        size = (self.folder / name).stat().st_size
        stored = [
            (piece, _written(name, size, piece.task.stem, len(self._pending), facts)) for piece, facts in self._pending
        ]
        self._tar, self._pending, self._number = None, [], self._number + 1
        return stored


class _Dropped(Exception):
    """Ends a file without a name."""


@contextmanager
def _unless_dropped(path: Path) -> Iterator[BinaryIO]:
    """`replacing`, whose file goes away on `_Dropped` without the exception going on."""
    try:
        with replacing(path) as file:
            yield file
    except _Dropped:
        pass


def _written(name: str, size: int, member: str, members: int, facts: Mapping[str, Any]) -> Written:
    return Written(
        ((name, size),), facts["sha256"], facts["duration"], facts["sample_rate"], facts["frames"], member, members
    )


# -- what lies there already ------------------------------------------------------------------------------------------


def _shards(folder: Path) -> Iterator[tuple[str, int, str]]:
    """(prefix, number, name) of the shards in a folder."""
    for name in sorted(os.listdir(folder)):
        if match := _NAME.fullmatch(name):
            yield match["prefix"], int(match["number"]), name


def shards_present(folder: Path) -> Present:
    """For pieces in tars: the tar is there, as long as it was, and holds the piece under the name planned."""
    sizes = {name: (folder / name).stat().st_size for _, _, name in _shards(folder)}

    def present(line: Mapping[str, Any], stem: str) -> bool:
        files = line.get("files")
        if not isinstance(files, list) or len(files) != 1 or not isinstance(files[0], list) or len(files[0]) != 2:
            return False
        name, size = files[0]
        return line.get("member") == stem and isinstance(name, str) and sizes.get(name) == size

    return present


def unrecorded(folder: Path, history: History) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(key, fingerprint, facts for the ledger) of pieces that are in a shard without a line that says so."""
    lines = [line for lines in history.done_keys().values() for line in lines if line.get("member")]
    known: Counter[str] = Counter(str(line["files"][0][0]) for line in lines if line.get("files"))
    members = {str(line["files"][0][0]): line.get("members") for line in lines if line.get("files")}
    for _, _, name in _shards(folder):
        if name in known and known[name] == members[name]:
            continue
        path = folder / name
        told = list(_sidecars(path))
        size = path.stat().st_size
        for member, facts in told:
            try:
                written = _written(name, size, member, len(told), facts)
                key, fingerprint = str(facts["key"]), str(facts["fingerprint"])
            except KeyError:
                _log.warning("%s of %s does not say what it is", member, path)
                continue
            done = history.of(key, fingerprint).done
            if done is None or done.get("files") != written.told()["files"]:
                yield key, fingerprint, {**written.told(), "attempt": facts.get("attempt", 1)}


def _sidecars(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(member's key, content) of the JSON files of a tar; none of one that cannot be read."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, _, suffix = member.name.rpartition(".")
                if suffix == "json" and member.isfile() and member.size < 2**22:
                    file = tar.extractfile(member)
                    facts = json.load(file) if file is not None else None
                    if isinstance(facts, dict):
                        yield stem, facts
    except (tarfile.TarError, OSError, ValueError) as error:
        _log.warning("%s cannot be read: %s", path, error)


def check_unchanged(decisions: Iterable[Decision], history: History, present: Present) -> None:
    """ValueError if a piece is to be rendered that a shard holds already, under another fingerprint: tars only grow,
    so it would be in there twice."""
    done = history.done_keys()
    for decision in decisions:
        for line in done.get(decision.task.key, ()) if decision.action == "render" else ():
            if present(line, str(line.get("member"))):
                raise ValueError(
                    f"{decision.task.key!r} (line {decision.task.item.line}) changed since it went into "
                    f"{line['files'][0][0]}; render into another folder, or everything again with --overwrite"
                )


def remove_shards(folder: Path, tag: str = "") -> int:
    """Remove the shards of earlier runs, for --overwrite. Returns how many."""
    prefix = f"shard-{tag}" if tag else "shard"
    names = [name for found, _, name in _shards(folder) if not tag or found == prefix]
    for name in names:
        (folder / name).unlink()
    return len(names)
