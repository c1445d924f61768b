"""One query per row against its cached keys and values, as one Triton kernel: append, attend, combine the splits.

A split is 128 positions of one head of one row, whatever the batch, so that a row's numbers never depend on who shares
it. Splits beyond a row's length leave at once; the last one to arrive combines them all, always in the same order.
Cache: half or fp32, or int8 with a scale per head of a position; d / H up to 128, any number of positions.

What one kernel of a step may read before it waits for the one before it (`pdl`): weights, caches, lengths, slots.
Nothing of that is written within a step before its last kernel, and `embed`, its first, starts in full order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .heuristics import POSITIONS_PER_SPLIT, num_splits

LOG2E = 1.4426950408889634
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves a whole number, ties to even


def attention(
    qkv: Tensor, cache: Tensor, cache_scales: Tensor | None, slot: Tensor, length: Tensor, out: Tensor,
    scratch: Tensor, arrived: Tensor, *, pdl: bool = False,
) -> None:  # fmt: skip
    """Append the step's keys and values to the cache, then attend to all positions up to and including them.

    Args:
        qkv: half [R, 3 * d], queries, keys, values, each [H, d / H].
        cache: half [2, slots, H, C, d / H], each slot contiguous; or int8 with cache_scales fp32 [2, slots, H, C], one
            scale per head of a position: the largest magnitude / 127, the rest rounded half to even. The step's own
            keys and values are attended to as they are.
        slot: int32 [R], a row's place in the cache; those of the rows that take part differ.
        length: int32 [R], positions held before this step, less than C; negative: the row takes no part.
        out: half [R, d], zeros in rows without a length.
        scratch: fp32 [R, H, splits, d / H + 2], splits at least C / 128. arrived: int32 [R, H], zeros before and after.
        pdl: as for `norm_linear`.
    """
    _, _, heads, positions, head_dim = cache.shape
    splits = num_splits(positions)
    assert cache[0, 0].is_contiguous() and scratch.shape[2] >= splits and scratch.is_contiguous()
    assert (cache.dtype == torch.int8) == (cache_scales is not None)
    assert cache_scales is None or cache_scales[0, 0].is_contiguous()
    strides = (0, 0) if cache_scales is None else cache_scales.stride()[:2]
    options = {"launch_pdl": True} if pdl else {}
    with torch.cuda.device_of(qkv):
        attention_kernel[(qkv.shape[0] * heads, splits)](
            qkv, cache, cache_scales, slot, length, out, scratch, arrived,
            *cache.stride()[:3], *strides, positions, head_dim**-0.5 * LOG2E,
            H=heads, DH=head_dim, D=triton.next_power_of_2(head_dim), BLOCK=POSITIONS_PER_SPLIT,
            SPLITS=scratch.shape[2], PDL=pdl,
            num_warps=num_warps(head_dim, cache.element_size()),
            enable_fp_fusion=True,  # said, because the default differs between versions of Triton
            **options,
        )  # fmt: skip


def num_warps(head_dim: int, element_size: int) -> int:
    """So many that a thread holds no more than 64 halves, or 32 floats, of a split's keys: nothing is spilled."""
    return 8 if head_dim * max(element_size, 2) > 128 else 4


