"""From samples to files: level, encoding, tags, the JSON beside the sound, the tokens; each file whole or not there.

Everything is written by the writers of `audio.py` under a temporary name in the same folder, synced and renamed; then
the folder is synced. A piece is [C, n] float samples, tokens [K, T]. Knows nothing of queues and ledgers.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..audio import audio_write
from ..audio_encode import check_format, clean_tags, encode, replacing
from ..cli_output import pcm16, set_level
from ..sections import plain
from .ledger import sync_folder
from .names import inside
from .resume import Task

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Files", "Piece", "Settings", "Sink", "Stored", "Written", "encoded", "ends_run", "prepare", "sweep"]

_RUN_ENDS = {
    getattr(errno, name, None)  # Windows lacks some
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "EACCES", "EPERM", "ESTALE", "ENODEV", "EMFILE", "ENFILE")
}
_SHA_OF = "the samples of the file as 16-bit little-endian PCM, channels interleaved, before ogg or mp3"


@dataclass(frozen=True)
class Settings:
    """How sound becomes files: `format` and `loudness` (a strategy) as on the command line; with `sidecar` and `tokens`
    JSON and .npz beside it; with `tags` the tags of the piece inside."""

    format: str = "wav"
    loudness: str = "loudness"
    sidecar: bool = True
    tokens: bool = False
    tags: bool = True

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files of a piece, the sound's first."""
        return (self.format, *(["json"] if self.sidecar else []), *(["npz"] if self.tokens else []))


@dataclass(frozen=True)
class Piece:
    """A piece that was made.

    Attributes:
        wav: float [C, n]. tokens: int [K, T], where they are to be kept. attempt: its number, from 1.
        facts: for the sidecar: parameters, model, device, seconds taken; `seconds` of them goes into the ledger.
    """

    task: Task
    wav: Tensor
    sample_rate: int
    tokens: Tensor | None = None
    attempt: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """In memory."""
        held = [self.wav] if self.tokens is None else [self.wav, self.tokens]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


@dataclass(frozen=True)
class Written:
    """Files of a piece: (path relative to the folder, bytes), the sound first; and facts about its samples.

    `member`: its key in the tar that is its one file, of `members` pieces; see `webdataset.py`.
    """

    files: tuple[tuple[str, int], ...]
    sha256: str
    audio_seconds: float
    sample_rate: int
    frames: int
    member: str = ""
    members: int = 0

    def told(self) -> dict[str, Any]:
        """For the ledger."""
        tar = {"member": self.member, "members": self.members} if self.member else {}
        return tar | {
            "files": [list(file) for file in self.files],
            "sha256": self.sha256,
            "audio_seconds": self.audio_seconds,
            "sample_rate": self.sample_rate,
            "frames": self.frames,
        }


Stored = tuple[Piece, Written]


class Sink(Protocol):
    """Where pieces go. Its methods may be called by several threads at once."""

    def write(self, piece: Piece) -> list[Stored]:
        """Take a piece; returns those that are on disk now, this one or earlier ones or none."""

    def close(self) -> list[Stored]:
        """Bring the rest to disk; returns it."""

    def abort(self) -> list[Piece]:
        """Give up what is not on disk; returns it."""


