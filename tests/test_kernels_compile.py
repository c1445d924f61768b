"""The kernels compiled for GPUs that need not be there: no spills, tensor cores, and loads where their docstrings say.

Prints the table of resources. Not under TRITON_INTERPRET=1, which leaves nothing to compile.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"),
]

ARCHITECTURES = (80, 90, 100, 120)
QKV, QKV_64, FFN_OUT = ("norm", 3072, 1024), ("norm", 3072, 1024, 64), ("parts", 1024, 4096)
QUICK: list[tuple[tuple, dict, tuple[int, ...]]] = [
    (QKV, {"pdl": True, "summed": 4}, ARCHITECTURES),
    (QKV_64, {}, ARCHITECTURES),
    (FFN_OUT, {"pdl": True}, ARCHITECTURES),
    (("norm", 4608, 1536), {"pdl": True, "summed": 3}, (90,)),
    (("norm", 8192, 2048), {"pdl": True, "summed": 2, "gelu": True}, (90,)),
    (("parts", 2048, 8192, 16), {}, (90,)),
    (("parts", 1024, 1024, 64), {}, (90,)),
    (QKV, {"dtype": "bf16"}, (90,)),
    (QKV, {"dtype": "int8"}, (90,)),
    (QKV, {"dtype": "fp32"}, (90,)),
    (("norm", 3072, 1024, 8), {"normed": False}, (90,)),
]
# Of what the step of one request consists of; CTAs that must fit on an SM of an H100
RESIDENT = {"norm": 2, "parts": 2, "close": 4}


def report(arguments: tuple, options: dict, arch: int) -> Any:
    from musicgen_fast.kernels.compile_report import compile_variant, supported
    from musicgen_fast.kernels.linear import Variant

    variant = supported(Variant(*arguments, **options), arch)
    return variant, arch, compile_variant(variant, arch)


def check(rows: list, capsys: pytest.CaptureFixture[str]) -> None:
    from musicgen_fast.kernels.compile_report import table

    with capsys.disabled():
        print("\n" + table(rows))
    for variant, arch, found in rows:
        what = f"{variant} sm_{arch}: {found}"
        assert found.spills == 0 and found.registers > 0, what
        assert found.shared <= 99 * 1024, what  # what a CTA of sm_120 may have
        assert found.ctas >= (RESIDENT[variant.kind] if variant.rows <= 16 and arch == 90 else 1), what
        if variant.kind != "close":
            check_products(variant, found, what)


def check_products(variant: Any, found: Any, what: str) -> None:
    """One family of tensor core instructions whatever the architecture and the rows are, each k16 step done once."""
    assert "wgmma" not in found.ptx and "tcgen05" not in found.ptx, what
    shapes = set(re.findall(r"mma\.sync\.aligned\.(\w+)", found.ptx))
    assert shapes == (set() if variant.dtype == "fp32" else {"m16n8k16"}), what
    assert (found.ffma >= 128) == (variant.dtype == "fp32"), what
    assert not re.search(r"ld\.global\.b(8|16)\b", found.ptx), what  # narrow loads of what should be 16 bytes


def test_usual_variants(capsys) -> None:
    check([report(a, options, arch) for a, options, archs in QUICK for arch in archs], capsys)


@pytest.mark.slow
def test_all_variants(capsys) -> None:
    from musicgen_fast.kernels.linear import VARIANTS

    rows = [report((), vars(v), arch) for v in VARIANTS for arch in ARCHITECTURES if arch == 90 or v.pdl]
    check(rows, capsys)


@pytest.mark.slow
def test_no_kernel_of_the_report_spills() -> None:
    from musicgen_fast.kernels import compile_report

    for name in compile_report.MODULES:
        variants = importlib.import_module(f"musicgen_fast.kernels.{name}").VARIANTS
        assert len(set(map(str, variants))) == len(variants), name  # the table tells them apart
        for variant in variants:
            assert compile_report.compile_variant(variant, 90).spills == 0, str(variant)


@pytest.mark.parametrize("arch", ARCHITECTURES[1:])
@pytest.mark.parametrize(
    ("arguments", "options", "loads"),
    [(QKV, {"summed": 4}, 8), (FFN_OUT, {}, 8), (("norm", 3072, 1024, 16), {}, 8), (QKV, {"dtype": "int8"}, 4)],
)
def test_weights_are_requested_before_the_wait(arguments: tuple, options: dict, loads: int, arch: int) -> None:
    """16 rows of 1024 halves are 8 loads of 16 bytes for each of 256 threads, of bytes 4."""
    found = report(arguments, options | {"pdl": True}, arch)[2]
    kinds = [o.split(".")[0] for o in found.opcodes]
    wait = kinds.index("ACQBULK")
    assert kinds.index("PREEXIT") < wait  # the kernel after this one may begin before this one waits
    assert sum(o.startswith("LDG.E.128") for o in found.opcodes[:wait]) >= loads
    assert "HMMA" not in kinds[:wait] and kinds.index("HMMA") > wait


def test_nothing_is_read_before_the_wait_but_weights() -> None:
    """Of the kernel that closes the residual, which has none."""
    found = report(("close", 0, 1024), {"pdl": True}, 90)[2]
    kinds = [o.split(".")[0] for o in found.opcodes]
    assert "LDG" in kinds and kinds.index("LDG") > kinds.index("ACQBULK")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_many_rows_are_pipelined(arch: int) -> None:
    """cp.async of weights and activations, and no tile staged through registers."""
    assert report(QKV_64, {}, arch)[2].ptx.count("cp.async.cg") >= 12
    assert report(QKV, {}, arch)[2].ptx.count("cp.async") == 0


def statistics_layouts(found: Any) -> list[str]:
    """The layouts of the 1-D sums, of which there are two for each row."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", found.ttgir, re.M))
    return [layouts[name] for name in re.findall(r"\}\) : \(tensor<\d+xf32, (#\w+)>\) -> f32", found.ttgir)]


@pytest.mark.parametrize(
    "arch", (90, pytest.param(80, marks=pytest.mark.slow), pytest.param(120, marks=pytest.mark.slow))
)
@pytest.mark.parametrize("d", (1024, 1536, 2048))
def test_the_statistics_are_summed_alike(d: int, arch: int) -> None:
    """A sum's order is its layout's: the same whoever takes it, or a row's bits would depend on the bucket."""
    kernels = [("norm", 3 * d, d, 1), ("norm", 3 * d, d, 2)] + [("norm", 3 * d, d, 4)] * (d == 1024) + [("close", 0, d)]
    found = [report(kernel, {"normed": normed}, arch)[2] for kernel in kernels for normed in (True, False)]
    layouts = [layout for each in found for layout in statistics_layouts(each)]
    assert len(layouts) == 2 * sum(2 if kernel[0] == "close" else 2 * kernel[3] for kernel in kernels)
    assert len(set(layouts)) == 1, set(layouts)


def test_nothing_is_contracted() -> None:
    """Elementwise code is in two kernels; FMAs of a correctly rounded division and root are in both."""
    found = report(("close", 0, 1024), {}, 90)[2]
    norm = report(QKV, {"summed": 2}, 90)[2]
    assert "fma.rn.f32" not in found.ptx and "fma.rn.f32" not in norm.ptx


def test_resident_ctas() -> None:
    from musicgen_fast.kernels.compile_report import _resident

    assert _resident(32, 0, 4, 90) == 16  # 64 warps
    assert _resident(128, 0, 8, 90) == 2  # 65536 registers
    assert _resident(129, 0, 8, 90) == 1
    assert _resident(32, 99 * 1024, 4, 120) == 1  # 100 KB, one of them the system's
