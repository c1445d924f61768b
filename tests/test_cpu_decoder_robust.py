"""The CPU decoder among limits, processes and threads: no memory, one core, fork, Ctrl-C, weights that are broken."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from musicgen_fast import native
from musicgen_fast.decoders.cpu import CpuDecoder
from musicgen_fast.packing import pack_weights

from .engine_tools import CountingCpu, plain, prompt_of, sampler_for, text_conditions
from .test_cpu_decoder import decoded, decoder_of, error, inputs_of, model_of, reference
from .test_cpu_pool import in_child, resident_kb, thread_count
from .test_decoder import random_model

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")

ROOT = Path(__file__).parents[1]
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts in /proc")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
ignores_fork_warning = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


def tokens_of(decoder: Any, seed: int = 1, total: int = 40) -> torch.Tensor:
    return plain(decoder, total, text_conditions(2), sampler_for(2, seeds=[seed, seed + 1]))


def python(code: str, *, timeout: float = 300) -> str:
    """What a child process prints; it must end well. Its names are those of this module's own imports."""
    begin = """
        import os, resource, sys, threading, time
        import numpy as np, torch
        torch.set_num_threads(1)
        from musicgen_fast import native
        from tests.test_cpu_decoder import decoder_of, decoded, inputs_of, model_of
        from tests.test_cpu_decoder_robust import *
    """
    command = [sys.executable, "-c", textwrap.dedent(begin) + textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment)
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


# -- memory -------------------------------------------------------------------------------------------------------

# Room that the process may still map, on top of what it has.
LIMIT = """
    def room(mib):
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + mib * 2**20, resource.RLIM_INFINITY))

    def unlimited():
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

    def refused(call):
        try:
            call()
        except MemoryError as error:
            print(error)
            return
        raise AssertionError("there was room")
"""


@pytest.fixture(scope="module")
def limits() -> None:
    pytest.importorskip("resource", reason="no limits of that kind on this system")
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads how much is mapped in /proc")


@pytest.mark.usefixtures("limits")
def test_no_room_for_caches_and_scratch():
    """A MemoryError with the size; afterwards, with room, the same decoder computes what it always did."""
    said = python(
        textwrap.dedent(LIMIT)
        + textwrap.dedent("""
        decoder = decoder_of(model_of("wide"))
        inputs = inputs_of(decoder.config, steps=5)
        expected = decoded(decoder, **inputs)
        one = native.extension().CpuCache("float32", 2, 1, 5, 32, 60_000)
        tokens = torch.zeros(1, 4, 50_000, dtype=torch.int64)
        decoder._require_positions(60_000)
        logits = np.empty((1, 4 * 37), np.float32)
        segments, empty = np.array([(0, 0, 0, 50_000, -1, 0, 0, 0)], np.int32), np.empty((0, 160), np.float32)
        fed, wanted = tokens[0].T.contiguous().numpy(), np.array([0], np.int32)
        room(60)
        refused(lambda: decoder.allocate(64, 5000))
        refused(lambda: decoder._native.run([one], segments, fed, empty, wanted, logits))
        refused(lambda: decoder.logits(tokens.repeat(1, 1, 20)))
        assert torch.equal(decoded(decoder, **inputs), expected), "it is usable still"
        unlimited()
        assert torch.equal(decoded(decoder, **inputs), expected)
        """)
    ).splitlines()
    assert "64 rows x 5000 positions" in said[0] and "MiB" in said[0]
    assert "MiB of scratch" in said[1] and "fewer requests" in said[1]
    assert len(said) == 3 and said[2]


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize(("threads", "rooms"), [(1, (2, 8, 14, 20, 30, 45, 60, 75)), (2, (220, 260, 300))])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_no_room_to_pack(precision, threads, rooms):
    """From no room for the packed weights at all to room for all but a last copy: an error that says so, or success."""
    said = python(
        textwrap.dedent(LIMIT)
        + textwrap.dedent(f"""
        from musicgen_fast.packing import pack_weights
        width = {512 * threads}
        model = random_model("cross", dim=width, num_heads=8, ffn_dim=4 * width, num_layers=2, vocab_size=500)
        weights, outcomes = dict(model.state_dict()), []
        torch.set_num_threads({threads})
        for mib in (*{rooms}, 4000):
            room(mib)
            try:
                packed = pack_weights(model.config, dict(weights), "{precision}")
                outcomes.append("packed")
                del packed
            except MemoryError as error:
                outcomes.append("no room")
                print(error)
            unlimited()
        assert outcomes[-1] == "packed" and ("no room" in outcomes or {threads} > 1), outcomes
        """)
    ).splitlines()
    assert all("no room" in line for line in said)


