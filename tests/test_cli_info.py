"""`musicgen-fast info`: its numbers are those of the loaded model, and it reads as little as it says."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from musicgen_fast import MusicGen
from musicgen_fast.checkpoints import expected_shapes
from musicgen_fast.checkpoints.convert import convert
from musicgen_fast.checkpoints.transformers import names_in_file
from musicgen_fast.cli import main
from musicgen_fast.config import named_config
from musicgen_fast.roofline import step_bytes

from . import checkpoint_writers as writers
from .cli_tools import write_models
from .test_checkpoint_hub import Hub


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def info(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["info", "--json", *argv]) == 0
    described: dict[str, Any] = json.loads(capsys.readouterr().out)
    return described


@pytest.mark.parametrize("kind", ["text", "melody"])
def test_info_counts_what_a_model_takes(models: Path, capsys, monkeypatch, kind: str) -> None:
    described = info(capsys, str(models / kind))
    monkeypatch.setenv("MUSICGEN_FAST_DECODER", "torch")
    model = MusicGen.get_pretrained(models / kind, precision="bfloat16")
    weights = list(model.lm.transformer.parameters())
    assert described["parameters"]["language_model"] == sum(p.numel() for p in weights)
    assert described["bytes"]["bfloat16"]["language_model"] == sum(p.nbytes for p in weights)
    assert described["parameters"]["codec"] == sum(p.numel() for p in model.compression_model.parameters())
    text = {p.data_ptr(): p for p in model.lm.conditioner.text.model.parameters()}  # the table is tied
    assert described["parameters"]["text_encoder"] == sum(p.numel() for p in text.values())

    caches = []
    allocate = model.lm.decoder.allocate
    monkeypatch.setattr(model.lm.decoder, "allocate", lambda *a: caches.append(allocate(*a)) or caches[-1])
    model.set_generation_params(duration=1.0)
    model.generate(["drum"])
    text_positions = len(model.lm.conditioner.encode_text("drum")) if kind == "melody" else 0
    cache = caches[0].tensor
    assert cache.shape[2] == described["kv_cache"]["rows"] == 2
    assert cache.shape[4] == described["kv_cache"]["positions"] + text_positions
    without_text = cache[:, :, :, :, text_positions:]
    assert described["bytes"]["bfloat16"]["kv_cache"] == without_text.numel() * 2


def test_info_reads_no_weights(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((models / "text/config.json").read_bytes())
    described = info(capsys, str(tmp_path))
    assert described["stored_as"] is None and "has no model.safetensors or pytorch_model.bin" in described["missing"][0]
    assert (described["width"], described["layers"], described["codebooks"]) == (32, 2, 4)
    assert described["conditioning"] == "text in cross-attention" and described["window_seconds"] == 1.0
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "EnCodec, 32000 Hz, 50 frames a second, 4 x 64 codes" in out and "float16   language model" in out


def test_info_of_released_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    described = info(capsys, "random:small")
    assert described["parameters"]["language_model"] == pytest.approx(420e6, rel=0.01)
    assert described["kv_cache"] == {"rows": 2, "positions": 1503}
    assert described["bytes"]["float16"]["kv_cache"] == 2 * 2 * 24 * 1503 * 1024 * 2
    assert info(capsys, "random:large-stereo-melody")["conditioning"] == "melody and text in a prefix"
    assert main(["info", "random:tiny"]) == 1
    assert "unknown size 'tiny'" in capsys.readouterr().err


def test_info_of_audiocrafts_files(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = writers.tiny("text")
    writers.write_audiocraft(tmp_path, checkpoint)
    writers.write_t5(tmp_path / "text_encoder", checkpoint)
    ours, theirs = info(capsys, str(tmp_path)), info(capsys, str(models / "text"))
    assert ours["parameters"] == theirs["parameters"] and ours["conditioning"] == theirs["conditioning"]


def test_info_reads_headers_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """musicgen-large in a file that is a header and a hole of 6.5 GB: names, shapes and dtypes are all there is."""
    resource = pytest.importorskip("resource", reason="needs the system's account of memory")
    small = writers.tiny("text")
    shapes = replace(small, config=replace(named_config("large"), text=small.config.text))
    header, end = {}, 0
    tensors = {name: tuple(tensor.shape) for name, tensor in writers.transformers_tensors(small).items()}
    kept = {name: shape for name, shape in tensors.items() if name.startswith(("text_encoder.", "audio_encoder."))}
    wanted = dict(expected_shapes(shapes.config))
    for name, theirs in names_in_file(shapes.config):
        kept.update({each: (wanted[name][0] // len(theirs), *wanted[name][1:]) for each in theirs})
    for name, shape in kept.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    writers.write_json(tmp_path / "config.json", writers.transformers_config(shapes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    described = info(capsys, str(tmp_path))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert end > 6.4e9 and grown * 1024 < 500e6
    assert described["stored_as"] == "float16" and described["parameters"]["language_model"] > 3.2e9


def test_info_knows_the_layout(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writers.write_audiocraft(tmp_path / "a", writers.tiny("text"), half=True)
    for folder, layout, dtype in (
        (models / "text", "transformers", "float32"),
        (tmp_path / "a", "audiocraft", "float16"),
    ):
        described = info(capsys, str(folder))
        assert (described["layout"], described["stored_as"], described["missing"]) == (layout, dtype, [])


@pytest.mark.parametrize("kind", ["text", "stereo", "melody", "stereo-melody", "style"])
def test_both_layouts_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    writers.write_audiocraft(tmp_path / "a", writers.tiny(kind))
    layout = "audiocraft" if kind == "style" else "transformers"
    convert(tmp_path / "a", tmp_path / "b", layout)
    ours, theirs = info(capsys, str(tmp_path / "a")), info(capsys, str(tmp_path / "b"))
    for described in (ours, theirs):
        del described["name"], described["layout"], described["step_ms"]
    assert ours == theirs
    expected = {"melody": "demucs", "style": "MERT"}
    for part, word in expected.items():
        if part in kind and (word != "demucs" or importlib.util.find_spec(word) is None):
            assert word in ours["missing"][0]


def test_what_is_missing(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each part, and an answer all the same."""
    checkpoint = writers.tiny("text")
    folder = writers.write_audiocraft(tmp_path / "a", checkpoint, text=False)
    (folder / "compression_state_dict.bin").unlink()
    codec, text = info(capsys, str(folder))["missing"]
    assert "compression_state_dict.bin" in codec and "text encoder" in text and "text_encoder" in text
    described = info(capsys, str(folder))
    assert described["parameters"]["text_encoder"] is None and described["parameters"]["language_model"] > 0
    folder = writers.write_transformers(tmp_path / "t", checkpoint)
    (folder / "spiece.model").unlink()
    (only,) = info(capsys, str(folder))["missing"]
    assert "no tokenizer" in only
    assert main(["info", str(folder)]) == 0
    assert f"missing         {only}" in capsys.readouterr().out


