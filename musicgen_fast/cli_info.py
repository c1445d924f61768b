"""`musicgen-fast info`: what a model is and what it takes in memory, from its configuration alone where there is one.

transformers' layout and random:* names are read from config.json or from nothing; audiocraft's files have their sizes
inside the weights and are loaded. Bytes are those of the weights and of the KV cache, without what a step computes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .checkpoints import SHORT_NAMES, CheckpointError, expected_shapes, load_checkpoint
from .checkpoints.codec_weights import codec_config_from_transformers
from .checkpoints.files import read_json
from .checkpoints.layout import stays_float32
from .checkpoints.sources import open_source
from .checkpoints.text import text_shapes
from .checkpoints.transformers import FAMILIES, model_config
from .codec import EnCodec
from .config import CodecConfig, ModelConfig, named_config
from .loading import DTYPES
from .roofline import kv_numbers, window_positions

__all__ = ["describe", "run"]


@dataclass(frozen=True)
class Facts:
    """What `describe` needs: configurations, and the numbers of parameters that do not follow from them."""

    name: str
    config: ModelConfig
    codec: CodecConfig
    text_parameters: int | None = None
    style_parameters: int = 0
    identity: bool = False  # the text goes into the model without a projection


def run(args: argparse.Namespace) -> int:
    """Print what is known about `args.model`; returns the exit code."""
    description = describe(facts_of(args.model, args.revision, args.cache_dir))
    if args.json:
        json.dump(description, sys.stdout, indent=2)
        print()
        return 0
    width = max(len(key) for key in description)
    for key, value in description.items():
        print(f"{key.replace('_', ' '):{width}}  {_text(key, value, ' ' * (width + 2))}")
    return 0


def facts_of(name: str, revision: str | None = None, cache_dir: str | None = None) -> Facts:
    """Reads as little as possible of a model. CheckpointError where there is none."""
    if name.startswith("random:"):
        try:
            config = named_config(name.removeprefix("random:"))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        books = config.num_codebooks // config.audio_channels
        return Facts(name, config, CodecConfig(num_codebooks=books, codebook_size=config.vocab_size))
    source = open_source(SHORT_NAMES.get(name, name), revision=revision, cache_dir=cache_dir)
    path = source.find("config.json")
    raw = read_json(path) if path is not None else {}
    if path is None or raw.get("model_type") not in FAMILIES:
        return _facts_of_weights(name, revision, cache_dir)
    optional = (source.find(f"{part}_config.json") for part in ("generation", "preprocessor"))
    config = model_config(raw, path, *(read_json(found) if found else None for found in optional))
    assert config.text is not None
    return Facts(
        name,
        config,
        codec_config_from_transformers(raw.get("audio_encoder") or {}),
        text_parameters=_count(text_shapes(raw["text_encoder"], source.label)),
        identity=config.text.dim == config.dim,
    )


def _facts_of_weights(name: str, revision: str | None, cache_dir: str | None) -> Facts:
    loaded = load_checkpoint(SHORT_NAMES.get(name, name), dtype=None, revision=revision, cache_dir=cache_dir)
    text = loaded.text and sum(tensor.numel() for tensor in loaded.text.tensors.values())
    style = sum(tensor.numel() for tensor in (loaded.style or {}).values())
    identity = loaded.config.text is not None and "text_proj.weight" not in loaded.lm
    return Facts(name, loaded.config, loaded.codec_config, text or None, style, identity)


def _count(shapes: list[tuple[str, tuple[int, ...]]]) -> int:
    return sum(math.prod(shape) for _, shape in shapes)


def describe(facts: Facts) -> dict[str, Any]:
    """The facts as JSON: numbers of parameters, and bytes for every precision of the language model."""
    config = facts.config
    shapes = [s for s in expected_shapes(config) if not (facts.identity and s[0].startswith("text_proj."))]
    fixed = _count([s for s in shapes if stays_float32(s[0], len(s[1]))]) + facts.style_parameters
    matrices = _count(shapes) + facts.style_parameters - fixed
    with torch.device("meta"):
        codec = sum(tensor.numel() for tensor in EnCodec(facts.codec).state_dict().values())
    positions = window_positions(config, facts.codec.frame_rate)
    numbers = int(2 * kv_numbers(config, positions))  # two rows: guidance
    memory = {}
    for name, dtype in DTYPES.items():
        model = matrices * dtype.itemsize + 4 * fixed
        rest = 4 * (codec + (facts.text_parameters or 0))
        memory[name] = {
            "language_model": model,
            "all_weights": model + rest,
            "kv_cache": numbers * dtype.itemsize,
        }
    return {
        "name": facts.name,
        "family": config.family,
        "conditioning": _conditioning(config),
        "audio_channels": config.audio_channels,
        "window_seconds": config.max_duration,
        "width": config.dim,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "ffn_width": config.ffn_dim,
        "codebooks": config.num_codebooks,
        "vocabulary": config.vocab_size,
        "pattern": {"kind": config.pattern.kind, "delays": list(config.pattern.delays)},
        "guidance": config.cfg_coef,
        "text_encoder": config.text and asdict(config.text),
        "codec": {**asdict(facts.codec), "frame_rate": facts.codec.frame_rate},
        "parameters": {
            "language_model": matrices + fixed,
            "codec": codec,
            "text_encoder": facts.text_parameters,
        },
        "kv_cache": {"rows": 2, "positions": positions},
        "bytes": memory,
    }


def _conditioning(config: ModelConfig) -> str:
    kinds = [kind for kind, part in (("melody", config.melody), ("style", config.style), ("text", config.text)) if part]
    where = "cross-attention" if config.conditioning == "cross" else "a prefix"
    return f"{' and '.join(kinds)} in {where}" if kinds else "none"


def _text(key: str, value: Any, indent: str) -> str:
    """A value for a person; further lines begin with `indent`."""
    if key == "text_encoder":
        return f"{value['name']}, width {value['dim']}" if value else "none"
    if key == "codec":
        return (
            f"EnCodec, {value['sample_rate']} Hz, {value['frame_rate']:g} frames a second, "
            f"{value['num_codebooks']} x {value['codebook_size']} codes, {value['num_filters']} filters"
        )
    if key == "pattern":
        return f"{value['kind']} {' '.join(map(str, value['delays']))}".rstrip()
    if key == "kv_cache":
        return f"{value['positions']} positions x {value['rows']} rows, for a whole window with guidance"
    if key == "parameters":
        counts = {part: "not counted" if n is None else f"{n / 1e6:.1f} M" for part, n in value.items()}
        return ", ".join(f"{part.replace('_', ' ')} {count}" for part, count in counts.items())
    if key == "bytes":
        lines = [
            f"{name:9} " + ", ".join(f"{part.replace('_', ' ')} {size / 1e6:.1f} MB" for part, size in sizes.items())
            for name, sizes in value.items()
        ]
        return f"\n{indent}".join(lines)
    return f"{value:g}" if isinstance(value, float) else str(value)
