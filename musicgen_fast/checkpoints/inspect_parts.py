"""The parts of a checkpoint for `inspect.py`: audiocraft's state, its codec, a T5; tensors as views, nothing read.

Where a codec lies (its own file, a folder beside, a pointer) is as in loading, but its tensors stay as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import CodecConfig
from ..errors import CheckpointError
from . import audiocraft as old
from .audiocraft_package import load_package, unpack
from .codec_weights import codec_config_from_audiocraft, codec_config_from_transformers
from .files import TensorFiles, read_json
from .sources import LocalFolder, Source, open_source, open_weights
from .text import text_shapes

__all__ = ["open_codec", "read_state", "text_views"]

CODEC_FILE = "compression_state_dict.bin"


def read_state(path: Path) -> tuple[TensorFiles, dict[str, Any], str | None]:
    """(tensors, configuration, the same as text where the file has it so) of an exported audiocraft file."""
    package = load_package(path)
    raw = package.get("xp.cfg")
    state, xp_cfg = unpack(package, path)
    return old._without_mha(state, path), xp_cfg, raw if isinstance(raw, str) else None


def open_codec(
    source: Source, xp_cfg: dict[str, Any], cache_dir: str | None
) -> tuple[CodecConfig, Mapping[str, Tensor], str | None]:
    """The codec of an audiocraft checkpoint: its own, the one beside, or the one that is pointed to."""
    path = source.find(CODEC_FILE)
    pointer = xp_cfg.get("compression_model_checkpoint")
    if path is not None:
        package = load_package(path)
        if "pretrained" not in package:
            return _codec_of_package(package, path)
        pointer = package["pretrained"]
    beside = (
        [source.path / name for name in ("encodec", "compression_model")] if isinstance(source, LocalFolder) else []
    )
    name = str(pointer or "").removeprefix("//pretrained/")
    if path is not None and name:
        beside.append(path.parent / name)
    for place in beside:
        if (place / "config.json").is_file():
            return *_codec_of_folder(LocalFolder(place)), None
        if place.is_file():
            return _codec_of_package(load_package(place), place)
    if path is None and not str(pointer).startswith("//pretrained/"):
        raise source.missing(CODEC_FILE)
    return *_codec_of_folder(open_source(name, cache_dir=cache_dir)), None


def _codec_of_package(package: Mapping[str, Any], path: Path) -> tuple[CodecConfig, Mapping[str, Tensor], str | None]:
    state, cfg = unpack(package, path)
    raw = package.get("xp.cfg")
    return (
        codec_config_from_audiocraft(cfg),
        TensorFiles.from_tensors(state, path),
        raw if isinstance(raw, str) else None,
    )


def _codec_of_folder(source: Source) -> tuple[CodecConfig, Mapping[str, Tensor]]:
    path = source.find("config.json")
    tensors = open_weights(source)
    if path is None or tensors is None:
        raise source.missing("config.json", "model.safetensors")
    return codec_config_from_transformers(read_json(path)), tensors


def text_views(config: dict[str, Any], tensors: TensorFiles, prefix: str) -> dict[str, Tensor]:
    """A T5's tensors; a file may keep either name of the tied table."""
    views = {}
    for name, shape in text_shapes(config, tensors.label):
        stored = prefix + name
        if name == "shared.weight" and stored not in tensors:
            stored = prefix + "encoder.embed_tokens.weight"
        if stored not in tensors or tuple(tensors.shape(stored)) != shape:
            there = f"has shape {list(tensors.shape(stored))}" if stored in tensors else "is missing"
            raise CheckpointError(f"{tensors.where(stored)}: {stored!r} {there}, expected {list(shape)}")
        views[name] = tensors[stored]
    return views
