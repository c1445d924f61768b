"""Cached attention against its definition, under Triton's interpreter: lengths, caches, dtypes, silent rows.

The `check_` functions run in a child process, which chooses the interpreter before triton is imported, and on a device
in tests/test_gpu_kernels_attention.py. What no row may read is NaN.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from musicgen_fast.kernels import reference

ROOT = Path(__file__).parent.parent
# Relative to the exact result; the interpreter cuts bf16 off where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
# heads, d / H, positions: one split, two and a bit, widths that are no power of two, more splits than sixteen
SHAPES = ((2, 16, 100), (2, 8, 300), (3, 12, 257), (1, 4, 2100))
LENGTHS = (0, -1, 1, 127, 128, 129, 255, 256, 98, -5)  # of rows; those beyond a cache count from its end

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def interpreted(module: str, check: str, *args: object) -> Any:
    """What check_... of tests.`module` returns in a process where Triton interprets."""
    code = f"import json; from tests import {module} as t; print(json.dumps(t.{check}(*{args!r})))"
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", code]
    child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype: str) -> None:
    assert interpreted("test_kernels_attention", "check_attention", dtype) == []


def test_a_row_is_the_same_in_every_batch() -> None:
    assert interpreted("test_kernels_attention", "check_batches", [2, 8, 16, 40], "cpu", (1, 8, 200)) == []


def test_steps_follow_each_other() -> None:
    assert interpreted("test_kernels_attention", "check_steps", 2) == []


def test_the_cases_reach_every_border() -> None:
    """Silent rows, the first position, both sides of a split's end, a full cache."""
    for heads, head_dim, positions in SHAPES:
        length = random_case(0, 10, heads, head_dim, positions).length
        assert {-1, 0, 1, positions - 1} <= set(length.tolist()) and length.max() < positions
    assert {127, 128, 129, 255, 256} <= set(random_case(0, 10, 2, 8, 300).length.tolist())


# -- cases ----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """The arguments of `attention`; positions that a row does not hold are NaN (or 127 with a scale of NaN)."""

    qkv: Tensor
    cache: Tensor
    cache_scales: Tensor | None
    slot: Tensor
    length: Tensor
    out: Tensor
    scratch: Tensor
    arrived: Tensor

    def run(self, attention: Any) -> None:
        attention(*vars(self).values())

    def clone(self, **changed: Any) -> Case:
        return Case(**{k: v if v is None else v.clone() for k, v in (vars(self) | changed).items()})


