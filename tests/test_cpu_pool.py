"""The CPU decoder's threads: barriers, exceptions, fork, lifetime, and going on with fewer."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from musicgen_fast import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts threads in /proc")


@pytest.fixture(scope="module")
def C() -> Any:
    return native.extension()


def thread_count() -> int:
    return len(os.listdir("/proc/self/task"))


def resident_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


# -- barriers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "count"), [(1, 10_000), (2, 5_000), (8, 5_000), (40, 100)])
def test_nobody_leaves_a_barrier_early(C, threads, count):
    """More threads than processors; `meet` runs two barriers for each count and looks at every thread's writes."""
    pool = C.Pool(threads)
    assert pool.size == threads
    assert pool.meet(count) == 0
    assert pool.meet(count // 10) == 0  # another region on the same threads


def test_many_regions(C):
    pool = C.Pool(3)
    assert sum(pool.meet(1) for _ in range(2_000)) == 0


def test_a_region_inside_a_region_runs_alone(C):
    assert C.Pool(3).nested() == 1
    assert C.Pool(1).nested() == 1


# -- exceptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_what_a_thread_throws_arrives(C, threads):
    pool = C.Pool(threads)
    for thread in range(threads):
        for at in (0, 3, 9):
            with pytest.raises(RuntimeError, match=f"thread {thread}"):
                pool.fail(thread, at, 10)
            assert pool.meet(20) == 0  # nothing is left of it
    assert pool.fail(99, 0, 5) == pool.threads


# -- processes, Python threads, lifetime --------------------------------------------------------------------------


def in_child(check: Any) -> int:
    """The exit status of a forked child that runs `check`, which has 20 s."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if check() else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_fork(C):
    """A child has none of its parent's threads: it starts its own, and the parent's go on."""
    used, unused = C.Pool(3), C.Pool(2)
    assert used.meet(10) == 0
    assert in_child(lambda: used.meet(50) == 0 and unused.meet(50) == 0 and used.threads == 3) == 0

    def drop() -> bool:
        nonlocal used
        del used  # destroyed in a child that never used it: must not wait for threads that are not there
        return True

    assert in_child(drop) == 0
    assert used.meet(50) == 0 and unused.meet(50) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_fork_in_the_middle_of_a_region(C):
    """The child inherits the lock as another thread held it."""
    pool = C.Pool(2)
    other = threading.Thread(target=pool.busy, args=([300.0, 300.0],))
    other.start()
    time.sleep(0.1)
    assert in_child(lambda: pool.meet(20) == 0) == 0
    other.join()
    assert pool.meet(20) == 0


@pytest.mark.parametrize("shared", [True, False])
def test_two_python_threads(C, shared):
    first = C.Pool(2)
    pools = [first, first if shared else C.Pool(2)]
    missed: list[int] = []

    def work(pool: Any) -> None:
        missed.extend(pool.meet(20) for _ in range(50))

    workers = [threading.Thread(target=work, args=(pool,)) for pool in pools]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert missed == [0] * 100


@needs_proc
def test_a_thousand_pools_leave_nothing(C):
    def cycle(count: int) -> None:
        for _ in range(count):
            assert C.Pool(3).meet(1) == 0

    cycle(50)
    before, memory = thread_count(), resident_kb()
    cycle(1000)
    assert thread_count() == before
    assert resident_kb() - memory < 2_000


@needs_proc
def test_threads_live_from_the_first_region_to_the_end_of_the_pool(C):
    before = thread_count()
    pool = C.Pool(4)
    assert thread_count() == before
    pool.meet(1)
    assert thread_count() == before + 3
    del pool
    assert thread_count() == before


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity masks on this system")
def test_pinning(C):
    allowed = os.sched_getaffinity(0)
    before = set(os.listdir("/proc/self/task"))
    pool = C.Pool(3, pin=True)
    assert pool.meet(10) == 0
    masks = [os.sched_getaffinity(int(task)) for task in set(os.listdir("/proc/self/task")) - before]
    assert len(masks) == 2 and all(len(mask) == 1 and mask <= allowed for mask in masks)
    assert os.sched_getaffinity(0) == allowed  # the caller's own thread is left alone


def test_a_pool_sheds(C):
    """The real thing: one thread is always late, and the region takes as long without it."""
    pool = C.Pool(2)
    deadline = time.monotonic() + 10
    while pool.threads == 2 and time.monotonic() < deadline:
        pool.busy([30.0, 0.0])
    assert pool.threads == 1 and pool.waited_share > 0.25
    assert pool.meet(10) == 0
