"""Loading a model, safely, from any of its published forms: one function, one result.

    load_checkpoint("facebook/musicgen-small")   a hub repository, either layout
    load_checkpoint("path/to/folder")            transformers' layout (config.json) or audiocraft's (state_dict.bin)
    load_checkpoint("path/to/packed")            what `musicgen-fast convert --to packed` wrote (packed.json)
    load_checkpoint("demo")                      the small model that comes with this package
    load_checkpoint("random:small-stereo")       a released size with random weights, for benchmarks

safetensors files are preferred; `.bin` files are read with torch's restricted unpickler only. Everything is checked by
name and shape before a weight is used. Knows nothing of devices and of running the model.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from ..errors import CheckpointError
from .checkpoint import Checkpoint, TextSource, TextTokenizer
from .layout import expected_shapes
from .sources import LocalFolder, Source, open_source, open_weights

__all__ = ["Checkpoint", "CheckpointError", "TextSource", "TextTokenizer", "expected_shapes", "load_checkpoint"]

SHORT_NAMES = {name: f"facebook/musicgen-{name}" for name in ("small", "medium", "large", "melody", "style")}


def load_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    text_encoder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    stream: bool = False,
) -> Checkpoint:
    """A model with its codec and text encoder (audiocraft `MusicGen.get_pretrained`, without building it).

    Args:
        name_or_path: a folder, a hub id, a short name ('small', 'medium', 'large', 'melody', 'style'), or
            'demo' for the model in this package, or 'random:SIZE' (`config.named_config`) for random weights.
        text_encoder: folder or hub id of the T5 to use instead of the checkpoint's own.
        dtype: of the language model's matrices; None keeps the stored one. Norms and projections stay float32.
            Packed weights stay what they are.
        revision: branch, tag or commit of a hub repository.
        cache_dir: of the hub; default: AUDIOCRAFT_CACHE_DIR of the environment for the model, else the hub's own.
        stream: leave the language model in its file where that can be (transformers' layout): `lm` then gives each
            tensor once, to `pop`, in the stored dtype.

    Raises:
        CheckpointError: nothing usable there; the message names the file, the key or field, and what to do.
    """
    name = os.fspath(name_or_path)
    if name.startswith("random:"):
        from .random_weights import random_checkpoint

        return random_checkpoint(name.removeprefix("random:"), dtype=dtype or torch.float32)
    if name in SHORT_NAMES and not Path(name).is_dir():
        warnings.warn(
            f"{name!r} stands for {SHORT_NAMES[name]!r}; short names are deprecated, give the full id",
            UserWarning,
            stacklevel=2,
        )
        name_or_path = SHORT_NAMES[name]
    # as in audiocraft, the variable moves the model's own files; T5 and shared codecs stay in the hub's cache
    own_cache = cache_dir or os.environ.get("AUDIOCRAFT_CACHE_DIR") or None
    source = open_source(name_or_path, revision=revision, cache_dir=own_cache)
    checkpoint = _load(source, name, text_encoder, dtype, cache_dir, stream)
    _check_parts_fit(checkpoint, source.label)
    return checkpoint


def _load(
    source: Source,
    name: str,
    text_encoder: str | os.PathLike[str] | None,
    dtype: torch.dtype | None,
    cache_dir: str | Path | None,
    stream: bool,
) -> Checkpoint:
    """transformers' layout where a source has it whole (config.json and weights), else audiocraft's, else packed.

    A folder with packed weights is that alone; a hub is asked for them last, which costs the other layouts no request.
    """
    from .audiocraft import load_audiocraft
    from .packed import load_packed
    from .packed_settings import SETTINGS
    from .streamed import stream_transformers
    from .transformers import load_transformers

    settings_path = source.find(SETTINGS) if isinstance(source, LocalFolder) else None
    if settings_path is not None:
        return load_packed(source, settings_path, name=name, text_encoder=text_encoder, cache_dir=cache_dir)
    config_path = source.find("config.json")
    tensors = open_weights(source) if config_path is not None else None
    if config_path is not None and tensors is not None and stream:
        return stream_transformers(
            source, config_path, tensors, name=name, text_encoder=text_encoder, cache_dir=cache_dir
        )
    if config_path is not None and tensors is not None:
        return load_transformers(
            source, config_path, tensors, name=name, text_encoder=text_encoder, dtype=dtype, cache_dir=cache_dir
        )
    state_path = source.find("state_dict.bin")
    if state_path is not None:
        return load_audiocraft(
            source, state_path, name=name, text_encoder=text_encoder, dtype=dtype, cache_dir=cache_dir
        )
    settings_path = source.find(SETTINGS)
    if settings_path is not None:
        return load_packed(source, settings_path, name=name, text_encoder=text_encoder, cache_dir=cache_dir)
    raise _nothing_found(source, config_path)


def _nothing_found(source: Source, config_path: Path | None) -> CheckpointError:
    if config_path is not None:
        return source.missing("model.safetensors", "pytorch_model.bin")
    if source.find("adapter_config.json") is not None:
        return CheckpointError(f"{source.label} is a LoRA adapter; merge it into its base model and save that")
    if source.find("checkpoint.th") is not None:
        return CheckpointError(
            f"{source.label} is a training checkpoint; export it with audiocraft.utils.export to get state_dict.bin"
        )
    return source.missing("config.json", "state_dict.bin")


def _check_parts_fit(checkpoint: Checkpoint, label: str) -> None:
    """The parts fit each other: text width, codebooks, vocabulary, sample rate. A codec may have more codebooks."""
    config, codec, text = checkpoint.config, checkpoint.codec_config, checkpoint.text
    if config.text is not None and text is not None:
        width = text.config.get("d_model", 512)
        if width != config.text.dim:
            raise CheckpointError(
                f"the text encoder ({text.origin}) has width {width}, {label} needs {config.text.dim}; "
                f"it was trained with {config.text.name!r}: give that one as text_encoder="
            )
    if codec.channels != 1:
        raise CheckpointError(f"{label}: the codec has {codec.channels} channels; only mono codecs are supported")
    used = config.num_codebooks // config.audio_channels
    if used > codec.num_codebooks or config.vocab_size != codec.codebook_size:
        raise CheckpointError(
            f"{label}: the model uses {used} codebooks of {config.vocab_size} entries a channel, its codec has "
            f"{codec.num_codebooks} of {codec.codebook_size}; the codec belongs to another model"
        )
    rate = (checkpoint.xp_cfg or {}).get("sample_rate")
    if isinstance(rate, int) and rate != codec.sample_rate:
        raise CheckpointError(
            f"{label}: xp.cfg: sample_rate is {rate}, its codec runs at {codec.sample_rate} Hz; "
            "the codec belongs to another model"
        )
