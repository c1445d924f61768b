"""Where the files of a checkpoint lie: in this package, a local folder or a hub repository, behind one method, `find`.

A hub file is downloaded only when it is asked for, so one layout of a repository never costs the other; all files come
from one commit. Without a network (or with HF_HUB_OFFLINE=1) the local cache is the repository. Knows no layout.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Protocol

from ..errors import CheckpointError
from .files import TensorFiles, shard_names

__all__ = ["EMBEDDED", "Source", "kind_of", "open_source", "open_weights"]

# Models that come with the package, made by examples/demo_model. A folder of the same name is reached as "./demo".
EMBEDDED = {"demo": Path(__file__).resolve().parent.parent / "assets" / "demo"}


class Source(Protocol):
    """A set of named files. `label` is what messages call it."""

    label: str

    def find(self, name: str) -> Path | None:
        """The local path of a file, downloaded if need be; None where the source does not have it."""

    def missing(self, *names: str) -> CheckpointError:
        """The error for files that the source should have and does not."""


class LocalFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)

    def find(self, name: str) -> Path | None:
        path = self.path / name
        return path if kind_of(path) == "file" else None

    def missing(self, *names: str) -> CheckpointError:
        return CheckpointError(f"{self.label} has no {' or '.join(names)}; the checkpoint is incomplete")


class HubRepo:
    """A repository of the Hugging Face hub. After the first file, everything comes from the commit of that file."""

    def __init__(self, repo: str, revision: str | None, cache_dir: str | Path | None) -> None:
        self.repo, self.revision = repo, revision
        self.cache_dir = cache_dir
        self.label = f"the hub repository {repo!r}"
        self.offline = _wants_offline()
        self.tried: list[str] = []

    def find(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        self.tried.append(name)
        try:
            path = hf_hub_download(
                self.repo,
                name,
                revision=self.revision,
                cache_dir=self.cache_dir,
                local_files_only=self.offline,
                library_name="musicgen_fast",
            )
        except LocalEntryNotFoundError:  # no network, and not in the cache either: the cache is all there is
            self.offline = True
            return None
        except EntryNotFoundError:
            return None
        except Exception as error:  # the hub's own errors, those of its HTTP library, a full disk
            raise CheckpointError(
                f"{name} of {self.label} could not be fetched ({_first_line(error)}). Check the name and the network, "
                "or give a local folder that holds the checkpoint"
            ) from error
        self._pin(Path(path), name)
        return Path(path)

    def _pin(self, path: Path, name: str) -> None:
        commit = path.parents[len(Path(name).parts) - 1].name
        if re.fullmatch(r"[0-9a-f]{40}", commit):
            self.revision = commit

    def missing(self, *names: str) -> CheckpointError:
        wanted = " or ".join(names)
        if not self.offline:
            return CheckpointError(f"{self.label} has no {wanted}; it is not a complete checkpoint")
        return CheckpointError(
            f"{wanted} of {self.label} is not in the local cache, and the hub cannot be reached (no network, or "
            f"HF_HUB_OFFLINE is set; tried {', '.join(dict.fromkeys(self.tried))}). Give a local folder that holds the "
            f"checkpoint, or fill the cache where there is a network: `hf download {self.repo}`. The small model "
            "'demo' comes with musicgen_fast and needs no network"
        )


def _wants_offline() -> bool:
    """HF_HUB_OFFLINE, read now: huggingface_hub reads it once, when it is first imported."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE_VARIABLES)


_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def local_path(text: str) -> Path:
    """The path that a user's text means, `~` included."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        return Path(text)


def kind_of(path: Path) -> str | None:
    """'file' or 'folder'; None for everything else, names that no file can have included."""
    try:
        return "folder" if path.is_dir() else "file" if path.is_file() else None
    except (OSError, ValueError):  # too long, a zero byte, no permission
        return None


def open_source(
    name: str | os.PathLike[str], *, revision: str | None = None, cache_dir: str | Path | None = None
) -> Source:
    """The embedded model of that name, a local folder if `name` is one, else a hub repository.

    Raises:
        CheckpointError: a file, a URL, or a path that does not exist.
    """
    text = os.fspath(name)
    if name in EMBEDDED:
        return LocalFolder(EMBEDDED[text])
    path = local_path(text)
    if text and kind_of(path) == "folder":
        return LocalFolder(path)
    if kind_of(path) == "file":
        raise CheckpointError(f"{path} is a file; give the folder that holds the whole checkpoint")
    if "://" in text:
        raise CheckpointError(f"{text}: URLs are not fetched; download the checkpoint and give its folder, or a hub id")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", text):
        raise CheckpointError(
            f"{text[:200]!r} is neither an existing folder nor the id of a hub repository (owner/name)"
        )
    return HubRepo(text, revision, cache_dir)


def open_weights(source: Source) -> TensorFiles | None:
    """The weights of a transformers model: safetensors before `.bin`, one file before shards; None if there are none.

    Twins in other precisions (`model.fp32.safetensors`) are never looked at.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = source.find(name)
        if path is not None:
            return TensorFiles.from_file(path)
        index = source.find(f"{name}.index.json")
        if index is not None:
            shards = {shard: source.find(shard) for shard in shard_names(index)}
            for shard, found in shards.items():
                if found is None:
                    raise source.missing(shard)
            return TensorFiles.from_index(index, {shard: found for shard, found in shards.items() if found is not None})
    return None
