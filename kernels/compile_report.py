"""What the kernels compile to on GPUs that need not be there: registers, spills, shared memory, PTX and SASS.

`python -m musicgen_fast.kernels.compile_report` prints a table of all kernels. Uses the ptxas and cuobjdump that Triton
ships. Not under TRITON_INTERPRET=1, which leaves nothing to compile.

A kernel's module lists what it compiles to as `VARIANTS`, a tuple of `Specialisation`s: small frozen dataclasses with a
`__str__` (the name in the table) and `arguments()`. A module whose name is added to `MODULES` is in the report.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .sample import sample_kernel

ARCHITECTURES = (80, 90, 100, 120)

# Modules of this package with VARIANTS, in the table's order; the sampler's stand below.
MODULES = ("linear", "attention", "cross", "embed")

# sm -> shared memory of an SM in KB, warps that it holds
SM = {80: (164, 64), 90: (228, 64), 100: (228, 64), 120: (100, 48)}


class Specialisation(Protocol):
    def arguments(self) -> tuple[Any, dict[str, str | None], dict[str, Any], dict[str, Any]]:
        """What a launch would pass: (kernel, types, constants, options).

        types: of every argument that is no constexpr, "*fp16", "*fp32", "*i8", "*i32", "*i64", "i32" ...; None where
        None is passed. Pointers and integers count as divisible by 16, but those under `do_not_specialize`.
        constants: the constexprs. options: num_warps, num_stages, enable_fp_fusion, launch_pdl.
        """


@dataclass(frozen=True)
class Variant:
    """One specialisation of the sampler; `noise`: the variates come from memory instead of Philox.

    `rows`: `sample_rows`, for requests that name their rows.
    """

    branches: int = 2
    dtype: str = "fp16"
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    noise: bool = False
    column: bool = True
    vocab: int = 2048
    greedy: bool = False
    rows: bool = False
    pdl: bool = False

    def __str__(self) -> str:
        flags = [f.name for f in fields(self) if f.type == "bool" and getattr(self, f.name)]
        return " ".join([f"sample NB={self.branches} V={self.vocab} {self.dtype}", *flags])

    def arguments(self) -> tuple[Any, dict[str, str | None], dict[str, Any], dict[str, Any]]:
        draws = not (self.noise or self.greedy)
        types = {
            "logits": "*" + self.dtype, "tokens": "*i64", "status": "*i32", "scale": "*fp32",
            "cfg_coef": "*fp32", "cfg_coef_beta": "*fp32",
            "top_k": "*i32" if self.top_k else None,
            "top_p": "*fp32" if self.top_p else None,
            "min_p": "*fp32" if self.min_p else None,
            "seed": "*i64" if draws else None, "step": "*i64" if draws else None, "stream": "*i64" if draws else None,
            "noise": "*fp32" if self.noise else None,
            "column": "*i32" if self.column else None, "frames": "*i32" if self.column else None,
            "request": "*i32" if self.rows else None, "branches": "*i32" if self.rows else None,
            "stride_nb": "i32", "stride_b": "i32", "stride_k": "i32", "num_columns": "i32",
        }  # fmt: skip
        block = max(128, triton.next_power_of_2(self.vocab))
        constants = {"V": self.vocab, "NB": self.branches, "BLOCK": block, "GREEDY": self.greedy, "PDL": self.pdl}
        warps = 8 if self.vocab > 2048 else 4
        return sample_kernel, types, constants, {
            "num_warps": warps, "enable_fp_fusion": False, "launch_pdl": self.pdl
        }  # fmt: skip


USUAL = Variant(top_k=True)
VARIANTS = (
    USUAL,
    Variant(),
    Variant(top_p=True),
    Variant(top_k=True, top_p=True, min_p=True),
    Variant(greedy=True),
    Variant(top_k=True, rows=True),
)


@dataclass(frozen=True)
class Report:
    """Of one cubin; `registers` a thread, `spills` and `shared` in bytes, `ffma` fused multiply-adds in the SASS.

    `ctas`: that fit on one SM. `ttgir`, `ptx`: the texts. `opcodes`: the SASS in order, "LDG.E.128" and so on.
    """

    registers: int
    spills: int
    shared: int
    instructions: int
    ffma: int
    ctas: int
    ttgir: str = field(repr=False)
    ptx: str = field(repr=False)
    opcodes: tuple[str, ...] = field(repr=False)

    def count(self, opcode: str) -> int:
        """SASS instructions that begin so."""
        return sum(o.startswith(opcode) for o in self.opcodes)


def compile_variant(variant: Specialisation, arch: int) -> Report:
    """Compiles for sm_`arch`; takes seconds, or nothing where Triton's cache has it."""
    kernel, types, constants, options = variant.arguments()
    signature, constants, aligned = _specialised(kernel, types, constants)
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _inspect(compiled.asm, compiled.metadata, arch)


def supported(variant: Any, arch: int) -> Any:
    """The variant without programmatic dependent launch where the architecture has none."""
    return replace(variant, pdl=False) if arch < 90 and variant.pdl else variant


def _specialised(
    kernel: Any, types: dict[str, str | None], constants: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and divisibility of the arguments as a launch would derive them."""
    named = set(types) | set(constants)
    assert named == set(kernel.arg_names), named ^ set(kernel.arg_names)
    constants = {name: None for name, kind in types.items() if kind is None} | constants
    signature = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, param) in enumerate(zip(kernel.arg_names, kernel.params, strict=True))
        if signature[name] != "constexpr" and not param.do_not_specialize
    }
    return signature, constants, aligned


def _inspect(asm: Any, metadata: Any, arch: int) -> Report:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        usage, sass = (
            subprocess.run([tool, flag, str(path)], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    return Report(
        registers=numbers["REG"],
        spills=numbers["STACK"] + numbers["LOCAL"],
        shared=metadata.shared,
        instructions=sum(opcode != "NOP" for opcode in opcodes),
        ffma=sum(opcode.startswith("FFMA") for opcode in opcodes),
        ctas=_resident(numbers["REG"], metadata.shared, metadata.num_warps, arch),
        ttgir=asm["ttgir"],
        ptx=asm["ptx"],
        opcodes=tuple(opcodes),
    )


def _resident(registers: int, shared: int, warps: int, arch: int) -> int:
    """CTAs per SM by registers (65536, given out by 8 a thread), shared memory (1 KB of its own each) and warps."""
    memory, most_warps = SM[arch]
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, memory * 1024 // (shared + 1024), most_warps // warps, 32)


def table(rows: Iterable[tuple[Specialisation, int, Report]]) -> str:
    """Markdown."""
    lines = [
        "| variant | sm | registers | spills | shared | CTAs/SM | SASS | FFMA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, arch, r in rows:
        lines.append(
            f"| {variant} | {arch} | {r.registers} | {r.spills} | {r.shared} | {r.ctas} | {r.instructions} | {r.ffma} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Each module's first variant on every architecture, the others on sm_90."""
    lists = [VARIANTS, *(importlib.import_module(f".{name}", __package__).VARIANTS for name in MODULES)]
    rows = []
    for usual, *others in lists:
        rows += [(supported(usual, arch), arch) for arch in ARCHITECTURES]
        rows += [(variant, 90) for variant in others]
    print(table((variant, arch, compile_variant(variant, arch)) for variant, arch in rows))


if __name__ == "__main__":
    main()