def test_time_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    described = info(capsys, "random:small")
    speed, times = described["step_ms"]["read_gb_per_s"], described["step_ms"]
    assert 0.1 < speed < 10_000
    assert times["float32"] == pytest.approx(2 * times["float16"], rel=0.01)
    read = step_bytes(named_config("small"), "float16", 1503 / 2)
    assert 1e-3 * times["float16"] * speed * 1e9 == pytest.approx(read, rel=0.01)
    sizes = described["bytes"]["float16"]
    assert sizes["request"] == sizes["kv_cache"] + 30 * 32000 * 4
    assert described["licence"] == "none: random weights"
    assert info(capsys, "demo")["licence"] == "mit"


@pytest.mark.parametrize("layout", ["transformers", "audiocraft"])
def test_broken_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str) -> None:
    """One line, whatever is wrong."""
    write = {"transformers": writers.write_transformers, "audiocraft": writers.write_audiocraft}[layout]
    folder = write(tmp_path / "m", writers.tiny("text"))
    weights = folder / {"transformers": "model.safetensors", "audiocraft": "state_dict.bin"}[layout]
    whole = weights.read_bytes()
    for content in (b"", whole[:1000], b"version https://git-lfs.github.com/spec/v1", b"<html>"):
        weights.write_bytes(content)
        assert main(["info", str(folder)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("musicgen-fast: error: ") and err.count("\n") == 1 and weights.name in err
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), str(tmp_path / "nothing"), str(weights), "someone/not-in-the-cache"):
        assert main(["info", name]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_info_downloads_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repository of the hub: its small files are fetched, weights are looked at where the cache has them."""
    hub, cached = Hub(tmp_path / "hub"), False

    def download(repo: str, name: str, **options: Any) -> str:
        if options["local_files_only"] and not cached:
            raise LocalEntryNotFoundError("not in the cache")
        assert options["local_files_only"] or not name.endswith((".safetensors", ".bin")), "weights"
        return hub(repo, name, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    writers.write_transformers(hub.folder("facebook/musicgen-small"), writers.tiny("text"))
    described = info(capsys, "facebook/musicgen-small")
    assert described["missing"] == [
        "model.safetensors or pytorch_model.bin of the hub repository 'facebook/musicgen-small' is not in the local "
        "cache: hf download facebook/musicgen-small"
    ]
    assert described["stored_as"] is None and described["parameters"]["text_encoder"] > 0
    assert described["licence"].startswith("cc-by-nc-4.0")
    cached = True
    described = info(capsys, "small")
    assert described["missing"] == [] and described["stored_as"] == "float32"
    cached = False
    writers.write_audiocraft(hub.folder("facebook/musicgen-style"), writers.tiny("style"))
    assert main(["info", "facebook/musicgen-style"]) == 1
    assert capsys.readouterr().err.endswith("is not in the local cache: hf download facebook/musicgen-style\n")
