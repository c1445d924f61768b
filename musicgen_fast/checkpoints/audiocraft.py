"""The layout of audiocraft: `state_dict.bin` (language model) and `compression_state_dict.bin` (codec, or a pointer).

Each file is a dict with `best_state` (tensors) and `xp.cfg` (the training configuration as YAML). The text encoder is
in neither: it is `text_encoder=`, the folder `text_encoder/` beside, or the hub id that the configuration names. Models
trained with `finetune: true` carry the T5 weights themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CodecConfig, ModelConfig
from ..errors import CheckpointError
from .audiocraft_config import check_family, model_config, text_encoder_name
from .checkpoint import Checkpoint, TextSource
from .codec_weights import canonical_codec_weights, codec_config_from_audiocraft, codec_config_from_transformers
from .files import TensorFiles, check_is_weights, read_json
from .layout import Piece, Plan, Shape, assemble, check, check_nothing_left, expected_shapes, style_shapes
from .pickled import load_pickle
from .sources import LocalFolder, Source, open_source, open_weights
from .text import find_tokenizer, open_text_source, read_text_config, read_text_source, text_from_tensors
from .xp_config import Section, parse_config

__all__ = ["load_audiocraft", "names_in_file"]

CONDITIONERS = "condition_provider.conditioners."
DESCRIPTION, SELF_WAV = CONDITIONERS + "description.", CONDITIONERS + "self_wav."
CODEC_FILE = "compression_state_dict.bin"
_CODEC_FOLDERS = ("encodec", "compression_model")


def load_audiocraft(
    source: Source,
    state_path: Path,
    *,
    name: str,
    text_encoder: str | os.PathLike[str] | None,
    dtype: torch.dtype | None,
    cache_dir: str | Path | None,
) -> Checkpoint:
    """A checkpoint in audiocraft's layout; `state_path` is its state_dict.bin, as found in `source`.

    Raises:
        CheckpointError: another family, a configuration that is not supported, missing or unknown tensors.
    """
    state, xp_cfg = _read_package(state_path)
    root = Section(xp_cfg, f"{state_path}: xp.cfg: ")
    check_family(root)
    tensors = _without_mha(state, state_path)
    config = model_config(root, _text_dim(root, tensors))
    plan, style = _plan(config), _style_plan(config)
    check({**plan, **style}, tensors)
    check_nothing_left(tensors, _known(config, plan, style, tensors))
    codec_config, codec = _codec(source, cache_dir)
    text = _text(source, root, config, tensors, text_encoder, cache_dir)
    return Checkpoint(
        name=name,
        config=config,
        lm=assemble(plan, tensors, dtype),
        codec_config=codec_config,
        codec=codec,
        text=text,
        style=assemble(style, tensors, torch.float32) if style else None,
        xp_cfg=xp_cfg,
    )


def _load_package(path: Path) -> Mapping[str, Any]:
    check_is_weights(path)
    package = load_pickle(path)
    if not isinstance(package, Mapping):
        raise CheckpointError(f"{path} holds a {type(package).__name__}, expected a dict with 'best_state'")
    return package


def _read_package(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, configuration) of an exported file."""
    return _unpack(_load_package(path), path)


