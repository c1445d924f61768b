"""Cases of `kernels/linear.py` against `kernels/reference.py`, for the interpreter and for a GPU.

Every `check_` function runs its cases on a device and returns (how many, what was wrong). Outputs lie in larger tensors
full of NaN, so that a value that is not written shows, and one that is written too much as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from musicgen_fast.kernels import linear, reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}  # relative error norms
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """scratch: "stats" or "rows" (see `linear.norm_linear`). group: of int8 weights; None: they have `dtype`."""

    rows: int
    d: int
    n: int
    parts: int = 2
    dtype: torch.dtype = torch.float32
    group: int | None = None
    scratch: str = "rows"
    gelu: bool = False
    keeps: bool = True  # x_out is given
    logits: bool = False  # out is fp32 whatever the weights are
    half_norm: bool = False  # gamma and beta have `dtype`
    seed: int = 0


@dataclass
class Inputs:
    x: Tensor
    parts: Tensor | None
    gamma: Tensor
    beta: Tensor
    weight: Tensor
    scales: Tensor | None


def make(case: Case, device: str) -> Inputs:
    g = torch.Generator().manual_seed(case.seed)
    x = torch.randn(case.rows, case.d, generator=g) * 3 + 1
    parts = torch.randn(case.parts, case.rows, case.d, generator=g) if case.parts else None
    norm = torch.stack([1 + 0.2 * torch.randn(case.d, generator=g), 0.3 * torch.randn(case.d, generator=g)])
    gamma, beta = norm.to(case.dtype if case.half_norm else torch.float32)
    weight, scales = weights(case.n, case.d, case.dtype, case.group, g)
    made = Inputs(x, parts, gamma, beta, weight, scales)
    return Inputs(**{name: None if t is None else t.to(device) for name, t in vars(made).items()})


def weights(n: int, k: int, dtype: torch.dtype, group: int | None, g: torch.Generator) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(n, k, generator=g) / k**0.5
    if group is None:
        return weight.to(dtype), None
    groups = weight.unflatten(1, (-1, group))
    scales = groups.abs().amax(-1) / 127
    return (groups / scales[..., None]).round().to(torch.int8).flatten(1), scales


def run(module: Any, case: Case, given: Inputs, pdl: bool = False) -> tuple[Tensor | None, Tensor]:
    """(x_out, out), each with a row behind its end."""
    device = given.x.device
    x_out = torch.full((case.rows + 1, case.d), torch.nan, device=device) if case.keeps else None
    out_dtype = torch.float32 if case.logits else case.dtype
    out = torch.full((case.rows + 1, case.n), torch.nan, dtype=out_dtype, device=device)
    shape, dtype = ((case.rows, case.d), case.dtype) if case.scratch == "rows" else ((case.rows, 2), torch.float32)
    stats = torch.full(shape, torch.nan, dtype=dtype, device=device)
    module.norm_linear(
        given.x, given.parts, None if x_out is None else x_out[: case.rows], stats, given.gamma, given.beta,
        given.weight, given.scales, out[: case.rows], gelu=case.gelu, pdl=pdl,
    )  # fmt: skip
    return x_out, out


def norm_cases() -> Iterator[Case]:
    for dtype in (torch.float32, *HALVES):
        for scratch in ("rows", "stats"):
            one = Case(2, 32, 96, dtype=dtype, scratch=scratch)
            yield one
            yield replace(one, rows=1, d=48, n=40, parts=0)  # n is not whole tiles
            yield replace(one, rows=3, d=48, parts=3, gelu=True, half_norm=True)
            yield replace(one, rows=4, d=64, n=52, parts=1, logits=True)
            yield replace(one, rows=4, parts=4, keeps=False)  # more than 8 rows of parts: a kernel before it
            yield replace(one, rows=8, d=48, parts=4, gelu=True)
            yield replace(one, rows=17, d=80, n=33, keeps=False)
            yield replace(one, rows=40, d=64, parts=0, keeps=False)
            yield replace(one, rows=100, n=20, half_norm=True, logits=True)
            yield replace(one, d=1024, n=20, parts=4)  # 8 slices
            yield replace(one, d=1536, n=16, parts=3)  # slices that are no power of two
            yield replace(one, rows=6, d=1536, n=16)
        yield Case(2, 4096, 16, dtype=dtype)  # more than one shot
    for dtype in HALVES:
        for scratch in ("rows", "stats"):
            one = Case(2, 32, 96, dtype=dtype, group=16, scratch=scratch)
            yield from (one, replace(one, rows=5, parts=0, gelu=True), replace(one, rows=40, d=128, n=24, group=32))
            yield replace(one, d=48, n=40)  # three groups among four slices
            yield replace(one, d=1536, n=16, group=128)
            yield replace(one, rows=20, d=1024, n=16, group=64)
    yield Case(2, 32, 48, dtype=torch.float16, group=16, scratch="stats", logits=True)  # whole numbers by fp32


def check_norm_linear(device: str = "cpu") -> tuple[int, list]:
    cases, wrong = list(norm_cases()), []
    for case in cases:
        given = make(case, device)
        (x_mine, mine), (x_theirs, theirs) = run(linear, case, given), run(reference, case, given)
        wrong += [(str(case), "out", e) for e in errors(mine, theirs, TOLERANCE[case.dtype])]
        if x_mine is not None and x_theirs is not None:
            wrong += [(str(case), "x_out", e) for e in errors(x_mine, x_theirs, 1e-6)]
    return len(cases), wrong


def errors(mine: Tensor, theirs: Tensor, tolerance: float) -> list[str]:
    """What differs beyond the tolerance; both end with something that must not have been written."""
    if not (torch.equal(mine.isnan(), theirs.isnan()) and bool(theirs[..., -1, :].isnan().all())):
        return ["written where it should not be, or not where it should"]
    a, b = mine[..., :-1, :].double(), theirs[..., :-1, :].double()
    error = ((a - b).norm() / b.norm()).item()
    return [] if error <= tolerance else [f"relative error {error:.2e}"]


def part_cases() -> Iterator[tuple[int, int, int, int, torch.dtype, int | None]]:
    """rows, k, n, parts, dtype, group."""
    for dtype in (torch.float32, *HALVES):
        yield from ((2, 32, 32, 1, dtype, None), (1, 192, 48, 3, dtype, None), (8, 192, 40, 4, dtype, None))
        yield from ((33, 128, 32, 2, dtype, None), (70, 64, 33, 1, dtype, None), (2, 4096, 16, 2, dtype, None))
        yield (3, 4096, 16, 1, dtype, None)
    for dtype in HALVES:
        yield from ((2, 128, 40, 1, dtype, 16), (5, 128, 32, 4, dtype, 32), (20, 1024, 16, 2, dtype, 128))


def check_linear_parts(device: str = "cpu") -> tuple[int, list]:
    cases, wrong = list(part_cases()), []
    for rows, k, n, parts, dtype, group in cases:
        g = torch.Generator().manual_seed(rows)
        a = torch.randn(rows, k, generator=g).to(dtype)
        weight, scales = weights(n, k, dtype, group, g)
        a, weight = a.to(device), weight.to(device)
        scales = None if scales is None else scales.to(device)
        mine, theirs = torch.full((2, parts * rows + 1, n), torch.nan, device=device)
        linear.linear_parts(a, weight, scales, mine[:-1].view(parts, rows, n))
        # Sums in fp32, as the twin's: the reference rounds those of halves to halves.
        exact = (a.float(), weight if scales is not None else weight.float(), scales)
        reference.linear_parts(*exact, theirs[:-1].view(parts, rows, n))
        found = errors(mine, theirs, 1e-5)
        wrong += [(rows, k, n, parts, str(dtype), group, e) for e in found]
    return len(cases), wrong


def check_rows_alone(device: str = "cpu", d: int = 48, n: int = 40, counts: tuple[int, ...] = (2, 8, 16, 40)) -> list:
    """A row's bits do not depend on how many there are: exactly on a GPU, to the order of numpy's sums on the CPU."""
    wrong = []
    most = max(counts)
    for dtype in (torch.float32, *HALVES):
        for scratch in ("rows", "stats"):
            for group in (None,) if dtype == torch.float32 or d == 48 else (None, 128):
                base = Case(most, d, n, dtype=dtype, scratch=scratch, group=group, logits=scratch == "stats")
                if group and scratch == "stats":  # int8 with fp32 outputs would be another arithmetic
                    base = replace(base, logits=False)
                given = make(base, device)
                whole = run(linear, base, given)
                for rows in counts:
                    few = replace(given, x=given.x[:rows].contiguous(), parts=given.parts[:, :rows].contiguous())
                    for name, a, b in zip(
                        ("x_out", "out"), run(linear, replace(base, rows=rows), few), whole, strict=True
                    ):
                        if not same(a[:-1], b[:rows], device):
                            wrong.append((str(base), rows, name))
    return wrong


def check_parts_alone(device: str = "cpu", k: int = 192, n: int = 40, counts: tuple[int, ...] = (2, 8, 16, 40)) -> list:
    """As `check_rows_alone`; on the CPU too the sums are exact, of whole numbers."""
    wrong = []
    for dtype in (torch.float32, *HALVES):
        g = torch.Generator().manual_seed(1)
        a = torch.randint(-4, 5, (max(counts), k), generator=g).to(dtype).to(device)
        weight = torch.randint(-4, 5, (n, k), generator=g).to(dtype).to(device)
        if device != "cpu":
            a, weight = (torch.randn(t.shape, generator=g).to(t) for t in (a, weight))
        whole = torch.empty(2, len(a), n, device=device)
        linear.linear_parts(a, weight, None, whole)
        for rows in counts:
            few = torch.empty(2, rows, n, device=device)
            linear.linear_parts(a[:rows].contiguous(), weight, None, few)
            if not torch.equal(few, whole[:, :rows]):
                wrong.append((str(dtype), rows))
    return wrong


def same(a: Tensor, b: Tensor, device: str) -> bool:
    if device != "cpu":
        return torch.equal(a, b)
    return torch.allclose(a.float(), b.float(), rtol=2e-2 if a.dtype in HALVES else 1e-4, atol=1e-3)


def check_silent_and_broken_rows(device: str = "cpu") -> list:
    """A row of NaN, infinities or zeros changes nothing of the others, whether the rows share a tile or a CTA."""
    wrong = []
    for dtype in (torch.float32, torch.float16):
        for rows in (2, 4, 8, 40):
            case = Case(rows, 48, 40, dtype=dtype, gelu=True)
            given = make(case, device)
            x_out, out = run(linear, case, given)
            assert x_out is not None
            for value in (torch.nan, torch.inf, 0.0):
                broken = replace(given, x=given.x.clone(), parts=given.parts.clone())
                broken.x[1], broken.parts[:, 1] = value, value
                x_broken, out_broken = run(linear, case, broken)
                others = [r for r in range(rows) if r != 1]
                if not (torch.equal(x_broken[others], x_out[others]) and torch.equal(out_broken[others], out[others])):
                    wrong.append((str(case), value, "others"))
                if bool(out_broken[1].isfinite().all()) != (value == 0):
                    wrong.append((str(case), value, "itself"))
    return wrong
