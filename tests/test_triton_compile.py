"""The Triton sampler compiled for GPUs that need not be there: no spills, bounded size, no FMA where bits count.

The ceilings are about a fifth above what Triton 3.6 and 3.9 give; the tests print the table.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"),
]

PIVOT_FFMA = 12  # the log2 in the first guess of a filter's boundary, which need not be exact

# What a variant consists of -> ceilings of registers a thread and SASS instructions.
PLAIN, TOP_K, TOP_P, ALL, GREEDY = (96, 2300), (128, 2900), (168, 4000), (168, 4900), (48, 420)

QUICK = [
    *[({"top_k": True}, arch, TOP_K) for arch in (80, 90, 100, 120)],
    # sm_100: where ptxas 12.9 fused packed products and sums
    *[({"top_p": True}, arch, TOP_P) for arch in (90, 100)],
    ({}, 90, PLAIN),
]
REST = [
    *[({"top_p": True}, arch, TOP_P) for arch in (80, 120)],
    *[({}, arch, PLAIN) for arch in (80, 100, 120)],
    *[({"top_k": True, "dtype": dtype}, 90, TOP_K) for dtype in ("fp32", "bf16")],
    *[({"top_k": True, "branches": branches}, 90, TOP_K) for branches in (1, 3)],
    *[({"top_k": True, "vocab": vocab}, 90, TOP_K) for vocab in (1, 400, 1000, 4096)],
    *[({"top_k": True, "noise": True}, arch, TOP_K) for arch in (80, 90)],
    *[({"top_k": True, "pdl": True}, arch, TOP_K) for arch in (90, 100, 120)],
    ({"top_k": True, "column": False}, 90, TOP_K),
    *[({"top_k": True, "top_p": True, "min_p": True}, arch, ALL) for arch in (80, 90, 100, 120)],
    ({"branches": 3, "dtype": "fp32", "vocab": 4096, "top_k": True, "top_p": True, "min_p": True}, 90, ALL),
    ({"greedy": True}, 90, GREEDY),
]


def check(cases: list, capsys: pytest.CaptureFixture[str]) -> None:
    from musicgen_fast.kernels.compile_report import Variant, compile_variant, table

    rows = [(Variant(**options), arch, ceilings) for options, arch, ceilings in cases]
    reports = [compile_variant(variant, arch) for variant, arch, _ in rows]
    with capsys.disabled():
        print("\n" + table((variant, arch, r) for (variant, arch, _), r in zip(rows, reports, strict=True)))
    for (variant, arch, (registers, instructions)), report in zip(rows, reports, strict=True):
        what = f"{variant} sm_{arch}: {report}"
        assert report.spills == 0, what
        assert 0 < report.registers <= registers and 0 < report.instructions <= instructions, what
        assert report.ffma <= PIVOT_FFMA * (variant.top_k + variant.top_p), what


def test_usual_variants(capsys) -> None:
    check(QUICK, capsys)


@pytest.mark.slow
def test_other_variants(capsys) -> None:
    check(REST, capsys)


def test_the_count_of_fma_sees_them() -> None:
    """The log2 of the first guess has some: the absence above is no fault of the counting."""
    from musicgen_fast.kernels.compile_report import Variant, compile_variant

    assert compile_variant(Variant(top_k=True), 90).ffma > 0
