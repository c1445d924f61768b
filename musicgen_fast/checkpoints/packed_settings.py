"""packed.json: everything about a packed model that is no tensor, written in full and read back strictly.

A file that lacks a field, has another one, or holds a value of another type or beyond every model's size is damaged or
of another version: it raises one CheckpointError, before anything is allocated by its numbers. Opens no other file.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..config import MAX_DURATION, CodecConfig, ModelConfig
from ..errors import CheckpointError
from ..packing import PACKED_PRECISIONS
from ..pattern import build_pattern
from .checkpoint import Checkpoint
from .files import read_json
from .random_weights import ByteTokenizer

__all__ = ["AGAIN", "SETTINGS", "Settings", "describe", "read_settings"]

FORMAT = 1
SETTINGS = "packed.json"
AGAIN = "convert the original again"

_FIELDS = ("format", "precision", "config", "codec_config", "text", "tokenizer", "xp_cfg")
_TOKENIZERS = (None, "files", "bytes")
# Bounds of whole numbers by field: sizes far beyond any model are damage, and must not become allocations.
_MOST = {
    "num_layers": 1024, "num_codebooks": 256, "delays": 4096, "flattening": 256, "lstm_layers": 16, "ratios": 1024,
    "num_residual_layers": 64, "radix2_exp": 24, "dilation_base": 64, "flatten_first": 4096, "empty_initial": 256,
}  # fmt: skip
_MAY_BE_ZERO = ("flatten_first", "empty_initial", "delays", "flattening", "lstm_layers", "num_residual_layers")
_WORDS = {"conditioning": ("cross", "prefix"), "family": ("musicgen", "audiogen"), "pad_mode": ("reflect", "constant")}


@dataclass(frozen=True)
class Settings:
    """What packed.json says. `text` is the configuration of the T5; `tokenizer` is 'files', 'bytes' or None."""

    precision: str
    config: ModelConfig
    codec_config: CodecConfig
    text: dict[str, Any] | None
    tokenizer: str | None
    xp_cfg: dict[str, Any] | None


def describe(checkpoint: Checkpoint, precision: str) -> str:
    """The content of packed.json."""
    text = checkpoint.text
    tokenizer = None
    if text is not None and text.tokenizer is not None:
        if not isinstance(text.tokenizer, ByteTokenizer):
            raise CheckpointError(f"{checkpoint.name}: its tokenizer has no files to copy")
        tokenizer = "bytes"
    elif text is not None and text.tokenizer_folder is not None:
        tokenizer = "files"
    values = (
        FORMAT,
        precision,
        asdict(checkpoint.config),
        asdict(checkpoint.codec_config),
        None if text is None else text.config,
        tokenizer,
        checkpoint.xp_cfg,
    )
    try:
        return json.dumps(dict(zip(_FIELDS, values, strict=True)), indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.name}: its configuration cannot be written as JSON ({error})") from error


def read_settings(path: Path) -> Settings:
    """The content of a packed.json.

    Raises:
        CheckpointError: naming the file and the field at fault.
    """
    raw = read_json(path)
    _check_fields(raw, _FIELDS, str(path))
    if type(raw["format"]) is not int or raw["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: format is {raw['format']!r}, this version of musicgen_fast reads {FORMAT}; {AGAIN}"
        )
    for field, known in (("precision", PACKED_PRECISIONS), ("tokenizer", _TOKENIZERS)):
        if raw[field] not in known:
            raise CheckpointError(f"{path}: {field} is {_shown(raw[field])}, expected one of {known}; {AGAIN}")
    for field in ("text", "xp_cfg"):
        if not isinstance(raw[field], (dict, types.NoneType)):
            raise CheckpointError(f"{path}: {field} is a {type(raw[field]).__name__}, expected an object; {AGAIN}")
    config: ModelConfig = _read(ModelConfig, raw["config"], f"{path}: config")
    _check_config(config, path)
    text, tokenizer = raw["text"], raw["tokenizer"]
    if (config.text is None) != (text is None) or (text is None and tokenizer is not None):
        raise CheckpointError(f"{path}: text does not fit config.text; {AGAIN}")
    codec_config: CodecConfig = _read(CodecConfig, raw["codec_config"], f"{path}: codec_config")
    return Settings(raw["precision"], config, codec_config, text, tokenizer, raw["xp_cfg"])


def _check_fields(raw: Mapping[str, Any], names: Iterable[str], label: str) -> None:
    wanted = set(names)
    for problem, odd in (("lacks", wanted - raw.keys()), ("has unknown fields:", raw.keys() - wanted)):
        if odd:
            raise CheckpointError(f"{label} {problem} {', '.join(sorted(odd)[:4])}; {AGAIN} with this version")


def _read(kind: Any, raw: Any, label: str) -> Any:
    """A dataclass of config.py from what `asdict` made of it: all of its fields, of their types, within bounds."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{label} is {_shown(raw)}, expected an object; {AGAIN}")
    _check_fields(raw, (f.name for f in fields(kind)), label)
    types_of = typing.get_type_hints(kind)
    values = {f.name: _value(types_of[f.name], f.name, raw[f.name], f"{label}.{f.name}") for f in fields(kind)}
    try:
        return kind(**values)
    except ValueError as error:
        raise CheckpointError(f"{label}: {error}") from error


def _value(kind: Any, field: str, raw: Any, label: str) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # X | None
        if raw is None:
            return None
        kind = next(option for option in typing.get_args(kind) if option is not types.NoneType)
    if is_dataclass(kind):
        return _read(kind, raw, label)
    if typing.get_origin(kind) is tuple:
        if isinstance(raw, list) and len(raw) <= 256:
            return tuple(_value(int, field, item, f"{label}[{i}]") for i, item in enumerate(raw))
    elif kind is bool or kind is str:
        if type(raw) is kind and raw in _WORDS.get(field, (raw,)):
            return raw
    elif kind is int:
        if type(raw) is int and (field not in _MAY_BE_ZERO) <= raw <= _MOST.get(field, 1 << 20):
            return raw
    elif kind is float and type(raw) in (int, float) and math.isfinite(raw):
        if field == "cfg_coef" or 0 < raw <= MAX_DURATION or (field == "trim_right_ratio" and raw == 0):
            return float(raw)
    raise CheckpointError(f"{label} is {_shown(raw)}, which no model has; {AGAIN}")


def _shown(raw: Any) -> str:
    text = repr(raw)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _check_config(config: ModelConfig, path: Path) -> None:
    if config.num_codebooks % config.audio_channels:
        raise CheckpointError(f"{path}: config: {config.num_codebooks} codebooks for {config.audio_channels} channels")
    try:
        build_pattern(config.pattern, config.num_codebooks, 4)
    except ValueError as error:
        raise CheckpointError(f"{path}: config.pattern: {error}") from error
