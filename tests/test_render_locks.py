"""Who may work in a folder, and which part of a manifest is whose."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from musicgen_fast.render import lock as lock_module
from musicgen_fast.render.lock import FolderLock, FolderLockedError
from musicgen_fast.render.shards import Shard, from_environment, parse_shard

ROOT = Path(__file__).resolve().parent.parent

HOLD = """
import sys
from pathlib import Path
from musicgen_fast.render.lock import FolderLock
with FolderLock(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(folder: Path, shard: str = "") -> subprocess.Popen[str]:
    pipe, argv = subprocess.PIPE, [sys.executable, "-c", HOLD, str(folder), shard]
    process = subprocess.Popen(argv, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_one_run_per_folder_and_it_is_named(tmp_path: Path) -> None:
    process = hold(tmp_path)
    for shard in ("", "1-of-2"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(FolderLockedError, match=f"process {process.pid} on"):
            minutes = itertools.count()
            patch.setattr(lock_module.time, "monotonic", lambda minutes=minutes: 60.0 * next(minutes))  # no patience
            FolderLock(tmp_path, shard)
    process.kill()
    process.wait()
    with FolderLock(tmp_path):  # the system let go of it
        pass


def test_shards_share_a_folder(tmp_path: Path) -> None:
    process = hold(tmp_path, "1-of-2")
    called: list[str] = []
    with FolderLock(tmp_path, "2-of-2", lambda: called.append("first")):
        assert not called  # the other one's temporary files are alive
        with pytest.raises(FolderLockedError, match=f"shard 1-of-2 of .* \\(process {process.pid} on"):
            FolderLock(tmp_path, "1-of-2")
        with pytest.raises(FolderLockedError, match=f"process {process.pid} on.*process {os.getpid()} on"):
            FolderLock(tmp_path)
    process.communicate("\n")
    with FolderLock(tmp_path, "2-of-2", lambda: called.append("first")):
        assert called == ["first"]
    with FolderLock(tmp_path):
        pass


def test_runs_of_shards_that_begin_together(tmp_path: Path) -> None:
    code = HOLD.replace("sys.stdin.readline()", "import time; time.sleep(0.2)")
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), f"{n}-of-6"], cwd=ROOT, stdout=subprocess.PIPE)
        for n in range(1, 7)
    ]
    assert [process.communicate()[0] for process in processes] == [b"held\n"] * 6


# -- shards -----------------------------------------------------------------------------------------------------------


def test_shards_part_the_ids() -> None:
    ids = [f"id {n}" for n in range(2000)]
    parts = [[i for i in ids if Shard(n, 8).has(i)] for n in range(1, 9)]
    assert sorted(sum(parts, [])) == sorted(ids) and all(200 < len(part) < 300 for part in parts)
    assert all(Shard().has(i) for i in ids) and Shard().name == "" and Shard(3, 16).name == "3-of-16"
    assert parse_shard(" 3/16 ", {}) == Shard(3, 16) and Shard(1, 1).has("\ud800")


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "a/b", "1", "", "1/2/3", "-1/2", "1/99999999999"])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        parse_shard(text, {})


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "1/1"),
        ({"RANK": "3", "WORLD_SIZE": "8"}, "4/8"),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "8"}, "8/8"),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"}, "1/8"),
        ({"SLURM_ARRAY_TASK_ID": "20", "SLURM_ARRAY_TASK_COUNT": "5", "SLURM_ARRAY_TASK_MIN": "10",
          "SLURM_ARRAY_TASK_STEP": "5"}, "3/5"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, "3/4"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "4"}, "3/4"),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2",
          "SLURM_NTASKS": "4"}, "7/8"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, None),  # the batch script itself, outside of srun
        ({}, None),
        ({"RANK": "8", "WORLD_SIZE": "8"}, None),
        ({"RANK": "x", "WORLD_SIZE": "8"}, None),
        ({"SLURM_ARRAY_TASK_ID": "11", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "10",
          "SLURM_ARRAY_TASK_STEP": "5"}, None),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "2"}, None),
    ],
)  # fmt: skip
def test_the_place_that_a_cluster_gives(environment: dict[str, str], shard: str | None) -> None:
    if shard is None:
        with pytest.raises(ValueError):
            from_environment(environment)
    else:
        assert str(parse_shard("auto", environment)) == shard
