"""What a checkpoint is in a layout: the files, and of which rows of the source each tensor is made. Writes nothing.

A layout is a function in `WRITERS`: from a checkpoint on disk (`inspect.OnDisk`) and a precision to `Files`. At the
stored precision every tensor stays bit for bit; what a layout cannot hold is refused or remarked on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import audiocraft as old
from . import transformers as new
from .audiocraft_write import audiocraft_config
from .checkpoint import Checkpoint, TextSource
from .codec_write import audiocraft_codec_config, codec_entries
from .entries import Entry
from .files import read_json
from .inspect import OnDisk
from .layout import stays_float32
from .write import generation_config, preprocessor_config, transformers_config

__all__ = ["FILE_NAMES", "WRITERS", "Files", "entries_in"]

_TOKENIZER = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_CARDS = ("README.md", "LICENSE", "LICENSE.txt")
_TOKENIZER_CONFIG = {
    "tokenizer_class": "T5Tokenizer",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "extra_ids": 100,
}
# every name in the folder of a result
FILE_NAMES = {*_TOKENIZER, *_CARDS, "config.json", "generation_config.json", "preprocessor_config.json"}
FILE_NAMES |= {"model.safetensors", "state_dict.bin", "compression_state_dict.bin", "text_encoder"}
_SIZES = ("small", "base", "large", "3b", "11b", "xl", "xxl")
_AUDIOCRAFTS_T5 = tuple(f"{prefix}t5-{size}" for prefix in ("", "google/flan-") for size in _SIZES)


@dataclass
class Files:
    """The files of a result by their names in its folder.

    `weights`: a list of entries makes a safetensors file, a dict (in which entries stand for tensors) one of torch.
    """

    weights: dict[str, list[Entry] | dict[str, Any]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    copies: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def entries(self) -> Iterator[Entry]:
        for content in self.weights.values():
            yield from content if isinstance(content, list) else entries_in(content)


def entries_in(content: Mapping[str, Any]) -> Iterator[Entry]:
    """The entries anywhere in the content of a torch file."""
    for value in content.values():
        if isinstance(value, Entry):
            yield value
        elif isinstance(value, dict):
            yield from entries_in(value)


def _dtype(name: str, dims: int, precision: torch.dtype | None) -> torch.dtype | None:
    """Of a tensor of the language model, by its canonical name; None: as stored."""
    return torch.float32 if precision is not None and stays_float32(name, dims) else precision


def _lm_entries(found: OnDisk, names: Iterable[tuple[str, list[str]]], precision: torch.dtype | None) -> list[Entry]:
    """The language model under the names that a layout gives to the rows of each canonical tensor."""
    targets: dict[str, tuple[list[Tensor], torch.dtype | None]] = {}
    for name, theirs in names:
        parts = found.lm.get(name, ())
        for i, target in enumerate(theirs if parts else ()):
            pieces, _ = targets.setdefault(target, ([], _dtype(name, parts[0].dim(), precision)))
            pieces.extend(_rows(parts, i, len(theirs)))
    return [Entry.of(target, *pieces, dtype=dtype) for target, (pieces, dtype) in targets.items()]


def _rows(parts: tuple[Tensor, ...], index: int, count: int) -> Iterator[Tensor]:
    """The rows of part `index` of `count` equal ones."""
    size = sum(len(part) for part in parts) // count
    start = index * size
    for part in parts:
        first, last = max(start, 0), min(start + size, len(part))
        if first < last:
            yield part[first:last]
        start -= len(part)


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _side_files(found: OnDisk, files: Files, folder: str = "") -> None:
    """The tokenizer into `folder`, the model card and the licence beside the weights."""
    tokenizer = found.text.tokenizer if found.text is not None else None
    if tokenizer is not None:
        files.copies.update({folder + name: tokenizer / name for name in _TOKENIZER if (tokenizer / name).is_file()})
    elif found.text is not None:
        files.notes.append("there is no tokenizer to copy: the result cannot read texts until one is put beside it")
    cards = {name: found.source.find(name) for name in _CARDS} if found.source is not None else {}
    files.copies.update({name: path for name, path in cards.items() if path is not None})


def _to_transformers(found: OnDisk, precision: torch.dtype | None) -> Files:
    """config.json, model.safetensors and what transformers' processors read."""
    config, text, codec_config = found.config, found.text, found.codec_config
    if config.text is None or text is None or codec_config is None:
        raise CheckpointError(f"{found.label} has no text encoder; transformers' models have one")
    if config.melody is not None and not config.melody.argmax:
        raise CheckpointError(f"{found.label} uses all of its chroma; transformers' melody models take the strongest")
    try:
        raw = transformers_config(Checkpoint("", config, {}, codec_config, {}, TextSource(text.config, {})))
    except ValueError as error:
        raise CheckpointError(f"{found.label}: {error}; --to audiocraft keeps it") from error
    if config.text.dim == config.dim and "text_proj.weight" in found.lm:
        found = _without_identity(found)
    entries = _lm_entries(found, new.names_in_file(config), precision)
    entries += [Entry.of(new.TEXT + name, tensor) for name, tensor in text.tensors.items()]
    codec = codec_entries(found.codec, codec_config, "transformers", found.label)
    entries += [replace(entry, name=new.CODEC + entry.name) for entry in codec]
    kinds = {entry.dtype for entry in entries if entry.dtype.is_floating_point}
    # without this transformers takes the dtype of whichever tensor comes first for all parts
    raw["torch_dtype"] = str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else "float32"
    raw["text_encoder"] = {"model_type": "t5", **text.config, "_name_or_path": config.text.name}
    files = Files(weights={"model.safetensors": entries})
    files.texts = {
        "config.json": _json(raw),
        "generation_config.json": _json(generation_config(config)),
        "preprocessor_config.json": _json(preprocessor_config(config, codec_config.sample_rate)),
        "tokenizer_config.json": _json(_TOKENIZER_CONFIG),
    }
    if found.layout == "transformers" and found.source is not None:
        for name in ("generation_config.json", "preprocessor_config.json"):
            path = found.source.find(name)
            if path is not None:
                files.texts[name] = _json(read_json(path))
    _side_files(found, files)
    for name in files.copies:
        files.texts.pop(name, None)
    return files


