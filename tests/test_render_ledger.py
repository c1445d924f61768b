"""Ledgers of `musicgen-fast render`: what a crash may do to them, and what a new run concludes."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musicgen_fast.config import GenerationParams
from musicgen_fast.render import ledger as ledger_module
from musicgen_fast.render.item import Item
from musicgen_fast.render.ledger import Ledger, ledger_paths, read_ledgers
from musicgen_fast.render.resume import Decision, Rules, Task, decide, files_present, write_failures


def task(key: str = "a", fingerprint: str = "f", **more: Any) -> Task:
    return Task(Item(key, 1, 0, 5, "x", GenerationParams(duration=2), **more), key, fingerprint)


def decision(path: Path, key: str = "a", fingerprint: str = "f", there: bool = True, **rules: Any) -> Decision:
    history = read_ledgers([path])
    return decide(task(key, fingerprint), history, lambda line, stem: there, Rules(**rules))


# -- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, {"model": "m"}) as ledger:
        ledger.start("a", "f", 1)
        ledger.done("a", "f", files=[["a.wav", 3]], audio_seconds=1.0)
        ledger.start("é\n\ud800", "f", 1, alone=True)
        ledger.fail("é\n\ud800", "f", 1, ValueError("bad\nthing"))
    history = read_ledgers([path])
    assert history.of("a", "f").done is not None and history.of("a", "other").done is None
    failed = history.of("é\n\ud800", "f")
    assert failed.failed is not None and failed.failed["error_type"] == "ValueError" and failed.attempts == 1
    assert not history.garbage and not failed.lost
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert lines[0]["status"] == "run" and lines[0]["model"] == "m" and len(lines) == 5


def test_torn_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.start("0", "f", 1)
        for n in range(2):
            ledger.done(f"{n}", "f", files=[[f"{n}.wav", n]])
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        complete = [json.loads(line) for line in whole[: end + 1].split(b"\n") if line.endswith(b"}")]
        if end < len(whole) and whole[end : end + 1] != b"\n" and not whole[:end].endswith(b"\n"):
            complete = [json.loads(line) for line in whole[:end].split(b"\n")[:-1]]
        wanted = {line["key"] for line in complete if line["status"] == "done"}
        history = read_ledgers([path])
        assert set(history.done_keys()) == wanted and not history.garbage
        Ledger(path).close()
        with Ledger(path) as ledger:
            ledger.done("new", "f")
        history = read_ledgers([path])
        assert set(history.done_keys()) == wanted | {"new"} and not history.garbage
        assert path.read_bytes().endswith(b"\n")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_anywhere_costs_only_the_lines_that_it_hits(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damage") / "ledger.jsonl"
    with Ledger(path) as ledger:
        for n in range(5):
            ledger.done(f"{n}", "f")
    lines = path.read_bytes().split(b"\n")[:-1]
    hit = data.draw(st.integers(1, 4))
    junk = data.draw(st.binary(min_size=0, max_size=40).map(lambda b: b.replace(b"\n", b" ")))
    share = data.draw(st.floats(0.02, 0.98))
    lines[hit] = lines[hit][: 1 + int(share * (len(lines[hit]) - 2))] + junk
    path.write_bytes(b"\n".join(lines) + b"\n")
    history = read_ledgers([path])
    kept = {f"{n}" for n in range(5)} - {f"{hit - 1}"}
    assert kept <= set(history.done_keys())
    with Ledger(path) as ledger:
        ledger.done("new", "f")
    assert kept | {"new"} <= set(read_ledgers([path]).done_keys())
    if set(history.done_keys()) == kept:
        ((_, number, _),) = history.garbage
        assert number == hit + 1


@pytest.mark.parametrize(
    "line",
    [b"", b"null", b"[]", b"{}", b"\0" * 100, b"\xff\xfe", b'{"status": 1}', b'{"status": "done", "key": 1}',
     b"[" * 100_000, b"x" * 3_000_000, b'{"status": "done", "key": "a"}'],
    ids=lambda line: str(line[:20]),
)  # fmt: skip
def test_garbage_is_reported_and_kept(line: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.done("a", "f")
    path.write_bytes(path.read_bytes() + line + b"\n")
    with Ledger(path) as ledger:
        ledger.done("b", "f")
    history = read_ledgers([path])
    assert set(history.done_keys()) == {"a", "b"} and [number for _, number, _ in history.garbage] == [3]
    assert "line 3 is damaged" in caplog.text and line in path.read_bytes()


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "ledger.jsonl", os.write

    def full(descriptor: int, data: Any) -> int:
        if len(data) > 10:
            return write(descriptor, bytes(data[:10]))
        raise OSError(28, "No space left on device")

    with Ledger(path) as ledger:
        ledger.done("a", "f")
        before = path.read_bytes()
        monkeypatch.setattr(ledger_module.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            ledger.done("b", "f")
        monkeypatch.undo()
        assert path.read_bytes() == before
        ledger.done("c", "f")
    assert set(read_ledgers([path]).done_keys()) == {"a", "c"}


def test_threads_share_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        threads = [
            threading.Thread(target=lambda n=n: [ledger.done(f"{n}-{i}", "f" * 50) for i in range(20)])
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    history = read_ledgers([path])
    assert len(history.done_keys()) == 160 and not history.garbage


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, times = tmp_path / "ledger.jsonl", iter([2e9, 2e9, 0.0, -5.0, 1e9, 3.0])
    monkeypatch.setattr(ledger_module.time, "time", lambda: next(times))
    with Ledger(path) as ledger:
        ledger.fail("a", "f", 1, "x")
        ledger.done("a", "f")
        ledger.done("b", "f")
        ledger.fail("b", "f", 1, "x")
    monkeypatch.undo()
    assert decision(path).action == "skip"
    state = read_ledgers([path]).of("b", "f")
    assert state.failed is not None and state.done is not None and state.attempts == 1
    assert all(0 <= json.loads(line)["t"] < 60 for line in path.read_bytes().splitlines())


def test_a_link_in_the_place_of_the_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "ledger.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        Ledger(tmp_path / "ledger.jsonl")
    assert (tmp_path / "precious").read_text() == "precious"


# -- what is left to do -----------------------------------------------------------------------------------------------


def test_decisions(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        assert decision(path) == Decision(task(), "render", 1)
        ledger.start("a", "f", 1)
        ledger.fail("a", "f", 1, OSError("x"))
        assert decision(path) == Decision(task(), "render", 2)
        ledger.fail("a", "f", 2, OSError("x"))
        ledger.fail("a", "f", 3, OSError("last"))
        left = decision(path)
        assert left.action == "failed" and left.line is not None and left.line["error"] == "last"
        assert decision(path, max_attempts=4) == Decision(task(), "render", 4)
        assert decision(path, retry_failed=True) == Decision(task(), "render", 1)
        assert decision(path, fingerprint="changed") == Decision(task(fingerprint="changed"), "render", 1)
        ledger.done("a", "f")
        assert decision(path).action == decision(path, retry_failed=True).action == "skip"
        assert decision(path, there=False) == Decision(task(), "render", 1)
        assert decision(path, overwrite=True) == Decision(task(), "render", 1)
        ledger.fail("b", "f", 1, ValueError("never"), final=True)
        assert decision(path, key="b").action == "failed"


def test_a_piece_that_kills_its_process_is_found_out(tmp_path: Path) -> None:
    """Three deaths in company, then alone; an innocent one beside it gets through."""
    path, seen = tmp_path / "ledger.jsonl", []
    Ledger(path).close()
    for _ in range(10):
        poison = decision(path, "poison")
        seen.append((poison.action, poison.alone, poison.attempt))
        if poison.action == "failed":
            break
        with Ledger(path) as ledger:
            if not poison.alone:
                ledger.start("innocent", "f", 1)
            ledger.start("poison", "f", poison.attempt, poison.alone)
    in_company = [("render", False, 1)] * 3
    assert seen == [*in_company, ("render", True, 1), ("render", True, 2), ("render", True, 3), ("failed", True, 4)]
    assert "died 6 times" in str((poison.line or {})["error"])
    innocent = decision(path, "innocent")
    assert (innocent.action, innocent.alone, innocent.attempt) == ("render", True, 1)
    assert decision(path, "innocent", alone_after=0) == Decision(task("innocent"), "render", 1)
    with Ledger(path) as ledger:
        ledger.start("innocent", "f", 1)
        ledger.stop("innocent", "f")
    assert read_ledgers([path]).of("innocent", "f").lost == 3


def test_ledgers_of_shards_are_read_together(tmp_path: Path) -> None:
    for name, key in (("ledger.jsonl", "a"), ("ledger-1-of-2.jsonl", "b"), ("ledger-2-of-2.jsonl", "c")):
        with Ledger(tmp_path / name) as ledger:
            ledger.done(key, "f")
            ledger.fail("d", "f", 2, "x")
    history = read_ledgers(ledger_paths(tmp_path))
    assert set(history.done_keys()) == {"a", "b", "c"} and history.of("d", "f").attempts == 2


def test_files_that_are_there(tmp_path: Path) -> None:
    present = files_present(tmp_path, ("wav", "json"))
    (tmp_path / "a.wav").write_bytes(b"123")
    (tmp_path / "a.json").write_bytes(b"{}")
    line = {"files": [["a.wav", 3], ["a.json", 2]]}
    assert present(line, "a")
    assert not present(line, "b") and not present({"files": [["a.wav", 3]]}, "a")
    for files in (None, [], "x", [["a.wav"]], [[1, 2]], [["a.wav", 4], ["a.json", 2]], [["a.mp3", 3]], [["\0.wav", 3]]):
        assert not files_present(tmp_path)({"files": files}, "a")
    (tmp_path / "a.wav").unlink()
    assert not present(line, "a")
    (tmp_path / "a.wav").symlink_to(tmp_path / "a.json")
    assert not present({"files": [["a.wav", 2], ["a.json", 2]]}, "a")


def test_failures_are_a_manifest(tmp_path: Path) -> None:
    from musicgen_fast.render.manifest import read_manifest

    path = tmp_path / "failures.jsonl"
    failed = task("x/y", variation=2, tags=(("title", "t"),))
    line = {"error_type": "ValueError", "error": "nan", "attempt": 3}
    assert write_failures(path, [(Task(failed.item, "stem", "f"), line)], "wav") == 1
    (item,) = read_manifest(path, GenerationParams(top_k=1, cfg_coef_beta=3.0), seed=99)
    assert (item.key, item.seed, item.params, item.output) == ("x/y#2", 5, failed.item.params, "stem")
    assert json.loads(path.read_text())["error"] == "nan"
    assert write_failures(path, [], "wav") == 0 and not path.exists()
