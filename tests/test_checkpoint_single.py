"""Fine-tunes in one file, completed by their base, and models of other families, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from musicgen_fast import MusicGen
from musicgen_fast.checkpoints import CheckpointError, load_checkpoint
from musicgen_fast.model import Transformer

from .checkpoint_configs import edited, xp_cfg
from .checkpoint_writers import (
    assert_same,
    audiocraft_state,
    edit_json,
    refused,
    tiny,
    write_audiocraft,
    write_codec,
    write_encodec,
    write_json,
    write_t5,
    write_transformers,
)

ALL = ("text", "stereo", "melody", "stereo-melody", "style")


def contents(form: str, state: dict[str, torch.Tensor], cfg: dict[str, Any]) -> Any:
    """What the tools that people use write: their dicts, with these tensors in."""
    if form == "bare":
        return state
    if form == "compiled":  # torch.compile, then DistributedDataParallel
        return {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    if form == "nested":
        return {"best_state": {**state}}
    if form == "cog":
        return {"xp.cfg": yaml.safe_dump(cfg), "model": state}
    return {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "2.0.2",
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-5}]}],
        "lr_schedulers": [],
    }


def write_single(path: Path, form: str, state: dict[str, torch.Tensor], cfg: dict[str, Any] | None = None) -> Path:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(contents(form, {k: t.clone() for k, t in state.items()}, {}), str(path))
    else:
        torch.save(contents(form, state, cfg or {}), path, _use_new_zipfile_serialization=path.suffix != ".old")
    return path


def assert_completed(loaded: Any, fine: Any, base: Any) -> None:
    """The fine-tune's language model, the rest from the base; equal logits."""
    assert loaded.config == fine.config
    assert_same(loaded.lm, fine.lm)
    if fine.style is not None:
        assert_same(loaded.style, fine.style)
    assert_same(loaded.text.tensors, base.text.tensors)
    assert_same(loaded.codec, base.codec)
    config = fine.config
    tokens = torch.randint(0, 65, (1, config.num_codebooks, 7))
    condition = {"prefix" if config.conditioning == "prefix" else "cross": torch.randn(1, 3, config.dim)}
    ours, theirs = (Transformer.from_weights(config, dict(c.lm)) for c in (loaded, fine))
    assert torch.equal(ours(tokens, **condition), theirs(tokens, **condition))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("form", "file"),
    [
        ("bare", "lm_final.pt"),
        ("bare", "lm.th"),
        ("bare", "pytorch.bin"),
        ("bare", "lm.safetensors"),
        ("bare", "lm.old"),
        ("compiled", "lm.pth"),
        ("nested", "lm.pt"),
        ("lightning", "last.ckpt"),
    ],
)
def test_a_language_model_alone(tmp_path, kind, form, file):
    fine, start = tiny(kind, seed=1), tiny(kind, seed=2)
    path = write_single(tmp_path / file, form, audiocraft_state(fine))
    folder = write_audiocraft(tmp_path / "base", start)
    base = load_checkpoint(folder)
    assert_completed(load_checkpoint(path, base=folder), fine, base)
    refused(path, str(path), "language model alone", "base=")


def test_base_in_any_form(tmp_path):
    fine, start = tiny(seed=1), tiny(seed=2)
    path = write_single(tmp_path / "lm.pt", "bare", audiocraft_state(fine))
    folder = write_transformers(tmp_path / "base", start)
    assert_completed(load_checkpoint(path, base=folder), fine, load_checkpoint(folder))
    first = write_single(tmp_path / "cog.tar", "cog", audiocraft_state(start), xp_cfg(start))
    write_codec(tmp_path, start)
    write_t5(tmp_path / "text_encoder", start)
    assert_completed(load_checkpoint(path, base=first), fine, load_checkpoint(first))
    other = write_t5(tmp_path / "t5", tiny(seed=3))
    assert_same(load_checkpoint(path, base=folder, text_encoder=other).text.tensors, tiny(seed=3).text.tensors)
    with pytest.raises(CheckpointError, match="brings everything itself"):
        load_checkpoint(folder, base=folder)
    wide = write_transformers(tmp_path / "wide", tiny(dim=64))
    with pytest.raises(CheckpointError, match=r"lm.pt.*shape.*the base '.*wide'"):
        load_checkpoint(path, base=wide)
    melody = write_transformers(tmp_path / "melody", tiny("melody"))
    with pytest.raises(CheckpointError, match=r"lacks .*self_wav.*the base"):
        load_checkpoint(path, base=melody)


def test_half_precision_and_a_finetuned_text_encoder(tmp_path):
    fine, start = tiny(seed=1), tiny(seed=2)
    state = {name: tensor.half() for name, tensor in audiocraft_state(fine).items()}
    prefix = "condition_provider.conditioners.description.t5."
    state.update({prefix + name: tensor for name, tensor in fine.text.tensors.items()})
    folder = write_transformers(tmp_path / "base", start)
    loaded = load_checkpoint(write_single(tmp_path / "lm.pt", "bare", state), base=folder, dtype=None)
    assert loaded.lm["heads.weight"].dtype == torch.float16
    assert torch.equal(loaded.lm["heads.weight"], fine.lm["heads.weight"].half())
    assert_same(loaded.text.tensors, fine.text.tensors)
    assert loaded.text.tokenizer_folder == folder


