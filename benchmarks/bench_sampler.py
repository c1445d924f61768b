"""Microseconds per column of sampled tokens for pytest-benchmark: `make bench` runs these few cases.

The whole comparison, in rounds and with a parity check, is `musicgen-fast bench sampler`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from musicgen_fast.bench.job import AbsentError
from musicgen_fast.bench.machine import synchronize
from musicgen_fast.bench.sampler import BURST
from musicgen_fast.bench.sampler_case import Case
from musicgen_fast.bench.sampler_peers import build, default_names


def run_benchmark(benchmark: Any, case: Case, name: str) -> None:
    """Grouped by case. On a GPU a round is a burst of draws and the wait for it."""
    try:
        sampler = build(name, case)
    except AbsentError as reason:
        pytest.skip(f"absent: {reason}")
    benchmark.group = case.title
    logits, burst = case.logits(), range(BURST if case.device == "cuda" else 1)

    def draws() -> None:
        for _ in burst:
            sampler(logits)
        synchronize(case.device)

    benchmark(draws)


# Compiling takes 20 s: that one is the command's.
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", [name for name in default_names("cpu") if name != "compiled"])
def test_sampler_on_cpu(benchmark, name, batch):
    run_benchmark(benchmark, Case(batch=batch), name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", [name for name in default_names("cuda") if name != "compiled"])
def test_sampler_on_gpu(benchmark, name, batch):
    run_benchmark(benchmark, Case("cuda", batch=batch, dtype="float16"), name)
