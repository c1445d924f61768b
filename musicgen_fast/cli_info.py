"""`musicgen-fast info`: what a model is and what it takes in memory and time, from configurations and headers alone.

No weight is read and none is downloaded, so the answer takes a second for any size. Bytes are those of the weights, of
the KV cache and of the sound, without what a step computes; times are what reading costs at the least.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoints import SHORT_NAMES, CheckpointError, expected_shapes
from .checkpoints.inspect import OnDisk, open_on_disk
from .checkpoints.layout import stays_float32
from .checkpoints.packed_settings import SETTINGS, Settings, read_settings
from .checkpoints.sources import Source, open_source
from .checkpoints.text import text_shapes
from .codec import EnCodec
from .config import CodecConfig, ModelConfig, named_config
from .machine import read_bandwidth
from .roofline import KV_FORMAT, WEIGHT_BYTES, kv_bytes, kv_numbers, step_bytes, window_positions

__all__ = ["describe", "facts_of", "facts_of_disk", "print_table", "run"]

_RELEASED = "cc-by-nc-4.0 (the released weights: not for commercial use)"
_REQUEST = 30.0  # seconds


@dataclass(frozen=True)
class Facts:
    """What `describe` needs: configurations, and what does not follow from them."""

    name: str
    config: ModelConfig
    codec: CodecConfig
    text_parameters: int | None = None
    style_parameters: int = 0
    identity: bool = False  # the text goes into the model without a projection
    layout: str | None = None
    dtype: str | None = None  # of most of the language model's numbers, as stored
    licence: str | None = None
    missing: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Print what is known about `args.model`; returns the exit code."""
    description = describe(facts_of(args.model, args.revision, args.cache_dir))
    if args.json:
        json.dump(description, sys.stdout, indent=2)
        print()
    else:
        print_table(description)
    return 0


def print_table(description: dict[str, Any]) -> None:
    """A description for a person, on standard output."""
    width = max(len(key) for key in description)
    for key, value in description.items():
        print(f"{key.replace('_', ' '):{width}}  {_text(key, value, ' ' * (width + 2))}")


def facts_of(name: str, revision: str | None = None, cache_dir: str | None = None) -> Facts:
    """Reads as little as possible of a model. CheckpointError where there is none."""
    packed = Path(name, SETTINGS)
    if packed.is_file():
        return _facts_of_packed(name, read_settings(packed))
    if not name.startswith("random:"):
        return facts_of_disk(open_on_disk(name, revision=revision, cache_dir=cache_dir, strict=False))
    try:
        config = named_config(name.removeprefix("random:"))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return Facts(name, config, _usual_codec(config), licence="none: random weights")


def facts_of_disk(found: OnDisk) -> Facts:
    """The facts of a checkpoint that was opened."""
    config, text = found.config, found.text
    counts: dict[torch.dtype, int] = {}
    for parts in found.lm.values():
        counts[parts[0].dtype] = counts.get(parts[0].dtype, 0) + sum(part.numel() for part in parts)
    dtype = str(max(counts, key=lambda key: counts[key])).removeprefix("torch.") if counts else None
    projected = "text_proj.weight" in found.lm
    identity = config.text is not None and not projected and (bool(found.lm) or config.text.dim == config.dim)
    return Facts(
        found.name,
        config,
        found.codec_config or _usual_codec(config),
        text_parameters=_count(text_shapes(text.config, found.label)) if text is not None else None,
        style_parameters=sum(part.numel() for parts in found.style.values() for part in parts),
        identity=identity and config.text is not None and config.text.dim == config.dim,
        layout=found.layout,
        dtype=dtype,
        licence=_licence(found.name, found.source),
        missing=[*found.missing, *_missing_encoders(config, found.source)],
    )


def _facts_of_packed(name: str, settings: Settings) -> Facts:
    text = None if settings.text is None else _count(text_shapes(settings.text, name))
    return Facts(
        name, settings.config, settings.codec_config, text_parameters=text, layout="packed", dtype=settings.precision,
        licence=_licence(name, None), missing=_missing_encoders(settings.config, None),
    )  # fmt: skip


