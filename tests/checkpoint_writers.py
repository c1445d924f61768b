"""Tiny random checkpoints on disk, in both published layouts and every variant of them that people hold.

All of them come from one canonical `Checkpoint` (see `tiny`), so a test compares what was loaded with what was written.
The audiocraft names are written out here by hand, as a second opinion on the loader's.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from musicgen_fast.checkpoints import Checkpoint, CheckpointError, load_checkpoint
from musicgen_fast.checkpoints.write import (
    generation_config,
    tiny_checkpoint,
    transformers_config,
    transformers_tensors,
    write_vocabulary,
)
from musicgen_fast.config import CodecConfig, MelodyConfig, ModelConfig, PatternConfig, StyleConfig, TextConfig

from .checkpoint_configs import codec_xp_cfg, edited, xp_cfg

KINDS = ("text", "stereo", "melody", "stereo-melody")  # those that both layouts have
SELF_WAV = "condition_provider.conditioners.self_wav."
DESCRIPTION = "condition_provider.conditioners.description."


def tiny_config(kind: str = "text", **changes: Any) -> ModelConfig:
    """kinds: text, stereo, melody, stereo-melody, style."""
    stereo, melody, style = "stereo" in kind, "melody" in kind, kind == "style"
    books = changes.pop("num_codebooks", 8 if stereo else 4)
    config = ModelConfig(
        dim=32,
        num_layers=2,
        num_heads=2,
        ffn_dim=128,
        num_codebooks=books,
        vocab_size=64,
        pattern=PatternConfig(delays=tuple(k // 2 if stereo else k for k in range(books))),
        conditioning="prefix" if melody or style else "cross",
        text=TextConfig(name="t5-base", dim=24),
        melody=MelodyConfig() if melody else None,
        style=StyleConfig(dim=256, num_layers=4, ffn_dim=1024, codebook_size=16) if style else None,
        audio_channels=2 if stereo else 1,
    )
    return replace(config, **changes)


def tiny(kind: str = "text", seed: int = 0, codec_config: CodecConfig | None = None, **changes: Any) -> Checkpoint:
    """A random checkpoint of `tiny_config(kind, **changes)`."""
    return tiny_checkpoint(seed, config=tiny_config(kind, **changes), codec_config=codec_config)


# ---- transformers


def write_transformers(
    folder: Path, checkpoint: Checkpoint, *, form: str = "safetensors", shards: int = 1, old_norms: bool = False
) -> Path:
    """form: 'safetensors' or 'bin'; `old_norms`: weight norm as `weight_g` and `weight_v`, as before torch 2.1."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = transformers_tensors(checkpoint)
    if old_norms:
        tensors = {_old_norm(name): tensor for name, tensor in tensors.items()}
    stem = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[form]
    if shards == 1:
        _save(tensors, folder / stem)
    else:
        _save_shards(tensors, folder, stem, shards)
    write_json(folder / "config.json", transformers_config(checkpoint))
    write_json(folder / "generation_config.json", generation_config(checkpoint.config))
    write_vocabulary(folder)
    return folder


def _old_norm(name: str) -> str:
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = name.replace(f"parametrizations.weight.{new}", old)
    return name


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    if path.suffix == ".safetensors":
        save_file(tensors, str(path), metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def _save_shards(tensors: dict[str, Tensor], folder: Path, stem: str, shards: int) -> None:
    base, suffix = stem.split(".")
    weight_map = {}
    for i in range(shards):
        file = f"{base}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        _save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    write_json(folder / f"{stem}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, section: str | None = None, **changes: Any) -> None:
    """Changes fields of a JSON file (of one of its sections)."""
    content = json.loads(path.read_text())
    (content if section is None else content[section]).update(changes)
    write_json(path, content)


# ---- audiocraft


def write_audiocraft(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    changes: dict[str, Any] | None = None,
    codec: str = "full",
    half: bool = False,
    mha: bool = False,
    nested: bool = False,
    text: bool = True,
    legacy: bool = False,
) -> Path:
    """An exported folder.

    Args:
        changes: fields of xp.cfg to set, dotted names; a value of `...` removes the field.
        codec: 'full', 'pointer' (with the codec in encodec/ beside), or the text of a pointer.
        half: float16 weights of the language model, as in the releases.
        mha: attention weights under torch's own module.
        nested: `best_state` one level deeper.
        text: write the T5 into text_encoder/.
        legacy: torch's file format from before 1.6 (no zip).
    """
    folder.mkdir(parents=True, exist_ok=True)
    cfg = edited(xp_cfg(checkpoint), changes or {})
    state = audiocraft_state(checkpoint)
    if half:
        state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    if mha:
        state = {_mha_name(name): tensor for name, tensor in state.items()}
    package = {
        "best_state": {"model": state} if nested else state,
        "xp.cfg": yaml.safe_dump(cfg),
        "version": "1.4.0a2",
        "exported": True,
    }
    torch.save(package, folder / "state_dict.bin", _use_new_zipfile_serialization=not legacy)
    write_codec(folder, checkpoint, codec)
    if text and checkpoint.text is not None:
        write_t5(folder / "text_encoder", checkpoint)
    return folder


