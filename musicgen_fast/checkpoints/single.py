"""A model in one file, as tools for fine-tuning leave it: `lm.state_dict()`, `last.ckpt`, `{"xp.cfg", "model"}`.

The kind is told by the content, not by the name. Such a file holds a language model in audiocraft's names and at most
its configuration; codec, T5 and what else is missing come from `base=`, the model that it was trained from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from .adapter import Adapter
from .audiocraft import _without_mha, language_model, load_audiocraft, text_inside
from .audiocraft_package import load_package
from .checkpoint import Checkpoint
from .families import other_tensors
from .files import TensorFiles
from .layout import Shape
from .sources import LocalFolder, open_source
from .text import read_text_source

__all__ = ["load_single"]

_FIRST = "emb.0.weight"  # every language model has it, and wrappers put their names in front of it
_PARTS_OF_FOLDERS = ("config.json", "model.safetensors", "pytorch_model.bin", "adapter_model.safetensors")
_SIZES = {(1024, 24): "small", (1536, 48): "medium", (2048, 48): "large"}


def load_single(
    path: Path,
    *,
    name: str,
    text_encoder: str | os.PathLike[str] | None,
    dtype: torch.dtype | None,
    cache_dir: str | Path | None,
    base: Checkpoint | None = None,
    adapter: Adapter | None = None,
    with_lm: bool = True,
) -> Checkpoint:
    """The model in the file `path`; the arguments are those of `load_audiocraft`.

    Raises:
        CheckpointError: no language model of MusicGen in there, or one that lacks what `base` would lend.
    """
    if path.name in _PARTS_OF_FOLDERS or path.name.endswith(".index.json") or "-of-" in path.name:
        raise CheckpointError(f"{path} is one file of a model; give the folder that holds the whole checkpoint")
    tensors = _tensors(path)
    if tensors is None:
        return load_audiocraft(
            LocalFolder(path.parent), path, name=name, text_encoder=text_encoder, dtype=dtype, cache_dir=cache_dir,
            base=base, adapter=adapter, with_lm=with_lm,
        )  # fmt: skip
    if base is None:
        raise CheckpointError(
            f"{path} holds a language model alone, without configuration, codec and text encoder: give the model that "
            f"it was trained from as base= (--base on the command line){_likely_base(tensors)}"
        )
    text = base.text
    if text_encoder is not None:
        text = read_text_source(open_source(text_encoder, cache_dir=cache_dir))
    elif text is not None:
        text = text_inside(tensors, text) or text
    try:
        lm, style = language_model(base.config, tensors, dtype, adapter, with_lm)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (the configuration is that of the base {base.name!r})") from error
    return Checkpoint(
        name=name, config=base.config, lm=lm, codec_config=base.codec_config, codec=base.codec, text=text,
        style=style, xp_cfg=base.xp_cfg,
    )  # fmt: skip


def _tensors(path: Path) -> TensorFiles | None:
    """The language model's tensors, without the names of wrappers; None for a file that brings its configuration."""
    if path.suffix == ".safetensors":
        files = TensorFiles.from_file(path)
        state = {key: files[key] for key in files}
    else:
        _refuse_archives(path)
        package = load_package(path)
        if "xp.cfg" in package or "pretrained" in package:
            return None
        inner = next((k for k in ("state_dict", "best_state", "model") if isinstance(package.get(k), Mapping)), None)
        state = dict(package if inner is None else package[inner])
    TensorFiles.from_tensors(state, path)  # names and values are what they should be
    first = min((key for key in state if key == _FIRST or key.endswith(f".{_FIRST}")), key=len, default=None)
    if first is None:
        found = ", ".join(repr(key[:80]) for key in list(state)[:3])
        raise other_tensors(state, str(path)) or CheckpointError(
            f"{path} holds no language model of MusicGen: no {_FIRST!r} among its tensors ({found or 'none'})"
        )
    prefix = first.removesuffix(_FIRST)
    inside = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    outside = {key: tensor for key, tensor in state.items() if not key.startswith(prefix)}
    return _without_mha({**inside, **outside}, path)


def _refuse_archives(path: Path) -> None:
    """tar and gzip by their marks: torch files are called .tar and .tar.gz by some tools, and are neither."""
    with open(path, "rb") as file:
        start = file.read(512)
    if start[257:262] == b"ustar" or start[:2] == b"\x1f\x8b":
        raise CheckpointError(f"{path} is an archive; unpack it and give what is inside")


def _likely_base(tensors: TensorFiles) -> str:
    """', e.g. base="facebook/musicgen-small"' where the shapes are those of a released model."""
    shape: Shape = tensors.shape(_FIRST)
    layers = sum(key.startswith("transformer.layers.") and key.endswith(".linear1.weight") for key in tensors)
    size = _SIZES.get((shape[-1] if shape else 0, layers))
    if size is None:
        return ""
    stereo = "stereo-" if "emb.7.weight" in tensors else ""
    wav = "condition_provider.conditioners.self_wav."
    if f"{wav}embed.weight" in tensors:
        size = "style"
    elif f"{wav}output_proj.weight" in tensors:
        size = {"medium": "melody", "large": "melody-large"}.get(size, size)
    return f', e.g. base="facebook/musicgen-{stereo}{size}"'
