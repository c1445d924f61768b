"""The kernels around a step's matrix products on a CUDA device: the cases of the interpreter, at real sizes too.

Also what an interpreter cannot show: splits that arrive in any order, many at a time, and launches that overlap.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from musicgen_fast.kernels import reference

from . import test_kernels_cross as cross
from . import test_kernels_embed as embed
from . import test_kernels_sample_rows as rows
from .test_kernels_attention import (
    DTYPES,
    SHAPES,
    check_attention,
    check_batches,
    check_steps,
    random_case,
    wrong_outputs,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]

REAL = ((16, 64, 1503), (24, 64, 1503), (32, 64, 1503))  # heads, d / H, positions of small, medium, large


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [SHAPES, REAL], ids=["small", "real"])
def test_attention(dtype, shapes):
    assert check_attention(dtype, "cuda", shapes) == []


@pytest.mark.parametrize("shape", [(2, 8, 300), (16, 64, 1503)])
def test_a_row_is_the_same_in_every_batch_and_every_time(shape):
    assert check_batches([2, 4, 8, 16, 32, 64, 128, 192], "cuda", shape, repeats=3) == []


def test_steps_follow_each_other():
    assert check_steps(5, "cuda") == []


def test_the_last_to_arrive_combines_whoever_it_is():
    """Hundreds of launches, all splits in use: one result, bit for bit, and counters back at zero."""
    from musicgen_fast.kernels.attention import attention

    case = random_case(11, 64, 16, 64, 1503, torch.float16, device="cuda")
    case.length[:] = torch.arange(64, device="cuda").int() * 23 + 20
    case.slot[:] = torch.arange(64, device="cuda").int()
    case.cache.nan_to_num_(0.25)
    first = None
    for _ in range(300):
        case.scratch.fill_(torch.nan)
        case.run(attention)
        first = case.out.clone() if first is None else first
        assert torch.equal(case.out, first)
    assert not case.arrived.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_texts(dtype):
    assert cross.check_cross(dtype, "cuda") == []
    assert cross.check_cross(dtype, "cuda", 16, 64) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_absorbed(dtype):
    real = ((16, 1024, 20, 4), (24, 1536, 33, 4), (32, 2048, 64, 2))
    assert cross.check_absorbed(dtype, "cuda", (*cross.FOLDED, *real)) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(dtype):
    assert embed.check_embed(dtype, "cuda") == []


def test_advance():
    assert embed.check_advance("cuda") == []


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize("vocab", [130, 2048])
def test_rows_of_a_board(branches, vocab):
    assert rows.check_rows(branches, 40, "cuda", vocab) == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_request_without_cfg_names_one_row_for_all_branches(dtype):
    assert rows.check_one_row(dtype, "cuda", 2048) == []


@pytest.mark.parametrize("quantised", [False, True], ids=["plain", "int8"])
def test_launches_that_overlap_give_the_same_bits(quantised):
    """Steps of attention and `advance` in a CUDA graph, with programmatic dependent launch and without."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs sm_90")
    from musicgen_fast.kernels.attention import attention
    from musicgen_fast.kernels.embed import advance
    from musicgen_fast.kernels.embed import embed as embed_rows

    def steps(pdl: bool) -> list[torch.Tensor]:
        case = random_case(2, 8, 16, 64, 300, torch.float16, quantised, "cuda")
        case.length[:] = torch.tensor([0, 120, -1, 127, 250, 1, 255, 3])
        case.slot[:] = torch.arange(8)
        case.cache = case.cache.nan_to_num(0.1)
        case.cache_scales = None if case.cache_scales is None else case.cache_scales.nan_to_num(0.01)
        fed, request = torch.zeros(8, dtype=torch.int32, device="cuda"), torch.full((4,), -1, device="cuda").int()
        column, step = torch.zeros(4, device="cuda").int(), torch.zeros(4, device="cuda").long()
        sequence = torch.randint(0, 2048, (1, 4, 60), generator=torch.Generator().manual_seed(0)).cuda()
        table = torch.ones(4 * 2049, 1024, device="cuda").half()
        positions, x = torch.zeros(300, 1024, device="cuda"), torch.empty(8, 1024, device="cuda")
        place = torch.zeros(8, dtype=torch.int32, device="cuda")
        outs = torch.empty(30, *case.out.shape, device="cuda", dtype=case.out.dtype)

        def run(count: int) -> None:
            for i in range(count):
                embed_rows(sequence, place, fed, case.length, table, positions, x, pdl=pdl)
                attention(*list(vars(case).values())[:5], outs[i], case.scratch, case.arrived, pdl=pdl)
                advance(fed, case.length, request, column, step, pdl=pdl)

        length = case.length.clone()
        run(1)  # compiles
        case.length.copy_(length)
        fed.zero_()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(30)
        graph.replay()
        torch.cuda.synchronize()
        return [outs, case.length, case.cache, case.arrived]

    for mine, theirs in zip(steps(True), steps(False), strict=True):
        assert torch.equal(mine, theirs)


def test_the_definition_itself_runs_on_the_device():
    """The oracle of all these tests, which is also the decoder's version 1, next to itself on the CPU."""
    case = random_case(1, 6, 4, 16, 200)
    case.cache.nan_to_num_(0.0)
    there = case.clone()
    for name, value in vars(there).items():
        setattr(there, name, value if value is None else value.cuda())
    case.run(reference.attention)
    there.run(reference.attention)
    assert wrong_outputs(there.out.cpu(), case.out, case.length < 0) == []
