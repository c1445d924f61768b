"""Loading: every layout and variant gives back the weights and the configuration that were written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from musicgen_fast.checkpoints import CheckpointError, expected_shapes, load_checkpoint
from musicgen_fast.checkpoints.random_weights import ByteTokenizer, random_checkpoint
from musicgen_fast.checkpoints.write import write_transformers_folder
from musicgen_fast.config import PatternConfig, TextConfig, named_config
from musicgen_fast.model import Transformer

from .checkpoint_writers import (
    KINDS,
    assert_same,
    edit_json,
    tiny,
    tiny_config,
    write_audiocraft,
    write_json,
    write_t5,
    write_transformers,
)


def assert_loads_as(folder, written, codec_tolerance=1e-6, **options):
    loaded = load_checkpoint(folder, **options)
    assert loaded.config == written.config
    assert loaded.codec_config == written.codec_config
    assert_same(loaded.lm, written.lm)
    assert_same(loaded.text.tensors, written.text.tensors)
    assert loaded.codec.keys() == written.codec.keys()
    for name, tensor in written.codec.items():
        torch.testing.assert_close(loaded.codec[name], tensor, rtol=codec_tolerance, atol=1e-7, msg=name)
    return loaded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"form": "bin"}, {"shards": 3}, {"form": "bin", "shards": 2}, {"old_norms": True}],
    ids=["safetensors", "bin", "sharded", "sharded-bin", "old-norms"],
)
def test_transformers_layout(tmp_path, kind, options):
    written = tiny(kind)
    loaded = assert_loads_as(write_transformers(tmp_path, written, **options), written)
    assert loaded.text.tokenizer_folder == tmp_path and loaded.xp_cfg is None and loaded.style is None


@pytest.mark.parametrize("kind", [*KINDS, "style"])
@pytest.mark.parametrize(
    "options",
    [{}, {"codec": "pointer"}, {"mha": True}, {"nested": True}, {"legacy": True}],
    ids=["export", "pointer", "mha", "nested", "legacy"],
)
def test_audiocraft_layout(tmp_path, kind, options):
    written = tiny(kind)
    loaded = assert_loads_as(write_audiocraft(tmp_path, written, **options), written)
    assert loaded.text.tokenizer_folder == tmp_path / "text_encoder"
    assert loaded.xp_cfg["generate"]["audio"]["sample_rate"] == written.codec_config.sample_rate
    assert loaded.xp_cfg["generate"]["home"] == "${oc.env:HOME}"
    assert (loaded.style is None) == (kind != "style")
    if loaded.style is not None:
        assert_same(loaded.style, written.style)


@pytest.mark.parametrize("layout", [write_transformers, write_audiocraft])
@pytest.mark.parametrize(
    ("dim", "heads", "vocab", "books"),
    [(32, 4, 64, 4), (64, 1, 128, 2), (40, 2, 2048, 8), (48, 6, 100, 3)],
)
def test_any_size(tmp_path, layout, dim, heads, vocab, books):
    written = tiny(dim=dim, num_heads=heads, ffn_dim=2 * dim, vocab_size=vocab, num_codebooks=books, num_layers=3)
    assert_loads_as(layout(tmp_path, written), written)


def test_half_precision_files(tmp_path):
    written = tiny()
    folder = write_audiocraft(tmp_path, written, half=True)
    full, stored, brain = (load_checkpoint(folder, dtype=dtype).lm for dtype in (torch.float32, None, torch.bfloat16))
    for name, tensor in written.lm.items():
        assert torch.equal(full[name], tensor.half().float())
        small = tensor.dim() < 2 or "_proj." in name
        assert stored[name].dtype == (torch.float32 if small else torch.float16)
        assert brain[name].dtype == (torch.float32 if small else torch.bfloat16)
        assert torch.equal(stored[name].float(), tensor.half().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"form": "bin"}, {"shards": 3}, {"form": "bin", "shards": 2}])
def test_half_precision_transformers_files(tmp_path, dtype, options):
    """Everything is 16 bit, T5 and codec included, as `save_pretrained` leaves a model that was loaded so."""
    from safetensors.torch import load_file, save_file

    written = tiny()
    folder = write_transformers(tmp_path, written, old_norms=True, **options)
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        read, save = (load_file, save_file) if path.suffix == ".safetensors" else (torch.load, torch.save)
        save({name: tensor.to(dtype) for name, tensor in read(path).items()}, path)
    loaded, stored = load_checkpoint(folder), load_checkpoint(folder, dtype=None)
    for name, tensor in written.lm.items():
        assert torch.equal(loaded.lm[name], tensor.to(dtype).float())
        small = tensor.dim() < 2 or "_proj." in name
        assert stored.lm[name].dtype == (torch.float32 if small else dtype)
    assert {tensor.dtype for part in (loaded.codec, loaded.text.tensors) for tensor in part.values()} == {torch.float32}


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    """A mapped file that is overwritten would change weights under a running model."""
    for name, folder in (
        ("model.safetensors", write_transformers(tmp_path / "a", tiny())),
        ("state_dict.bin", write_audiocraft(tmp_path / "b", tiny(), half=True)),
    ):
        loaded = load_checkpoint(folder, dtype=None)
        before = {key: tensor.clone() for key, tensor in {**loaded.lm, **loaded.text.tensors}.items()}
        with open(folder / name, "r+b") as file:
            file.write(b"\0" * (folder / name).stat().st_size)
        assert_same({**loaded.lm, **loaded.text.tensors}, before)


def test_text_projection_may_be_absent_where_widths_agree(tmp_path):
    written = tiny(text=TextConfig(dim=32))
    del written.lm["text_proj.weight"], written.lm["text_proj.bias"]
    loaded = assert_loads_as(write_transformers(tmp_path, written), written)
    assert Transformer.from_weights(loaded.config, loaded.lm).text_proj is None


@pytest.mark.parametrize("kind", [*KINDS, "style"])
def test_expected_shapes_are_those_of_the_transformer(kind):
    config = tiny_config(kind)
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    assert dict(expected_shapes(config)) == {name: tuple(tensor.shape) for name, tensor in state.items()}


# ---- which files are used


def test_both_layouts_prefer_transformers_unless_it_has_no_weights(tmp_path):
    first, second = tiny(seed=1), tiny(seed=2)
    write_transformers(tmp_path, first)
    write_audiocraft(tmp_path, second)
    assert_same(load_checkpoint(tmp_path).lm, first.lm)
    (tmp_path / "model.safetensors").unlink()
    assert_same(load_checkpoint(tmp_path).lm, second.lm)


def test_safetensors_before_bin(tmp_path):
    first, second = tiny(seed=1), tiny(seed=2)
    write_transformers(tmp_path, second, form="bin")
    write_transformers(tmp_path, first)
    (tmp_path / "model.fp32.safetensors").write_bytes(b"not looked at")
    assert_same(load_checkpoint(tmp_path).lm, first.lm)


@pytest.mark.parametrize("layout", [write_transformers, write_audiocraft])
def test_text_encoder_of_the_callers_choice(tmp_path, layout):
    folder = layout(tmp_path / "model", tiny(seed=1))
    other = tiny(seed=2)
    t5 = write_t5(tmp_path / "t5", other)
    inside = write_transformers(tmp_path / "whole", other)
    for choice in (t5, inside):
        loaded = load_checkpoint(folder, text_encoder=choice)
        assert_same(loaded.text.tensors, other.text.tensors)
        assert loaded.text.tokenizer_folder == choice


def test_text_encoder_of_another_width_is_refused(tmp_path):
    folder = write_audiocraft(tmp_path / "model", tiny())
    t5 = write_t5(tmp_path / "t5", tiny(text=TextConfig(dim=16)))
    with pytest.raises(CheckpointError, match=r"t5.*width 16.*needs 24.*t5-base"):
        load_checkpoint(folder, text_encoder=t5)


def test_a_folder_with_a_vocabulary_alone_completes_a_model_without_one(tmp_path):
    written = tiny()
    folder = write_transformers(tmp_path / "model", written)
    (tmp_path / "vocabulary").mkdir()
    (folder / "spiece.model").rename(tmp_path / "vocabulary" / "spiece.model")
    assert load_checkpoint(folder).text.tokenizer_folder is None
    loaded = load_checkpoint(folder, text_encoder=tmp_path / "vocabulary")
    assert loaded.text.tokenizer_folder == tmp_path / "vocabulary"
    assert_same(loaded.text.tensors, written.text.tensors)


def test_a_finetuned_text_encoder_is_taken_from_the_file(tmp_path):
    written, start = tiny(seed=1), tiny(seed=2)
    write_audiocraft(tmp_path, written, changes={"conditioners.description.t5.finetune": True}, text=False)
    write_t5(tmp_path / "text_encoder", start)
    path = tmp_path / "state_dict.bin"
    package = torch.load(path)
    prefix = "condition_provider.conditioners.description.t5."
    package["best_state"].update({prefix + name: tensor for name, tensor in written.text.tensors.items()})
    torch.save(package, path)
    assert_same(load_checkpoint(tmp_path).text.tensors, written.text.tensors)


def test_pattern_and_parameters_of_transformers_files(tmp_path):
    folder = write_transformers(tmp_path, tiny("melody"))
    edit_json(folder / "generation_config.json", guidance_scale=4.5)
    edit_json(folder / "config.json", chroma_length=79, segment_duration=10)
    config = load_checkpoint(folder).config
    assert (config.cfg_coef, config.max_duration, config.melody.duration) == (4.5, 10.0, 10.0)
    assert config.melody.chroma_length == 79
    edit_json(folder / "config.json", chroma_length=40)
    assert load_checkpoint(folder).config.melody.chroma_length == 40
    write_json(folder / "preprocessor_config.json", {"chunk_length": 5, "n_fft": 4096, "hop_length": 1024})
    edit_json(folder / "config.json", chroma_length=157)
    melody = load_checkpoint(folder).config.melody
    assert (melody.radix2_exp, melody.duration, melody.chroma_length) == (12, 5.0, 157)


# ---- random weights


def test_random_weights_of_a_released_size():
    first = random_checkpoint("small-stereo", dtype=torch.bfloat16)
    assert first.config == named_config("small-stereo")
    assert {name: tuple(t.shape) for name, t in first.lm.items()} == dict(expected_shapes(first.config))
    assert first.lm["layers.0.qkv.weight"].dtype == torch.bfloat16
    assert first.codec_config.num_codebooks == 4 and first.codec_config.codebook_size == 2048
    assert first.text.config["d_model"] == 768 and isinstance(first.text.tokenizer, ByteTokenizer)
    rows = first.lm["heads.weight"][:, :6].float()
    assert torch.unique(rows, dim=0).shape == rows.shape


def test_random_weights_depend_on_the_seed_alone():
    config = tiny_config()
    first, again, other = (random_checkpoint(config, seed=seed) for seed in (3, 3, 4))
    assert_same(first.lm, again.lm)
    assert_same(first.codec, again.codec)
    assert not torch.equal(first.lm["emb.weight"], other.lm["emb.weight"])
    logits = Transformer.from_weights(config, first.lm)(torch.randint(0, 65, (1, 4, 50)), cross=torch.randn(1, 3, 32))
    assert 0.3 < logits.std() < 3


def test_random_names():
    with pytest.raises(CheckpointError, match="unknown size 'huge'"):
        load_checkpoint("random:huge")
    assert ByteTokenizer().ids("aé") == [100, 198, 172, 1]


def test_a_written_folder_needs_no_arguments(tmp_path):
    first = load_checkpoint(write_transformers_folder(tmp_path / "a", seed=1))
    again = load_checkpoint(write_transformers_folder(tmp_path / "b", seed=1))
    assert_same(first.lm, again.lm)
    from musicgen_fast.conditioning.text import TextEncoder

    encoder = TextEncoder.from_weights(first.text.config, first.text.tensors, first.text.tokenizer_folder)
    assert encoder.encode("calm piano").shape[1] == first.config.text.dim
    with pytest.raises(ValueError, match="style"):
        write_transformers_folder(tmp_path / "c", checkpoint=tiny("style"))
    with pytest.raises(ValueError, match="delays"):
        odd = tiny()
        write_transformers_folder(
            tmp_path / "d", checkpoint=replace(odd, config=replace(odd.config, pattern=PatternConfig("parallel")))
        )
