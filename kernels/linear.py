"""Products of a few rows with the weights of a layer, and the LayerNorm before them, at the memory's speed.

`norm_linear` closes the residual, normalises and multiplies; `linear_parts` multiplies into partial sums, which the
next `norm_linear` adds. Both are twins of the functions in `reference.py`. Any number of rows, any d; weights fp16,
bf16, int8 with a scale per group of columns, or fp32 for exactness. Knows nothing of generation.

**Who computes what.** A CTA owns 16 rows of the weight and a range of K: all of d, or one of P parts. 16 is the M of
mma.m16n8k16 with the weight as its first operand; the batch is its N, so 8 rows cost what 2 do, and small tiles make
many CTAs. Its 4 or 8 warps divide the range: a batched dot [S, 16, K / S] x [S, K / S, rows] gives each warp a slice,
where a plain one would have every warp repeat the whole. CTAs, KB of fp16 weights in each, and how many fit on an SM
of an H100 (`compile_report.py`), for one request with CFG:

    d      qkv         ffn_in      4 heads     out         ffn_out     query of cross-attention
    1024   192 32 3    256 32 3    512 32 3    128 16 8    256 32 4     64 32 3
    1536   288 48 2    384 48 2    512 48 2    288 16 8    288 64 2     96 48 2
    2048   384 64 2    512 64 2    512 64 2    256 32 4    512 64 2    128 64 2

All matrices of d = 1024 but the heads are in flight as a whole; 17 KB per SM keep the memory of an H100 busy.

**What is loaded when.** Up to 16 rows, the weights go to registers by 16-byte loads issued before `gdc_wait`: they
travel while the kernel before this one still runs (nothing writes weights during a step). Then, for 2 rows
(`heuristics.fused_norm`), every CTA closes the residual and takes the statistics itself, in registers: 40 KB from L2
are cheaper than a kernel and its gap. Beyond, `close_kernel` does that with one program per row. Beyond 16 rows
weights and activations come through a loop of cp.async with two stages, and a CTA owns 32 rows of the weight where
that saves reading the activations.

**Why a row's bits do not depend on the batch.** Over K a warp adds k16 steps in ascending order to one accumulator per
output, whatever the tiles are and whether it loops; the warps' sums are folded in a fixed order; the statistics are
1-D over d and laid out alike in both kernels; `enable_fp_fusion=False` keeps the rest from being contracted in one
kernel and not in the other. Columns of the dot never meet, so no row, not even one of NaN, reaches another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .linear_jit import close_kernel, linear_kernel

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "int8"}
TYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}


def norm_linear(
    x: Tensor, parts: Tensor | None, x_out: Tensor | None, stats: Tensor, gamma: Tensor, beta: Tensor,
    weight: Tensor, scales: Tensor | None, out: Tensor, *, gelu: bool = False, pdl: bool = False,
) -> None:  # fmt: skip
    """out = act(LN(x + sum of parts) W^T), the new residual to x_out: see `reference.norm_linear`.

    Everything is contiguous. One kernel or, beyond `heuristics.fused_norm` (2 rows; 4 in small models), two.

    Args:
        stats: scratch. fp32 [R, 2]; or half [R, d], into which the normed rows go. Better for many rows, which are
            then normed once instead of by every CTA, are half the bytes, and travel by cp.async. int8: its dtype is
            what the normed row is rounded to, otherwise that of `out`.
        gelu: the exact GELU before the rounding to the dtype of `out`.
        pdl: programmatic dependent launch (sm_90 and newer), as of the kernel before and the one after.
    """
    rows, width = x.shape
    count = 0 if parts is None else parts.shape[0]
    group = None if scales is None else width // scales.shape[1]
    keeps_rows = stats.shape[1] == width
    half = weight.dtype if scales is None else stats.dtype if keeps_rows else out.dtype
    dtype = NAMES[weight.dtype]
    fused = heuristics.fused_norm(rows, count, width, dtype)
    if not fused:
        close = _close_constants(width, count, group, pdl)
        with torch.cuda.device_of(x):
            close_kernel[(rows,)](
                x, parts, x_out, *((None, stats, gamma, beta) if keeps_rows else (stats, None, None, None)),
                **close, **_options(close),
            )  # fmt: skip
    shape = _constants(weight.shape[0], width, rows, dtype, NAMES[half], group, 1, fused, count, gelu, pdl)
    inputs: tuple[Tensor | None, ...]
    if fused:
        inputs = (x, parts, x_out, None, gamma, beta)
    elif keeps_rows:
        inputs = (stats, None, None, None, None, None)
    else:
        inputs = (x, parts, None, stats, gamma, beta) if x_out is None else (x_out, None, None, stats, gamma, beta)
    _launch(inputs, weight, scales, out, rows, 1, shape)


def linear_parts(a: Tensor, weight: Tensor, scales: Tensor | None, parts: Tensor, *, pdl: bool = False) -> None:
    """a [R, K] times W^T as P sums over the P ranges of K: see `reference.linear_parts`; P is best `heuristics.parts`.

    Everything is contiguous; K / P is a multiple of 16, or of the groups of int8 weights. scales, pdl: as for
    `norm_linear`.
    """
    rows, k = a.shape
    count = parts.shape[0]
    group = None if scales is None else k // scales.shape[1]
    assert k % count == 0 and (k // count) % (group or 1) == 0, (k, count, group)
    dtype, half = NAMES[weight.dtype], NAMES[a.dtype]
    shape = _constants(weight.shape[0], k, rows, dtype, half, group, count, False, 0, False, pdl)
    _launch((a, None, None, None, None, None), weight, scales, parts, rows, count, shape)


def _launch(
    inputs: tuple[Tensor | None, ...], weight: Tensor, scales: Tensor | None, out: Tensor, rows: int, count: int,
    shape: dict[str, Any],
) -> None:  # fmt: skip
    grid = (triton.cdiv(shape["M"], shape["BM"]), triton.cdiv(rows, shape["BN"]), count)
    with torch.cuda.device_of(weight):
        linear_kernel[grid](*inputs, weight, scales, out, rows, **shape, **_options(shape))


def _options(constants: dict[str, Any]) -> dict[str, Any]:
    """What a launch passes besides the arguments."""
    options: dict[str, Any] = {"num_warps": constants["S"], "enable_fp_fusion": False}
    if constants["PDL"]:
        options["launch_pdl"] = True
    if constants.get("FUSED", 0) and constants["PAD"] > 128:
        options["maxnreg"] = 128  # two CTAs per SM; without it d = 1536 takes 130, while 1024 stays below 80 for three
    elif not constants.get("ONE_SHOT", True):
        options["maxnreg"] = 255  # or ptxas spills 8 bytes to fit a sixth CTA
    return options


def _close_constants(d: int, count: int, group: int | None, pdl: bool) -> dict[str, Any]:
    size = heuristics.slice_k(d, group)
    padded = triton.next_power_of_2(size)
    return {"D": d, "P": count, "S": heuristics.slices(d), "SLICE": size, "PAD": padded, "PDL": pdl}


def _constants(
    n: int, k: int, rows: int, dtype: str, half: str, group: int | None, count: int, fused: bool, summed: int,
    gelu: bool, pdl: bool,
) -> dict[str, Any]:  # fmt: skip
    """The constexprs of `linear_kernel`; `count` parts are written, `summed` parts read."""
    width = k // count
    once = heuristics.one_shot(width, rows, dtype)
    size = heuristics.slice_k(width, group)
    padded = triton.next_power_of_2(size)
    block = heuristics.block_k(width, dtype, group, looped=not once)
    return {
        "M": n, "K": k, "WIDTH": width, "S": heuristics.slices(width), "SLICE": size, "GROUP": group or 0,
        "P": summed, "FUSED": rows if fused else 0, "GELU": gelu, "HALF": TYPES[half],
        "BM": heuristics.weight_tile(n, count, rows, dtype), "BN": heuristics.row_tile(rows, dtype), "PAD": padded,
        "BK": padded if fused and group is None else block,  # the rows lie in registers: no blocks of them
        "ONE_SHOT": once, "PDL": pdl,
    }  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One specialisation for `compile_report`: kind "norm" or "parts" (which launch `linear_kernel`), or "close".

    summed: parts that "norm" and "close" read. normed: the normed rows have a scratch, instead of the statistics.
    """

    kind: str
    n: int
    k: int
    rows: int = 2
    dtype: str = "fp16"
    summed: int = 2
    normed: bool = True
    gelu: bool = False
    pdl: bool = False
    group: int = 128

    def __str__(self) -> str:
        what = f"{self.kind} {self.n}x{self.k}" if self.kind != "close" else f"close {self.k}"
        flags = [name for name in ("gelu", "pdl") if getattr(self, name)] + ["stats"] * (not self.normed)
        return " ".join([f"{what} R={self.rows} {self.dtype}", *flags])

    def arguments(self) -> tuple[Any, dict[str, str | None], dict[str, Any], dict[str, Any]]:
        half = "fp16" if self.dtype == "int8" else self.dtype
        group = self.group if self.dtype == "int8" else None
        fp32, summed = "*fp32", "*fp32" if self.summed else None
        if self.kind == "close":
            constants = _close_constants(self.k, self.summed, group, self.pdl)
            types = {"x": fp32, "parts": summed, "x_out": fp32, "stats": None if self.normed else fp32}
            types |= dict.fromkeys(("gamma", "beta"), fp32 if self.normed else None)
            types["normed"] = "*" + half if self.normed else None
            return close_kernel, types, constants, _options(constants)
        norm = self.kind == "norm"
        count = 1 if norm else heuristics.parts(self.n, self.k)
        fused = norm and heuristics.fused_norm(self.rows, self.summed, self.k, self.dtype)
        inside = norm and (fused or not self.normed)  # the kernel norms
        constants = _constants(self.n, self.k, self.rows, self.dtype, half, group, count, fused,
                               self.summed if fused else 0, self.gelu, self.pdl)  # fmt: skip
        types = {
            "a": fp32 if inside else "*" + half, "parts": summed if fused else None, "x_out": fp32 if fused else None,
            "stats": fp32 if inside and not fused else None, "gamma": fp32 if inside else None,
            "beta": fp32 if inside else None, "weight": "*i8" if group else "*" + half,
            "scales": fp32 if group else None, "out": "*" + half if norm else fp32, "rows": "i32",
        }  # fmt: skip
        return linear_kernel, types, constants, _options(constants)