@pytest.mark.usefixtures("limits")
def test_no_room_for_threads():
    """Their stacks do not fit: fewer threads, the same tokens."""
    python(
        textwrap.dedent(LIMIT)
        + textwrap.dedent("""
        alone = decoder_of(model_of("cross"), threads=1)
        decoder = decoder_of(model_of("cross"), threads=64)
        expected = tokens_of(alone)
        room(40)
        assert torch.equal(tokens_of(decoder), expected)
        assert 1 <= decoder._native.pool.threads < 20, decoder._native.pool.threads
        """)
    )


# -- lifetime -----------------------------------------------------------------------------------------------------


@needs_proc
def test_threads_die_with_the_decoder():
    gc.collect()  # decoders of other tests
    before = thread_count()
    decoder = decoder_of(model_of("cross"), threads=3)
    decoded(decoder, **inputs_of(decoder.config))
    assert thread_count() == before + 2 and decoder.threads == 3
    del decoder
    gc.collect()
    assert thread_count() == before


@needs_proc
def test_a_thousand_decoders_leave_nothing():
    model = model_of("cross")
    packed = pack_weights(model.config, dict(model.state_dict()), "int8")
    inputs = inputs_of(model.config, steps=2)

    def cycle(count: int) -> None:
        for _ in range(count):
            decoded(CpuDecoder(packed, threads=2), **inputs)

    cycle(100)
    gc.collect()
    before, memory = thread_count(), resident_kb()
    cycle(1000)
    gc.collect()
    assert thread_count() == before
    assert resident_kb() - memory < 2_000


# -- processors, processes, threads -------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks on this system")
@ignores_fork_warning
def test_one_core():
    """Three threads on it and one: the same tokens, and no thread that waits for a core that is not there."""
    expected = tokens_of(decoder_of(random_model("cross")))

    def check() -> bool:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        assert native.extension().available_threads() == 1
        crowded = decoder_of(random_model("cross"), threads=3)
        return torch.equal(tokens_of(decoder_of(random_model("cross"))), expected) and torch.equal(
            tokens_of(crowded), expected
        )

    assert in_child(check) == 0


@pytest.fixture
def quota() -> Iterator[Path]:
    """A cgroup (v2) with half a processor; skips where none can be made."""
    group = Path("/sys/fs/cgroup") / f"musicgen-fast-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    if not (group / "cgroup.procs").exists():
        group.rmdir()
        pytest.skip("/sys/fs/cgroup is no cgroup (v2) here, but a plain folder")
    try:
        (group / "cpu.max").write_text("50000 100000")
        yield group
    except OSError as error:
        pytest.skip(f"no quota can be set here: {error}")
    finally:
        for _ in range(100):  # busy until the last process in it is gone
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.05)


@needs_fork
@ignores_fork_warning
def test_under_a_quota(quota: Path):
    expected = tokens_of(decoder_of(random_model("cross")))

    def check() -> bool:
        (quota / "cgroup.procs").write_text(str(os.getpid()))
        decoder = decoder_of(random_model("cross"), threads=0)  # as many as there are
        return decoder.threads == 1 and torch.equal(tokens_of(decoder), expected)

    assert in_child(check) == 0


@needs_fork
@ignores_fork_warning
def test_after_fork():
    """Generate, fork, generate in both; then a grandchild."""
    decoder = decoder_of(random_model("cross"), threads=2)
    expected = tokens_of(decoder)

    def check() -> bool:
        same = torch.equal(tokens_of(decoder), expected)
        return same and in_child(lambda: torch.equal(tokens_of(decoder), expected)) == 0

    assert in_child(check) == 0
    assert torch.equal(tokens_of(decoder), expected)


@needs_fork
@ignores_fork_warning
def test_fork_in_the_middle_of_a_pass():
    """The child inherits what the pass had locked, and none of its threads."""
    decoder = decoder_of(model_of("wide"), "int8", threads=2)
    inputs = inputs_of(decoder.config, steps=400)
    expected, stop = decoded(decoder, **inputs), threading.Event()

    def work() -> None:
        while not stop.is_set():
            decoded(decoder, **inputs)

    other = threading.Thread(target=work)
    other.start()
    try:
        for _ in range(5):
            time.sleep(0.02)
            assert in_child(lambda: torch.equal(decoded(decoder, **inputs), expected)) == 0
    finally:
        stop.set()
        other.join()
    assert torch.equal(decoded(decoder, **inputs), expected)


