"""What `musicgen-fast generate` leaves behind: names of files, levels, sound, tags and the JSON beside the sound.

Nothing here generates. A name is made of a template (`{prompt}_{seed}`) whose values are reduced to letters, digits,
dots and dashes, so a prompt can never name a folder; a name that is taken gets _2, _3, ... behind it. Waveforms are
float [C, n]. torch is imported when sound is written: the parser uses this file too.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import logging
import os
import re
import string
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMATS", "OutputFolder", "logging_to_stderr", "name_template", "pcm16", "safe_name", "set_level"]

FORMATS = ("wav", "flac", "ogg", "mp3")
FIELDS = {"index": 0, "prompt": "prompt", "seed": 0, "model": "model", "variation": 0}  # name: example
_UNSAFE = re.compile(r'[<>:"\\|?*\x00-\x1f\x7f]')  # what some file system refuses, or takes for something else
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices of Windows
_MAX_BYTES = 200  # of one name; file systems take 255, and "_2", the suffix and ".json" come behind
_MAX_PROMPT = 60


def name_template(text: str) -> str:
    """`text` if it is a usable template of file names; the message of the ArgumentTypeError says what is wrong."""
    try:
        for _, name, _, _ in string.Formatter().parse(text):
            if name is not None and name not in FIELDS:
                raise ValueError(f"unknown field {{{name}}}; choose from {', '.join(f'{{{f}}}' for f in FIELDS)}")
        _render(text, FIELDS)
    except (ValueError, LookupError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no template for file names: {error}") from error
    return text


def _render(template: str, values: Mapping[str, Any]) -> PurePosixPath:
    """The relative path, without a suffix, that a template gives for values that are safe already."""
    path = PurePosixPath(*(part.format(**values) or "/" for part in template.split("/")))
    if path.is_absolute():
        raise ValueError("an empty name, or one that begins or ends with /")
    for part in path.parts:
        if part.startswith(".") or part.endswith((".", " ")) or _UNSAFE.search(part):
            raise ValueError(f"{part!r} cannot be the name of a file or folder on every system")
        if _RESERVED.fullmatch(part):
            raise ValueError(f"{part!r} is the name of a device on Windows")
        if len(part.encode("utf-8", "replace")) > _MAX_BYTES:
            raise ValueError(f"a name of more than {_MAX_BYTES} bytes")
    return path


def safe_name(text: str | None, limit: int = _MAX_PROMPT) -> str:
    """`text` as a piece of a file name: ASCII letters, digits, _ . and -; cut after a word, at `limit` characters.

    Accents are dropped. A text that leaves nothing (another script) is named by its hash, no text "unconditional".
    """
    if not text:
        return "unconditional"
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    words = re.sub(r"[^A-Za-z0-9._]+", "-", plain).strip("-.")
    if not words:
        return "prompt-" + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]
    if len(words) > limit:
        words = words[: limit + 1].rpartition("-")[0] or words[:limit]
    words = words.strip("-.")
    return f"{words}-" if _RESERVED.fullmatch(words) else words


@dataclass
class OutputFolder:
    """Where the files go, and which names are taken.

    Attributes:
        path: the folder; `prepare` makes it.
        template: see `name_template`.
        format, loudness: of the files; see `set_level`.
        overwrite: replace files that were there before; two files of one run never share a name.
        sidecar: write the JSON.
        written: sound files written so far.
    """

    path: Path
    template: str
    format: str = "wav"
    loudness: str = "loudness"
    overwrite: bool = False
    sidecar: bool = True
    written: int = 0
    _taken: set[str] = field(default_factory=set)

    def prepare(self) -> None:
        """Make the folder and try to write into it. OSError where that does not work."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            problem = f"cannot write into the output folder {self.path}: {error.strerror or error}"
            raise OSError(error.errno or errno.EIO, problem) from error

    def name(self, values: Mapping[str, Any]) -> Path:
        """The path without a suffix for these values of the fields; ValueError where the template gives no name."""
        safe = {key: safe_name(v) if key in ("prompt", "model") else v for key, v in values.items()}
        stem = self.path / _render(self.template.removesuffix(f".{self.format}"), safe)
        if not stem.parent.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(f"{stem} lies outside of {self.path}: a folder in it is a link")
        return stem

    def claim(self, values: Mapping[str, Any]) -> Path:
        """A path without a suffix that no file has, for a file that is written elsewhere."""
        return self._free(self.name(values))

    def _free(self, stem: Path) -> Path:
        """`stem`, or the first of stem_2, stem_3, ... that is not taken."""
        number, candidate = 1, stem
        while self._is_taken(candidate):
            number += 1
            candidate = stem.with_name(f"{stem.name}_{number}")
        self._taken.add(str(candidate).casefold())  # file systems may not tell cases apart
        return candidate

    def _is_taken(self, stem: Path) -> bool:
        if str(stem).casefold() in self._taken:
            return True
        # a.json would describe a.flac and seem to describe an older a.wav
        suffixes = (*FORMATS, "json") if self.sidecar else (self.format,)
        return not self.overwrite and any(os.path.lexists(f"{stem}.{suffix}") for suffix in suffixes)

    def write(self, wav: Tensor, sample_rate: int, values: Mapping[str, Any], facts: Mapping[str, Any]) -> Path:
        """Write a sound file and its sidecar; both appear whole, the sidecar last.

        Args:
            wav: float [C, n] as the model made it.
            values: of the fields of the template, for the name.
            facts: what the sidecar says; format, level, length and hash are added.
        """
        from . import __version__
        from .audio import audio_write

        wav = set_level(wav.detach().float().cpu(), sample_rate, self.loudness)
        stem = self.claim(values)
        sidecar = {
            "file": f"{stem.name}.{self.format}",
            **facts,
            "format": self.format,
            "loudness": self.loudness,
            "duration": wav.shape[-1] / sample_rate,
            "sample_rate": sample_rate,
            "channels": wav.shape[0],
            "frames": wav.shape[-1],
            "sha256": hashlib.sha256(pcm16(wav)).hexdigest(),
            "sha256_of": "the samples of the file as 16-bit little-endian PCM, channels interleaved, before ogg or mp3",
        }
        tags = {
            "title": facts.get("prompt") or "",
            "comment": json.dumps({key: facts[key] for key in ("model", "seed", "parameters") if key in facts}),
            "software": f"musicgen_fast {__version__}",
        }
        path = audio_write(
            stem, wav, sample_rate, self.format, strategy="clip", peak_clip_headroom_db=0, metadata=tags,
            sidecar=sidecar if self.sidecar else None,
        )  # fmt: skip
        self.written += 1
        return path