class Files:
    """Writes each piece as files of its own below `folder`. Used by several threads at once."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings

    def write(self, piece: Piece) -> list[Stored]:
        """All files of a piece, the JSON last; returns the piece.

        OSError: a file cannot be written. ValueError: no sound (NaN, no samples), or a format that cannot hold it.
        """
        settings, stem = self.settings, piece.task.stem
        path = self.check(stem)
        names = [f"{stem}.{suffix}" for suffix in settings.suffixes]
        wav = prepare(piece, settings)
        facts = sidecar_of(piece, wav, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        if settings.tokens:
            with replacing(Path(f"{path}.npz")) as file:
                file.write(npz(piece))
        audio_write(
            path, wav, piece.sample_rate, settings.format, strategy="clip", peak_clip_headroom_db=0,
            metadata=tags_of(piece, settings), sidecar=facts if settings.sidecar else None,
        )  # fmt: skip
        for depth in range(len(Path(stem).parents)):
            sync_folder(self.folder / Path(stem).parents[depth])
        sizes = tuple((name, (self.folder / name).stat().st_size) for name in names)
        written = Written(sizes, facts["sha256"], facts["duration"], piece.sample_rate, wav.shape[-1])
        return [(piece, written)]

    def check(self, stem: str) -> Path:
        """The path without a suffix; ValueError where a link would lead the writing somewhere else."""
        for suffix in self.settings.suffixes:
            if (file := self.folder / f"{stem}.{suffix}").is_symlink():
                raise ValueError(f"{file} is a link; remove it, or choose another folder")
        return inside(self.folder, stem)

    def close(self) -> list[Stored]:
        return []

    def abort(self) -> list[Piece]:
        return []


def prepare(piece: Piece, settings: Settings) -> Tensor:
    """The samples [C, n] that go into the file: on the CPU, at the level asked for. ValueError for NaN, Inf or none."""
    wav = piece.wav.detach().float().cpu()
    if wav.dim() != 2 or not wav.numel():
        raise ValueError(f"a piece must be [channels, samples], got shape {tuple(wav.shape)}")
    if not bool(wav.isfinite().all()):
        raise ValueError("the samples are not finite: the model's numbers overflowed; another precision may help")
    return set_level(wav, piece.sample_rate, settings.loudness)


def sidecar_of(piece: Piece, wav: Tensor, settings: Settings) -> dict[str, Any]:
    """What stands beside the sound, as of `generate`: all of the item, what the engine told, the hash."""
    item = piece.task.item
    recording: dict[str, Any] | None = None
    if item.continuation:
        recording = {"use": "continuation", "file": item.continuation, "from": item.continuation_start}
        recording["seconds"] = item.continuation_seconds
    elif item.melody:
        recording = {"use": "melody", "file": item.melody, "separate": item.separate}
    return {
        "file": f"{piece.task.stem.rpartition('/')[2]}.{settings.format}",
        "key": piece.task.key,
        "fingerprint": piece.task.fingerprint,
        "id": item.id,
        "index": item.index,
        "variation": item.variation,
        "prompt": item.prompt,
        "seed": item.seed,
        "parameters": asdict(item.params),
        "recording": recording,
        "negative_prompt": item.negative_prompt,
        **({"sections": plain(item.sections), "crossfade": item.crossfade} if item.sections else {}),
        **({"tags": dict(item.tags)} if item.tags else {}),
        **piece.facts,
        "attempt": piece.attempt,
        "format": settings.format,
        "loudness": settings.loudness,
        "duration": wav.shape[-1] / piece.sample_rate,
        "sample_rate": piece.sample_rate,
        "channels": wav.shape[0],
        "frames": wav.shape[-1],
        "sha256": hashlib.sha256(pcm16(wav)).hexdigest(),
        "sha256_of": _SHA_OF,
    }


def tags_of(piece: Piece, settings: Settings) -> dict[str, str]:
    """Tags of the sound file; the item's own win."""
    from .. import __version__

    if not settings.tags:
        return {}
    item = piece.task.item
    comment = json.dumps({"id": item.id, "seed": item.seed, "fingerprint": piece.task.fingerprint})
    own = dict(item.tags)
    return {"title": item.prompt or "", "comment": comment, "software": f"musicgen_fast {__version__}"} | own


def npz(piece: Piece) -> bytes:
    """Tokens as an .npz file: `tokens` uint16 [K, T], or int32 where a codebook is larger."""
    import numpy as np

    if piece.tokens is None:
        raise ValueError("tokens are to be kept, and the engine gave none")
    tokens = piece.tokens.detach().cpu().numpy()
    small = tokens.size == 0 or 0 <= tokens.min() <= tokens.max() < 2**16
    memory = io.BytesIO()
    np.savez_compressed(memory, tokens=tokens.astype(np.uint16 if small else np.int32))
    return memory.getvalue()


def encoded(piece: Piece, settings: Settings) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of a piece in memory, suffix -> content, and its sidecar."""
    wav = prepare(piece, settings)
    check_format(settings.format, wav.shape[0], piece.sample_rate)
    facts = sidecar_of(piece, wav, settings)
    memory = io.BytesIO()
    tags = clean_tags(tags_of(piece, settings), settings.format)
    encode(memory, wav, piece.sample_rate, settings.format, tags)
    contents = {settings.format: memory.getvalue()}
    contents["json"] = (json.dumps(facts, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode()
    if settings.tokens:
        contents["npz"] = npz(piece)
    return contents, facts


def ends_run(error: BaseException) -> bool:
    """Whether writing failed for a reason that every other piece would meet too: a full disk, a read-only folder."""
    return isinstance(error, OSError) and error.errno in _RUN_ENDS


def sweep(folder: Path) -> int:
    """Remove the temporary files that killed runs left below `folder`; links are not followed. Returns how many.

    Only for whoever holds the folder's lock: those of a living run have the same kind of name.
    """
    removed = 0
    for where, _, names in os.walk(folder):
        for name in names:
            if name.startswith(".musicgen_fast-") and name.endswith(".tmp"):
                Path(where, name).unlink(missing_ok=True)
                removed += 1
    return removed