@pytest.mark.parametrize("kind", ALL)
def test_weights_with_their_configuration(tmp_path, kind):
    """The cog's file: everything beside it, or from a base; a name is not needed to tell what it is."""
    fine, start = tiny(kind, seed=1), tiny(kind, seed=2)
    cfg = xp_cfg(fine)
    path = write_single(tmp_path / "model.tar", "cog", audiocraft_state(fine), cfg)
    refused(path, "compression_state_dict.bin", "base=") if kind == "text" else None
    folder = write_audiocraft(tmp_path / "base", start)
    assert_completed(load_checkpoint(path, base=folder), fine, load_checkpoint(folder))
    write_codec(tmp_path, fine)
    write_t5(tmp_path / "text_encoder", fine)
    loaded = load_checkpoint(path)
    assert_same(loaded.lm, fine.lm)
    assert_same(loaded.text.tensors, fine.text.tensors)
    assert loaded.xp_cfg["sample_rate"] == 32000


def test_the_cogs_configuration_as_pickled_objects(tmp_path):
    omegaconf = pytest.importorskip("omegaconf", reason="makes the file under test")
    fine = tiny()
    cfg = omegaconf.OmegaConf.create(yaml.safe_dump(xp_cfg(fine)))
    path = tmp_path / "model"
    torch.save({"xp.cfg": cfg, "model": audiocraft_state(fine)}, path)
    folder = write_transformers(tmp_path / "base", tiny(seed=2))
    assert_same(load_checkpoint(path, base=folder).lm, fine.lm)


def test_an_exported_file_and_a_folder_without_codec(tmp_path):
    fine, start = tiny(seed=1), tiny(seed=2)
    folder = write_audiocraft(tmp_path / "fine", fine)
    assert_same(load_checkpoint(folder / "state_dict.bin").lm, fine.lm)
    (folder / "compression_state_dict.bin").unlink()
    refused(folder, "compression_state_dict.bin", "base=")
    base = write_transformers(tmp_path / "base", start)
    loaded = load_checkpoint(folder, base=base)
    assert_same(loaded.lm, fine.lm)
    assert_same(loaded.codec, load_checkpoint(base).codec)
    assert_same(loaded.text.tensors, fine.text.tensors)  # its own text_encoder/ comes first
    write_codec(folder, fine, "facebook/encodec_32khz")  # a pointer, and no network
    assert_same(load_checkpoint(folder, base=base).codec, loaded.codec)


def test_the_codec_that_the_configuration_names(tmp_path):
    fine = tiny()
    cfg = edited(xp_cfg(fine), {"compression_model_checkpoint": "//pretrained/facebook/encodec_32khz"})
    path = write_single(tmp_path / "model.pt", "cog", audiocraft_state(fine), cfg)
    write_t5(tmp_path / "text_encoder", fine)
    refused(path, "facebook/encodec_32khz", "encodec/ beside")
    write_encodec(tmp_path / "facebook" / "encodec_32khz", fine)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert_same(load_checkpoint(path).lm, fine.lm)


def test_the_drop_in_class(tmp_path):
    fine = tiny(seed=1)
    path = write_single(tmp_path / "lm.pt", "bare", audiocraft_state(fine))
    base = write_transformers(tmp_path / "base", tiny(seed=1))
    one, two = MusicGen.get_pretrained(path, "cpu", base=base), MusicGen.get_pretrained(base, "cpu")
    tokens = []
    for model in (one, two):
        model.set_generation_params(duration=0.1)
        tokens.append(model.generate(["calm piano"], return_tokens=True, seed=3)[1])
    assert torch.equal(*tokens)
    assert one.name == str(path)


@pytest.mark.parametrize(
    ("sizes", "kind", "name"),
    [
        ((1024, 24), "text", "musicgen-small"),
        ((1536, 48), "text", "musicgen-medium"),
        ((2048, 48), "stereo", "musicgen-stereo-large"),
        ((1536, 48), "melody", "musicgen-melody"),
        ((2048, 48), "stereo-melody", "musicgen-stereo-melody-large"),
        ((1536, 48), "style", "musicgen-style"),
        ((1536, 24), "text", ""),
    ],
)
def test_the_base_that_is_proposed(tmp_path, sizes, kind, name):
    """By shapes alone; one number a tensor is enough to write them."""
    dim, layers = sizes
    one = torch.zeros(1)
    state = {f"emb.{k}.weight": one.expand(2, dim).clone() for k in range(8 if "stereo" in kind else 4)}
    state |= {f"transformer.layers.{i}.linear1.weight": one for i in range(layers)}
    wav = "condition_provider.conditioners.self_wav."
    if kind == "style":
        state[f"{wav}embed.weight"] = one
    if "melody" in kind or kind == "style":
        state[f"{wav}output_proj.weight"] = one
    message = refused(write_single(tmp_path / "lm.pt", "bare", state), "language model alone")
    assert (f'base="facebook/{name}"' in message) if name else ("e.g." not in message)


