"""Files of the right kind with the wrong content: missing, unknown and misshapen tensors, indexes, configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from musicgen_fast.checkpoints import load_checkpoint
from musicgen_fast.checkpoints.files import TensorFiles

from .checkpoint_writers import edit_json, refused, tiny, write_audiocraft, write_json, write_transformers


@pytest.fixture(scope="module")
def checkpoint():
    return tiny()


@pytest.fixture
def exported(tmp_path, checkpoint) -> Path:
    return write_audiocraft(tmp_path, checkpoint)


@pytest.fixture
def saved(tmp_path, checkpoint) -> Path:
    return write_transformers(tmp_path, checkpoint)


@pytest.mark.parametrize("key", ["best_state", "xp.cfg"])
def test_missing_parts_of_an_export(exported, key):
    path = exported / "state_dict.bin"
    package = torch.load(path)
    del package[key]
    torch.save(package, path)
    refused(exported, str(path), repr(key), "audiocraft.utils.export")


@pytest.mark.parametrize("layout", ["audiocraft", "transformers", "text", "codec"])
def test_a_missing_key_is_named_with_its_file(tmp_path, checkpoint, layout):
    if layout == "transformers":
        folder = write_transformers(tmp_path, checkpoint)
        path, key = folder / "model.safetensors", "decoder.model.decoder.layers.1.fc2.weight"
    elif layout == "text":
        folder = write_audiocraft(tmp_path, checkpoint)
        path, key = folder / "text_encoder" / "model.safetensors", "encoder.block.1.layer.0.SelfAttention.k.weight"
    else:
        folder = write_audiocraft(tmp_path, checkpoint)
        file = "state_dict.bin" if layout == "audiocraft" else "compression_state_dict.bin"
        path, key = folder / file, {"audiocraft": "transformer.layers.1.norm_cross.bias"}.get(layout, "")
    drop(path, key)
    refused(folder, *((str(path), key) if key else (str(path),)))


def drop(path: Path, key: str) -> None:
    """Removes a tensor from a file (from the codec: its first one)."""
    from safetensors.torch import load_file, save_file

    if path.suffix == ".safetensors":
        tensors = load_file(path)
        del tensors[key]
        save_file(tensors, path)
        return
    package = torch.load(path)
    state = package["best_state"]
    del state[key or sorted(state)[0]]
    torch.save(package, path)


@pytest.mark.parametrize("layout", [write_transformers, write_audiocraft])
def test_weights_of_another_size(tmp_path, layout, checkpoint):
    folder = layout(tmp_path / "a", checkpoint)
    other = layout(tmp_path / "b", tiny(vocab_size=128))
    file = "model.safetensors" if layout is write_transformers else "state_dict.bin"
    if layout is write_transformers:
        (other / file).replace(folder / file)
        refused(folder, str(folder / file), "[129, 32]", "[65, 32]", "embed_tokens.0.weight")
    else:  # one file holds both, so it is the codec that differs
        (other / file).replace(folder / file)
        refused(folder, "4 codebooks of 128 entries", "codec has 4 of 64")


@pytest.mark.parametrize("layout", [write_transformers, write_audiocraft])
def test_unknown_tensors_are_refused_by_name(tmp_path, checkpoint, layout):
    folder = layout(tmp_path, checkpoint)
    if layout is write_transformers:
        from safetensors.torch import load_file, save_file

        path, key = folder / "model.safetensors", "decoder.model.decoder.layers.0.self_attn.q_proj.lora_A.weight"
        save_file({**load_file(path), key: torch.zeros(2, 2)}, path)
    else:
        path, key = folder / "state_dict.bin", "transformer.layers.0.layer_scale_1.scale"
        package = torch.load(path)
        package["best_state"][key] = torch.zeros(2)
        torch.save(package, path)
    refused(folder, str(path), key)


def test_the_stored_table_of_positions_is_ignored(tmp_path, checkpoint):
    folder = write_transformers(tmp_path, checkpoint, form="bin")
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path)
    tensors["decoder.model.decoder.embed_positions.weights"] = torch.zeros(2048, 32)
    tensors["text_encoder.encoder.embed_tokens.weight"] = tensors["text_encoder.shared.weight"]
    torch.save(tensors, path)
    assert torch.equal(load_checkpoint(folder).lm["emb.weight"], checkpoint.lm["emb.weight"])


@pytest.mark.parametrize("value", [3, "text", torch.zeros(65, 32, dtype=torch.int64)])
def test_values_that_are_not_weights(exported, value):
    path = exported / "state_dict.bin"
    package = torch.load(path)
    package["best_state"]["emb.1.weight"] = value
    torch.save(package, path)
    refused(exported, str(path), "'emb.1.weight'")


def test_index_of_shards(tmp_path, checkpoint):
    folder = write_transformers(tmp_path, checkpoint, shards=2)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    weight_map = json.loads(good)["weight_map"]
    key, shard = sorted(weight_map.items())[0]
    other = next(s for s in weight_map.values() if s != shard)
    write_json(index, {"weight_map": {**weight_map, key: other}})
    refused(folder, other, key)
    for evil in ("../model.safetensors", "/etc/passwd", "", 3):
        write_json(index, {"weight_map": {**weight_map, key: evil}})
        refused(folder, str(index), "plain file name")
    index.write_text("{}")
    refused(folder, "weight_map")
    index.write_text(good)
    (folder / shard).unlink()
    refused(folder, shard)


@pytest.mark.parametrize("content", ["", "{", "[1]", "version https://git-lfs.github.com/spec/v1\n", '"x"'])
def test_config_json_that_is_none(saved, content):
    (saved / "config.json").write_text(content)
    refused(saved, str(saved / "config.json"))


def test_values_of_config_json(saved):
    for field, value in (("hidden_size", 0), ("num_attention_heads", "two"), ("num_hidden_layers", True)):
        edit_json(saved / "config.json", "decoder", **{field: value})
        refused(saved, f"decoder.{field} is {value!r}")
        edit_json(saved / "config.json", "decoder", hidden_size=32, num_attention_heads=2, num_hidden_layers=2)
    edit_json(saved / "config.json", "decoder", num_attention_heads=3)
    refused(saved, "config.json", "3 heads")


def test_tensor_files_is_a_mapping(saved):
    files = TensorFiles.from_file(saved / "model.safetensors")
    assert len(files) == len(list(files)) and "decoder.lm_heads.0.weight" in files and "x" not in files
    assert files.shape("decoder.lm_heads.0.weight") == (64, 32)
    with pytest.raises(KeyError):
        files["x"]
