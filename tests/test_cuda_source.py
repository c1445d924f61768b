"""The CUDA sampler without a GPU: its source runs in an emulator and must give the tokens of the reference.

The emulator (cuda_emulator/) compiles csrc/cuda with g++ and runs the threads of a block as fibers, in several orders.
What nvcc makes of the source is for test_cuda_build.py, the real thing for test_gpu.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from musicgen_fast import sampling
from musicgen_fast.sampling.native_args import pack

from .cuda_source_tools import ROOT, EmulatedSampler, build_emulated, why_no_emulator
from .sampler_cases import compare, describe, random_draw, random_draws
from .sampler_edges import edge_draws
from .test_sampling import GOLDEN, golden_arguments, golden_logits

SOURCE = ROOT / "csrc" / "cuda" / "sample.cu"

needs_emulator = pytest.mark.skipif(bool(why_no_emulator()), reason=why_no_emulator() or "it can be built")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> EmulatedSampler:
    return EmulatedSampler(build_emulated(SOURCE, tmp_path_factory.mktemp("emulator") / "sample.so", "-Werror"))


def mismatches(sampler: EmulatedSampler, seed: int, rows: int, batch_rows: int = 48) -> list[str]:
    found = []
    for draw in random_draws(seed, rows, batch_rows):
        found += [f"{describe(draw)}: {difference}" for difference in compare(draw, sampler)]
    return found


@needs_emulator
@pytest.mark.parametrize("case", GOLDEN["cases"] + GOLDEN["special"], ids=lambda c: str(c["case"]))
def test_golden_tokens(emulated, case, monkeypatch):
    emulated.order("shuffled", case["case"] + 1)
    monkeypatch.setattr(sampling, "choose", lambda name, device: emulated)
    drawn = sampling.sample(golden_logits(case), **golden_arguments(case))
    assert drawn.tolist() == case["tokens"]


FUNCTIONS = """
#include <cuda_runtime.h>
#include "cpu/race.h"
__global__ void functions(int n, const uint32_t* x, const float* t, float* E, float* w, float* iw) {
    __shared__ int count;  // the emulator wants some shared memory
    if (threadIdx.x == 0) count = n;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        E[i] = mgf::exponential(x[i]);
        const mgf::PowerOfTwo pair = mgf::exp2_pair(t[i]);
        w[i] = pair.w, iw[i] = pair.iw;
    }
}
extern "C" int run(int n, const uint32_t* x, const float* t, float* E, float* w, float* iw) {
    cudaLaunchConfig_t launch{};
    launch.blockDim = dim3(64);
    return cudaLaunchKernelEx(&launch, functions, n, x, t, E, w, iw);
}
"""


@needs_emulator
def test_golden_functions(tmp_path):
    """-ln and 2^t as a kernel sees them."""
    table = json.loads((ROOT / "tests" / "assets" / "golden_functions.json").read_text())
    (tmp_path / "functions.cu").write_text(FUNCTIONS)
    library = ctypes.CDLL(str(build_emulated(tmp_path / "functions.cu", tmp_path / "functions.so")))
    x, t = torch.tensor(table["x"]).to(torch.int32), torch.tensor(table["t_bits"]).to(torch.int32)
    assert len(x) == len(t) > 100
    out = torch.zeros(3, len(x), dtype=torch.int32)
    assert library.run(len(x), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, t, *out))) == 0
    for name, found in zip(("E_bits", "w_bits", "iw_bits"), out, strict=True):
        assert torch.equal(found, torch.tensor(table[name]).to(torch.int32)), name


@needs_emulator
@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_random_rows(emulated, order):
    """Every kind of row, filter and output, whatever the order of the threads; the draws differ between orders."""
    emulated.order(order, 7)
    assert not mismatches(emulated, seed=len(order), rows=3000)


@needs_emulator
@pytest.mark.parametrize("vocab", [33, 257, 511, 1023, 2047, 2049, 4095])
def test_rows_at_any_address(emulated, vocab):
    """An odd vocabulary ends within a thread's eight tokens, and most of its rows begin between 16-byte addresses."""
    emulated.order("shuffled", vocab)
    assert not compare(random_draw(vocab, 150, vocab=vocab), emulated)


@needs_emulator
def test_edges(emulated):
    emulated.order("shuffled", 11)
    for name, draw in edge_draws():
        assert not compare(draw, emulated), name


@needs_emulator
def test_refuses_what_it_cannot_draw(emulated):
    draw = random_draw(1, 8, vocab=16, branches=2, noise=False, column=True)
    before = draw.tokens.clone()
    wrong = {"size": 8, "NB": 4, "V": 4097, "K": 70000, "B": -1, "dtype": 3, "divide": 1, "cfg": None, "frames": None}
    wrong |= {"size ": 0, "NB ": 0, "V ": 0}
    for name, value in wrong.items():
        args = pack(draw)
        setattr(args, name.strip(), value)
        assert emulated.sample(args) == 1, name  # cudaErrorInvalidValue
    assert torch.equal(draw.tokens, before)
    nothing = pack(draw)
    nothing.B = 0
    assert emulated.sample(nothing) == 0 and torch.equal(draw.tokens, before)


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_random_rows(emulated, seed):
    emulated.order(("forward", "backward", "shuffled", "shuffled")[seed], seed)
    assert not mismatches(emulated, seed=100 + seed, rows=25_000)


