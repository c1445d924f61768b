"""The kernels of a step that read caches, texts and tables, compiled for GPUs that need not be there.

No spills, bounded registers, loads of 16 bytes, and with `pdl` the cache asked for before the wait. The ceilings are
about a fifth above what Triton 3.9 gives; the tests print the table.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from typing import Any

import pytest

from .test_triton_compile import TOP_K

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"),
]

ALL = (80, 90, 100, 120)
# Kernel -> ceilings of registers a thread and SASS instructions. Two CTAs of every kernel fit on an SM, or more, but
# for `absorbed_scores` in bf16, of which there are no more than heads.
CEILINGS = {
    "attention": (160, 1350), "attention int8": (240, 1800), "cross_attention": (80, 1150),
    "absorbed_scores": (255, 2600), "absorbed_output": (200, 1400), "embed": (64, 460), "advance": (48, 300),
}  # fmt: skip


def ceilings(variant: Any) -> tuple[int, int]:
    name = str(variant).split()[0]
    return CEILINGS[name + " int8" * (getattr(variant, "cache", "") == "int8")]


def check(cases: list[tuple[Any, int]], capsys: pytest.CaptureFixture[str]) -> None:
    from musicgen_fast.kernels.compile_report import compile_variant, table

    rows = [(variant, arch, compile_variant(variant, arch)) for variant, arch in cases]
    with capsys.disabled():
        print("\n" + table(rows))
    for variant, arch, report in rows:
        registers, instructions = ceilings(variant)
        what = f"{variant} sm_{arch}: {report}"
        assert report.spills == 0, what
        assert 0 < report.registers <= registers and 0 < report.instructions <= instructions, what


def test_usual_variants(capsys) -> None:
    from musicgen_fast.kernels import attention, cross, embed

    cases: list[tuple[Any, int]] = [(attention.VARIANTS[0], arch) for arch in ALL]
    cases += [(attention.Variant(cache="int8"), 90), (embed.Variant(), 90), (embed.Variant("advance"), 90)]
    cases += [(cross.Variant(kernel), 90) for kernel in ("cross_attention", "absorbed_scores", "absorbed_output")]
    check(cases, capsys)


@pytest.mark.slow
def test_other_variants(capsys) -> None:
    from musicgen_fast.kernels import attention, cross, embed

    variants = [
        *(v for module in (attention, cross, embed) for v in module.VARIANTS),
        *(attention.Variant(dtype, cache, heads)
          for dtype, heads in (("fp16", 24), ("bf16", 32)) for cache in ("", "int8")),
        attention.Variant(cache="int8", dtype="fp32"),
        attention.Variant(head_dim=128),
        *(cross.Variant(kernel, dtype, parts=4, texts=16)
          for kernel in ("cross_attention", "absorbed_scores", "absorbed_output") for dtype in ("fp32", "bf16")),
    ]  # fmt: skip
    check([(v, arch) for v in variants for arch in ALL if not (v.pdl and arch == 80)], capsys)


CACHES = [("fp16", "", 16), ("bf16", "", 16), ("fp16", "int8", 8), ("fp32", "", 16)]


@pytest.mark.parametrize("dtype,cache,vectors", CACHES)
@pytest.mark.parametrize("arch", [80, 90])
def test_keys_and_values_are_loaded_16_bytes_at_a_time(dtype: str, cache: str, vectors: int, arch: int) -> None:
    """`vectors` a thread hold a split's keys and values. Otherwise: length, slot, the row's own q, k, v and scales."""
    from musicgen_fast.kernels.attention import Variant
    from musicgen_fast.kernels.compile_report import compile_variant

    ptx = compile_variant(Variant(dtype, cache), arch).ptx
    loads = re.findall(r"ld\.global(?!\.cg)\.(\w+)", ptx)
    assert loads.count("v4") >= vectors and loads.count("v2") == 0, loads
    assert len(loads) - loads.count("v4") <= 2 + 3 + 2 * bool(cache), loads


# module, options, loads of 16 bytes a thread: a split's keys and values, a text's, a tile of folded keys, of outputs
EARLY = [
    ("attention", {}, 16),
    ("attention", {"cache": "int8"}, 8),
    ("cross", {"kernel": "cross_attention"}, 8),
    ("cross", {"kernel": "absorbed_scores", "heads": 16, "parts": 4}, 16),
    ("cross", {"kernel": "absorbed_scores", "heads": 24, "parts": 4}, 16),
    ("cross", {"kernel": "absorbed_output"}, 8),
]


@pytest.mark.parametrize("module,options,vectors", EARLY)
def test_caches_are_asked_for_at_once_and_before_the_wait(module: str, options: dict[str, Any], vectors: int) -> None:
    from musicgen_fast.kernels.compile_report import compile_variant

    kernels = importlib.import_module(f"musicgen_fast.kernels.{module}")
    opcodes = compile_variant(kernels.Variant(**options, pdl=True), 90).opcodes
    loads = [i for i, opcode in enumerate(opcodes) if re.fullmatch(r"LDG\.E(\.\w+)*\.128(\.CONSTANT)?", opcode)]
    wait = next(i for i, opcode in enumerate(opcodes) if opcode == "ACQBULK" and i > loads[0])
    assert sum(i < wait for i in loads) == vectors
    assert "PREEXIT" in opcodes[:wait]  # the next kernel may start, and ask for its weights
    assert not any(opcode.startswith(("SHFL", "BAR")) for opcode in opcodes[loads[0] : wait])


def test_the_last_split_to_arrive_sees_the_others() -> None:
    """A counter with acquire and release for the whole device, behind a barrier; partial results read from L2."""
    from musicgen_fast.kernels.attention import Variant
    from musicgen_fast.kernels.compile_report import compile_variant

    ptx = compile_variant(Variant(), 90).ptx
    before, counter, after = re.split(r"(atom\.global\S*)", ptx)
    assert counter.startswith("atom.global.gpu.acq_rel.add")
    stores, barriers = before.rfind("st.global"), before.rfind("bar.sync")
    assert 0 < stores < barriers
    assert "ld.global.cg" in after and "ld.global.cg" not in before


def test_sample_rows_costs_what_sample_column_costs() -> None:
    from musicgen_fast.kernels.compile_report import Variant, compile_variant

    for arch in (80, 90):
        column, rows = (compile_variant(Variant(top_k=True, rows=rows), arch) for rows in (False, True))
        assert rows.spills == 0 and rows.registers <= TOP_K[0] and rows.instructions <= TOP_K[1], rows
        assert rows.ffma == column.ffma  # none but in the first guess: the bits are those of `sample_column`
