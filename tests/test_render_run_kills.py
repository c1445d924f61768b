"""Runs of `musicgen-fast render` on a tiny model that are killed at any moment, and the runs that go on after them."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from musicgen_fast import MusicGen, native
from musicgen_fast.render import Options, make_plan, render
from musicgen_fast.render.ledger import ledger_paths, read_ledgers

from .cli_tools import write_models
from .test_render_run import mixed, options_of
from .test_render_session import found

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("models"))
    MusicGen.get_pretrained(folder / "text", "cpu")  # what it imports need not be imported in every fork
    return folder


def child(options: Options) -> None:
    os._exit(render(make_plan(options)))


def start(options: Options) -> multiprocessing.process.BaseProcess:
    """A fork: starting Python and torch afresh would take seconds for each kill."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(options,), daemon=True)
    process.start()
    return process


def children_of(process: int | None) -> list[str]:
    folder = Path(f"/proc/{process}/task")
    try:
        return [pid for task in folder.iterdir() for pid in (task / "children").read_text().split()]
    except OSError:  # no such kernel, or it is over
        return []


def kill_and_resume(options: Options, kills: int, longest: float) -> int:
    """Runs that are killed after a random while until one comes to its end; returns how many were killed."""
    chance, killed, done, out = random.Random(3), 0, 0, Path(options.output_dir)
    for _ in range(20 * kills):
        process = start(options)
        process.join(chance.uniform(0.1, longest) if killed < kills else 300)
        assert not children_of(process.pid)
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
            killed += 1
        process.join()
        here = len(found(out))
        assert here >= done, "what was there is there"
        done = here
        if process.exitcode == 0:
            return killed
    raise AssertionError(f"no run came to its end after {killed} kills")


def settle(folder: Path, models: Path, count: int, kills: int, longest: float) -> int:
    calm = options_of(folder, models, mixed(count), out="calm", batch_size=8)
    process = start(calm)
    process.join(300)
    wanted = found(folder / "calm")
    assert process.exitcode == 0 and len(wanted) == count
    options = replace(calm, output_dir=folder / "out")
    killed = kill_and_resume(options, kills, longest)
    out = folder / "out"
    assert found(out) == wanted and len(list(out.glob("n*.wav"))) == len(list(out.glob("n*.json"))) == count
    assert not list(out.rglob("*.tmp"))
    history = read_ledgers(ledger_paths(out))
    assert not history.garbage and set(history.done_keys()) == set(make_plan(options).stems)
    return killed


def test_killed_a_few_times(models: Path, tmp_path: Path) -> None:
    assert settle(tmp_path, models, 80, 4, 0.8) >= 1


@pytest.mark.slow
def test_killed_twenty_times(models: Path, tmp_path: Path) -> None:
    assert settle(tmp_path, models, 500, 20, 1.5) >= 12