def _without_identity(found: OnDisk) -> OnDisk:
    """The model without its text projection, which transformers has only between unequal widths."""
    weight = torch.cat(found.lm["text_proj.weight"])
    if not torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)) or found.lm["text_proj.bias"][0].any():
        raise CheckpointError(
            f"{found.label}: the text encoder is as wide as the model, where transformers has no projection; "
            "this model has one, so transformers cannot hold it"
        )
    return replace(found, lm={name: rows for name, rows in found.lm.items() if not name.startswith("text_proj.")})


def _to_audiocraft(found: OnDisk, precision: torch.dtype | None) -> Files:
    """state_dict.bin, compression_state_dict.bin, and the T5 in text_encoder/ beside, which audiocraft's files lack."""
    import yaml

    config, codec_config = found.config, found.codec_config
    if codec_config is None:
        raise CheckpointError(f"{found.label} has no codec")
    raw = found.raw_xp_cfg
    if raw is None:
        made = found.xp_cfg or audiocraft_config(config, codec_config.sample_rate)
        raw = yaml.safe_dump(made, sort_keys=False)
    state = {entry.name: entry for entry in _lm_entries(found, old.names_in_file(config), precision)}
    if config.text is not None and "text_proj.weight" not in found.lm:
        # transformers has no projection where both are equally wide; audiocraft always has: one that changes nothing
        for name, tensor in (("weight", torch.eye(config.dim)), ("bias", torch.zeros(config.dim))):
            state[f"{old.DESCRIPTION}output_proj.{name}"] = Entry.of(f"{old.DESCRIPTION}output_proj.{name}", tensor)
    for name, rows in found.style.items():
        state[old.SELF_WAV + name] = Entry.of(old.SELF_WAV + name, *rows)
    buffers = {**_buffers(found), **found.rest, **_finetuned(found)}
    state.update({name: Entry.of(name, tensor) for name, tensor in buffers.items()})
    codec = codec_entries(found.codec, codec_config, "audiocraft", found.label)
    codec_cfg = found.raw_codec_xp_cfg if any(name.endswith("weight_g") for name in found.codec) else None
    package = {"version": "musicgen_fast", "exported": True}
    files = Files()
    files.weights["state_dict.bin"] = {"best_state": state, "xp.cfg": raw, **package}
    files.weights["compression_state_dict.bin"] = {
        "best_state": {entry.name: entry for entry in codec},
        "xp.cfg": codec_cfg or yaml.safe_dump(audiocraft_codec_config(codec_config), sort_keys=False),
        **package,
    }
    if found.text is not None and config.text is not None:
        files.weights["text_encoder/model.safetensors"] = [Entry.of(n, t) for n, t in found.text.tensors.items()]
        t5 = {"model_type": "t5", "architectures": ["T5EncoderModel"], **found.text.config}
        files.texts["text_encoder/config.json"] = _json(t5)
        files.notes.append(f"audiocraft itself fetches {config.text.name!r} from the hub; text_encoder/ is for others")
        if config.text.name not in _AUDIOCRAFTS_T5:
            files.notes.append(f"audiocraft does not know a text encoder {config.text.name!r}: edit xp.cfg to use one")
    _side_files(found, files, "text_encoder/")
    return files


def _finetuned(found: OnDisk) -> dict[str, Tensor]:
    """The T5 inside, which audiocraft looks for where its configuration says that it was trained along."""
    node: Any = found.xp_cfg or {}
    for key in ("conditioners", "description", "t5"):
        node = node.get(key) or {}
    inside = old.DESCRIPTION + "t5."
    if not node.get("finetune") or found.text is None or any(name.startswith(inside) for name in found.rest):
        return {}
    out = {inside + name: tensor for name, tensor in found.text.tensors.items()}
    return {**out, f"{inside}encoder.embed_tokens.weight": found.text.tensors["shared.weight"]}


def _buffers(found: OnDisk) -> dict[str, Tensor]:
    """What audiocraft's strict loading asks for and inference does not use, where the source had none."""
    out: dict[str, Tensor] = {}
    melody = found.config.melody
    if melody is not None:
        window = torch.hann_window(2**melody.radix2_exp)
        out[old.SELF_WAV + "chroma.spec.window"] = window.to(found.lm["norm.weight"][0].dtype)  # as files have it
    for name, rows in found.style.items():
        stem = old.SELF_WAV + name.removesuffix("embed")
        if name.endswith("_codebook.embed"):
            made = {"inited": torch.ones(1), "cluster_size": torch.ones(len(rows[0])), "embed_avg": rows[0]}
            out.update({stem + key: value for key, value in made.items()})
        if name == "batch_norm.running_var":
            out[old.SELF_WAV + "batch_norm.num_batches_tracked"] = torch.tensor(0)
    return out


Writer = Callable[[OnDisk, "torch.dtype | None"], Files]

# `--to NAME`: another layout is a function here
WRITERS: dict[str, Writer] = {"transformers": _to_transformers, "audiocraft": _to_audiocraft}
