"""Attention to a row's text in Triton: over its keys and values, or with the projections folded into them.

A row without a text (a null branch) gets zeros and costs next to nothing. Every program walks one row's own text, so
no row's numbers depend on another's. d / H up to 128; texts of any length, folded ones up to 256 positions (beyond 64
folding reads more than the projections that it saves). What is read before the wait: see attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .heuristics import slice_k, slices
from .linear_jit import _columns, _residual_row
from .race import round_to

BLOCK_T = 64  # positions of a text at a time: almost every text is shorter
TILE = 4096  # elements of folded keys that a warp asks for at once: 64 registers a thread
OUTPUTS, PAIRS = 32, 256  # of one program of `absorbed_output`: columns, and (head, position) pairs at once
LOG2E = tl.constexpr(1.4426950408889634)


def cross_attention(
    q: Tensor, texts: Tensor, text_slot: Tensor, text_length: Tensor, out: Tensor, *, pdl: bool = False
) -> None:
    """Attend to a row's text: q half [R, d], texts half [2, slots, H, T, d / H] (slots contiguous), out half [R, d].

    text_slot, text_length: int32 [R]; zeros come out where the length is 0, as of a null branch. pdl: as for
    `norm_linear`.
    """
    _, _, heads, _, head_dim = texts.shape
    assert texts[0, 0].is_contiguous()
    options = {"launch_pdl": True} if pdl else {}
    with torch.cuda.device_of(q):
        cross_kernel[(q.shape[0], heads)](
            q, texts, text_slot, text_length, out,
            *texts.stride()[:3], head_dim**-0.5 * LOG2E.value,
            H=heads, DH=head_dim, D=triton.next_power_of_2(head_dim), BLOCK=BLOCK_T, PDL=pdl,
            num_warps=4,
            enable_fp_fusion=True,
            **options,
        )  # fmt: skip


@triton.jit
def cross_kernel(
    q, texts, text_slot, text_length, out,
    stride_kv, stride_slot, stride_head,
    factor,
    H: tl.constexpr,
    DH: tl.constexpr,
    D: tl.constexpr,  # the power of two that holds DH
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    d = tl.arange(0, D)
    own = row.to(tl.int64) * (H * DH) + head * DH + d
    size = tl.load(text_length + row)
    if size <= 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        tl.store(out + own, tl.zeros([D], out.dtype.element_ty), mask=d < DH)
        return
    place = tl.maximum(tl.load(text_slot + row), 0).to(tl.int64)
    keys = texts + place * stride_slot + head.to(tl.int64) * stride_head
    at = tl.arange(0, BLOCK)
    k, v = _text(keys, stride_kv, at, d, size, DH, D)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(q + own, mask=d < DH, other=0.0).to(tl.float32) * factor
    s = tl.where(at < size, tl.sum(k.to(tl.float32) * x[None, :], 1), -float("inf"))
    m = tl.max(s, 0)
    p = tl.exp2(s - m)
    total = tl.sum(p, 0)
    a = tl.sum(p[:, None] * v.to(tl.float32), 0)
    for first in range(BLOCK, size, BLOCK):
        k, v = _text(keys, stride_kv, first + at, d, size, DH, D)
        s = tl.where(first + at < size, tl.sum(k.to(tl.float32) * x[None, :], 1), -float("inf"))
        top = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - top)
        shrink = tl.exp2(m - top)
        total = total * shrink + tl.sum(p, 0)
        a = a * shrink + tl.sum(p[:, None] * v.to(tl.float32), 0)
        m = top
    tl.store(out + own, (a / total).to(out.dtype.element_ty), mask=d < DH)


@triton.jit
def _text(keys, stride_kv, at, d, size, DH: tl.constexpr, D: tl.constexpr):
    """Keys and values [BLOCK, D] of the positions `at`, zeros beyond the text."""
    inside = at[:, None] < size
    if D != DH:
        inside = inside & (d[None, :] < DH)
    where = at[:, None] * DH + d[None, :]
    k = tl.load(keys + where, mask=inside, other=0.0)
    v = tl.load(keys + stride_kv + where, mask=inside, other=0.0)
    return k, v


def absorbed_scores(
    x: Tensor, parts: Tensor | None, x_out: Tensor, gamma: Tensor, beta: Tensor, to_scores: Tensor,
    text_slot: Tensor, text_length: Tensor, weights: Tensor, *, pdl: bool = False,
) -> None:  # fmt: skip
    """`norm_linear` and the softmax of `cross_attention` where the query projection is folded into the text's keys.

    scores = (h Wq) K^T = h (Wq K^T): to_scores half [slots, H, T, d], slots contiguous, the scale 1 / sqrt(d / H)
    included. x, parts, x_out (not x), gamma, beta as in `norm_linear`; text_slot, text_length: int32 [R]; weights fp32
    [R, H, T], written: zeros beyond the text and without one. pdl: as for `norm_linear`.
    """
    rows, width = x.shape
    _, heads, positions, _ = to_scores.shape
    assert to_scores[0].is_contiguous() and weights.is_contiguous()
    options = {"launch_pdl": True} if pdl else {}
    with torch.cuda.device_of(x):
        scores_kernel[(rows, heads)](
            x, parts, x_out, gamma, beta, to_scores, text_slot, text_length, weights, to_scores.stride(0),
            H=heads, T=positions, D=width, P=0 if parts is None else parts.shape[0], **tiles(width, positions), PDL=pdl,
            num_warps=slices(width),  # as wherever a row is normed: its bits depend on the layout of the sums
            enable_fp_fusion=False,
            **options,
        )  # fmt: skip


def tiles(width: int, positions: int) -> dict[str, int]:
    """How a row of `width` is laid out, as in linear.py, and folded keys [positions, width] are cut into tiles."""
    pad = triton.next_power_of_2(slice_k(width))
    tile = max(1, min(triton.next_power_of_2(positions), TILE // pad))
    count = triton.next_power_of_2(triton.cdiv(positions, tile))
    return {"S": slices(width), "SLICE": slice_k(width), "PAD": pad, "BT": tile, "TILES": count}


@triton.jit
def scores_kernel(
    x, parts, x_out, gamma, beta, to_scores, text_slot, text_length, weights,
    stride_slot,
    H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    S: tl.constexpr, SLICE: tl.constexpr, PAD: tl.constexpr,  # how linear.py lays a row out
    BT: tl.constexpr, TILES: tl.constexpr,  # positions of a tile, tiles
    PDL: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i, t = tl.arange(0, TILES), tl.arange(0, BT)
    d, inside = _columns(D, S, SLICE, PAD)
    at = i[:, None] * BT + t[None, :]
    to = weights + (row.to(tl.int64) * H + head) * T + at
    size = tl.load(text_length + row)
    if (size <= 0) & (head > 0):
        if PDL:
            tl.extra.cuda.gdc_wait()
        tl.store(to, tl.zeros([TILES, BT], tl.float32), mask=at < T)
        return
    place = tl.maximum(tl.load(text_slot + row), 0).to(tl.int64)
    keys = to_scores + place * stride_slot + head * (T * D)
    k = _folded(keys, t, size, D, S, SLICE, PAD)
    g = tl.load(gamma + d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(beta + d, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    new, mean, rstd = _residual_row(x, parts, row, tl.num_programs(0), D, P, S, SLICE, PAD)
    if head == 0:
        tl.store(x_out + row.to(tl.int64) * D + d, new, mask=inside)
    h = round_to((new - mean) * rstd * g + b, to_scores.dtype.element_ty)
    s = tl.zeros([TILES, BT], tl.float32) + tl.sum(k.to(tl.float32) * h[None, :], 1)[None, :]
    for n in range(1, tl.cdiv(size, BT)):
        k = _folded(keys, n * BT + t, size, D, S, SLICE, PAD)
        s = tl.where(i[:, None] == n, tl.sum(k.to(tl.float32) * h[None, :], 1)[None, :], s)
    s = tl.where(at < size, s, -float("inf"))
    p = tl.exp2((s - tl.max(tl.max(s, 1), 0)) * LOG2E)
    p = tl.where(at < size, p / tl.sum(tl.sum(p, 1), 0), 0.0)
    tl.store(to, p, mask=at < T)


@triton.jit
def _folded(keys, t, size, D: tl.constexpr, S: tl.constexpr, SLICE: tl.constexpr, PAD: tl.constexpr):
    """[BT, S * PAD]: the folded keys of the positions t, zeros beyond the text; columns as in `_columns`."""
    j = tl.arange(0, S * PAD)
    d = j // PAD * SLICE + j % PAD  # without its hint, which would halve the loads to 8 bytes
    inside = (j % PAD < SLICE) & (d < D)
    return tl.load(keys + t[:, None] * D + d[None, :], mask=(t[:, None] < size) & inside[None, :], other=0.0)


def absorbed_output(
    weights: Tensor, to_output: Tensor, text_slot: Tensor, text_length: Tensor, parts: Tensor, *, pdl: bool = False
) -> None:
    """(p V) Wo = p (V Wo): weights fp32 [R, H, T], to_output half [slots, H, T, d], slots contiguous; parts fp32
    [1, R, d], zeros without a text. text_slot, text_length: int32 [R]. pdl: as for `norm_linear`."""
    rows, heads, positions = weights.shape
    width = to_output.shape[3]
    assert to_output[0].is_contiguous() and weights.is_contiguous() and parts.is_contiguous()
    options = {"launch_pdl": True} if pdl else {}
    with torch.cuda.device_of(weights):
        output_kernel[(rows, triton.cdiv(width, OUTPUTS))](
            weights, to_output, text_slot, text_length, parts, to_output.stride(0),
            H=heads, T=positions, D=width, BD=OUTPUTS, BJ=PAIRS, PDL=pdl,
            num_warps=4,
            enable_fp_fusion=True,
            **options,
        )  # fmt: skip


@triton.jit
def output_kernel(
    weights, to_output, text_slot, text_length, parts,
    stride_slot,
    H: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BJ: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    to = parts + row.to(tl.int64) * D + d
    size = tl.load(text_length + row)
    if size <= 0:
        if PDL:
            tl.extra.cuda.gdc_wait()
        tl.store(to, tl.zeros([BD], tl.float32), mask=d < D)
        return
    place = tl.maximum(tl.load(text_slot + row), 0).to(tl.int64)
    values, p = to_output + place * stride_slot, weights + row.to(tl.int64) * (H * T)
    j = tl.arange(0, BJ)  # numbers the pairs of a head and a position inside the text
    v = _outputs(values, j, d, size, H, T, D)
    if PDL:
        tl.extra.cuda.gdc_wait()
    w = tl.load(p + _pair(j, size, T), mask=j < H * size, other=0.0)
    a = v.to(tl.float32) * w[:, None]
    for first in range(BJ, H * size, BJ):
        v = _outputs(values, first + j, d, size, H, T, D)
        w = tl.load(p + _pair(first + j, size, T), mask=first + j < H * size, other=0.0)
        a += v.to(tl.float32) * w[:, None]
    tl.store(to, tl.sum(a, 0), mask=d < D)


@triton.jit
def _outputs(values, j, d, size, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr):
    """[BJ, BD]: the folded values of the pairs j, zeros beyond the last one."""
    at = _pair(j, size, T)[:, None] * D + d[None, :]
    return tl.load(values + at, mask=(j[:, None] < H * size) & (d[None, :] < D), other=0.0)


@triton.jit
def _pair(j, size, T: tl.constexpr):
    """Where pair j, of head j // size and position j % size, stands in [H, T]."""
    return (j // size) * T + j % size


@dataclass(frozen=True)
class Variant:
    """One specialisation of the kernel named so, for compile_report.py; `texts`: positions of a text's slot."""

    kernel: str = "cross_attention"
    dtype: str = "fp16"
    heads: int = 16
    head_dim: int = 64
    texts: int = 64
    parts: int = 0
    pdl: bool = False

    def __str__(self) -> str:
        size = f"H={self.heads} d/H={self.head_dim} {self.dtype}"
        return f"{self.kernel} {size}" + f" P={self.parts}" * bool(self.parts) + " pdl" * self.pdl

    def arguments(self) -> tuple[Any, dict[str, str | None], dict[str, Any], dict[str, Any]]:
        half, width, scores = "*" + self.dtype, self.heads * self.head_dim, self.kernel == "absorbed_scores"
        types: dict[str, str | None] = {"text_slot": "*i32", "text_length": "*i32", "stride_slot": "i32"}
        constants: dict[str, Any] = {"H": self.heads, "PDL": self.pdl}
        options = {"num_warps": slices(width) if scores else 4, "enable_fp_fusion": not scores, "launch_pdl": self.pdl}
        if self.kernel == "cross_attention":
            types |= {"q": half, "texts": half, "out": half, "stride_kv": "i32", "stride_head": "i32", "factor": "fp32"}
            constants |= {"DH": self.head_dim, "D": triton.next_power_of_2(self.head_dim), "BLOCK": BLOCK_T}
            return cross_kernel, types, constants, options
        constants |= {"T": self.texts, "D": width}
        types |= {"weights": "*fp32", "parts": "*fp32" if self.parts or not scores else None}
        if scores:
            types |= {"x": "*fp32", "x_out": "*fp32", "gamma": half, "beta": half, "to_scores": half}
            constants |= {"P": self.parts, **tiles(width, self.texts)}
            return scores_kernel, types, constants, options
        return output_kernel, types | {"to_output": half}, constants | {"BD": OUTPUTS, "BJ": PAIRS}, options


VARIANTS = (
    Variant(),
    Variant(dtype="bf16", heads=32, pdl=True),
    *(Variant("absorbed_scores", heads=heads, parts=4, pdl=True) for heads in (16, 24, 32)),
    Variant("absorbed_scores", "bf16", parts=0),
    Variant("absorbed_output", pdl=True),
    Variant("absorbed_output", "bf16", heads=32),
)
