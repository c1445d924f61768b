"""The first and the last kernel of a decoding step in Triton: what goes into the first layer, and the counters.

`embed` sums the K embeddings of a column in the order of the codebooks, bit for bit like the definition in torch;
`advance` counts. Any R, Q, K and d.

`embed` also parts the steps: it starts only when everything before it has ended, whatever `pdl` says. So a kernel of
the step may read what the last step wrote (caches, lengths, slots) before its wait, also in a graph of several steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def embed(
    sequence: Tensor, request: Tensor, fed: Tensor, length: Tensor, table: Tensor, positions: Tensor, x: Tensor,
    *, pdl: bool = False,
) -> None:  # fmt: skip
    """The input of the first layer: the embeddings of a column's K tokens, summed in order in fp32, plus the position.

    Args:
        sequence: int64 [N, K, S]. request: int32 [R], a row's place in it. fed: int32 [R], the column it reads.
        length: int32 [R], the row's position; negative: the row takes no part.
        table: half [K * (V + 1), d]; codebook k begins at row k * (V + 1). positions: fp32 [C, d].
        x: fp32 [R, d], written; zeros in rows without a length. pdl: as for `norm_linear`.
    """
    _, num_codebooks, columns = sequence.shape
    width = table.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    assert sequence.is_contiguous() and table.is_contiguous() and positions.is_contiguous() and x.is_contiguous()
    with torch.cuda.device_of(x):
        embed_kernel[(x.shape[0], triton.cdiv(width, block))](
            sequence, request, fed, length, table, positions, x, columns,
            K=num_codebooks, EACH=table.shape[0] // num_codebooks, D=width, BLOCK=block, PDL=pdl,
            num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["columns"])
def embed_kernel(
    sequence, request, fed, length, table, positions, x, columns,
    K: tl.constexpr,
    EACH: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    to = x + row.to(tl.int64) * D + d
    at = tl.load(length + row)
    if at < 0:
        tl.store(to, tl.zeros([BLOCK], tl.float32), mask=d < D)
        return
    n = tl.maximum(tl.load(request + row), 0).to(tl.int64)
    cells = sequence + n * K * columns + tl.maximum(tl.load(fed + row), 0)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        token = k * EACH + tl.maximum(tl.load(cells + k * columns.to(tl.int64)), 0)
        e = tl.load(table + token * D + d, mask=d < D, other=0.0).to(tl.float32)
        total = e if k == 0 else total + e
    place = positions + at.to(tl.int64) * D + d
    tl.store(to, total + tl.load(place, mask=d < D, other=0.0), mask=d < D)


def advance(fed: Tensor, length: Tensor, request: Tensor, column: Tensor, step: Tensor, *, pdl: bool = False) -> None:
    """Count a step: fed and length int32 [R] of the rows that take part; column int32 [N] and step int64 [N] of the
    places `request` int32 [Q] that drew; negative: none. pdl: as for `norm_linear`."""
    rows, requests = len(length), len(request)
    options = {"launch_pdl": True} if pdl else {}
    with torch.cuda.device_of(length):
        advance_kernel[(1,)](
            fed, length, request, column, step, rows, requests,
            BLOCK_R=triton.next_power_of_2(rows), BLOCK_Q=triton.next_power_of_2(requests), PDL=pdl,
            num_warps=1,
            enable_fp_fusion=False,
            **options,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "requests"])
def advance_kernel(
    fed, length, request, column, step, rows, requests,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    r = tl.arange(0, BLOCK_R)
    at = tl.load(length + r, mask=r < rows, other=-1)
    read = tl.load(fed + r, mask=at >= 0, other=0)
    tl.store(length + r, at + 1, mask=at >= 0)
    tl.store(fed + r, read + 1, mask=at >= 0)
    q = tl.arange(0, BLOCK_Q)
    n = tl.load(request + q, mask=q < requests, other=-1)
    one = tl.full([BLOCK_Q], 1, tl.int32)
    # Sums of whole numbers: a request that stood here twice would be counted twice, as by index_add_.
    tl.atomic_add(column + n, one, mask=n >= 0, sem="relaxed")
    tl.atomic_add(step + n, one.to(tl.int64), mask=n >= 0, sem="relaxed")


@dataclass(frozen=True)
class Variant:
    """One specialisation of the kernel named so, for compile_report.py; `rows` of `advance`."""

    kernel: str = "embed"
    dtype: str = "fp16"
    width: int = 1024
    num_codebooks: int = 4
    rows: int = 2
    pdl: bool = False

    def __str__(self) -> str:
        size = f"d={self.width} K={self.num_codebooks} {self.dtype}" if self.kernel == "embed" else f"R={self.rows}"
        return f"{self.kernel} {size}" + " pdl" * self.pdl

    def arguments(self) -> tuple[Any, dict[str, str | None], dict[str, Any], dict[str, Any]]:
        types: dict[str, str | None] = {"fed": "*i32", "length": "*i32", "request": "*i32"}
        if self.kernel == "advance":
            types |= {"column": "*i32", "step": "*i64", "rows": "i32", "requests": "i32"}
            constants = {"BLOCK_R": self.rows, "BLOCK_Q": max(1, self.rows // 2), "PDL": self.pdl}
            options = {"num_warps": 1, "enable_fp_fusion": False, "launch_pdl": self.pdl}
            return advance_kernel, types, constants, options
        types |= {"sequence": "*i64", "table": "*" + self.dtype, "positions": "*fp32", "x": "*fp32", "columns": "i32"}
        constants = {"K": self.num_codebooks, "EACH": 2049, "D": self.width, "BLOCK": 1024, "PDL": self.pdl}
        return embed_kernel, types, constants, {"num_warps": 4, "enable_fp_fusion": False}


VARIANTS = (
    Variant(),
    Variant(dtype="bf16", width=1536, num_codebooks=8, pdl=True),
    Variant("advance"),
    Variant("advance", rows=256, pdl=True),
)
