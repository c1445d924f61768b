"""Writing a checkpoint that is in memory in transformers' layout: what `load_checkpoint` and transformers read.

For tests, demos and models trained here: a folder with config.json, generation_config.json, model.safetensors and a T5
vocabulary. `transformers_config` and `transformers_tensors` are the two halves, for writers of other file formats.
Files of any size, from files: `convert.py`.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CodecConfig, ModelConfig, TextConfig
from .checkpoint import Checkpoint
from .codec_write import transformers_codec_config, transformers_codec_weights
from .random_weights import random_checkpoint
from .transformers import CODEC, TEXT, names_in_file

__all__ = [
    "tiny_checkpoint",
    "transformers_config",
    "transformers_tensors",
    "write_transformers_folder",
    "write_vocabulary",
]

_LINES = (
    "calm piano with soft strings, slow",
    "fast drum and bass with a bright synth lead",
    "80s pop track with bassy drums and synth",
    "acoustic guitar, warm, 90 bpm, minor key",
    "a cheerful country song with acoustic guitars",
    "loud distorted electric guitar and heavy drums",
)


def tiny_checkpoint(
    seed: int = 0,
    *,
    config: ModelConfig | None = None,
    codec_config: CodecConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Random weights at a tiny size: by default width 32, 2 layers, 4 x 64 codes at 50 Hz, 32 kHz, a T5 of width 24."""
    if config is None:
        config = ModelConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=64, vocab_size=64, text=TextConfig(dim=24))
    if codec_config is None:
        codec_config = CodecConfig(
            num_filters=4,
            dimension=16,
            lstm_layers=1,
            num_codebooks=config.num_codebooks // config.audio_channels,
            codebook_size=config.vocab_size,
        )
    return random_checkpoint(config, seed=seed, dtype=dtype, codec_config=codec_config)


def write_transformers_folder(
    path: str | os.PathLike[str],
    seed: int = 0,
    *,
    checkpoint: Checkpoint | None = None,
    captions: Iterable[str] = _LINES,
) -> Path:
    """Writes a checkpoint that `load_checkpoint` and transformers' `MusicgenForConditionalGeneration` load.

    Args:
        path: folder, made if need be; files of these names in it are replaced.
        seed: of `tiny_checkpoint`, used where no checkpoint is given.
        checkpoint: what to write; its tensors keep their dtypes. The codec's weight norm is recomputed, so its folded
            weights come back within rounding.
        captions: texts that the vocabulary is trained on where the checkpoint brings none.
    """
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint or tiny_checkpoint(seed)
    config = transformers_config(checkpoint)
    text = checkpoint.text
    tensors = transformers_tensors(checkpoint)
    if text is not None and text.tokenizer_folder is not None:
        for name in ("spiece.model", "tokenizer.json"):
            if (text.tokenizer_folder / name).is_file():
                shutil.copyfile(text.tokenizer_folder / name, folder / name)
    else:
        write_vocabulary(folder, captions)
    weights = folder / "model.safetensors"
    save_file(tensors, str(weights), metadata={"format": "pt"})
    weights.chmod(
        (folder / "spiece.model").stat().st_mode if (folder / "spiece.model").exists() else 0o644
    )  # it is 0600
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config(checkpoint.config))
    return folder


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """A generation_config.json: as the released ones, with this model's special token and guidance."""
    special = dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), config.special_token)
    return {**special, "do_sample": True, "guidance_scale": config.cfg_coef, "max_length": 1500}


