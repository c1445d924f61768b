"""Loading a model, safely, from any of its published forms: one function, one result.

    load_checkpoint("facebook/musicgen-small")   a hub repository, either layout
    load_checkpoint("path/to/folder")            transformers' layout (config.json) or audiocraft's (state_dict.bin)
    load_checkpoint("lm_final.pt", base="small") a fine-tune in one file, completed by the model it was trained from
    load_checkpoint(base, adapter="folder")      a model with a LoRA adapter of PEFT merged in
    load_checkpoint("path/to/packed")            what `musicgen-fast convert --to packed` wrote (packed.json)
    load_checkpoint("demo")                      the small model that comes with this package
    load_checkpoint("random:small-stereo")       a released size with random weights, for benchmarks

safetensors files are preferred; `.bin` files are read with torch's restricted unpickler only. Everything is checked by
name and shape before a weight is used. Knows nothing of devices and of running the model.
"""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError
from .audiocraft_package import training_checkpoint
from .checkpoint import Checkpoint, TextSource, TextTokenizer
from .families import other_folder, other_model_type
from .files import read_json
from .layout import expected_shapes
from .sources import EMBEDDED, LocalFolder, Source, kind_of, local_path, open_source, open_weights

if TYPE_CHECKING:
    from .adapter import Adapter

__all__ = ["Checkpoint", "CheckpointError", "TextSource", "TextTokenizer", "expected_shapes", "load_checkpoint"]

SHORT_NAMES = {name: f"facebook/musicgen-{name}" for name in ("small", "medium", "large", "melody", "style")}


def load_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    text_encoder: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    base: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    adapter_scale: float = 1.0,
    stream: bool = False,
) -> Checkpoint:
    """A model with its codec and text encoder (audiocraft `MusicGen.get_pretrained`, without building it).

    Args:
        name_or_path: a folder, a file with a language model, a hub id, a short name ('small', 'medium', 'large',
            'melody', 'style'), 'demo' for the model in this package, or 'random:SIZE' (`config.named_config`) for
            random weights.
        text_encoder: folder or hub id of the T5 to use instead of the checkpoint's own.
        dtype: of the language model's matrices; None keeps the stored one. Norms and projections stay float32.
            Packed weights stay what they are.
        revision: branch, tag or commit of a hub repository.
        cache_dir: of the hub; default: AUDIOCRAFT_CACHE_DIR of the environment for the model, else the hub's own.
        base: the model that a fine-tune was trained from (any of the above): it lends what a file with a language model
            alone lacks (configuration, codec, T5), or a folder of audiocraft's its codec and T5.
        adapter: folder or hub id of a LoRA adapter of PEFT, merged in float32 before the weights are cast.
        adapter_scale: multiplies the adapter's whole update; 1 is the adapter as trained.
        stream: leave the language model in its file where that can be (transformers' layout): `lm` then gives each
            tensor once, to `pop`, in the stored dtype.

    Raises:
        CheckpointError: nothing usable there; the message names the file, the key or field, and what to do.
        TypeError, ValueError: an `adapter_scale` that is no finite number.
    """
    from .adapter import Adapter

    patch = Adapter.open(adapter, adapter_scale, cache_dir) if adapter is not None else None
    open_ = partial(_open, text_encoder=text_encoder, dtype=dtype, revision=revision, cache_dir=cache_dir)
    lender = open_(base, with_lm=False) if base is not None else None
    checkpoint = open_(name_or_path, base=lender, adapter=patch, stream=stream)
    _check_parts_fit(checkpoint, str(checkpoint.name))
    if patch is not None:
        patch.edit_text(checkpoint.text)
    return checkpoint