@triton.jit
def attention_kernel(
    qkv, cache, scales, slot, length, out, scratch, arrived,
    stride_kv, stride_slot, stride_head, scales_kv, scales_slot, scales_head,
    factor,
    H: tl.constexpr,
    DH: tl.constexpr,
    D: tl.constexpr,  # the power of two that holds DH
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,  # room in `scratch`
    PDL: tl.constexpr,
):  # fmt: skip
    cell, split = tl.program_id(0), tl.program_id(1)
    row, head = cell // H, cell % H
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    d = tl.arange(0, D)
    to = out + row.to(tl.int64) * (H * DH) + head * DH + d
    new = tl.load(length + row)
    first = split * BLOCK
    if new < 0:
        if split == 0:
            if PDL:
                tl.extra.cuda.gdc_wait()
            tl.store(to, tl.zeros([D], to.dtype.element_ty), mask=d < DH)
        return
    if first > new:
        return

    # One shot: 32 KB are asked for at once, before the wait. Positions from `new` on are never read.
    at = first + tl.arange(0, BLOCK)
    place = tl.load(slot + row).to(tl.int64)
    keys = cache + place * stride_slot + head.to(tl.int64) * stride_head
    inside = at[:, None] < new
    if D != DH:
        inside = inside & (d[None, :] < DH)
    where = at[:, None] * DH + d[None, :]
    k = tl.load(keys + where, mask=inside, other=0.0)
    v = tl.load(keys + stride_kv + where, mask=inside, other=0.0)
    if scales is not None:
        sizes = scales + place * scales_slot + head.to(tl.int64) * scales_head
        k_scale = tl.load(sizes + at, mask=at < new, other=0.0)
        v_scale = tl.load(sizes + scales_kv + at, mask=at < new, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()

    own = qkv + row.to(tl.int64) * (3 * H * DH) + head * DH + d
    here = d < tl.where(new < first + BLOCK, DH, 0)  # this split's to append
    q = tl.load(own, mask=d < DH, other=0.0).to(tl.float32) * factor
    k_new = tl.load(own + H * DH, mask=here, other=0.0)
    v_new = tl.load(own + 2 * H * DH, mask=here, other=0.0)
    if new < first + BLOCK:
        to_k, to_v = keys + new * DH + d, keys + stride_kv + new * DH + d
        if scales is None:
            tl.store(to_k, k_new, mask=d < DH)
            tl.store(to_v, v_new, mask=d < DH)
        else:
            _store_rounded(k_new, to_k, sizes + new, d < DH)
            _store_rounded(v_new, to_v, sizes + scales_kv + new, d < DH)

    s = tl.sum(k.to(tl.float32) * q[None, :], 1)
    if scales is not None:
        s *= k_scale
    s_new = tl.sum(k_new.to(tl.float32) * q, 0)
    s = tl.where(at == new, s_new, s)
    s = tl.where(at <= new, s, -float("inf"))
    m = tl.max(s, 0)
    p = tl.exp2(s - m)
    total = tl.sum(p, 0)
    p_new = tl.where(new < first + BLOCK, tl.exp2(s_new - m), 0.0)
    if scales is not None:
        p *= v_scale
    a = tl.sum(p[:, None] * v.to(tl.float32), 0) + p_new * v_new.to(tl.float32)

    last = new // BLOCK
    if last == 0:
        tl.store(to, (a / total).to(to.dtype.element_ty), mask=d < DH)
        return
    mine = scratch + cell.to(tl.int64) * (SPLITS * (DH + 2))
    tl.store(mine + split * DH + d, a, mask=d < DH)
    tl.store(mine + SPLITS * DH + split, m)
    tl.store(mine + SPLITS * (DH + 1) + split, total)
    tl.debug_barrier()  # all threads have stored before one of them counts
    if tl.atomic_add(arrived + cell, 1, sem="acq_rel") == last:
        tl.store(to, _combined(mine, last, d, DH, SPLITS).to(to.dtype.element_ty), mask=d < DH)
        tl.store(arrived + cell, 0)


@triton.jit
def _combined(mine, last, d, DH: tl.constexpr, SPLITS: tl.constexpr):
    """The attention of splits 0 .. last, in an order that the size of the cache does not change either."""
    m, total, a = _sixteen(mine, 0, last, d, DH, SPLITS)
    for first in range(16, last + 1, 16):  # beyond 2048 positions
        m_more, total_more, a_more = _sixteen(mine, first, last, d, DH, SPLITS)
        top = tl.maximum(m, m_more)
        total = total * tl.exp2(m - top) + total_more * tl.exp2(m_more - top)
        a = a * tl.exp2(m - top) + a_more * tl.exp2(m_more - top)
        m = top
    return a / total


@triton.jit
def _sixteen(mine, first, last, d, DH: tl.constexpr, SPLITS: tl.constexpr):
    """Largest score, mass and weighted values of up to sixteen splits; read from L2, where the others wrote."""
    i = first + tl.arange(0, 16)
    parts = mine + i[:, None] * DH + d[None, :]
    a = tl.load(parts, mask=(i[:, None] <= last) & (d[None, :] < DH), other=0.0, cache_modifier=".cg")
    m = tl.load(mine + SPLITS * DH + i, mask=i <= last, other=-float("inf"), cache_modifier=".cg")
    total = tl.load(mine + SPLITS * (DH + 1) + i, mask=i <= last, other=0.0, cache_modifier=".cg")
    top = tl.max(m, 0)
    weight = tl.exp2(m - top)
    return top, tl.sum(total * weight, 0), tl.sum(a * weight[:, None], 0)


@triton.jit
def _store_rounded(x, to, to_scale, mask):
    """x [d / H] as int8 and its scale: the bits that the definition in torch gives."""
    x = x.to(tl.float32)
    size = tl.div_rn(tl.max(tl.abs(x), 0), 127.0)
    y = tl.div_rn(x, tl.maximum(size, 1e-30) + tl.zeros_like(x))
    y = (y + ROUNDER) - ROUNDER
    tl.store(to, tl.minimum(tl.maximum(y, -127.0), 127.0).to(tl.int8), mask=mask)
    tl.store(to_scale, size)


@dataclass(frozen=True)
class Variant:
    """One specialisation of `attention`, for compile_report.py; `cache` is "int8" or the dtype of the rest."""

    dtype: str = "fp16"
    cache: str = ""
    heads: int = 16
    head_dim: int = 64
    positions: int = 1503
    pdl: bool = False

    def __str__(self) -> str:
        flags = [self.cache] * bool(self.cache) + ["pdl"] * self.pdl
        return " ".join([f"attention H={self.heads} d/H={self.head_dim} {self.dtype}", *flags])

    def arguments(self) -> tuple[Any, dict[str, str | None], dict[str, Any], dict[str, Any]]:
        half, quantised = "*" + self.dtype, self.cache == "int8"
        splits = num_splits(self.positions)
        types = {
            "qkv": half, "cache": "*i8" if quantised else half, "scales": "*fp32" if quantised else None,
            "slot": "*i32", "length": "*i32", "out": half, "scratch": "*fp32", "arrived": "*i32",
            "stride_kv": "i64", "stride_slot": "i32", "stride_head": "i32",
            "scales_kv": "i32", "scales_slot": "i32", "scales_head": "i32", "factor": "fp32",
        }  # fmt: skip
        constants = {
            "H": self.heads, "DH": self.head_dim, "D": triton.next_power_of_2(self.head_dim),
            "BLOCK": POSITIONS_PER_SPLIT, "SPLITS": splits, "PDL": self.pdl,
        }  # fmt: skip
        warps = num_warps(self.head_dim, 1 if quantised else 4 if self.dtype == "fp32" else 2)
        return attention_kernel, types, constants, {
            "num_warps": warps, "enable_fp_fusion": True, "launch_pdl": self.pdl
        }  # fmt: skip


VARIANTS = (
    Variant(),
    Variant(cache="int8"),
    Variant(dtype="bf16", heads=24, pdl=True),
    Variant(dtype="bf16", cache="int8", heads=32, pdl=True),
    Variant(dtype="fp32"),
)
