"""Whole runs of `musicgen-fast render` that are killed, meet a full disk, or each other."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from musicgen_fast.render.ledger import ledger_paths, read_ledgers
from musicgen_fast.render.lock import FolderLockedError
from musicgen_fast.render.plan import Options, make_plan
from musicgen_fast.render.resume import Decision, Rules
from musicgen_fast.render.shards import Shard

from .test_render_session import Fault, engine, expected, found, options_of


def child(options: Options, fault: Fault | None, slots: int, wait: float) -> None:
    os._exit(engine(options, fault, slots, wait)[0])


def spawn(options: Options, fault: Fault | None = None, slots: int = 3, wait: float = 0.01) -> Any:
    """A fork: starting Python and torch afresh would take two seconds for each kill."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(options, fault, slots, wait), daemon=True)
    process.start()
    return process


def tars(folder: Path) -> dict[str, str]:
    """member -> hash, of all tars; none may be in two."""
    hashes: dict[str, str] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    told = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                    assert told["key"] not in hashes, f"{told['key']} is there twice"
                    hashes[told["key"]] = told["sha256"]
    return hashes


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_killed_again_and_again(layout: str, tmp_path: Path) -> None:
    """No half file ever has its final name, nothing is lost, nothing is made twice, no temporary file stays."""
    options, chance = options_of(tmp_path, 80, layout=layout, shard_pieces=5), random.Random(1)
    wanted, out, kills, done = expected(options), tmp_path / "out", 0, 0
    for _ in range(60):
        process = spawn(options)
        process.join(chance.uniform(0.02, 0.35))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        here = found(out) if layout == "files" else tars(out)
        assert here.items() <= wanted.items()
        assert len(here) >= done
        done = len(here)
        if process.exitcode == 0:
            break
    if done < len(wanted):  # a machine so slow that every run was killed
        assert engine(options)[0] == 0
    assert kills >= 3
    assert (found(out) if layout == "files" else tars(out)) == wanted
    assert not list(out.rglob("*.tmp")) and engine(options)[1].todo == []
    history = read_ledgers(ledger_paths(out))
    assert not history.garbage and set(history.done_keys()) == set(make_plan(options).stems)


def test_a_piece_that_waits_in_a_tar_is_not_suspected(tmp_path: Path) -> None:
    options = options_of(tmp_path, 8, layout="webdataset", shard_pieces=100)

    def fault(decision: Decision, made: int) -> None:
        if made == 6:
            time.sleep(0.3)  # the writer puts the others into its tar
            os.kill(os.getpid(), signal.SIGKILL)

    process = spawn(options, fault, slots=1)
    process.join()
    states = read_ledgers(ledger_paths(tmp_path / "out")).states
    assert process.exitcode == -signal.SIGKILL and sorted(state.lost for state in states.values()) == [0] * 6 + [1]


def test_temporary_files_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    options = options_of(tmp_path, 3, filename="deep/{id}")
    (tmp_path / "out/deep").mkdir(parents=True)
    (tmp_path / "out/deep/.musicgen_fast-123.tmp").write_bytes(b"half")
    assert engine(options)[0] == 0 and not list((tmp_path / "out").rglob("*.tmp"))


def test_a_poison_piece_ends_up_alone_and_failed(tmp_path: Path) -> None:
    options = options_of(tmp_path, 12)

    def fault(decision: Decision, made: int) -> None:
        if decision.task.key == "n004":  # one of the longest: it runs first, with others
            os.kill(os.getpid(), signal.SIGKILL)

    codes = []
    for _ in range(12):
        process = spawn(options, fault, wait=0.0)
        process.join()
        codes.append(process.exitcode)
        if process.exitcode >= 0:
            break
    assert codes[-1] == 3 and set(codes[:-1]) == {-signal.SIGKILL} and len(codes) == 7
    good = {key: value for key, value in expected(options).items() if key != "n004"}
    assert found(tmp_path / "out") == good
    (row,) = map(json.loads, (tmp_path / "out/failures.jsonl").read_text().splitlines())
    assert row["id"] == "n004" and row["error_type"] == "ProcessDied"


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    options = options_of(tmp_path, 30)
    process = spawn(options, wait=0.05)
    while not (tmp_path / "out/ledger.jsonl").exists():
        time.sleep(0.01)
    with pytest.raises(FolderLockedError, match=f"process {process.pid} on"):
        engine(options)
    process.join()
    assert process.exitcode == 0 and found(tmp_path / "out") == expected(options)