def _open(
    name_or_path: str | os.PathLike[str],
    *,
    text_encoder: str | os.PathLike[str] | None,
    dtype: torch.dtype | None,
    revision: str | None,
    cache_dir: str | Path | None,
    base: Checkpoint | None = None,
    adapter: Adapter | None = None,
    with_lm: bool = True,
    stream: bool = False,
) -> Checkpoint:
    """One checkpoint, from wherever it is."""
    name = os.fspath(name_or_path)
    if name.startswith("random:"):
        from .random_weights import random_checkpoint

        if adapter is not None:
            raise CheckpointError(f"{adapter.label} is an update of trained weights; {name} has random ones")
        return random_checkpoint(name.removeprefix("random:"), dtype=dtype or torch.float32)
    if name in SHORT_NAMES and not Path(name).is_dir():
        warnings.warn(
            f"{name!r} stands for {SHORT_NAMES[name]!r}; short names are deprecated, give the full id",
            UserWarning,
            stacklevel=3,
        )
        name_or_path = SHORT_NAMES[name]
    # as in audiocraft, the variable moves the model's own files; T5 and shared codecs stay in the hub's cache
    own_cache = cache_dir or os.environ.get("AUDIOCRAFT_CACHE_DIR") or None
    path = local_path(name)
    wanted: Any = {"name": name, "text_encoder": text_encoder, "dtype": dtype, "cache_dir": cache_dir}
    wanted |= {"adapter": adapter, "with_lm": with_lm}
    if name not in EMBEDDED and kind_of(path) == "file":
        from .single import load_single

        return load_single(path, base=base, **wanted)
    return _load(open_source(name_or_path, revision=revision, cache_dir=own_cache), base, wanted, stream)


def _load(source: Source, base: Checkpoint | None, wanted: dict[str, Any], stream: bool) -> Checkpoint:
    """transformers' layout where a source has it whole (config.json and weights), else audiocraft's, else packed.

    A folder with packed weights is that alone; a hub is asked for them last, which costs the other layouts no request.
    """
    from .audiocraft import load_audiocraft
    from .packed_settings import SETTINGS
    from .streamed import stream_transformers
    from .transformers import load_transformers

    settings_path = source.find(SETTINGS) if isinstance(source, LocalFolder) else None
    if settings_path is not None:
        return _load_packed(source, settings_path, base, wanted)
    config_path = source.find("config.json")
    tensors = open_weights(source) if config_path is not None else None
    if config_path is not None and tensors is not None and stream and wanted["adapter"] is None and base is None:
        given = {key: wanted[key] for key in ("name", "text_encoder", "cache_dir")}
        return stream_transformers(source, config_path, tensors, **given)
    if config_path is not None and tensors is not None:
        checkpoint = load_transformers(source, config_path, tensors, **wanted)
        if base is not None:
            raise CheckpointError(f"{source.label} brings everything itself; leave base= out")
        return checkpoint
    state_path = source.find("state_dict.bin")
    if state_path is not None:
        return load_audiocraft(source, state_path, base=base, **wanted)
    settings_path = source.find(SETTINGS)
    if settings_path is not None:
        return _load_packed(source, settings_path, base, wanted)
    raise _nothing_found(source, config_path)


def _load_packed(source: Source, settings: Path, base: Checkpoint | None, wanted: dict[str, Any]) -> Checkpoint:
    from .packed import load_packed

    if wanted["adapter"] is not None or base is not None:
        raise CheckpointError(f"{source.label} is packed: give adapter= and base= to `convert` and pack what it makes")
    given = {key: wanted[key] for key in ("name", "text_encoder", "cache_dir")}
    return load_packed(source, settings, **given)


def _nothing_found(source: Source, config_path: Path | None) -> CheckpointError:
    adapter = source.find("adapter_config.json")
    if adapter is not None:
        base = read_json(adapter).get("base_model_name_or_path")
        base = base if isinstance(base, str) else "the model it was trained on"
        return CheckpointError(
            f"{source.label} is a LoRA adapter: load its base with it, "
            f"get_pretrained({base[:200]!r}, adapter={source.label!r}) (--model and --adapter on the command line)"
        )
    if config_path is not None:
        model_type = read_json(config_path).get("model_type")
        if model_type is not None and model_type not in ("musicgen", "musicgen_melody"):
            return other_model_type(model_type, f"{config_path}: ", "musicgen or musicgen_melody")
        return source.missing("model.safetensors", "pytorch_model.bin")
    if source.find("checkpoint.th") is not None:
        return training_checkpoint(source.label)
    other = other_folder(source)
    if other is not None:
        return other
    files = _single_files(source)
    if files:
        return CheckpointError(f"{source.label} is a folder with {', '.join(files)}: give that file (and base=)")
    return source.missing("config.json", "state_dict.bin")


def _single_files(source: Source) -> list[str]:
    """Files in a folder that may hold a language model alone."""
    if not isinstance(source, LocalFolder):
        return []
    found = (
        path.name for path in source.path.iterdir() if path.suffix in (".pt", ".pth", ".th", ".ckpt", ".safetensors")
    )
    return sorted(found)[:3]


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
