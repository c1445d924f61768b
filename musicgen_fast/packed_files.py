"""Writing a model once as the CPU decoder reads it: a folder that loads in a second and needs no fp32 copy.

The format is that of `checkpoints/packed.py`. A folder appears when it is whole: it is written beside its place under
another name. Knows nothing of decoding.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from . import native
from .checkpoints import Checkpoint, CheckpointError, load_checkpoint
from .checkpoints.packed import CODEC, LM, STYLE, TEXT, save_tensors
from .checkpoints.packed_settings import SETTINGS, describe
from .checkpoints.text import TOKENIZER_FILES
from .packing import PACKED_PRECISIONS, pack_weights

__all__ = ["convert_to_packed", "write_packed"]


def convert_to_packed(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    precision: str,
    *,
    text_encoder: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    **patches: Any,
) -> None:
    """Load a checkpoint in any layout and write it packed. The language model is read tensor by tensor where its file
    allows (transformers' layout): memory then holds the packed weights and some matrices, never the original's.

    Args:
        source, text_encoder, revision, cache_dir: of `load_checkpoint`. The text encoder becomes part of the folder.
        out: the folder to write; it must not exist, or be empty.
        precision: 'float32', 'bfloat16', 'int8' or 'int4'.
        overwrite: replace `out` where it is a packed folder; never anything else.
        patches: `base`, `adapter` and `adapter_scale` of `load_checkpoint`.

    Raises:
        ValueError: an unknown precision, or no C++ extension, which packs.
        CheckpointError: the source is not usable or packed already, or `out` is taken.
        MemoryError, OSError: no room; nothing is left behind.
    """
    _check_precision(precision)
    _check_place(Path(out), overwrite)  # before the work, not only after it
    checkpoint = load_checkpoint(
        source, text_encoder=text_encoder, dtype=None, revision=revision, cache_dir=cache_dir, stream=True, **patches
    )
    write_packed(checkpoint, out, precision, overwrite=overwrite)


def write_packed(
    checkpoint: Checkpoint, folder: str | os.PathLike[str], precision: str, *, overwrite: bool = False
) -> Path:
    """Write a checkpoint packed, using it up: its weights are let go of as they are written.

    Pass what `load_checkpoint(dtype=None)` gives, so that weights are rounded once. Other arguments and errors:
    `convert_to_packed`.
    """
    _check_precision(precision)
    if checkpoint.packed is not None:
        raise CheckpointError(
            f"{checkpoint.name} is packed already, as {checkpoint.packed.precision}: convert the original, "
            "or copy the folder"
        )
    folder = Path(folder)
    _check_place(folder, overwrite)
    settings = describe(checkpoint, precision)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        _write_side_files(checkpoint, part)
        _write_language_model(checkpoint, part / LM, precision)
        (part / SETTINGS).write_text(settings, encoding="utf-8")
        _check_place(folder, overwrite)  # nobody took it meanwhile
        _move_into_place(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _check_precision(precision: str) -> None:
    if precision not in PACKED_PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: weights are packed as {', '.join(PACKED_PRECISIONS)}")
    if not native.available():
        raise ValueError(f"packing weights needs the C++ extension: {native.why_not()}")


def _check_place(folder: Path, overwrite: bool) -> None:
    if not folder.name or folder.name == "..":
        raise CheckpointError(f"{folder} is no name for a new folder")
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise CheckpointError(f"{folder} is not a folder; give the name of a new one")
    if any(folder.iterdir()):
        if not (folder / SETTINGS).is_file():
            raise CheckpointError(f"{folder} holds something else than a packed model; give the name of a new folder")
        if not overwrite:
            raise CheckpointError(f"{folder} exists already; remove it, or ask to overwrite it")


def _move_into_place(part: Path, folder: Path) -> None:
    """A rename of the whole folder. An older one steps aside first and comes back if that fails."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    """All but the language model. Their memory is free again before that is packed."""
    save_tensors(folder / CODEC, checkpoint.codec)
    checkpoint.codec.clear()
    text = checkpoint.text
    if text is not None:
        save_tensors(folder / TEXT, text.tensors)
        text.tensors.clear()
        for name in TOKENIZER_FILES if text.tokenizer_folder is not None else ():
            assert text.tokenizer_folder is not None
            if (text.tokenizer_folder / name).is_file():
                shutil.copyfile(text.tokenizer_folder / name, folder / name)
    if checkpoint.style is not None:
        save_tensors(folder / STYLE, checkpoint.style)
        checkpoint.style.clear()
        _copy_mert(checkpoint.name, folder)


def _copy_mert(name: str, folder: Path) -> None:
    """The folder mert/ beside a style model on disk, which is looked for beside the packed one as well."""
    beside = Path(name).expanduser() / "mert"
    if not beside.is_dir():
        return
    (folder / "mert").mkdir()
    for path in beside.iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / "mert" / path.name)


def _write_language_model(checkpoint: Checkpoint, path: Path, precision: str) -> None:
    try:
        packed = pack_weights(checkpoint.config, checkpoint.lm, precision)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from None
    save_tensors(path, {**packed.projections, **packed.tensors})
