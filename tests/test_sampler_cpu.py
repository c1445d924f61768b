"""The C++ sampler on every instruction set against the torch reference: random rows, threads, and its machine code."""

from __future__ import annotations

import copy
import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from musicgen_fast import native
from musicgen_fast.sampling import Draw, SamplingParams, draw
from musicgen_fast.sampling.native_args import SampleArgs, pack

from .sampler_cases import compare, describe, random_draw, random_draws
from .sampler_edges import edge_draws
from .test_sampling import GOLDEN, golden_arguments, golden_logits

ROOT = Path(__file__).parent.parent
ISAS = {"baseline": 0, "avx2": 1, "avx512": 2}

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")


def on(isa: str, threads: int = 1) -> Callable[[Draw], None]:
    """The C++ sampler with that instruction set."""
    extension = native.extension()
    if ISAS[isa] > extension.BEST_ISA:
        pytest.skip(f"this processor lacks {isa}")

    def run(inputs: Draw) -> None:
        args = pack(inputs)
        extension.sample(ctypes.addressof(args), threads, ISAS[isa])

    return run


def check_rows(isa: str, seed: int, rows: int) -> int:
    run, checked = on(isa), 0
    for inputs in random_draws(seed, rows, 500):
        inputs.divide = inputs.noise is not None  # noise mode divides by the temperature on a CPU
        wrong = compare(inputs, run)
        assert not wrong, f"{len(wrong)} cells differ, first {wrong[0]}: {describe(inputs)}"
        checked += inputs.status.numel()
    return checked


@pytest.mark.parametrize("isa", ISAS)
def test_golden_tokens(isa):
    run = on(isa)
    for case in GOLDEN["cases"] + GOLDEN["special"]:
        logits, given = golden_logits(case), golden_arguments(case)
        _, batch, num_codebooks, _ = logits.shape
        counters = [given.pop(name) for name in ("seed", "step", "stream")]
        counters = [torch.as_tensor(c).expand(batch).contiguous() for c in counters]
        tokens, status = torch.empty(batch, num_codebooks, dtype=torch.int64), torch.zeros(batch, num_codebooks).int()
        run(Draw(logits, SamplingParams.build(batch, num_codebooks, **given), tokens, status, *counters))
        assert tokens.tolist() == case["tokens"], case["case"]


@pytest.mark.parametrize("isa", ISAS)
def test_random_rows(isa):
    assert check_rows(isa, 1, 12_000) >= 12_000


@pytest.mark.parametrize("isa", ISAS)
def test_edges(isa):
    run = on(isa)
    for name, inputs in edge_draws(random_rows=40):
        assert not compare(inputs, run), name


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_million_random_rows(part):
    """100,000 a part; the reference is drawn once and compared with every instruction set."""
    rows, runs = 0, [on(isa) for isa, level in ISAS.items() if level <= native.extension().BEST_ISA]
    for inputs in random_draws(100 + part, 100_000, 1000):
        inputs.divide = inputs.noise is not None
        first = copy.copy(inputs)
        first.tokens, first.status = inputs.tokens.clone(), inputs.status.clone()
        runs[0](first)
        wrong = compare(inputs, runs[-1])
        assert not wrong, f"{len(wrong)} cells differ, first {wrong[0]}: {describe(inputs)}"
        for run in runs[1:]:
            other = copy.copy(inputs)
            other.tokens, other.status = inputs.tokens.clone(), inputs.status.clone()
            run(other)
            assert torch.equal(other.tokens, first.tokens) and torch.equal(other.status, first.status)
        rows += inputs.status.numel()
    print(f"{rows} rows x {len(runs)} instruction sets, 0 mismatches")
    assert rows >= 100_000


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_threads_change_nothing(threads):
    """257 requests x 4: parts of unequal length, and more threads asked for than there is work."""
    inputs = random_draw(5, 1028, vocab=130, branches=2, dtype=torch.float32, noise=False, column=False)
    assert not compare(inputs, on("baseline", threads))


def test_draw_uses_the_threads_of_torch(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked.append(1) or 2)
    draw(random_draw(6, 8, vocab=16, noise=False), backend="cpu")
    assert asked


def test_the_struct_is_the_one_that_was_compiled():
    inputs = random_draw(7, 8, vocab=16)
    args = pack(inputs)
    args.size -= 8
    with pytest.raises(ValueError, match="another version"):
        native.extension().sample(ctypes.addressof(args))
    args = pack(inputs)
    args.V = 5000
    with pytest.raises(ValueError, match="up to 4096"):
        native.extension().sample(ctypes.addressof(args))
    header = (ROOT / "csrc" / "sample_args.h").read_text()
    body = header[header.index("struct SampleArgs {") :]
    declared = re.findall(r"(\w+)(?=[,;])", re.sub(r"//.*", "", body))
    assert [name for name, _ in SampleArgs._fields_] == declared


@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("objdump"), reason="needs g++ and objdump")
@pytest.mark.skipif(sys.platform != "linux", reason="the flags are those of gcc on Linux")
@pytest.mark.parametrize("isa", ISAS)
def test_no_multiply_is_fused_with_an_add(isa, tmp_path):
    """An FMA rounds once where the definition rounds twice; AVX-512 processors have it, and compilers like it."""
    flags = re.findall(r'"(-[^"]+)"', re.search(r"UNIX_FLAGS = .*?MSVC", (ROOT / "setup.py").read_text(), re.S)[0])
    assert "-ffp-contract=off" in flags
    source, target = ROOT / "csrc" / "cpu" / f"sample_{isa}.cpp", tmp_path / "sample.o"
    command = ["g++", *flags, "-mfma", f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    code = subprocess.run(["objdump", "-d", str(target)], check=True, capture_output=True, text=True).stdout
    multiplies = len(re.findall(r"\bv?mulps\b", code))
    assert multiplies > 50, "the arithmetic is not vectorised any more"
    assert not re.findall(r"\bvfn?m(?:add|sub)\w*", code)
    widest = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}[isa]
    assert re.search(rf"mulps.*%{widest}", code), f"nothing is multiplied in {widest} registers"
