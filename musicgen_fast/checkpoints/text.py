"""The T5 encoder that goes with a checkpoint: found, checked and read, not run (`conditioning/text.py` runs it).

Reads T5 checkpoints of transformers (an encoder alone, a whole T5, or the T5 inside a MusicGen folder) and keeps the
encoder half in float32. Knows nothing of the language model except the width that it expects.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .checkpoint import TextSource
from .files import TensorFiles, read_json
from .layout import Piece, Shape, check
from .sources import LocalFolder, Source, open_source, open_weights
from .xp_config import Section, shown

__all__ = ["find_tokenizer", "open_text_source", "read_text_source", "text_from_tensors"]

TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
_OLD_IDS = ("t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b")  # live under google-t5/ since 2023


def text_shapes(config: dict[str, Any], label: str) -> list[tuple[str, Shape]]:
    """(name, shape) of the tensors of transformers' `T5EncoderModel`; sizes left out are those of `T5Config`."""
    sizes = Section(config, f"{label}: text_encoder.")
    d, ffn, heads = sizes.positive("d_model", 512), sizes.positive("d_ff", 2048), sizes.positive("num_heads", 8)
    inner = heads * sizes.positive("d_kv", 64)
    inputs = ("wi_0", "wi_1") if str(config.get("feed_forward_proj", "relu")).startswith("gated") else ("wi",)
    shapes: list[tuple[str, Shape]] = [("shared.weight", (sizes.positive("vocab_size", 32128), d))]
    for i in range(sizes.positive("num_layers", 6, most=1024)):
        attention, feed = f"encoder.block.{i}.layer.0.", f"encoder.block.{i}.layer.1."
        shapes += [(f"{attention}SelfAttention.{part}.weight", (inner, d)) for part in "qkv"]
        shapes += [(f"{attention}SelfAttention.o.weight", (d, inner)), (f"{attention}layer_norm.weight", (d,))]
        if i == 0:
            buckets = sizes.positive("relative_attention_num_buckets", 32)
            shapes.append((f"{attention}SelfAttention.relative_attention_bias.weight", (buckets, heads)))
        shapes += [(f"{feed}DenseReluDense.{name}.weight", (ffn, d)) for name in inputs]
        shapes += [(f"{feed}DenseReluDense.wo.weight", (d, ffn)), (f"{feed}layer_norm.weight", (d,))]
    return [*shapes, ("encoder.final_layer_norm.weight", (d,))]


def text_from_tensors(config: dict[str, Any], tensors: TensorFiles, prefix: str, origin: str) -> TextSource:
    """The T5 encoder held by `tensors` under `prefix`, every name and shape checked; without a tokenizer yet.

    Raises:
        CheckpointError: not a T5, a missing tensor, a wrong shape.
    """
    family = config.get("model_type", "t5")
    if family != "t5":
        raise CheckpointError(f"{origin}: the text encoder is a {family!r}, only T5 encoders are supported")
    table = prefix + "shared.weight"
    if table not in tensors and prefix + "encoder.embed_tokens.weight" in tensors:
        table = prefix + "encoder.embed_tokens.weight"  # tied; a file may keep either name
    plan = {}
    for name, shape in text_shapes(config, origin):
        plan[name] = [Piece.whole(table if name == "shared.weight" else prefix + name, shape)]
    check(plan, tensors)
    weights = {name: tensors.real(parts[0].name).to(dtype=torch.float32, copy=True) for name, parts in plan.items()}
    return TextSource(config=config, tensors=weights, origin=origin)


def find_tokenizer(*sources: Source) -> Path | None:
    """The folder of the first tokenizer file that one of `sources` has; `spiece.model` before `tokenizer.json`."""
    for source in sources:
        for name in TOKENIZER_FILES:
            path = source.find(name)
            if path is not None:
                return path.parent
    return None


def open_text_source(
    asked: str | os.PathLike[str] | None, beside: Source, named: str | None, cache_dir: str | Path | None
) -> Source:
    """Where the T5 lies: `asked` (the caller's `text_encoder=`), else the folder `text_encoder/` beside the checkpoint,
    else the hub id `named` by the checkpoint."""
    if asked is not None:
        return open_source(asked, cache_dir=cache_dir)
    if isinstance(beside, LocalFolder) and (beside.path / "text_encoder").is_dir():
        return LocalFolder(beside.path / "text_encoder")
    if not named:
        raise CheckpointError(f"{beside.label} does not say which text encoder it needs; give text_encoder=<folder>")
    try:
        source = open_source(named, cache_dir=cache_dir)
        if source.find("config.json") is None and named in _OLD_IDS:
            moved = open_source(f"google-t5/{named}", cache_dir=cache_dir)
            source = moved if moved.find("config.json") is not None else source
        if source.find("config.json") is not None:
            return source
        raise source.missing("config.json")
    except CheckpointError as error:
        raise CheckpointError(
            f"{beside.label} needs the text encoder {shown(named)}: {error}. "
            "Or give text_encoder=<folder>, or put it in a folder text_encoder/ beside the checkpoint"
        ) from error


def read_text_source(source: Source) -> TextSource:
    """The T5 encoder and tokenizer of a transformers folder or repository.

    Raises:
        CheckpointError: no T5 there, missing files or tensors.
    """
    config, prefix = _text_config(source)
    tensors = open_weights(source)
    if tensors is None:
        raise source.missing("model.safetensors", "pytorch_model.bin")
    text = text_from_tensors(config, tensors, prefix, source.label)
    text.tokenizer_folder = find_tokenizer(source)
    if text.tokenizer_folder is None:
        raise source.missing(*TOKENIZER_FILES)
    return text


def read_text_config(source: Source) -> dict[str, Any]:
    """The T5 configuration of a folder or repository (of the T5 inside, where it is a MusicGen)."""
    return _text_config(source)[0]


def _text_config(source: Source) -> tuple[dict[str, Any], str]:
    path = source.find("config.json")
    if path is None:
        raise source.missing("config.json")
    config = read_json(path)
    if isinstance(config.get("text_encoder"), dict):
        return config["text_encoder"], "text_encoder."
    return config, ""