# ---- refusals


@pytest.mark.parametrize(
    "content",
    [
        {"best_state": {}, "xp.cfg": "a: 1", "optimizer": {"state": {}}},
        {"xp.cfg": "a: 1", "xp.sig": "0123", "model": {}},
        {"fsdp_best_state": {}, "best_state": {"model": {}}, "history": []},
    ],
)
def test_training_checkpoints_are_for_convert(tmp_path, content):
    path = tmp_path / "checkpoint.th"
    torch.save(content, path)
    refused(path, "training checkpoint", "musicgen-fast convert", "--trust-pickle", "audiocraft.utils.export")
    refused(tmp_path, "training checkpoint", "--trust-pickle")


def test_a_training_checkpoint_with_objects_of_its_own(tmp_path):
    """The class of a training tool: nothing is run, and the message names the command."""
    import argparse

    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"model.emb.0.weight": torch.ones(1)}, "hyper_parameters": argparse.Namespace(a=1)}, path)
    refused(path, "argparse.Namespace", "nothing in it was run", "--trust-pickle")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"lm_model": "transformer_lm_magnet"}, "MAGNeT"),
        ({"solver": "audio-magnet"}, "MAGNeT"),
        ({"solver": "jasco"}, "JASCO"),
        ({"solver": "diffusion"}, "MultiBand Diffusion"),
        ({"solver": "compression"}, "a codec alone"),
    ],
)
def test_other_models_of_audiocraft(tmp_path, changes, name):
    folder = write_audiocraft(tmp_path, tiny(), changes=changes)
    refused(folder, name, "only MusicGen and AudioGen")
    refused(folder / "state_dict.bin", name)


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("model_index.json", {"_class_name": "StableAudioPipeline"}, "Stable Audio"),
        ("model_config.json", {"model_type": "diffusion_cond", "sample_rate": 44100}, "Stable Audio"),
        ("model_index.json", {"_class_name": "AudioLDMPipeline"}, "AudioLDM"),
        ("model_index.json", {"_class_name": "AudioLDM2Pipeline"}, "AudioLDM"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ("config.json", {"model_type": "encodec"}, "EnCodec, a codec alone"),
        ("config.json", {"model_type": "dac"}, "DAC"),
        ("config.json", {"model_type": "musicgen_decoder"}, "decoder of a MusicGen alone"),
        ("config.json", {"model_type": "llama"}, "'llama'"),
        ("config.json", {"model_type": ["musicgen"]}, "['musicgen']"),
    ],
)
def test_folders_of_other_families(tmp_path, file, content, name):
    write_json(tmp_path / file, content)
    refused(tmp_path, file, name, "only MusicGen and AudioGen models are supported")


def test_a_codec_alone(tmp_path):
    written = tiny()
    refused(write_encodec(tmp_path / "hf", written), "EnCodec, a codec alone")
    (tmp_path / "ac").mkdir()
    write_codec(tmp_path / "ac", written)
    refused(tmp_path / "ac", "a codec alone")
    refused(tmp_path / "ac" / "compression_state_dict.bin", "a codec alone")


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["model.model.transformer.layers.0.w", "pretransform.model.encoder.w"], "Stable Audio"),
        (["model.diffusion_model.input_blocks.0.w", "first_stage_model.w"], "AudioLDM"),
        (["encoder.model.0.conv.conv.weight_g", "quantizer.vq.layers.0._codebook.embed"], "EnCodec"),
        (["a", "b"], "no language model of MusicGen"),
        ([], "none"),
    ],
)
def test_files_of_other_families(tmp_path, keys, name):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {key: torch.ones(1) for key in keys}}, path)
    refused(path, str(path), name)


def test_what_else_is_wrong_with_a_file(tmp_path):
    base = write_transformers(tmp_path / "base", tiny())
    state = audiocraft_state(tiny())

    def load(content: Any, name: str = "lm.pt") -> None:
        torch.save(content, tmp_path / name)
        load_checkpoint(tmp_path / name, base=base)

    with pytest.raises(CheckpointError, match=r"lm.pt lacks 'out_norm.bias'"):
        load({k: t for k, t in state.items() if k != "out_norm.bias"})
    with pytest.raises(CheckpointError, match=r"holds 'extra.weight', which no supported"):
        load({**state, "extra.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="'note' holds a str, expected a tensor"):
        load({**state, "note": "x"})
    with pytest.raises(CheckpointError, match="holds a list"):
        load([1, 2])
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        load(torch.ones(2))
    (tmp_path / "x.tar").write_bytes(b"\0" * 257 + b"ustar" + b"\0" * 300)
    with pytest.raises(CheckpointError, match="archive; unpack it"):
        load_checkpoint(tmp_path / "x.tar", base=base)
    with pytest.raises(CheckpointError, match=r"folder with .*lm.pt.*give that file"):
        load_checkpoint(tmp_path)
    edit_json(base / "config.json", model_type="t5")
    with pytest.raises(CheckpointError, match="T5 text encoder alone"):
        load(state)
