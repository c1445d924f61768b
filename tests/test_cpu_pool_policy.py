"""How many threads the CPU decoder's pool has, and how long they spin: made-up histories, containers, masks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from musicgen_fast import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")


@pytest.fixture(scope="module")
def C() -> Any:
    return native.extension()


# -- how many threads ---------------------------------------------------------------------------------------------


def play(policy: Any, seconds: float, share: Any, step: Any = lambda threads: 0.02) -> list[int]:
    """Regions of step(threads) with a share(threads) of waiting, for `seconds` of use; the numbers of threads."""
    used, seen = 0.0, []
    while used < seconds:
        threads = policy.threads
        seen.append(threads)
        policy.observe(step(threads), step(threads) * share(threads))
        used += step(threads)
    return seen


def test_healthy_waits_keep_all_threads(C):
    assert set(play(C.ShedPolicy(4), 20, lambda n: 0.2)) == {4}


def test_a_single_thread_stays(C):
    assert set(play(C.ShedPolicy(1), 5, lambda n: 0.9)) == {1}


def test_one_bad_region_changes_nothing(C):
    policy = C.ShedPolicy(2)
    for _ in range(50):
        policy.observe(0.02, 0.015)  # 75 %: a hiccup
        for _ in range(9):
            policy.observe(0.02, 0.001)
        assert policy.threads == 2


def test_a_slow_start_costs_no_thread(C):
    """The first step of a process: 0.34 s, 29 % of it waiting; then 15 ms with 5 %."""
    policy = C.ShedPolicy(2)
    policy.observe(0.335, 0.1)
    assert set(play(policy, 5, lambda n: 0.05, lambda n: 0.015 if n == 2 else 0.027)) == {2}


def test_a_taken_core_costs_one_thread(C):
    """One of four cores is taken: three threads stay, tried again after 2, 4, 8, ... 30 s of use."""
    policy = C.ShedPolicy(4)
    seen = play(policy, 120, lambda n: 0.5 if n == 4 else 0.05, lambda n: 0.03 if n == 4 else 0.02)
    assert seen[:4] == [4] * 4 and set(seen) == {3, 4}
    assert seen.count(4) < 0.01 * len(seen)
    runs = "".join(map(str, seen)).replace("44", "4").replace("44", "4").split("4")
    lengths = [len(run) for run in runs if len(run) > 2]
    assert lengths[0] < 130 and lengths[1] > 1.8 * lengths[0] and len(lengths) <= 8
    assert max(lengths) < 31 / 0.02


def test_a_thread_comes_back_when_its_core_is_free(C):
    policy = C.ShedPolicy(2)
    play(policy, 1, lambda n: 0.5)
    assert policy.threads == 1
    seen = play(policy, 10, lambda n: 0.05)
    assert seen[-1] == 2 and seen.count(1) * 0.02 < 2.2


def test_shedding_goes_down_to_one(C):
    policy = C.ShedPolicy(8)
    assert 1 in play(policy, 2, lambda n: 0.6)


def test_shedding_that_does_not_help_is_undone(C):
    """Waits of uneven work: without the thread a region takes longer, so it comes back for half a minute."""
    policy = C.ShedPolicy(3)
    seen = play(policy, 25, lambda n: 0.35 if n == 3 else 0.1, lambda n: 0.06 / n)
    assert set(seen) == {2, 3}
    assert seen.count(2) <= 6


def test_spinning_gives_up_and_comes_back(C):
    policy = C.SpinPolicy()
    longest = policy.budget
    assert 50e-6 <= longest <= 100e-6
    for _ in range(3):
        policy.observe(5e-3)
    assert policy.budget == longest / 8
    for _ in range(100):
        policy.observe(5e-3)
    assert 0 < policy.budget <= 1e-6
    for _ in range(8):
        policy.observe(20e-6)
    assert policy.budget == longest


# -- what a container gives ---------------------------------------------------------------------------------------


def tree(root: Path, cgroup: str, **files: str) -> str:
    """A file system with /proc/self/cgroup and limits; `files`: paths under /sys/fs/cgroup, / written as __."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("cpu_", "cpu.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return str(root)


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {"cpu_max": "max 100000"}, 16),
        ("0::/\n", {"cpu_max": "200000 100000"}, 2),
        ("0::/\n", {"cpu_max": "150000 100000"}, 2),
        ("0::/\n", {"cpu_max": "10000 100000"}, 1),
        ("0::/\n", {"cpu_max": "6400000 100000"}, 16),
        ("0::/a/b\n", {"a__cpu_max": "300000 100000", "a__b__cpu_max": "max 100000"}, 3),
        ("0::/a/b\n", {"a__cpu_max": "900000 100000", "a__b__cpu_max": "250000 50000"}, 5),
        ("0::/seen/by/the/host\n", {"cpu_max": "400000 100000"}, 4),
        ("4:memory:/x\n3:cpu,cpuacct:/x\n", {"cpu,cpuacct__x__cpu_cfs_quota_us": "200000",
                                             "cpu,cpuacct__x__cpu_cfs_period_us": "100000"}, 2),
        ("3:cpu:/\n0::/\n", {"cpu__cpu_cfs_quota_us": "-1", "cpu__cpu_cfs_period_us": "100000"}, 16),
        ("3:cpu:/gone\n", {"cpu__cpu_cfs_quota_us": "700000", "cpu__cpu_cfs_period_us": "100000"}, 7),
        ("1:cpuset:/\n", {"cpu__cpu_cfs_quota_us": "1000", "cpu__cpu_cfs_period_us": "1000"}, 16),
        ("nonsense\n", {"cpu_max": "nonsense"}, 16),
    ],
)  # fmt: skip
def test_quota(C, tmp_path, cgroup, files, expected):
    assert C.available_threads(tree(tmp_path, cgroup, **files), 16) == expected


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity masks on this system")
def test_affinity(C):
    allowed = os.sched_getaffinity(0)
    assert 1 <= C.available_threads() <= len(allowed)
    assert C.Pool().size == C.available_threads()
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert C.available_threads() == 1 and C.Pool().size == 1
    finally:
        os.sched_setaffinity(0, allowed)
