"""`kernels/linear.py` on a CUDA device: the interpreter's cases, the released sizes, and bits that ignore the batch."""

from __future__ import annotations

import pytest
import torch

from musicgen_fast.kernels import heuristics

from .kernels_linear_cases import (
    TOLERANCE,
    Case,
    check_linear_parts,
    check_norm_linear,
    check_parts_alone,
    check_rows_alone,
    check_silent_and_broken_rows,
    errors,
    make,
    run,
)

pytestmark = pytest.mark.gpu  # skipped, with a message, where torch sees no GPU (conftest.py)

ROWS = (1, 2, 3, 4, 8, 16, 32, 40, 64, 128, 192)
RELEASED = (1024, 1536, 2048)


def test_norm_linear() -> None:
    assert check_norm_linear("cuda")[1] == []


def test_linear_parts() -> None:
    assert check_linear_parts("cuda")[1] == []


def test_broken_rows_break_no_others() -> None:
    assert check_silent_and_broken_rows("cuda") == []


@pytest.mark.parametrize("d", (48, *RELEASED))
def test_a_rows_bits_do_not_depend_on_the_batch(d: int) -> None:
    """Over every tile, over one shot and loop, and over who takes the statistics."""
    assert check_rows_alone("cuda", d, 3 * d, ROWS) == []


@pytest.mark.parametrize("d", RELEASED)
def test_the_bits_of_parts_do_not_depend_on_the_batch(d: int) -> None:
    assert check_parts_alone("cuda", d, d, ROWS) == []
    assert check_parts_alone("cuda", 4 * d, d, ROWS) == []


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("rows", (2, 4, 16, 64))
@pytest.mark.parametrize("d", RELEASED)
def test_released_sizes(d: int, rows: int, dtype: torch.dtype) -> None:
    from musicgen_fast.kernels import linear, reference

    for n, gelu in ((3 * d, False), (4 * d, True)):
        case = Case(rows, d, n, parts=heuristics.parts(d, 4 * d), dtype=dtype, gelu=gelu)
        given = make(case, "cuda")
        assert errors(run(linear, case, given)[1], run(reference, case, given)[1], TOLERANCE[dtype]) == []


def test_dependent_launch_changes_nothing() -> None:
    """In a graph, kernels that may begin while the one before runs give the bits of one after another."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs sm_90")
    for rows in (2, 8, 64):
        assert torch.equal(chain(rows, pdl=True), chain(rows, pdl=False))


def chain(rows: int, pdl: bool, d: int = 1024, layers: int = 24) -> torch.Tensor:
    """The residual after `layers` times (close, norm, up, down) replayed three times in a CUDA graph."""
    from musicgen_fast.kernels import linear

    g = torch.Generator(device="cuda").manual_seed(0)
    x, other, first = torch.randn(3, rows, d, device="cuda", generator=g)
    up = torch.randn(layers, 4 * d, d, device="cuda", generator=g).half() / 32
    down = torch.randn(layers, d, 4 * d, device="cuda", generator=g).half() / 64
    gamma, beta = torch.ones(d, device="cuda"), torch.zeros(d, device="cuda")
    stats, h = torch.empty(rows, d, device="cuda").half(), torch.empty(rows, 4 * d, device="cuda").half()
    parts = torch.empty(heuristics.parts(d, 4 * d), rows, d, device="cuda")

    def step() -> None:
        here, there = x, other
        here.copy_(first)
        parts.zero_()
        for layer in range(layers):
            linear.norm_linear(here, parts, there, stats, gamma, beta, up[layer], None, h, gelu=True, pdl=pdl)
            linear.linear_parts(h, down[layer], None, parts, pdl=pdl)
            here, there = there, here

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return (x if layers % 2 == 0 else other).clone()
