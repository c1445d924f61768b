"""What the sampler compiles to on GPUs that need not be there: registers, spills, shared memory, SASS instructions.

`python -m musicgen_fast.kernels.compile_report` prints a table. Uses the ptxas and cuobjdump that Triton ships. Not
under TRITON_INTERPRET=1, which leaves nothing to compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .sample import sample_kernel

ARCHITECTURES = (80, 90, 100, 120)


@dataclass(frozen=True)
class Variant:
    """One specialisation of the kernel; `noise`: the variates come from memory instead of Philox."""

    branches: int = 2
    dtype: str = "fp16"
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    noise: bool = False
    column: bool = True
    vocab: int = 2048
    greedy: bool = False
    pdl: bool = False

    def __str__(self) -> str:
        flags = [f.name for f in fields(self) if f.type == "bool" and getattr(self, f.name)]
        return " ".join([f"NB={self.branches} V={self.vocab} {self.dtype}", *flags])


@dataclass(frozen=True)
class Report:
    """Of one cubin; `registers` a thread, `spills` and `shared` in bytes, `ffma` fused multiply-adds in the SASS."""

    registers: int
    spills: int
    shared: int
    instructions: int
    ffma: int


def compile_variant(variant: Variant, arch: int) -> Report:
    """Compiles for sm_`arch`; takes seconds, or nothing where Triton's cache has it."""
    signature, constants, aligned = _arguments(variant)
    source = ASTSource(sample_kernel, signature, constants, aligned)
    warps = 8 if variant.vocab > 2048 else 4
    options = {"num_warps": warps, "enable_fp_fusion": False, "launch_pdl": variant.pdl}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _inspect(compiled.asm["cubin"], compiled.metadata.shared)


def _arguments(variant: Variant) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Signature, constants and divisibility of the arguments as a launch would derive them."""
    draws = not (variant.noise or variant.greedy)
    types = {
        "logits": "*" + variant.dtype, "tokens": "*i64", "status": "*i32", "scale": "*fp32",
        "cfg_coef": "*fp32", "cfg_coef_beta": "*fp32",
        "top_k": "*i32" if variant.top_k else None,
        "top_p": "*fp32" if variant.top_p else None,
        "min_p": "*fp32" if variant.min_p else None,
        "seed": "*i64" if draws else None, "step": "*i64" if draws else None, "stream": "*i64" if draws else None,
        "noise": "*fp32" if variant.noise else None,
        "column": "*i32" if variant.column else None, "frames": "*i32" if variant.column else None,
        "stride_nb": "i32", "stride_b": "i32", "stride_k": "i32", "num_columns": "i32",
    }  # fmt: skip
    block = max(128, triton.next_power_of_2(variant.vocab))
    constants = {name: None for name, kind in types.items() if kind is None}
    constants |= {"V": variant.vocab, "NB": variant.branches, "BLOCK": block}  # type: ignore[dict-item]
    constants |= {"GREEDY": variant.greedy, "PDL": variant.pdl}  # type: ignore[dict-item]
    signature = {name: types.get(name) or "constexpr" for name in sample_kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(sample_kernel.arg_names)
        if signature[name] != "constexpr" and name != "num_columns"
    }
    return signature, constants, aligned


def _inspect(cubin: bytes, shared: int) -> Report:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tool, flag, str(path)], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    return Report(
        registers=numbers["REG"],
        spills=numbers["STACK"] + numbers["LOCAL"],
        shared=shared,
        instructions=sum(opcode != "NOP" for opcode in opcodes),
        ffma=sum(opcode.startswith("FFMA") for opcode in opcodes),
    )


def table(rows: Iterable[tuple[Variant, int, Report]]) -> str:
    """Markdown."""
    lines = ["| variant | sm | registers | spills | shared | SASS | FFMA |", "|---|---|---|---|---|---|---|"]
    for variant, arch, r in rows:
        lines.append(f"| {variant} | {arch} | {r.registers} | {r.spills} | {r.shared} | {r.instructions} | {r.ffma} |")
    return "\n".join(lines)


def main() -> None:
    usual = Variant(top_k=True)
    variants = (
        usual,
        Variant(),
        Variant(top_p=True),
        Variant(top_k=True, top_p=True, min_p=True),
        Variant(greedy=True),
    )
    rows = [(usual, arch, compile_variant(usual, arch)) for arch in ARCHITECTURES]
    rows += [(variant, 90, compile_variant(variant, 90)) for variant in variants[1:]]
    print(table(rows))


if __name__ == "__main__":
    main()