def _usual_codec(config: ModelConfig) -> CodecConfig:
    return CodecConfig(num_codebooks=config.num_codebooks // config.audio_channels, codebook_size=config.vocab_size)


def _licence(name: str, source: Source | None) -> str | None:
    """What the model card says, or what is known of the released models."""
    card = source.find("README.md") if source is not None else None
    if card is not None:
        with open(card, encoding="utf-8", errors="replace") as file:
            head = file.read(1 << 16)
        for line in head.split("---")[1].splitlines() if head.startswith("---") and head.count("---") > 1 else []:
            if line.startswith("license:"):
                return line.partition(":")[2].strip() or None
    return _RELEASED if SHORT_NAMES.get(name, name).startswith("facebook/musicgen-") else None


def _missing_encoders(config: ModelConfig, source: Source | None) -> list[str]:
    """What listens to recordings and is not in the files of a checkpoint."""
    import importlib.util

    if config.melody is not None and importlib.util.find_spec("demucs") is None:
        return [
            "demucs, which takes drums and bass out of melodies, is not installed: pip install musicgen-fast[melody]"
        ]
    if config.style is None or (source is not None and source.find("mert/config.json") is not None):
        return []
    mert = open_source(config.style.feature_name)
    mert.offline = True  # type: ignore[attr-defined]
    if mert.find("config.json") is not None:
        return []
    return [f"MERT is not in the hub's cache: hf download {config.style.feature_name}, or put it in a folder mert/"]


def _count(shapes: list[tuple[str, tuple[int, ...]]]) -> int:
    return sum(math.prod(shape) for _, shape in shapes)


def describe(facts: Facts) -> dict[str, Any]:
    """The facts as JSON: numbers of parameters, and bytes and times for every precision of the language model."""
    config = facts.config
    shapes = [s for s in expected_shapes(config) if not (facts.identity and s[0].startswith("text_proj."))]
    fixed = _count([s for s in shapes if stays_float32(s[0], len(s[1]))]) + facts.style_parameters
    matrices = _count(shapes) + facts.style_parameters - fixed
    with torch.device("meta"):
        codec = sum(tensor.numel() for tensor in EnCodec(facts.codec).state_dict().values())
    positions = window_positions(config, facts.codec.frame_rate)
    rest = 4 * (codec + (facts.text_parameters or 0))
    speed = read_bandwidth()
    memory, times = {}, {}
    for name, item in WEIGHT_BYTES.items():
        model = int(matrices * item) + 4 * fixed
        cache = int(2 * kv_numbers(config, positions) * kv_bytes(config, KV_FORMAT[name]))  # two rows: guidance
        memory[name] = {
            "language_model": model,
            "all_weights": model + rest,
            "kv_cache": cache,
            "request": cache + int(4 * _REQUEST * facts.codec.sample_rate) * config.audio_channels,
        }
        times[name] = round(1e3 * step_bytes(config, name, positions / 2) / speed, 4)
    return {
        "name": facts.name,
        "layout": facts.layout,
        "family": config.family,
        "licence": facts.licence,
        "conditioning": _conditioning(config),
        "audio_channels": config.audio_channels,
        "window_seconds": config.max_duration,
        "width": config.dim,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "ffn_width": config.ffn_dim,
        "codebooks": config.num_codebooks,
        "vocabulary": config.vocab_size,
        "stored_as": facts.dtype,
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
        "step_ms": {"read_gb_per_s": round(speed / 1e9, 2), **times},
        "missing": facts.missing,
    }


def _conditioning(config: ModelConfig) -> str:
    kinds = [kind for kind, part in (("melody", config.melody), ("style", config.style), ("text", config.text)) if part]
    where = "cross-attention" if config.conditioning == "cross" else "a prefix"
    return f"{' and '.join(kinds)} in {where}" if kinds else "none"


def _text(key: str, value: Any, indent: str) -> str:
    """A value for a person; further lines begin with `indent`."""
    if value is None:
        return {"licence": "not stated", "stored_as": "not known: the weights are not here"}.get(key, "none")
    if key == "missing":
        return f"\n{indent}".join(value) or "nothing"
    if key == "text_encoder":
        return f"{value['name']}, width {value['dim']}"
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
        return f"\n{indent}".join(_bytes_line(name, sizes) for name, sizes in value.items())
    if key == "step_ms":
        steps = ", ".join(f"{name} {value[name]:.2f}" for name in WEIGHT_BYTES)
        return f"{steps}: at least, for one request with guidance, at the {value['read_gb_per_s']:g} GB/s read here"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _bytes_line(name: str, sizes: dict[str, int]) -> str:
    named = {**sizes, f"{_REQUEST:g} s request": sizes["request"]}
    del named["request"]
    return f"{name:9} " + ", ".join(f"{part.replace('_', ' ')} {size / 1e6:.1f} MB" for part, size in named.items())
