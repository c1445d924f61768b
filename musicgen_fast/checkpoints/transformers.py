"""The layout of transformers: `config.json` of a MusicGen or MusicGen Melody, and one set of weights for all its parts.

Translates configuration and names; says by name what a configuration asks for and this package does not compute. Old
files are welcome: `.bin`, shards, a stored table of positions, both spellings of weight norm. MusicGen without the text
inside, audiocraft's files belong elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import MAX_DURATION, CodecConfig, MelodyConfig, ModelConfig, PatternConfig, TextConfig
from ..errors import CheckpointError
from .adapter import Adapter
from .checkpoint import Checkpoint, TextSource
from .codec_weights import canonical_codec_weights, codec_config_from_transformers
from .families import other_model_type
from .files import TensorFiles, read_json
from .layout import Piece, Plan, assemble, check, check_nothing_left, expected_shapes
from .sources import LocalFolder, Source, open_source
from .text import TOKENIZER_FILES, find_tokenizer, read_text_source, text_from_tensors
from .xp_config import Section, shown

__all__ = ["load_transformers", "model_config", "names_in_file"]

FAMILIES = {"musicgen": "cross", "musicgen_melody": "prefix"}
BODY = "decoder.model.decoder."
TEXT, CODEC = "text_encoder.", "audio_encoder."
# A table that transformers rebuilds and old files stored.
_IGNORED = (BODY + "embed_positions.weights",)


def load_transformers(
    source: Source,
    config_path: Path,
    tensors: TensorFiles,
    *,
    name: str,
    text_encoder: str | os.PathLike[str] | None,
    dtype: torch.dtype | None,
    cache_dir: str | Path | None,
    adapter: Adapter | None = None,
    with_lm: bool = True,
) -> Checkpoint:
    """A checkpoint in transformers' layout.

    Args:
        config_path, tensors: its config.json and its weights, as found in `source`.
        adapter: merged into the language model.
        with_lm: False checks the language model and leaves it unread.

    Raises:
        CheckpointError: a configuration that is not supported, missing or unknown tensors, wrong shapes.
    """
    raw = read_json(config_path)
    generation, features = (_optional(source, f"{part}_config.json") for part in ("generation", "preprocessor"))
    config = model_config(raw, config_path, generation, features)
    codec_config = _codec_config(raw, config_path)
    plan = _plan(config, tensors)
    check(plan, tensors)
    known = {piece.name for parts in plan.values() for piece in parts}
    check_nothing_left(tensors, [*known, *_IGNORED, *(n for n in tensors if n.startswith((TEXT, CODEC)))])
    codec_tensors = {n: tensors[n] for n in tensors if n.startswith(CODEC)}
    codec = canonical_codec_weights(codec_tensors, codec_config, tensors.label)
    text = _text(source, raw, tensors, text_encoder, cache_dir)
    edits = adapter.edits(config) if adapter is not None else None
    return Checkpoint(
        name=name,
        config=config,
        lm=assemble(plan, tensors, dtype, edits) if with_lm else {},
        codec_config=codec_config,
        codec=codec,
        text=text,
    )


def _optional(source: Source, name: str) -> dict[str, Any]:
    path = source.find(name)
    return read_json(path) if path is not None else {}


def _codec_config(raw: dict[str, Any], path: Path) -> CodecConfig:
    section = raw.get("audio_encoder")
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} has no 'audio_encoder'; the checkpoint must bring its EnCodec")
    try:
        return codec_config_from_transformers(section)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: audio_encoder: {error}") from error


def model_config(
    raw: dict[str, Any], path: Path, generation: dict[str, Any] | None = None, features: dict[str, Any] | None = None
) -> ModelConfig:
    """The `ModelConfig` of a config.json, read with its generation_config.json and preprocessor_config.json.

    Fields that a file leaves out have transformers' defaults (its config files hold differences only).

    Raises:
        CheckpointError: another family, or a field whose value is not supported, by name.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise other_model_type(family, f"{path}: ", " or ".join(FAMILIES))
    decoder, text = raw.get("decoder"), raw.get("text_encoder")
    if not isinstance(decoder, dict) or not isinstance(text, dict):
        raise CheckpointError(f"{path} lacks {'decoder' if not isinstance(decoder, dict) else 'text_encoder'!r}")
    _refuse(raw, decoder, path)
    sizes = Section(decoder, f"{path}: decoder.")
    vocab, channels = sizes.positive("vocab_size", 2048), sizes.positive("audio_channels", 1)
    pad = decoder.get("pad_token_id")
    if pad is not None and sizes.integer("pad_token_id") < vocab:
        raise CheckpointError(f"{path}: decoder.pad_token_id is {pad}; the special token must lie above the vocabulary")
    codebooks = sizes.positive("num_codebooks", 4, most=256)
    if channels == 2 and codebooks % 2:
        raise CheckpointError(f"{path}: decoder.num_codebooks is {codebooks}, but stereo codebooks come in pairs")
    melody = _melody(raw, features or {}, path) if family == "musicgen_melody" else None
    width = Section(text, f"{path}: text_encoder.").positive("d_model", 512)
    guidance = {key: value for key, value in (generation or {}).items() if value is not None}
    try:
        return ModelConfig(
            dim=sizes.positive("hidden_size", 1024),
            num_layers=sizes.positive("num_hidden_layers", 24, most=1024),
            num_heads=sizes.positive("num_attention_heads", 16),
            ffn_dim=sizes.positive("ffn_dim", 4096),
            num_codebooks=codebooks,
            vocab_size=vocab,
            pattern=PatternConfig(delays=tuple(k // channels for k in range(codebooks))),
            conditioning=FAMILIES[family],
            text=TextConfig(name=str(text.get("_name_or_path") or "t5-base"), dim=width),
            melody=melody,
            audio_channels=channels,
            max_duration=Section({**decoder, **raw}, f"{path}: ").seconds("segment_duration", 30.0),
            cfg_coef=Section(guidance, f"{path.with_name('generation_config.json')}: ").finite("guidance_scale", 3.0),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _refuse(raw: dict[str, Any], decoder: dict[str, Any], path: Path) -> None:
    """CheckpointError for every setting that would make another model than the one this package computes."""
    allowed: dict[str, tuple[Any, ...]] = {
        "activation_function": ("gelu",),
        "scale_embedding": (False,),
        "audio_channels": (1, 2),
        "tie_word_embeddings": (False,),
    }
    for field, values in allowed.items():
        if field in decoder and decoder[field] not in values:
            supported = ", ".join(map(repr, values))
            raise CheckpointError(f"{path}: decoder.{field} is {shown(decoder[field])}, supported: {supported}")
    width = decoder.get("cross_attention_hidden_size")
    if width is not None:
        raise CheckpointError(f"{path}: decoder.cross_attention_hidden_size is {shown(width)}, supported: null")
    if raw.get("quantization_config"):
        raise CheckpointError(f"{path}: quantization_config: quantized weights are not read; give the original files")


def _melody(raw: dict[str, Any], features: dict[str, Any], path: Path) -> MelodyConfig:
    """The chroma settings: `num_chroma` and `chroma_length` of the model, the spectrogram of its feature extractor."""
    spectrum = Section(features, f"{path.with_name('preprocessor_config.json')}: ")
    n_fft = spectrum.positive("n_fft", 16384, most=1 << 17)
    hop = spectrum.positive("hop_length", max(n_fft // 4, 1))
    if n_fft & (n_fft - 1) or hop != n_fft // 4:
        raise CheckpointError(
            f"{spectrum.name('n_fft')} is {n_fft} with hop_length {hop}; supported: a power of 2 and its quarter"
        )
    sizes = Section(raw, f"{path}: ")
    config = MelodyConfig(
        sample_rate=spectrum.positive("sampling_rate", 32000),
        n_chroma=sizes.positive("num_chroma", 12, most=256),
        radix2_exp=n_fft.bit_length() - 1,
        duration=spectrum.positive("chunk_length", 30, most=MAX_DURATION),
    )
    length = sizes.positive("chroma_length", 235)
    if config.chroma_length == length:
        return config
    return replace(config, duration=_duration_of(length, config.sample_rate, hop))


def _duration_of(chroma_length: int, sample_rate: int, hop: int) -> float:
    """Seconds that give `chroma_length` frames: a whole number of them where there is one."""
    first = -(-(chroma_length - 1) * hop // sample_rate)  # ceil
    if first > 0 and first * sample_rate // hop + 1 == chroma_length:
        return float(first)
    return ((chroma_length - 1) * hop + hop // 2) / sample_rate  # the middle of the range, safe from rounding


def names_in_file(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """(canonical name, names in transformers' files whose rows make it up), in the order of `expected_shapes`."""
    codebooks = range(config.num_codebooks)
    fixed = {
        "emb.weight": [f"{BODY}embed_tokens.{k}.weight" for k in codebooks],
        "heads.weight": [f"decoder.lm_heads.{k}.weight" for k in codebooks],
        "norm.weight": [BODY + "layer_norm.weight"],
        "norm.bias": [BODY + "layer_norm.bias"],
        "text_proj.weight": ["enc_to_dec_proj.weight"],
        "text_proj.bias": ["enc_to_dec_proj.bias"],
        "melody_proj.weight": ["audio_enc_to_dec_proj.weight"],
        "melody_proj.bias": ["audio_enc_to_dec_proj.bias"],
    }
    for name, _ in expected_shapes(config):
        yield name, fixed[name] if name in fixed else _layer_names(name)


_PARTS = {
    "norm1": ["self_attn_layer_norm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn_out": ["self_attn.out_proj"],
    "norm_cross": ["encoder_attn_layer_norm"],
    "cross_q": ["encoder_attn.q_proj"],
    "cross_kv": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "cross_out": ["encoder_attn.out_proj"],
    "norm2": ["final_layer_norm"],
    "ffn_in": ["fc1"],
    "ffn_out": ["fc2"],
}


def _layer_names(name: str) -> list[str]:
    _, layer, part, kind = name.split(".")
    return [f"{BODY}layers.{layer}.{theirs}.{kind}" for theirs in _PARTS[part]]


def _plan(config: ModelConfig, tensors: TensorFiles) -> Plan:
    shapes = dict(expected_shapes(config))
    plan: Plan = {}
    for name, sources in names_in_file(config):
        identity = config.text is not None and config.text.dim == config.dim
        if name.startswith("text_proj.") and identity and not any(source in tensors for source in sources):
            continue
        rows = shapes[name][0] // len(sources)
        plan[name] = [Piece.whole(source, (rows, *shapes[name][1:])) for source in sources]
    return plan


def _text(
    source: Source,
    raw: dict[str, Any],
    tensors: TensorFiles,
    text_encoder: str | os.PathLike[str] | None,
    cache_dir: str | Path | None,
) -> TextSource:
    """The T5 of the checkpoint itself, or the one asked for; its tokenizer from wherever there is one."""
    places: list[Source] = [source]
    if text_encoder is not None:
        asked = open_source(text_encoder, cache_dir=cache_dir)
        if asked.find("config.json") is not None:
            return read_text_source(asked)
        places = [asked]  # a folder with a tokenizer alone
    elif isinstance(source, LocalFolder):
        places.append(LocalFolder(source.path / "text_encoder"))
    text = text_from_tensors(raw["text_encoder"], tensors, TEXT, tensors.label)
    text.tokenizer_folder = find_tokenizer(*places)
    if text.tokenizer_folder is None and text_encoder is not None:
        raise places[0].missing("config.json", *TOKENIZER_FILES)
    return text
