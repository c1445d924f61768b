"""`render` with Ray's workers: the same samples, and only the pieces at fault fail. Needs `musicgen-fast[ray]`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from musicgen_fast import native
from musicgen_fast.render import Options, Rules, Settings, ray_engine

from .cli_tools import write_models
from .test_render_run import failures, mixed, options_of, run, short, summary
from .test_render_session import found

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}"),
]
ROOT = Path(__file__).resolve().parent.parent
ray = pytest.importorskip("ray", reason="Ray is not installed (pip install musicgen-fast[ray])")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", autouse=True)
def _paths_of_workers() -> Iterator[None]:
    """Workers import this package and these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        yield
    assert not ray.is_initialized(), "a run ends what it started"


def with_ray(options: Options, **more: Any) -> Options:
    return replace(options, engine="ray", workers=2, **more)


def test_the_samples_are_those_of_one_process(models: Path, tmp_path: Path) -> None:
    settings = Settings(loudness="none", tokens=True)
    options = options_of(tmp_path, models, mixed(30), batch_size=3, settings=settings)
    assert run(options) == 0
    several = with_ray(options, output_dir=tmp_path / "several")
    assert run(several) == 0, failures(several)
    assert found(tmp_path / "several") == found(tmp_path / "out")
    told = summary(several)
    assert (told["done"], told["batch_size"]) == (30, 6) and told["slot_occupancy"] > 0.5


class Faulty(ray_engine.Worker):
    """Does what a piece of that name says."""

    def work(self, given: Sequence[Any], waiting: bool) -> Any:
        for key, *_ in given:
            if key == "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            if key == "hang":
                time.sleep(1000)
            if key == "raise":
                raise RuntimeError("no such luck")
            if key.startswith("killed") and not (mark := Path(os.environ["MARKS"]) / key).exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().work(given, waiting)


def test_only_the_pieces_at_fault_fail(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*short(24), *({"id": name, "prompt": "x", "duration": 0.3} for name in ("segfault", "hang", "raise"))]
    rows.append({"id": "killed", "prompt": "x", "duration": 0.3})
    options = with_ray(options_of(tmp_path, models, rows), batch_size=3, item_timeout=60.0, rules=Rules(max_attempts=2))
    monkeypatch.setenv("MARKS", str(tmp_path))
    monkeypatch.setattr(ray_engine, "Worker", Faulty)
    monkeypatch.setattr(ray_engine, "_LONGEST_STEP", -54.0)
    assert run(options) == 3
    why = failures(options)
    assert set(why) == {"segfault", "hang", "raise"} and len(found(tmp_path / "out")) == 25
    assert why["segfault"].startswith("WorkerDiedError") and why["hang"].startswith("TimeoutError: a worker did not")
    assert "no such luck" in why["raise"]
    monkeypatch.undo()
    assert run(replace(options, rules=Rules(retry_failed=True))) == 0
    calm = options_of(tmp_path, models, rows, out="calm")
    assert run(calm) == 0 and found(tmp_path / "calm") == found(tmp_path / "out")


class Broken(ray_engine.Worker):
    def __init__(self, *_: Any) -> None:
        raise OSError("this machine lacks the model")


def test_workers_that_cannot_start_end_the_run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "Worker", Broken)
    with pytest.raises(ray_engine.WorkerDiedError, match="lacks the model"):
        run(with_ray(options_of(tmp_path, models, short(3))))


def test_the_head_is_killed_and_started_again(models: Path, tmp_path: Path) -> None:
    options = options_of(tmp_path, models, short(200, 1.0))
    argv = ["render", str(options.manifest), "-o", str(tmp_path / "out"), "-m", options.model, "-d", "cpu", "-q"]
    argv += ["--engine", "ray", "--workers", "2", "--batch-size", "2", "--loudness", "none", "--precision", "float32"]
    process = subprocess.Popen([sys.executable, "-m", "musicgen_fast", *argv], cwd=ROOT)
    end = time.monotonic() + 240
    while not list((tmp_path / "out").glob("*.wav")) and time.monotonic() < end:
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    before = found(tmp_path / "out")
    assert 0 < len(before) < 200 and len(family) >= 3
    _, alive = psutil.wait_procs(family, timeout=180)  # agents of Ray that were starting look for its head for a minute
    assert not alive, "no orphans"
    assert run(with_ray(options, batch_size=2)) == 0
    after = found(tmp_path / "out")
    assert len(after) == 200 and before.items() <= after.items() and not list((tmp_path / "out").rglob("*.tmp"))
    lines = [json.loads(line) for line in (tmp_path / "out/ledger.jsonl").read_text().splitlines()]
    assert sum(line.get("status") == "done" for line in lines) <= 200 + 8