def transformers_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        ValueError: a model that transformers has no class for (style, patterns other than the usual delays, no text).
    """
    config, text = checkpoint.config, checkpoint.text
    channels = config.audio_channels
    usual = tuple(k // channels for k in range(config.num_codebooks))
    if config.style is not None or config.family != "musicgen":
        raise ValueError("transformers has no class for style and AudioGen models")
    if config.pattern.kind != "delay" or config.pattern.delays not in ((), usual) or config.pattern.flatten_first:
        raise ValueError(f"transformers knows the delays {list(usual)} only, not {config.pattern}")
    if config.text is None or text is None or (config.melody is None) != (config.conditioning == "cross"):
        raise ValueError("transformers' models have text in cross-attention, or chroma and text as a prefix")
    family = "musicgen" if config.melody is None else "musicgen_melody"
    decoder = {
        "model_type": f"{family}_decoder",
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "ffn_dim": config.ffn_dim,
        "num_codebooks": config.num_codebooks,
        "vocab_size": config.vocab_size,
        "audio_channels": channels,
        "activation_function": "gelu",
        "bos_token_id": config.special_token,
        "pad_token_id": config.special_token,
    }
    melody = config.melody
    extra = {} if melody is None else {"num_chroma": melody.n_chroma, "chroma_length": melody.chroma_length}
    return {
        "model_type": family,
        "architectures": ["Musicgen" + ("Melody" if melody else "") + "ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "segment_duration": config.max_duration,
        "text_encoder": {**text.config, "_name_or_path": config.text.name},
        "audio_encoder": transformers_codec_config(checkpoint.codec_config),
        "decoder": decoder,
        **extra,
    }


def preprocessor_config(config: ModelConfig, sample_rate: int) -> dict[str, Any]:
    """A preprocessor_config.json: what transformers' processors cut recordings by, or hear melodies with."""
    shared = {"feature_size": config.audio_channels, "padding_side": "left", "padding_value": 0.0}
    melody = config.melody
    if melody is None:
        kind = {"feature_extractor_type": "EncodecFeatureExtractor", "chunk_length_s": None, "overlap": None}
        return {**kind, **shared, "return_attention_mask": True, "sampling_rate": sample_rate}
    size = 2**melody.radix2_exp
    return {
        **shared,
        "feature_extractor_type": "MusicgenMelodyFeatureExtractor",
        "feature_size": melody.n_chroma,
        "chunk_length": int(melody.duration),
        "n_fft": size,
        "hop_length": size // 4,
        "num_chroma": melody.n_chroma,
        "n_samples": int(melody.duration) * melody.sample_rate,
        "sampling_rate": melody.sample_rate,
        "return_attention_mask": False,
    }


def transformers_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The content of model.safetensors: transformers' names, contiguous tensors of their own."""
    tensors = {}
    for name, theirs in names_in_file(checkpoint.config):
        if name in checkpoint.lm:
            for target, part in zip(theirs, checkpoint.lm[name].chunk(len(theirs)), strict=True):
                tensors[target] = part.clone()
    if checkpoint.text is not None:
        tensors.update({TEXT + name: tensor.clone() for name, tensor in checkpoint.text.tensors.items()})
    codec = transformers_codec_weights(checkpoint.codec, checkpoint.codec_config)
    return {**tensors, **{CODEC + name: tensor for name, tensor in codec.items()}}


def write_vocabulary(folder: Path, captions: Iterable[str] = _LINES, size: int = 80) -> None:
    """A small T5 vocabulary, `spiece.model`, trained on the captions."""
    (folder / "spiece.model").write_bytes(train_vocabulary(captions, size))


def train_vocabulary(
    captions: Iterable[str], size: int, *, fold_case: bool = False, characters: str = "", mixed_words: bool = False
) -> bytes:
    """The content of a spiece.model: unigrams, at most `size` pieces, T5's <pad> 0, </s> 1, <unk> 2. Deterministic.

    `fold_case` reads capitals as small letters (the table for it takes 240 kB); `characters` become pieces though no
    caption holds them; `mixed_words` allows pieces of letters and digits ("f#5").
    """
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(captions)),
        model_writer=model,
        model_type="unigram",
        vocab_size=size,
        hard_vocab_limit=False,
        split_by_number=not mixed_words,
        split_by_unicode_script=not mixed_words,
        normalization_rule_name="nmt_nfkc_cf" if fold_case else "nmt_nfkc",
        required_chars=characters,
        character_coverage=1.0 if characters else 0.9995,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