def _variants() -> tuple[Variant, ...]:
    """qkv, ffn_in, out, ffn_out and heads at the released sizes for one request, then other rows and dtypes."""
    found = []
    for d in (1024, 1536, 2048):
        found += [
            Variant("norm", 3 * d, d, summed=heuristics.parts(d, 4 * d), pdl=True),
            Variant("norm", 4 * d, d, summed=heuristics.parts(d, d), gelu=True, pdl=True),
            Variant("parts", d, d, pdl=True), Variant("parts", d, 4 * d, pdl=True),
            Variant("norm", 8192, d, summed=heuristics.parts(d, 4 * d), pdl=True),
        ]  # fmt: skip
        found += [Variant(kind, n, k, rows) for rows in (4, 8, 16, 64)
                  for kind, n, k in (("norm", 3 * d, d), ("parts", d, d), ("parts", d, 4 * d))]  # fmt: skip
        found += [Variant("norm", 3 * d, d, rows, dtype) for rows in (2, 16) for dtype in ("bf16", "int8", "fp32")]
        found += [Variant("parts", d, 4 * d, 2, dtype) for dtype in ("bf16", "int8", "fp32")]
        found += [Variant("norm", 3 * d, d, rows, normed=False) for rows in (8, 64)]
        found += [Variant("close", 0, d, normed=normed) for normed in (True, False)]
    return tuple(found)


VARIANTS = _variants()