@pytest.mark.parametrize("shared", [True, False], ids=["one decoder", "two"])
def test_two_python_threads(shared):
    """Each its own requests; also the first table of positions, which both bring."""
    first = decoder_of(random_model("cross"), "int8", threads=2)
    second = first if shared else decoder_of(random_model("cross"), "int8", threads=2)
    quiet = decoder_of(random_model("cross"), "int8")
    expected = {seed: tokens_of(quiet, seed) for seed in range(1, 9)}
    found: dict[int, torch.Tensor] = {}

    def work(decoder: Any, seeds: range) -> None:
        for seed in seeds:
            found[seed] = tokens_of(decoder, seed)

    threads = [threading.Thread(target=work, args=a) for a in ((first, range(1, 5)), (second, range(5, 9)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[seed], expected[seed]) for seed in expected)


def test_two_threads_need_different_tables_of_positions():
    """The longer table stays whoever comes last; it is replaced while the other one's passes run."""
    decoder = decoder_of(random_model("cross", dim=8, num_heads=1, ffn_dim=8, vocab_size=5, num_layers=1))
    failures: list[BaseException] = []

    def work(counts: list[int]) -> None:
        try:
            for count in counts:
                assert decoder.logits(torch.zeros(1, 4, count, dtype=torch.int64)).isfinite().all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(c,)) for c in ([10, 2100, 2300, 2500], [20, 2200, 2400, 2600])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures and decoder._native.positions == 2600


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that send signals on this system")
def test_ctrl_c_in_a_long_prefill():
    """It ends within a pass of 64 rows, and the decoder goes on."""
    model = random_model("cross", dim=256, num_heads=8, ffn_dim=1024, num_layers=4)
    decoder = CountingCpu(model, threads=1)
    conditions = text_conditions(1)
    conditions.branches[0].cross = [torch.randn(4, 256)]
    prompt = prompt_of(1, 6000)

    def run(frames: int) -> torch.Tensor:
        part = prompt[:, :, :frames]
        return plain(decoder, frames + 2, conditions, sampler_for(1, seeds=[1]), part, window=frames + 2, stride=frames)

    expected = run(20)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)  # as SIGINT does, in this process alone
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(6000)
        took = time.monotonic() - start
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert took < 3, "on a busy machine; a pass takes a few milliseconds"
    assert torch.equal(run(20), expected)


# -- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_broken_matrices_are_refused(precision, bad):
    model = random_model("cross")
    for name in ("layers.1.ffn_in.weight", "heads.weight", "layers.0.cross_kv.weight"):
        weights = {n: p.clone() for n, p in model.state_dict().items()}
        weights[name][3, 5] = bad
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinite values: the checkpoint is broken"):
            pack_weights(model.config, weights, precision)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("where", ["norm", "embedding", "text", "overflow"])
def test_broken_activations_end_the_request(precision, bad, where):
    """The sampler's own error, not tokens: NaN in a norm, in the embeddings or in a text; sums beyond fp32."""
    decoder = CountingCpu(random_model("cross"), precision)
    conditions = text_conditions(2)
    if where == "text":
        conditions.branches[0].cross[1][0, 3] = bad
    elif where == "norm":
        decoder.packed.tensors["layers.1.norm2.weight"].view(torch.float32)[3] = bad
    elif where == "embedding":
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        decoder.packed.tensors["emb.weight"].view(dtype).fill_(bad)
    else:
        decoder.packed.tensors["norm.weight"].view(torch.float32).fill_(3e38)
    with pytest.raises(ValueError, match="NaN"):
        plain(decoder, 20, conditions, sampler_for(2, seeds=[1, 2]))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_denormals(precision):
    """Weights that are denormal for the most part, and activations with them: right, and not NaN."""
    model = random_model("cross", dim=160, num_heads=5)
    for name in ("attn_out", "ffn_out"):
        getattr(model.layers[0], name).weight.data *= 1e-38
    inputs = inputs_of(model.config)
    assert error(decoded(decoder_of(model, precision), **inputs), reference(model, **inputs)) < 0.05
    zeros = {n: torch.zeros_like(p) for n, p in model.state_dict().items()}
    decoder = CpuDecoder(pack_weights(model.config, zeros, precision))
    assert (decoded(decoder, **inputs) == 0).all()
    assert np.isfinite(decoded(decoder, **inputs).numpy()).all()
