"""`musicgen-fast info`: its numbers are those of the loaded model, and it reads as little as it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from musicgen_fast import MusicGen
from musicgen_fast.cli import main

from . import checkpoint_writers as writers
from .cli_tools import write_models


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