WRONG_TOKENS = 3
SCRIPT = f"""
import sys
from pathlib import Path
from tests.test_cuda_source import EmulatedSampler, mismatches

sampler = EmulatedSampler(Path(sys.argv[1]))
for order in ("forward", "backward", "shuffled"):
    sampler.order(order, 5)
    if mismatches(sampler, 9, *map(int, sys.argv[2:])):
        sys.exit({WRONG_TOKENS})
"""


def in_a_process(library: Path, rows: int, batch_rows: int = 48, **variables: str) -> subprocess.CompletedProcess:
    """Random rows in every order, where a crash does no harm; exit status `WRONG_TOKENS` at the first mismatch."""
    command = [sys.executable, "-c", SCRIPT, str(library), str(rows), str(batch_rows)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


BARRIERS = [
    (path.name, number)
    for path in sorted(SOURCE.parent.iterdir())
    for number in range(path.read_text().count("__syncthreads();"))
]


@needs_emulator
@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), BARRIERS)
def test_a_missing_barrier_is_seen(tmp_path, name, number):
    """Without any one of its barriers the kernel gives wrong tokens in some order: the emulator can fail."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    changed = tmp_path / "csrc" / "cuda" / name
    pieces = changed.read_text().split("__syncthreads();")
    changed.write_text("__syncthreads();".join(pieces[: number + 1]) + "__syncthreads();".join(pieces[number + 1 :]))
    library = build_emulated(tmp_path / "csrc" / "cuda" / "sample.cu", tmp_path / "s.so", csrc=tmp_path / "csrc")
    done = in_a_process(library, rows=1000)
    noticed = "a barrier after some thread" in done.stderr  # garbage made the warps disagree about the way
    assert done.returncode == WRONG_TOKENS or done.returncode < 0 or noticed, done.stderr  # < 0: it crashed


MISUSE = """
#include <cuda_runtime.h>
__global__ void misuse(int how, unsigned* out) {
    __shared__ unsigned sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    if (how == 1 && threadIdx.x == 40) return;
    if (how == 2 && threadIdx.x < 32) __syncthreads();
    if (how == 3) out[0] = threadIdx.x % 2 ? __shfl_sync(~0u, 1u, 0)
                                           : __ballot_sync(~0u, 1);
    if (how == 4) out[0] = __reduce_max_sync(1u, 7u);
    atomicAdd(&sum, unsigned(threadIdx.x));
    __syncthreads();
    if (threadIdx.x == 63) out[0] = sum;
}
extern "C" int run(int how, unsigned* out) {
    cudaLaunchConfig_t launch{};
    launch.blockDim = dim3(how == 5 ? 63 : 64);
    return cudaLaunchKernelEx(&launch, misuse, how, out);
}
extern "C" const char* message() { return cudaGetErrorString(cudaErrorLaunchFailure); }
"""


@needs_emulator
def test_the_emulator_sees_misuse(tmp_path):
    """What hangs a GPU or is undefined there is an error here."""
    (tmp_path / "misuse.cu").write_text(MISUSE)
    library = ctypes.CDLL(str(build_emulated(tmp_path / "misuse.cu", tmp_path / "misuse.so")))
    library.message.restype = ctypes.c_char_p
    out = ctypes.c_uint(0)
    expected = ["", "returned", "barrier", "lines", "part of a warp", "full warps"]
    for how, words in enumerate(expected):
        code = library.run(how, ctypes.byref(out))
        assert (code != 0) == (how != 0), how
        assert words in library.message().decode(), (how, library.message())
        if how == 0:
            assert out.value == 63 * 64 // 2


@needs_emulator
@pytest.mark.slow
def test_no_undefined_behaviour(tmp_path):
    """Shifts, indices, alignment, conversions."""
    flags = ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-g"]
    done = in_a_process(build_emulated(SOURCE, tmp_path / "sample.so", *flags), rows=1000)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_emulator
@pytest.mark.slow
def test_no_access_outside_of_a_tensor(tmp_path):
    """Rows of an odd length, read 16 bytes at a time, must not be read past their end."""
    # Python itself is not built for the sanitizer, so its runtime must be there before anything is allocated.
    find = ["g++", "-print-file-name=libasan.so"]
    runtime = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    library = build_emulated(SOURCE, tmp_path / "sample.so", "-fsanitize=address", "-g")
    # Alone in its tensor, a row begins at a multiple of 16 bytes and ends where the allocation does.
    done = in_a_process(library, rows=250, batch_rows=1, LD_PRELOAD=runtime, ASAN_OPTIONS="detect_leaks=0")
    assert done.returncode == 0, done.stderr[-3000:]
