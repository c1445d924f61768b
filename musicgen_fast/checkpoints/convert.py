"""From any layout to another, tensor by tensor: the size of a model does not matter, only that of its largest tensor.

    convert("facebook/musicgen-small", "small-audiocraft", "audiocraft", precision=torch.float16)

A writer (`convert_layouts.WRITERS`) says which files the result has and of which rows each tensor is made; writing,
reading back and renaming are the same for all. Between layouts at the stored precision every tensor stays bit for bit.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .audiocraft_package import training_checkpoint
from .convert_layouts import FILE_NAMES, WRITERS, Files, entries_in
from .entries import same_content, write_safetensors, write_torch
from .files import TensorFiles
from .inspect import OnDisk, open_on_disk
from .pickled import load_pickle

__all__ = ["WRITERS", "convert"]


def convert(
    name: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    precision: torch.dtype | None = None,
    text_encoder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    overwrite: bool = False,
    trust_pickle: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
    **patches: Any,
) -> tuple[OnDisk, list[str]]:
    """Write the checkpoint `name` to the folder `out` in the layout `to` and read it back.

    The folder appears when it is whole: errors and Ctrl-C leave nothing there, or what was there before.

    Args:
        to: a key of `WRITERS`.
        precision: of the language model's matrices; its norms and projections become float32. None: all as stored.
        text_encoder, revision, cache_dir: as for `load_checkpoint`.
        overwrite: replace `out` if it is the folder of a checkpoint.
        trust_pickle: read a training `checkpoint.th`, see `untrusted.py`.
        patches: `base`, `adapter` and `adapter_scale` of `load_checkpoint`; these models are loaded whole.
        progress: called with the bytes done and in all, each byte being written and read back.

    Returns:
        What was written, opened, and remarks on what the layout could not keep.

    Raises:
        CheckpointError: nothing usable at `name`, or a model that the layout cannot hold.
        OSError: `out` exists or cannot be written.
    """
    target = Path(out).expanduser()
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _named(target), _scratch(target) as scratch:
        if trust_pickle:
            from .untrusted import open_training_checkpoint

            found = open_training_checkpoint(name, scratch / "unpickled", text_encoder, cache_dir)
        else:
            _refuse_training_checkpoint(Path(name))
            options: dict[str, Any] = {"text_encoder": text_encoder, "revision": revision, "cache_dir": cache_dir}
            found = open_on_disk(name, **options, **patches)
        files = WRITERS[to](found, precision)
        folder = scratch / "result"
        _write(files, folder, progress)
        files.notes += _differences(found, open_on_disk(folder))
        _move(folder, target, scratch)
    return open_on_disk(target), files.notes


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; give another folder, or --overwrite to replace it")
    strange = [] if target.is_dir() and not target.is_symlink() else ["it is no folder"]
    if not strange:  # nobody's home directory goes by a slip of the keyboard
        strange = [f"it holds {path.name}" for path in target.iterdir() if path.name not in FILE_NAMES]
    if strange:
        raise FileExistsError(f"{target} is not replaced: {strange[0]}, not a checkpoint alone")


def _refuse_training_checkpoint(path: Path) -> None:
    if path.name == "checkpoint.th" or (path / "checkpoint.th").is_file() and not (path / "state_dict.bin").is_file():
        raise training_checkpoint(str(path))


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A folder beside the target, on the same disk, that goes away with all that is in it."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (folder / "result").mkdir()  # with the usual permissions; mkdtemp's are the user's alone
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _named(target: Path) -> Iterator[None]:
    """Errors of writing name the target: those of a full disk name no file, others a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or f".{target.name}." in str(error.filename)):
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise


def _move(folder: Path, target: Path, scratch: Path) -> None:
    if os.path.lexists(target):
        target.rename(scratch / "before")
    try:
        folder.rename(target)
    except BaseException:
        if (scratch / "before").exists():
            (scratch / "before").rename(target)
        raise


def _write(files: Files, folder: Path, progress: Callable[[int, int], object]) -> None:
    """Everything of `files` in `folder`, weights read back and compared. OSError, CheckpointError."""
    size, done = sum(entry.nbytes for entry in files.entries()), 0
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"the disk has {free / 1e9:.2f} GB left, the result takes {size / 1e9:.2f} GB")

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(done, 2 * size)

    for name, content in files.weights.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, list):
            write_safetensors(path, content, report)
            pairs = [(entry, entry.name) for entry in content]
            read: Any = TensorFiles.from_file(path)
        else:
            write_torch(path, content, report)
            read = load_pickle(path)
            pairs, read = [(entry, entry.name) for entry in entries_in(content)], _flat(read)
        for entry, key in pairs:
            if not same_content(entry, read[key], report):
                raise CheckpointError(f"{path.name}: {key!r} reads back differently; is the disk sound?")
    for name, text in files.texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for name, source in files.copies.items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source, folder / name)


def _flat(content: Mapping[str, Any]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            out[key] = value
        elif isinstance(value, dict):
            out.update(_flat(value))
    return out


def _differences(found: OnDisk, result: OnDisk) -> list[str]:
    """Settings of the model that the result states otherwise, for a person."""
    before, after = asdict(found.config), asdict(result.config)
    if before.get("pattern", {}).get("delays") == ():
        before["pattern"]["delays"] = after["pattern"]["delays"]
    return [
        f"the layout does not keep {key}: it was {before[key]!r} and reads back as {after[key]!r}"
        for key in before
        if before[key] != after[key]
    ]
