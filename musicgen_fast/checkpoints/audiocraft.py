"""The layout of audiocraft: `state_dict.bin` (language model) and `compression_state_dict.bin` (codec, or a pointer).

Each file is a dict with `best_state` (tensors) and `xp.cfg` (the training configuration as YAML). The text encoder is
in neither: it is `text_encoder=`, the folder `text_encoder/` beside, that of `base=`, or the hub id that the
configuration names. Models trained with `finetune: true` carry the T5 weights themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from .adapter import Adapter
from .audiocraft_codec import load_codec
from .audiocraft_config import check_family, model_config, text_encoder_name
from .audiocraft_package import load_package, unpack
from .checkpoint import Checkpoint, TextSource
from .files import TensorFiles
from .layout import Piece, Plan, Shape, assemble, check, check_nothing_left, expected_shapes, style_shapes
from .sources import LocalFolder, Source
from .text import find_tokenizer, open_text_source, read_text_config, read_text_source, text_from_tensors
from .xp_config import Section, shown

__all__ = ["language_model", "load_audiocraft", "names_in_file", "text_inside"]

CONDITIONERS = "condition_provider.conditioners."
DESCRIPTION, SELF_WAV = CONDITIONERS + "description.", CONDITIONERS + "self_wav."
_T5 = DESCRIPTION + "t5."


def load_audiocraft(
    source: Source,
    state_path: Path,
    *,
    name: str,
    text_encoder: str | os.PathLike[str] | None,
    dtype: torch.dtype | None,
    cache_dir: str | Path | None,
    base: Checkpoint | None = None,
    adapter: Adapter | None = None,
    with_lm: bool = True,
) -> Checkpoint:
    """A checkpoint in audiocraft's layout.

    Args:
        state_path: its state_dict.bin, as found in `source`; or a file of a fine-tuning tool, with the same content.
        base: lends the codec and the T5 where `source` has none.
        adapter: merged into the language model.
        with_lm: False checks the language model and leaves it unread.

    Raises:
        CheckpointError: another family, a configuration that is not supported, missing or unknown tensors.
    """
    state, xp_cfg = unpack(load_package(state_path), state_path)
    root = Section(xp_cfg, f"{state_path}: xp.cfg: ")
    check_family(root)
    tensors = _without_mha(state, state_path)
    config = model_config(root, _text_dim(root, tensors))
    codec_config, codec = load_codec(source, xp_cfg, base, cache_dir)
    text = _text(source, root, config, tensors, text_encoder, cache_dir, base)
    lm, style = language_model(config, tensors, dtype, adapter, with_lm)
    return Checkpoint(
        name=name,
        config=config,
        lm=lm,
        codec_config=codec_config,
        codec=codec,
        text=text,
        style=style,
        xp_cfg=xp_cfg,
    )


def language_model(
    config: ModelConfig, tensors: TensorFiles, dtype: torch.dtype | None, adapter: Adapter | None, read: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """(canonical tensors, those of the style conditioner) of a file in audiocraft's names, all of it checked first.

    Raises:
        CheckpointError: missing or unknown tensors, other shapes than those of `config`.
    """
    plan, style = _plan(config), _style_plan(config)
    check({**plan, **style}, tensors)
    check_nothing_left(tensors, _known(config, plan, style, tensors))
    edits = adapter.edits(config) if adapter is not None else None
    if not read:
        return {}, None
    return assemble(plan, tensors, dtype, edits), assemble(style, tensors, torch.float32) if style else None


def _without_mha(state: dict[str, Any], path: Path) -> TensorFiles:
    """Attention of torch's own module is stored one level deeper (`self_attn.mha.`); the tensors are the same."""
    renamed = {}
    for name in list(state):
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: {shown(name)} is no name of a tensor")
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
    yield from (name for name in tensors if name.startswith(_T5))
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
    base: Checkpoint | None,
) -> TextSource | None:
    if config.text is None:
        return None
    beside = isinstance(source, LocalFolder) and (source.path / "text_encoder").is_dir()
    if base is not None and base.text is not None and text_encoder is None and not beside:
        return text_inside(tensors, base.text) or base.text
    place = open_text_source(text_encoder, source, text_encoder_name(root), cache_dir)
    if text_encoder is not None or not any(name.startswith(_T5) for name in tensors):
        return read_text_source(place)
    # finetuned: the weights are here, the sizes and the tokenizer are those of the T5 it started from
    start = TextSource(read_text_config(place), {}, find_tokenizer(place))
    return text_inside(tensors, start)


def text_inside(tensors: TensorFiles, start: TextSource) -> TextSource | None:
    """The T5 in a language model's file, where it was trained too; sizes and tokenizer are those of `start`."""
    if not any(name.startswith(_T5) for name in tensors):
        return None
    text = text_from_tensors(start.config, tensors, _T5, tensors.label)
    text.tokenizer_folder, text.tokenizer = start.tokenizer_folder, start.tokenizer
    return text
