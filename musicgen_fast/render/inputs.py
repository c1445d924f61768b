"""Recordings that a manifest names: only below one folder, only files, only of a bearable size; nothing is fetched.

A header is believed only where it is modest: the length of a flac that claims 2**63 frames is found by decoding, up to
the limit. Each file is looked at once, however many pieces use it. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from .item import Limits

__all__ = ["Inputs", "Recording"]


@dataclass(frozen=True)
class Recording:
    """A recording that can be used: where it is, and seconds of it."""

    path: Path
    seconds: float


class Inputs:
    """The recordings below `root`."""

    def __init__(self, root: str | Path, limits: Limits | None = None) -> None:
        self.root = Path(root)
        self._real = Path(os.path.realpath(root))
        self._limits = limits or Limits()
        self._found: dict[str, Recording | str] = {}
        self._hashes: dict[Path, str] = {}

    def check(self, name: str) -> Recording:
        """The recording of that name, relative to the root or absolute below it.

        ValueError: a URL, a path that leaves the root (links count), what is no sound, or more than the limits allow.
        """
        if name not in self._found:
            try:
                self._found[name] = self._look(name)
            except (ValueError, OSError) as error:
                self._found[name] = str(getattr(error, "strerror", None) or error)
        found = self._found[name]
        if isinstance(found, str):
            raise ValueError(f"{name!r}: {found}")
        return found

    def content(self, name: str) -> str:
        """SHA-256 of the file, in hex: what a piece depends on, whatever the file is called."""
        path = self.check(name).path
        if path not in self._hashes:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            self._hashes[path] = digest.hexdigest()
        return self._hashes[path]

    def _look(self, name: str) -> Recording:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", name):
            raise ValueError("URLs are not fetched; download the file and give its path")
        path = Path(os.path.realpath(self._real / name))
        if not path.is_relative_to(self._real):
            raise ValueError(f"lies outside of the input root {self.root}; --input-root names another one")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a file")
        if status.st_size > self._limits.input_bytes:
            megabytes = self._limits.input_bytes / 2**20
            raise ValueError(f"has {status.st_size / 2**20:.0f} MB, at most {megabytes:.0f} MB are read")
        seconds = self._seconds(path)
        if seconds > self._limits.input_seconds:
            raise ValueError(f"is longer than {self._limits.input_seconds:g} s, the most that is read")
        if not seconds:
            raise ValueError("holds no sound")
        return Recording(path, seconds)

    def _seconds(self, path: Path) -> float:
        import soundfile

        from ..audio import audio_read

        limit = self._limits.input_seconds
        wav, rate = audio_read(path, duration=min(1.0, limit))  # what cannot be decoded at all is refused here
        frames = float(soundfile.info(str(path)).frames)
        if frames > 1e9 and frames / rate > limit:
            wav, rate = audio_read(path, duration=limit + 1)
            frames = wav.shape[-1]
        return frames / rate if wav.numel() else 0.0