def _unpack(package: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    for key in ("best_state", "xp.cfg"):
        if key not in package:
            found = ", ".join(repr(k) for k in list(package)[:4])
            raise CheckpointError(
                f"{path} lacks {key!r} (it holds {found or 'nothing'}); expected a file made by audiocraft.utils.export"
            )
    config = parse_config(package["xp.cfg"], f"{path}: xp.cfg")
    state = package["best_state"]
    if isinstance(state, Mapping) and set(state) == {"model"}:
        state = state["model"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: 'best_state' holds a {type(state).__name__}, expected a dict of tensors")
    return state, config


def _without_mha(state: dict[str, Any], path: Path) -> TensorFiles:
    """Attention of torch's own module is stored one level deeper (`self_attn.mha.`); the tensors are the same."""
    renamed = {}
    for name in list(state):
        flat = name.replace("_attn.mha.", "_attn.").replace("cross_attention.mha.", "cross_attention.")
        renamed[flat] = state.pop(name)
    return TensorFiles.from_tensors(renamed, path)


def _text_dim(root: Section, tensors: TensorFiles) -> int | None:
    """D from the shape of the text projection; None for a model without text."""
    if "description" not in root.section("conditioners").values:
        return None
    name = DESCRIPTION + "output_proj.weight"
    if name not in tensors:
        raise CheckpointError(f"{tensors.label} lacks {name!r}; the checkpoint is incomplete or of another model")
    shape = tensors.shape(name)
    if len(shape) != 2:
        raise CheckpointError(f"{tensors.label}: {name!r} has shape {list(shape)}, expected a matrix")
    return shape[1]


_PARTS = {
    "norm1": "norm1",
    "qkv": "self_attn.in_proj",
    "attn_out": "self_attn.out_proj",
    "norm_cross": "norm_cross",
    "cross_q": "cross_attention.in_proj",
    "cross_kv": "cross_attention.in_proj",
    "cross_out": "cross_attention.out_proj",
    "norm2": "norm2",
    "ffn_in": "linear1",
    "ffn_out": "linear2",
}


def names_in_file(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """(canonical name, names in audiocraft's files that make it up), in the order of `expected_shapes`.

    Rows of `cross_attention.in_proj_weight` are q, k, v: `cross_q` takes the first third, `cross_kv` the rest.
    """
    codebooks = range(config.num_codebooks)
    fixed = {
        "emb.weight": [f"emb.{k}.weight" for k in codebooks],
        "heads.weight": [f"linears.{k}.weight" for k in codebooks],
        "norm.weight": ["out_norm.weight"],
        "norm.bias": ["out_norm.bias"],
        "text_proj.weight": [DESCRIPTION + "output_proj.weight"],
        "text_proj.bias": [DESCRIPTION + "output_proj.bias"],
        "melody_proj.weight": [SELF_WAV + "output_proj.weight"],
        "melody_proj.bias": [SELF_WAV + "output_proj.bias"],
    }
    for name, _ in expected_shapes(config):
        yield name, fixed[name] if name in fixed else [_layer_name(name)]


def _layer_name(name: str) -> str:
    _, layer, part, kind = name.split(".")
    theirs = _PARTS[part]
    return f"transformer.layers.{layer}.{theirs}{'_' if theirs.endswith('in_proj') else '.'}{kind}"


def _plan(config: ModelConfig) -> Plan:
    shapes = dict(expected_shapes(config))
    plan: Plan = {}
    d = config.dim
    for name, sources in names_in_file(config):
        shape = shapes[name]
        if name.endswith(("cross_q.weight", "cross_kv.weight")):
            start, stop = (0, d) if name.endswith("cross_q.weight") else (d, 3 * d)
            plan[name] = [Piece(sources[0], (3 * d, d), start, stop)]
        else:
            part: Shape = (shape[0] // len(sources), *shape[1:])
            plan[name] = [Piece.whole(source, part) for source in sources]
    return plan


def _style_plan(config: ModelConfig) -> Plan:
    if config.style is None:
        return {}
    return {name: [Piece.whole(SELF_WAV + name, shape)] for name, shape in style_shapes(config.style, config.dim)}


def _known(config: ModelConfig, plan: Plan, style: Plan, tensors: TensorFiles) -> Iterator[str]:
    """Names that the file may hold: what is used, the text encoder, and buffers that inference rebuilds or ignores."""
    yield from (piece.name for parts in (*plan.values(), *style.values()) for piece in parts)
    yield from (name for name in tensors if name.startswith(DESCRIPTION + "t5."))
    yield SELF_WAV + "chroma.spec.window"
    yield SELF_WAV + "batch_norm.num_batches_tracked"
    for q in range(config.style.num_codebooks if config.style else 0):
        for buffer in ("inited", "cluster_size", "embed_avg"):
            yield f"{SELF_WAV}rvq.vq.layers.{q}._codebook.{buffer}"


def _text(
    source: Source,
    root: Section,
    config: ModelConfig,
    tensors: TensorFiles,
    text_encoder: str | os.PathLike[str] | None,
    cache_dir: str | Path | None,
) -> TextSource | None:
    if config.text is None:
        return None
    place = open_text_source(text_encoder, source, text_encoder_name(root), cache_dir)
    inside = DESCRIPTION + "t5."
    if text_encoder is not None or not any(name.startswith(inside) for name in tensors):
        return read_text_source(place)
    # finetuned: the weights are here, the sizes and the tokenizer are those of the T5 it started from
    text = text_from_tensors(read_text_config(place), tensors, inside, tensors.label)
    text.tokenizer_folder = find_tokenizer(place)
    return text


def _codec(source: Source, cache_dir: str | Path | None) -> tuple[CodecConfig, dict[str, Tensor]]:
    """The codec: in its own file, or in the transformers folder or repository that this file points to."""
    path = source.find(CODEC_FILE)
    if path is None:
        beside = _codec_beside(source)
        if beside is None:
            raise source.missing(CODEC_FILE)
        return _codec_of_folder(beside)
    package = _load_package(path)
    if "pretrained" not in package:
        return _codec_of_package(package, path)
    return _codec_of_pointer(str(package["pretrained"]), path, source, cache_dir)


def _codec_of_package(package: Mapping[str, Any], path: Path) -> tuple[CodecConfig, dict[str, Tensor]]:
    state, cfg = _unpack(package, path)
    try:
        config = codec_config_from_audiocraft(cfg)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: xp.cfg: {error}") from error
    tensors = TensorFiles.from_tensors(state, path)
    return config, canonical_codec_weights(tensors, config, str(path))


def _codec_of_pointer(
    pointer: str, path: Path, source: Source, cache_dir: str | Path | None
) -> tuple[CodecConfig, dict[str, Tensor]]:
    name = pointer.removeprefix("//pretrained/")
    if name.startswith("dac_") or name == "debug_compression_model":
        raise CheckpointError(f"{path} points to the codec {name!r}; only EnCodec models are supported")
    beside = _codec_beside(source)
    if beside is not None:
        return _codec_of_folder(beside)
    for local in (path.parent / name, Path(name)):
        if local.is_file():
            return _codec_of_package(_load_package(local), local)
        if local.is_dir():
            return _codec_of_folder(LocalFolder(local))
    try:
        return _codec_of_folder(open_source(name, cache_dir=cache_dir))
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} points to the codec {name!r}: {error}. Or put that codec (config.json and its weights) in a "
            f"folder {_CODEC_FOLDERS[0]}/ beside the checkpoint"
        ) from error


def _codec_beside(source: Source) -> LocalFolder | None:
    if isinstance(source, LocalFolder):
        for name in _CODEC_FOLDERS:
            if (source.path / name / "config.json").is_file():
                return LocalFolder(source.path / name)
    return None


def _codec_of_folder(source: Source) -> tuple[CodecConfig, dict[str, Tensor]]:
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