def write_codec(folder: Path, checkpoint: Checkpoint, codec: str = "full") -> None:
    """`compression_state_dict.bin`: the codec itself, or a pointer."""
    tensors = {
        name.removeprefix("audio_encoder."): tensor
        for name, tensor in transformers_tensors(checkpoint).items()
        if name.startswith("audio_encoder.")
    }
    path = folder / "compression_state_dict.bin"
    if codec == "full":
        state = {audiocraft_codec_name(name): tensor for name, tensor in tensors.items()}
        cfg = codec_xp_cfg(checkpoint.codec_config)
        torch.save({"best_state": state, "xp.cfg": yaml.safe_dump(cfg), "version": "1", "exported": True}, path)
        return
    pointer = "facebook/encodec_32khz" if codec == "pointer" else codec
    torch.save({"pretrained": pointer, "exported": True, "version": "1"}, path)
    if codec == "pointer":
        write_encodec(folder / "encodec", checkpoint, tensors)


def write_encodec(folder: Path, checkpoint: Checkpoint, tensors: dict[str, Tensor] | None = None) -> Path:
    """An EnCodec alone in transformers' layout."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        every = transformers_tensors(checkpoint)
        tensors = {n.removeprefix("audio_encoder."): t for n, t in every.items() if n.startswith("audio_encoder.")}
    _save(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", transformers_config(_as_text(checkpoint))["audio_encoder"])
    return folder


def _as_text(checkpoint: Checkpoint) -> Checkpoint:
    """The codec's configuration does not depend on the language model, but `transformers_config` wants one it knows."""
    return replace(checkpoint, config=tiny_config(), text=tiny().text)


def write_t5(folder: Path, checkpoint: Checkpoint) -> Path:
    """The T5 of a checkpoint alone, in transformers' layout, with a vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    assert checkpoint.text is not None
    _save({name: tensor.clone() for name, tensor in checkpoint.text.tensors.items()}, folder / "model.safetensors")
    write_json(folder / "config.json", checkpoint.text.config)
    write_vocabulary(folder)
    return folder


def audiocraft_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """`best_state` of the language model, conditioners included."""
    config, lm = checkpoint.config, checkpoint.lm
    state: dict[str, Tensor] = {}
    for k in range(config.num_codebooks):
        state[f"emb.{k}.weight"] = lm["emb.weight"].chunk(config.num_codebooks)[k].clone()
        state[f"linears.{k}.weight"] = lm["heads.weight"].chunk(config.num_codebooks)[k].clone()
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"transformer.layers.{i}."
        for norm in ("norm1", "norm2", "norm_cross"):
            for part in ("weight", "bias"):
                if f"{ours}{norm}.{part}" in lm:
                    state[f"{theirs}{norm}.{part}"] = lm[f"{ours}{norm}.{part}"]
        state[f"{theirs}self_attn.in_proj_weight"] = lm[f"{ours}qkv.weight"]
        state[f"{theirs}self_attn.out_proj.weight"] = lm[f"{ours}attn_out.weight"]
        if config.conditioning == "cross":
            q, kv = lm[f"{ours}cross_q.weight"], lm[f"{ours}cross_kv.weight"]
            state[f"{theirs}cross_attention.in_proj_weight"] = torch.cat([q, kv])
            state[f"{theirs}cross_attention.out_proj.weight"] = lm[f"{ours}cross_out.weight"]
        state[f"{theirs}linear1.weight"] = lm[f"{ours}ffn_in.weight"]
        state[f"{theirs}linear2.weight"] = lm[f"{ours}ffn_out.weight"]
    for part in ("weight", "bias"):
        state[f"out_norm.{part}"] = lm[f"norm.{part}"]
        if config.text is not None:
            state[f"{DESCRIPTION}output_proj.{part}"] = lm[f"text_proj.{part}"]
        if config.melody is not None:
            state[f"{SELF_WAV}output_proj.{part}"] = lm[f"melody_proj.{part}"]
    if config.melody is not None:
        state[f"{SELF_WAV}chroma.spec.window"] = torch.hann_window(16384)
    for name, tensor in (checkpoint.style or {}).items():
        state[SELF_WAV + name] = tensor
        if name.endswith("_codebook.embed"):
            base = SELF_WAV + name.removesuffix("embed")
            state[base + "inited"], state[base + "embed_avg"] = torch.ones(1), tensor.clone()
            state[base + "cluster_size"] = torch.ones(len(tensor))
    if checkpoint.style is not None:
        state[SELF_WAV + "batch_norm.num_batches_tracked"] = torch.tensor(7)
    return state


def _mha_name(name: str) -> str:
    for attention in ("self_attn", "cross_attention"):
        name = name.replace(f"{attention}.in_proj", f"{attention}.mha.in_proj")
        name = name.replace(f"{attention}.out_proj", f"{attention}.mha.out_proj")
    return name


def audiocraft_codec_name(name: str) -> str:
    """transformers' EnCodec name -> audiocraft's, for four ratios and one residual layer."""
    name = _old_norm(name)
    if name.startswith("quantizer.layers."):
        return name.replace("quantizer.layers.", "quantizer.vq.layers.").replace(".codebook.", "._codebook.")
    side, _, index, rest = name.split(".", 3)
    if rest.startswith("lstm"):
        return f"{side}.model.{index}.{rest}"
    transposed = side == "decoder" and index in ("3", "6", "9", "12")
    inner = "convtr.convtr" if transposed else "conv.conv"
    return f"{side}.model.{index}.{rest.replace('conv.', inner + '.', 1)}"


# ---- checks


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def refused(folder: Path, *words: str) -> str:
    """Loading raises a CheckpointError that holds all of `words`; its message."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    for word in words:
        assert word in message
    return message
