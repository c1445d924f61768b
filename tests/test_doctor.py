"""`musicgen-fast doctor`: passes where all is well, names what is broken and what to do."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen_fast import __version__, doctor, native
from musicgen_fast.cli import main
from musicgen_fast.sampling import backends


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Any:
    """report(*argv, code=0): the JSON of the command."""

    def run(*argv: str, code: int = 0) -> dict[str, Any]:
        assert main(["doctor", "--json", *argv]) == code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def problem(report: dict[str, Any], *words: str) -> None:
    """The report has one problem, which says `words`, and what to do."""
    (only,) = report["problems"]
    for word in words:
        assert word in f"{only['what']} {only['do']}"
    assert only["do"]


def test_a_sound_installation(report: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = report()
    assert found["problems"] == [] and found["musicgen_fast"] == __version__
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["yaml"]
    assert found["compiled"]["extension"] == native.available()
    if native.available():
        assert found["compiled"]["linear"] == native.extension().linear_isas()
        assert found["system"]["available_threads"] == native.extension().available_threads()
    assert found["samplers"]["cpu"]["torch"] == "yes"
    assert found["memory"]["free"] is None or found["memory"]["free"] > 0
    test = found["self_test"]
    assert test["ok"] and test["same_tokens"] and test["finite"] and test["loud"]
    assert main(["doctor", "--no-self-test"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and "nothing is broken" in out and "self-test" not in out
    assert max(map(len, out.splitlines())) < 400


def test_the_self_test_sees_a_wrong_sampler(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available():
        pytest.skip("there is no second sampler: the C++ extension is not built")

    draw = backends._DRAW["cpu"]
    monkeypatch.setitem(backends._DRAW, "cpu", lambda inputs: _shifted(draw, inputs))
    monkeypatch.setenv("MUSICGEN_FAST_SAMPLER", "auto")
    problem(report(code=1), "the self-test failed: same_tokens", "reinstall")
    assert os.environ["MUSICGEN_FAST_SAMPLER"] == "auto", "as it was"


def _shifted(draw: Any, inputs: Any) -> None:
    inputs.logits.neg_()
    draw(inputs)


def test_the_self_test_sees_broken_sound(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from musicgen_fast.codec import EnCodec

    decode = EnCodec.decode
    monkeypatch.setattr(EnCodec, "decode", lambda self, *args: decode(self, *args) * float("nan"))
    problem(report(code=1), "the self-test failed: finite, loud")


def test_a_model_that_does_not_load(report: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from musicgen_fast.checkpoints import sources

    monkeypatch.setitem(sources.EMBEDDED, "demo", tmp_path)
    problem(report(code=1), "CheckpointError", "has no config.json", "--json")


def test_broken_packages(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name == "soundfile":
            raise OSError("libsndfile.so.1: cannot open shared object file")
        return load(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    problem(report("--no-self-test", code=1), "soundfile cannot be imported", "libsndfile", "pip install --upgrade")


def test_broken_and_missing_extensions(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is there and does not load is broken; one that was never built is only slower."""
    monkeypatch.setattr(native, "why_not", lambda: "musicgen_fast._C cannot be imported (undefined symbol)")
    there = [Path("_C.so")]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: there if pattern == "_C.*" else iter(()))
    problem(report("--no-self-test", code=1), "generation on a CPU is slower", "undefined symbol")
    there.clear()
    found = report("--no-self-test")
    assert found["problems"] == [] and "undefined symbol" in found["notes"][0]["do"]
    assert found["system"]["available_threads"] is None


def test_a_sampler_that_cannot_be(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSICGEN_FAST_SAMPLER", "cude")
    found = report("--no-self-test", code=1)
    problem(found, "got 'cude'", "unset MUSICGEN_FAST_SAMPLER")
    assert found["variables"]["MUSICGEN_FAST_SAMPLER"] == "cude"


def test_the_hubs_cache(report: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "not/there/yet"
    monkeypatch.setenv("AUDIOCRAFT_CACHE_DIR", str(cache))
    assert report("--no-self-test")["hub"]["models"] == []
    for name in ("facebook--musicgen-small", "someone--unrelated", "google-t5--t5-base"):
        (cache / f"models--{name}").mkdir(parents=True)
    hub = report("--no-self-test")["hub"]
    assert hub["models"] == ["facebook/musicgen-small", "google-t5/t5-base"]
    assert hub["cache"] == str(cache) and hub["free"] > 0 and hub["offline"]
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: False if Path(path) == cache else access(path, mode))
    problem(report("--no-self-test", code=1), str(cache), "cannot be written", "HF_HOME")


def test_little_memory_is_noted(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemAvailable: 8000000 kB", "/sys/fs/cgroup/memory.max": "2000000000",
             "/sys/fs/cgroup/memory.current": "500000000", "/sys/fs/cgroup/cpu.max": "50000 100000"}  # fmt: skip
    monkeypatch.setattr(doctor, "_read", lambda path: files.get(str(path)))
    found = report("--no-self-test")
    assert found["memory"]["free"] == 1_500_000_000 and found["system"]["cgroup"]["cpu.max"] == "50000 100000"
    assert any("1.5 GB of memory are free" in note["what"] for note in found["notes"])


def test_the_report_holds_no_secrets(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in json.dumps(report("--no-self-test"))