def set_level(wav: Tensor, sample_rate: int, loudness: str) -> Tensor:
    """wav [C, n] at the level that --loudness names, within +-1; see `loudness.normalize_audio`.

    'loudness' bends peaks as audiocraft's demo does; 'none' clips at full scale, since a piece that was made should not
    be lost for a sample that is too high.
    """
    from .loudness import normalize_audio

    if loudness == "none":
        return wav.clamp(-1, 1)
    return normalize_audio(wav, strategy=loudness, loudness_compressor=True, sample_rate=sample_rate)


def pcm16(wav: Tensor) -> bytes:
    """The samples that a wav or flac file of wav [C, n] holds: 16 bits, little-endian, channels interleaved."""
    levels = (wav.T * 32768).round().clamp(-32768, 32767)
    return levels.contiguous().numpy().astype("<i2").tobytes()


@contextmanager
def logging_to_stderr(verbose: bool, quiet: bool) -> Iterator[None]:
    """Messages of this package to standard error while a command runs; as it was afterwards, for callers of `main`."""
    logger = logging.getLogger(__package__)  # not the root logger: huggingface_hub prints its own lines
    before = logger.handlers, logger.level
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("musicgen-fast: %(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING)
    try:
        yield
    finally:
        logger.handlers = before[0]
        logger.setLevel(before[1])