def random_case(
    seed: int, rows: int, heads: int, head_dim: int, positions: int,
    dtype: torch.dtype = torch.float32, quantised: bool = False, device: str = "cpu",
) -> Case:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    length = torch.tensor([LENGTHS[r % len(LENGTHS)] for r in range(rows)])
    length = torch.where(length >= positions, positions - 1 - length % 8, length)
    length[-1] = positions - 1
    slots, width = rows + 3, heads * head_dim
    slot = torch.randperm(slots, generator=g)[:rows]
    slot[length < 0] = -1
    shape = (2, slots, heads, positions, head_dim)
    held = torch.zeros(slots, positions, dtype=torch.bool)
    for r in range(rows):
        held[slot[r], : max(int(length[r]), 0)] = length[r] >= 0
    scales = None
    if quantised:
        cache = torch.randint(-127, 128, shape, generator=g).to(torch.int8)
        scales = torch.rand(shape[:-1], generator=g) / 60
        scales = scales.where(held[:, None], torch.nan).to(device)
        cache = cache.where(held[:, None, :, None], 127)
    else:
        cache = torch.randn(shape, generator=g).where(held[:, None, :, None], torch.nan).to(dtype)
    splits = -(-positions // 128)
    return Case(
        (torch.randn(rows, 3 * width, generator=g) * 1.5).to(dtype).to(device),
        cache.to(device), scales, slot.int().to(device), length.int().to(device),
        torch.full((rows, width), torch.nan, dtype=dtype, device=device),
        torch.full((rows, heads, splits, head_dim + 2), torch.nan, device=device),
        torch.zeros(rows, heads, dtype=torch.int32, device=device),
    )  # fmt: skip


def expected_of(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, exact (fp32 throughout), cache and scales, by the definition."""
    clean = case.clone(qkv=case.qkv.float(), out=case.out.float())
    if clean.cache_scales is None:
        clean.cache = clean.cache.float()
    for memory in (clean.cache, clean.cache_scales):
        if memory is not None and memory.is_floating_point():
            memory.nan_to_num_(0.0)  # it sums zeros times what a row may not read
    clean.run(reference.attention)
    cache, scales = case.cache.clone(), None if case.cache_scales is None else case.cache_scales.clone()
    for r, n in enumerate(case.length.tolist()):
        if n >= 0:
            s = int(case.slot[r])
            cache[:, s, :, n] = clean.cache[:, s, :, n].to(cache.dtype)
            if scales is not None:
                scales[:, s, :, n] = clean.cache_scales[:, s, :, n]
    return clean.out, cache, scales


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(777.0), b.nan_to_num(777.0)) if a.is_floating_point() else torch.equal(a, b)


def wrong_outputs(out: Tensor, expected: Tensor, silent: Tensor) -> list:
    """Rows whose error is above the tolerance of their dtype, or that are not zero though they are silent."""
    exact = expected.float()
    error = (out.float() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-6)
    wrong = torch.where(silent, (out != 0).any(-1), ~(error < TOLERANCE[out.dtype]))
    return [(r, error[r].item()) for r in wrong.nonzero().flatten().tolist()]


# -- in the child, or on a device -------------------------------------------------------------------------------------


def check_attention(dtype: str, device: str = "cpu", shapes: Any = SHAPES, rows: int = 10) -> list:
    from musicgen_fast.kernels.attention import attention

    wrong: list = []
    for seed, (shape, quantised) in enumerate(product(shapes, (False, True))):
        case = random_case(seed, rows, *shape, DTYPES[dtype], quantised, device)
        out, cache, scales = expected_of(case)
        case.run(attention)
        wrong += [(shape, *row) for row in wrong_outputs(case.out, out, case.length < 0)]
        if not same_bits(case.cache, cache):
            wrong.append((shape, "cache"))
        if scales is not None and not same_bits(case.cache_scales, scales):
            wrong.append((shape, "scales"))
        if case.arrived.any():
            wrong.append((shape, "arrived"))
    return wrong


def check_batches(buckets: list[int], device: str = "cpu", shape: Any = (2, 8, 300), repeats: int = 1) -> list:
    """Rows of the largest batch, two and more at a time, in batches of every size, whose other rows are silent."""
    from musicgen_fast.kernels.attention import attention

    wrong: list = []
    for quantised in (False, True):
        case = random_case(5, max(buckets), *shape, torch.float16, quantised, device)
        whole = case.clone()
        whole.run(attention)
        for bucket in buckets * repeats:
            rows = torch.randperm(max(buckets), generator=torch.Generator().manual_seed(bucket))[:bucket].to(device)
            part = {name: getattr(case, name)[rows] for name in ("qkv", "slot", "length", "out", "scratch", "arrived")}
            mine = case.clone(**part)
            mine.length[bucket // 2 :: 5] = -1
            mine.run(attention)
            takes_part = (mine.length >= 0)[:, None]
            if not torch.equal(mine.out, whole.out[rows].where(takes_part, torch.zeros_like(mine.out))):
                wrong.append((quantised, bucket))
    return wrong


def check_steps(steps: int, device: str = "cpu") -> list:
    """Steps over a split's end, with the same scratch: what one appends the next ones read."""
    from musicgen_fast.kernels.attention import attention

    wrong: list = []
    for quantised in (False, True):
        case = random_case(3, 4, 2, 16, 200, torch.float32, quantised, device)
        case.length[:] = torch.tensor([127, 126, -1, 0])
        case.slot[:] = torch.arange(4)
        for memory in (case.cache, case.cache_scales):
            if memory is not None and memory.is_floating_point():
                memory.nan_to_num_(0.01)
        theirs = case.clone()
        for step in range(steps):
            for mine, function in ((case, attention), (theirs, reference.attention)):
                mine.qkv[:] = torch.randn(mine.qkv.shape, generator=torch.Generator().manual_seed(step)).to(device)
                mine.run(function)
                mine.length += (mine.length >= 0).int()
            wrong += [(step, *row) for row in wrong_outputs(case.out, theirs.out, case.length < 0)]
        wrong += [] if same_bits(case.cache, theirs.cache) else ["cache"]
    return wrong
