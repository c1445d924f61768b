"""Whole runs of `musicgen-fast render` with an engine that makes noise: kills, full disks, locks, and what is left."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from musicgen_fast.cli_output import pcm16, set_level
from musicgen_fast.render.ledger import ledger_paths, read_ledgers
from musicgen_fast.render.output import Settings
from musicgen_fast.render.plan import Options, describe, make_plan
from musicgen_fast.render.resume import Decision, Rules
from musicgen_fast.render.session import Session, TooManyFailuresError

RATE = 32000
Fault = Callable[[Decision, int], None]


def noise(decision: Decision) -> torch.Tensor:
    item = decision.task.item
    generator = torch.Generator().manual_seed(item.seed)
    return torch.randn(1, int(item.params.duration * RATE), generator=generator) * 0.1


def engine(options: Options, fault: Fault | None = None, slots: int = 3, wait: float = 0.0) -> tuple[int, Session]:
    """What the real loop does, with noise for music. `fault(decision, pieces made so far)` may raise."""
    made = 0
    with Session(make_plan(options), "weights") as session:
        queue: deque[Decision] = deque(session.todo)
        running: list[Decision] = []
        while queue or running or session.busy:
            queue.extend(session.retries())
            while queue and len(running) < slots and not (queue[0].alone and running):
                running.append(queue.popleft())
                session.start(running[-1])
                if running[-1].alone:
                    break
            if not running:
                session.drain()
                continue
            time.sleep(wait)
            decision = running.pop(0)
            try:
                if fault is not None:
                    fault(decision, made)
                session.deliver(decision, noise(decision), RATE, torch.zeros(4, 9))
                made += 1
            except (RuntimeError, ValueError) as error:
                session.fail(decision, error)
    return session.exit_code, session


def options_of(folder: Path, count: int = 20, **more: Any) -> Options:
    rows = [{"id": f"n{n:03}", "prompt": f"p{n}", "duration": 0.02 + 0.02 * (n % 5)} for n in range(count)]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"progress": "none", "settings": Settings(loudness="none")} | more
    return Options(folder / "m.jsonl", folder / "out", **given)


def expected(options: Options) -> dict[str, str]:
    """stem -> hash of the samples, as an undisturbed run would write them."""
    plan = make_plan(options)
    decisions = [Decision(task, "render") for task in plan.tasks(plan.identity("weights", "float32"))]
    return {d.task.stem: hashlib.sha256(pcm16(set_level(noise(d), RATE, "none"))).hexdigest() for d in decisions}


def found(folder: Path) -> dict[str, str]:
    """stem -> hash of the samples of the wav files; each of them must be whole."""
    hashes = {}
    for path in folder.rglob("*.wav"):
        samples, rate = soundfile.read(path, dtype="int16")
        assert rate == RATE
        hashes[path.relative_to(folder).with_suffix("").as_posix()] = hashlib.sha256(samples.tobytes()).hexdigest()
    for path in folder.rglob("n*.json"):
        json.loads(path.read_text())
    return hashes


def test_a_run_and_runs_after_it(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    code, session = engine(options)
    out = tmp_path / "out"
    assert code == 0 and found(out) == expected(options) and not list(out.glob(".musicgen_fast-*"))
    durations = [d.task.item.params.duration for d in session.todo]
    assert durations == sorted(durations, reverse=True)
    before = {path: path.stat().st_mtime_ns for path in out.glob("n*")}
    code, session = engine(options)
    assert code == 0 and not session.todo and before == {path: path.stat().st_mtime_ns for path in out.glob("n*")}
    assert session.summary["skipped"] == 20 and session.summary["last_times_real_time"] > 0
    (out / "n003.wav").unlink()
    (out / "n004.wav").write_bytes(b"torn")
    (out / "n005.json").unlink()
    lines = (tmp_path / "m.jsonl").read_text().splitlines(keepends=True)
    lines[6] = lines[6].replace("p6", "changed")
    (tmp_path / "m.jsonl").write_text("".join(reversed(lines)))
    code, session = engine(options)
    assert {d.task.key for d in session.todo} == {"n003", "n004", "n005", "n006"} and found(out) == expected(options)
    code, session = engine(replace(options, rules=Rules(overwrite=True)))
    assert len(session.todo) == 20
    code, session = engine(replace(options, settings=Settings(loudness="none", tokens=True)))
    assert len(session.todo) == 20 and len(list(out.glob("*.npz"))) == 20
    code, session = engine(options)
    assert not session.todo  # what is there besides does no harm


def test_failures_are_recorded_retried_and_rendered_again_from_their_own_manifest(tmp_path: Path) -> None:
    options, tries = options_of(tmp_path, 10), Counter[str]()

    def fault(decision: Decision, made: int) -> None:
        tries[decision.task.key] += 1
        if decision.task.key == "n001":
            raise RuntimeError("out of <memory>")
        if decision.task.key == "n002":
            raise ValueError("no such value")
        if decision.task.key == "n003" and tries["n003"] < 3:
            raise RuntimeError("sometimes")

    code, session = engine(options, fault)
    assert code == 3 and (tries["n001"], tries["n002"], tries["n003"]) == (3, 1, 3)
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [(r["id"], r["error_type"], r["attempts"]) for r in rows] == [
        ("n001", "RuntimeError", 3),
        ("n002", "ValueError", 1),
    ]
    assert session.summary["failed"] == 2 and session.summary["errors"] == {"RuntimeError": 1, "ValueError": 1}
    assert "out of &lt;memory&gt;" in (out / "report.html").read_text()
    code, session = engine(options)
    assert code == 3 and not session.todo and len((out / "failures.jsonl").read_text().splitlines()) == 2
    again = replace(options, manifest=out / "failures.jsonl", output_dir=tmp_path / "again")
    assert engine(again)[0] == 0 and set(found(tmp_path / "again")) == {"n001", "n002"}
    code, session = engine(replace(options, rules=Rules(retry_failed=True)))
    assert code == 0 and len(session.todo) == 2 and not (out / "failures.jsonl").exists()
    both = found(out)
    assert both == expected(options) and found(tmp_path / "again") == {key: both[key] for key in ("n001", "n002")}


def test_a_run_ends_at_max_failures(tmp_path: Path) -> None:
    def fault(decision: Decision, made: int) -> None:
        raise ValueError("no")

    with pytest.raises(TooManyFailuresError, match="2 pieces failed"):
        engine(options_of(tmp_path, max_failures=2), fault)
    assert len((tmp_path / "out/failures.jsonl").read_text().splitlines()) == 2
    with pytest.raises(FileNotFoundError):
        make_plan(Options(tmp_path / "nothing.jsonl", tmp_path))


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_interrupts(layout: str, tmp_path: Path) -> None:
    options = options_of(tmp_path, layout=layout, shard_pieces=4)

    def fault(decision: Decision, made: int) -> None:
        if made == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine(options, fault)
    history = read_ledgers(ledger_paths(tmp_path / "out"))
    done = set(history.done_keys())
    assert len(done) == 7 and all(state.lost == 0 for state in history.states.values())
    assert not list((tmp_path / "out").glob("*.tmp")) and (tmp_path / "out/report.html").exists()
    code, session = engine(options)
    assert code == 0 and {d.task.key for d in session.todo} == set(make_plan(options).stems) - done


def test_the_exit_code_of_a_drained_run(tmp_path: Path) -> None:
    with Session(make_plan(options_of(tmp_path)), "weights") as session:
        session.start(session.todo[0])
        session.deliver(session.todo[0], noise(session.todo[0]), RATE)
        session.interrupted = True
    assert session.exit_code == 130 and session.summary["done"] == 1 and session.summary["open"] == 19
    with Session(make_plan(options_of(tmp_path)), "weights") as session:
        pass
    assert session.exit_code == 1


# -- around it --------------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_knows_what_is_there(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    told = describe(make_plan(options), speed=2.0)
    assert not (tmp_path / "out").exists() and (told["pieces"], told["pieces_left"]) == (20, 20)
    seconds = sum(0.02 + 0.02 * (n % 5) for n in range(20))
    assert told["hours_left"] == pytest.approx(seconds / 3600 / 2) and told["disk_bytes_free"] > 0
    engine(options)
    (tmp_path / "out/n007.wav").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    told = describe(make_plan(options))
    assert told["pieces_made_before"] == 19 and told["pieces_left"] == 1 and told["speed"] > 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_recordings_are_hashed_and_checked(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "in.wav", np.zeros(8000, np.float32), 8000)
    rows = [{"id": "a", "prompt": "x", "melody": "in.wav", "duration": 0.1}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Options(tmp_path / "m.jsonl", tmp_path / "out", progress="none")
    assert engine(options)[0] == 0 and engine(options)[1].todo == []
    soundfile.write(tmp_path / "in.wav", np.ones(8000, np.float32), 8000)
    assert len(engine(options)[1].todo) == 1


def test_a_link_in_the_place_of_a_file_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/n003.wav").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="n003.wav is a link"):
        engine(options)
    assert not (tmp_path / "precious").exists() and not list((tmp_path / "out").glob("*.json"))
    (tmp_path / "out/n003.wav").unlink()
    assert engine(options)[0] == 0
