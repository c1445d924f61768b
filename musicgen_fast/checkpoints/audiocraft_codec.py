"""The codec of an audiocraft checkpoint: in `compression_state_dict.bin`, in the folder or repository that this file or
the training configuration points to, in a folder beside, or lent by a base model.

Reads EnCodec only, in audiocraft's or transformers' layout. Knows nothing of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import CodecConfig
from ..errors import CheckpointError
from .audiocraft_package import load_package, unpack
from .checkpoint import Checkpoint
from .codec_weights import canonical_codec_weights, codec_config_from_audiocraft, codec_config_from_transformers
from .files import TensorFiles, read_json
from .sources import LocalFolder, Source, kind_of, open_source, open_weights
from .xp_config import shown

__all__ = ["load_codec"]

CODEC_FILE = "compression_state_dict.bin"
_CODEC_FOLDERS = ("encodec", "compression_model")
_POINTER = "//pretrained/"
Codec = tuple[CodecConfig, dict[str, Tensor]]


def load_codec(
    source: Source, xp_cfg: Mapping[str, Any], base: Checkpoint | None, cache_dir: str | Path | None
) -> Codec:
    """Configuration and canonical weights of the codec, from the first of the places that has one.

    Raises:
        CheckpointError: no codec anywhere (the message says what to pass), or one that is not an EnCodec.
    """
    path = source.find(CODEC_FILE)
    if path is not None:
        package = load_package(path)
        if "pretrained" not in package:
            return _of_package(package, path)
        pointer = package["pretrained"]
        if not isinstance(pointer, str):
            raise CheckpointError(
                f"{path}: 'pretrained' holds a {type(pointer).__name__}, expected the name of a codec"
            )
        if base is not None and _beside(source) is None:
            return base.codec_config, base.codec
        return _of_pointer(pointer, path, source, cache_dir)
    beside = _beside(source)
    if beside is not None:
        return _of_folder(beside)
    if base is not None:
        return base.codec_config, base.codec
    named = xp_cfg.get("compression_model_checkpoint")
    if isinstance(named, str) and named.startswith(_POINTER) and isinstance(source, LocalFolder):
        return _of_pointer(named, source.path, source, cache_dir)
    raise CheckpointError(
        f"{source.missing(CODEC_FILE)}; base= (on the command line: --base) lends that of the model it was made from"
    )


def _of_package(package: Mapping[str, Any], path: Path) -> Codec:
    state, cfg = unpack(package, path)
    try:
        config = codec_config_from_audiocraft(cfg)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: xp.cfg: {error}") from error
    tensors = TensorFiles.from_tensors(state, path)
    return config, canonical_codec_weights(tensors, config, str(path))


def _of_pointer(pointer: str, path: Path, source: Source, cache_dir: str | Path | None) -> Codec:
    name = pointer.removeprefix(_POINTER)
    if name.startswith("dac_") or name == "debug_compression_model":
        raise CheckpointError(f"{path} points to the codec {shown(name)}; only EnCodec models are supported")
    beside = _beside(source)
    if beside is not None:
        return _of_folder(beside)
    for local in (path.parent / name, Path(name)):
        if kind_of(local) == "file":
            return _of_package(load_package(local), local)
        if kind_of(local) == "folder":
            return _of_folder(LocalFolder(local))
    try:
        return _of_folder(open_source(name, cache_dir=cache_dir))
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} points to the codec {shown(name)}: {error}. Or put that codec (config.json and its weights) in a "
            f"folder {_CODEC_FOLDERS[0]}/ beside the checkpoint"
        ) from error


def _beside(source: Source) -> LocalFolder | None:
    if isinstance(source, LocalFolder):
        for name in _CODEC_FOLDERS:
            if (source.path / name / "config.json").is_file():
                return LocalFolder(source.path / name)
    return None


def _of_folder(source: Source) -> Codec:
    """An EnCodec in transformers' layout: config.json with model_type 'encodec', and its weights."""
    path = source.find("config.json")
    if path is None:
        raise source.missing("config.json")
    raw = read_json(path)
    if raw.get("model_type") != "encodec":
        raise CheckpointError(f"{path}: model_type is {raw.get('model_type')!r}, expected 'encodec'")
    tensors = open_weights(source)
    if tensors is None:
        raise source.missing("model.safetensors", "pytorch_model.bin")
    try:
        config = codec_config_from_transformers(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config, canonical_codec_weights(tensors, config, tensors.label)