def test_shards_beside_each_other(tmp_path: Path) -> None:
    options = options_of(tmp_path, 30)
    processes = [spawn(replace(options, shard=Shard(n, 3))) for n in (1, 2, 3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0] and found(tmp_path / "out") == expected(options)
    assert len(list((tmp_path / "out").glob("ledger-*-of-3.jsonl"))) == 3
    assert engine(options)[1].todo == []  # the whole knows what its parts made


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, where this machine lets us have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True, capture_output=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        pytest.skip("mounting a small tmpfs needs root; the test without a mount covers the rest")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=20)


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_a_disk_that_is_full(layout: str, tmp_path: Path, disk: Path) -> None:
    options = replace(options_of(tmp_path, 60, layout=layout, shard_pieces=10), output_dir=disk)
    (disk / "ballast").write_bytes(b"x" * 700_000)
    with pytest.raises(OSError) as caught:
        engine(options)
    assert caught.value.errno == errno.ENOSPC
    assert not list(disk.rglob("*.tmp")) and not read_ledgers(ledger_paths(disk)).garbage
    wanted = expected(options)
    here = found(disk) if layout == "files" else tars(disk)
    assert here.items() <= wanted.items() and len(here) < 60
    (disk / "ballast").unlink()
    code, session = engine(options)
    assert code == 0 and session.summary["failed"] == 0
    assert (found(disk) if layout == "files" else tars(disk)) == wanted


def test_a_disk_that_is_full_without_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, fsync, left = options_of(tmp_path), os.fsync, [30]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        engine(options)
    monkeypatch.undo()
    out = tmp_path / "out"
    assert not list(out.rglob("*.tmp")) and found(out).items() <= expected(options).items()
    assert not read_ledgers(ledger_paths(out)).garbage
    code, session = engine(options)
    assert code == 0 and 0 < len(session.todo) < 20 and found(out) == expected(options)


def test_a_folder_that_cannot_be_written(tmp_path: Path, disk: Path) -> None:
    """Root passes over permissions, so the disk itself is made read-only."""
    options = replace(options_of(tmp_path, 3), output_dir=disk / "out")
    (disk / "out").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=20)
    with pytest.raises(OSError) as caught:
        engine(options)
    assert caught.value.errno == errno.EROFS
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True, timeout=20)
    assert engine(options)[0] == 0


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    options = options_of(tmp_path, 3)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError):
        engine(options)
    assert (tmp_path / "out").read_text() == "a file"


def test_a_torn_ledger(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options, ledger = options_of(tmp_path), tmp_path / "out/ledger.jsonl"
    engine(options)
    lines = ledger.read_bytes().split(b"\n")
    at = next(n for n, line in enumerate(lines) if b'"done"' in line)
    key = json.loads(lines[at])["key"]
    lines[at] = lines[at][:40]
    ledger.write_bytes(b"\n".join(lines) + b'{"status": "do')
    code, session = engine(options)
    assert code == 0 and [d.task.key for d in session.todo] == [key] and f"line {at + 1} is damaged" in caplog.text
    assert found(tmp_path / "out") == expected(options)


def test_webdataset_refuses_changed_pieces_and_overwrites(tmp_path: Path) -> None:
    options = options_of(tmp_path, 6, layout="webdataset", shard_pieces=4)
    assert engine(options)[0] == 0
    changed = replace(options, seed=1)
    with pytest.raises(ValueError, match="changed since it went into shard-00000"):
        engine(changed)
    assert tars(tmp_path / "out") == expected(options)
    assert engine(replace(changed, rules=Rules(overwrite=True)))[0] == 0
    assert tars(tmp_path / "out") == expected(changed)
    assert engine(changed)[1].todo == []
