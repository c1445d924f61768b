"""The sampler as one Triton kernel: one program per (request, codebook), its logits in registers from load to token.

Mixes the CFG branches, scales, filters and draws by an exponential race, bit for bit like the torch reference: no
floating-point sum and no division decides anything. Everything that varies between requests or steps is read from
device memory, so that one captured CUDA graph serves any mix of them; a filter or tensor that is None is compiled out.
Shapes: logits [NB, B, K, V], or rows [R, K, V] that requests name; V up to 4096. Knows nothing of generation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .race import exp2_pair, exponential, mul, random_words, round_to

LOG2E = tl.constexpr(1.44269504)
INTERPOLATED_PASSES = tl.constexpr(12)  # top-k takes 4 to 8, top-p 4 to 12; then come bisections, at most 32


def sample_column(
    logits: Tensor, tokens: Tensor, status: Tensor, *,
    scale: Tensor, cfg_coef: Tensor, cfg_coef_beta: Tensor, top_k: Tensor | None, top_p: Tensor | None,
    min_p: Tensor | None, seed: Tensor | None, step: Tensor | None, stream: Tensor | None, noise: Tensor | None,
    column: Tensor | None, frames: Tensor | None, pdl: bool = False,
) -> None:  # fmt: skip
    """Draws one column of every request on the current stream of the logits' device; waits for nothing.

    Args:
        logits: [NB, B, K, V] fp32, fp16 or bf16, any strides but the last, which is 1.
        tokens: int32 or int64, contiguous: [B, K], or with `column` the sequence [B, K, S], -1 where unknown.
        status: int32 [B, K], set to 1 where no token could be chosen, otherwise left as it is.
        scale: fp32 [B, K], 1 / temperature; negative is greedy. cfg_coef, cfg_coef_beta: fp32 [B].
        top_k: int32 [B, K], off where <= 0 or >= V. top_p: fp32 [B, K], off where <= 0 or >= 1. min_p: fp32 [B, K].
        seed, step, stream: int64 [B], the counters of the noise; may be None if `noise` is given or all are greedy.
        noise: fp32 [B, K, V], exponential variates to use instead.
        column: int32 [B] with frames: int32 [S, K], negative where the pattern masks the cell (V is written there).
            A request whose column lies outside of [0, S) and a cell that is known are left alone.
        pdl: programmatic dependent launch (sm_90 and newer): the launch overlaps the end of the kernel before it.
    """
    branches, batch, num_codebooks, vocab = logits.shape
    block = max(128, triton.next_power_of_2(vocab))
    options = {"launch_pdl": True} if pdl else {}
    with torch.cuda.device_of(logits):  # Triton launches on the current device, whatever the pointers say
        sample_kernel[(batch, num_codebooks)](
            logits, tokens, status, scale, cfg_coef, cfg_coef_beta, top_k, top_p, min_p,
            seed, step, stream, noise, column, frames, None, None,
            *logits.stride()[:3],
            tokens.shape[2] if column is not None else 1,
            V=vocab, NB=branches, BLOCK=block, GREEDY=seed is None and noise is None, PDL=pdl,
            num_warps=8 if block == 4096 else 4,
            enable_fp_fusion=False,  # an FMA rounds once where the definition rounds twice
            **options,
        )  # fmt: skip


def sample_rows(
    logits: Tensor, branches: Tensor, request: Tensor, tokens: Tensor, status: Tensor, *,
    scale: Tensor, cfg_coef: Tensor, cfg_coef_beta: Tensor, top_k: Tensor | None, top_p: Tensor | None,
    min_p: Tensor | None, seed: Tensor | None, step: Tensor | None, stream: Tensor | None = None,
    noise: Tensor | None = None, column: Tensor, frames: Tensor, pdl: bool = False,
) -> None:  # fmt: skip
    """As `sample_column`, for some requests of a board of N: their branches are rows of a batch, the rest by request.

    Args:
        logits: [R, K, V], any strides but the last, which is 1. branches: int32 [Q, NB], the rows of q's branches in
            the order of `sample_column`. A request without CFG names one row NB times: x + (x - x) * coef is x, bit
            for bit but for the sign of a zero, where x and the coefficients are finite, and an x of -inf stays barred.
        request: int32 [Q], where q stands on the board; negative: q draws nothing. No two stand in one place.
        tokens: int32 or int64 [N, K, S]. status: int32 [N, K]. The parameters: [N] and [N, K], noise [N, K, V].
        stream: None stands for 0 everywhere.
    """
    requests, num_branches = branches.shape
    _, num_codebooks, vocab = logits.shape
    block = max(128, triton.next_power_of_2(vocab))
    options = {"launch_pdl": True} if pdl else {}
    with torch.cuda.device_of(logits):
        sample_kernel[(requests, num_codebooks)](
            logits, tokens, status, scale, cfg_coef, cfg_coef_beta, top_k, top_p, min_p,
            seed, step, stream, noise, column, frames, request, branches,
            logits.stride(0), 0, logits.stride(1),
            tokens.shape[2],
            V=vocab, NB=num_branches, BLOCK=block, GREEDY=seed is None and noise is None, PDL=pdl,
            num_warps=8 if block == 4096 else 4,
            enable_fp_fusion=False,
            **options,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_columns"])
def sample_kernel(
    logits, tokens, status, scale, cfg_coef, cfg_coef_beta, top_k, top_p, min_p,
    seed, step, stream, noise, column, frames, request, branches,
    stride_nb, stride_b, stride_k, num_columns,
    V: tl.constexpr,  # a constant, so that the mask of a load does not keep it from being a vector
    NB: tl.constexpr,
    BLOCK: tl.constexpr,
    GREEDY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    b, k = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if branches is not None:
        branches += b * NB
    if request is not None:
        b = tl.load(request + b)
        if b < 0:
            return
    cell = b * tl.num_programs(1) + k
    out = tokens + cell
    if column is not None:
        at = tl.load(column + b)
        if (at < 0) | (at >= num_columns):
            return
        out = tokens + cell.to(tl.int64) * num_columns + at
        if tl.load(out) != -1:
            return
        if tl.load(frames + at * tl.num_programs(1) + k) < 0:
            tl.store(out, V)
            return

    ids = tl.arange(0, BLOCK)
    row = logits + b.to(tl.int64) * stride_b + k * stride_k
    x = _mixed(row, stride_nb, cfg_coef + b, cfg_coef_beta + b, ids, V, NB, branches)
    rate = tl.load(scale + cell)
    if GREEDY:
        token = _largest(x, ids)
    else:
        if rate < 0:
            token = _largest(x, ids)
        else:
            z = round_to(x * rate, logits.dtype.element_ty)
            z = tl.where(tl.abs(z) < 1.1754943508222875e-38, 0.0, z)
            z = tl.where(z == z, z, -float("inf"))
            keep, iw = _kept(z, top_k, top_p, min_p, cell, V)
            if noise is not None:
                e = tl.load(noise + cell.to(tl.int64) * V + ids, mask=ids < V, other=0.0)
            else:
                lane = tl.full([], 0, tl.int64) if stream is None else tl.load(stream + b)
                e = exponential(random_words(tl.load(seed + b), tl.load(step + b), k, lane, BLOCK))
            # Scores are not negative, so their bits order them; the low word orders ties by token, and is -1 if none.
            score = (e * iw).to(tl.int32, bitcast=True).to(tl.int64)
            token = tl.min(tl.where(keep, (score << 32) | ids, 0x7FFFFFFFFFFFFFFF), 0).to(tl.int32)
    tl.store(out, tl.maximum(token, 0))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if token < 0:
        tl.store(status + cell, 1)


@triton.jit
def _mixed(row, stride_nb, cfg_coef, cfg_coef_beta, ids, V: tl.constexpr, NB: tl.constexpr, branches=None):
    """The branches of one cell mixed, in fp32; every operation rounds to the logits' dtype."""
    dtype: tl.constexpr = row.dtype.element_ty
    x = _branch(row, stride_nb, 0, branches, ids, V)
    if NB >= 2:
        u = _branch(row, stride_nb, NB - 1, branches, ids, V)
        cfg = tl.load(cfg_coef)
        if NB == 3:
            w = _branch(row, stride_nb, 1, branches, ids, V)
            x = round_to(w + round_to(mul(round_to(x - w, dtype), tl.load(cfg_coef_beta)), dtype), dtype)
        x = round_to(round_to(mul(round_to(x - u, dtype), cfg), dtype) + u, dtype)
    return x


@triton.jit
def _branch(row, stride_nb, index: tl.constexpr, branches, ids, V: tl.constexpr):
    """The logits of one branch in fp32: that `index`, or that which `branches` names there."""
    if branches is not None:
        row += tl.load(branches + index).to(tl.int64) * stride_nb
    else:
        row += index * stride_nb
    return tl.load(row + ids, mask=ids < V, other=-float("inf")).to(tl.float32)


@triton.jit
def _largest(x, ids):
    """The lowest index among the maxima, NaN counted as -inf; -1 where all are -inf."""
    x = tl.where(x == x, x, -float("inf"))
    top = tl.max(x, 0)
    return tl.where(top > -float("inf"), tl.min(tl.where(x == top, ids, 0x7FFFFFFF), 0), -1)


@triton.jit
def _kept(z, top_k, top_p, min_p, cell, V: tl.constexpr):
    """Which tokens survive the filters, and 1 / w of each, w the weight relative to the largest."""
    key = _key(z)
    top = tl.max(z, 0)
    t = tl.where(z == top, 0.0, (z - top) * LOG2E)
    keep = (z > -float("inf")) & (t >= -126.0)
    if top_k is not None:
        k = tl.load(top_k + cell)
        if (k > 0) & (k < V):
            # What lies 88 below the top has t < -126: the search need not look there.
            guess = _normal_quantile(z, k.to(tl.float32) * (1.0 / V), V)
            one = tl.full(z.shape, 1, tl.int32)
            keep &= key >= _boundary(key, one, k - 1, V, top - 88.0, top, guess, True)
    w, iw = exp2_pair(tl.minimum(tl.maximum(t, -126.0), 0.0))
    if min_p is not None:
        keep &= w >= tl.load(min_p + cell)
    if top_p is not None:
        p = tl.load(top_p + cell)
        if (p > 0) & (p < 1):
            keep &= _nucleus(key, top, tl.where(keep, w, 0.0), p, V)
    return keep, iw


@triton.jit
def _nucleus(key, top, w, p, V: tl.constexpr):
    """In descending order, the tokens before which at most p of the mass lies; int64 sums, exact in any order."""
    mass = (w * 1099511627776.0).to(tl.int64)
    total = tl.sum(mass, 0)
    share = (p * 2147483648.0).to(tl.int64)
    limit = (total >> 32) * share * 2 + (((total & 0xFFFFFFFF) * share) >> 31)
    # Tokens 28 below the top weigh less than 2^-40, which is nothing here: the boundary lies above.
    # Guess: where V equal tokens would weigh 8 times what is cut off.
    guess = top + 0.6931472 * tl.log2((1.0 - p) * total.to(tl.float32) * (8.0 / 1099511627776.0 / V))
    edge = _boundary(key, mass, limit, total, top - 28.0, top, guess, False)
    before = tl.sum(tl.where(key > edge, mass, 0), 0)
    tied = (key == edge) & (mass > 0)
    each = tl.max(tl.where(tied, mass, 0), 0)
    inside = key >= edge
    if before + tl.sum(tl.where(tied, mass, 0), 0) - each > limit:  # the group of equals is cut, in index order
        rank = tl.cumsum(tied.to(tl.int32), 0) - 1
        inside = (key > edge) | (tied & (before + rank * each <= limit))
    return inside


@triton.jit
def _boundary(key, mass, limit, total, low, high, guess, WHOLE: tl.constexpr):
    """The largest key t for which the mass of keys >= t exceeds `limit`, or one that separates the same tokens.

    Searched between the values `low` and `high` by regula falsi from `guess`: pivots are ordinary floats, only counts
    and keys decide. Exits at the sought mass (`WHOLE`: masses are 1, so limit + 1 is it), or where one key is left.
    If no boundary lies above `low`, keeps all keys from there on.
    """
    lo, hi = _key(low), _key(high) + 1  # mass(>= lo) > limit >= mass(>= hi)
    mass_lo, mass_hi = total, total * 0
    excess_lo, excess_hi = (total - limit).to(tl.float32), limit.to(tl.float32) + 0.5
    pivot = _key(guess)
    passes = 0
    rose = False
    searching = (lo + 1 < hi) & (limit < total)
    while searching:
        pivot = tl.minimum(tl.maximum(pivot, lo + 1), hi - 1)
        found = tl.sum(tl.where(key >= pivot, mass, 0), 0)
        nothing_between = (found == mass_lo) | (found == mass_hi)
        rises = found > limit
        # Illinois rule: an end that stays twice counts half, or the other one would creep.
        halved = tl.where((rises == rose) & (passes > 0), 0.5, 1.0)
        if rises:
            lo, mass_lo = pivot, found
            excess_lo, excess_hi = (found - limit).to(tl.float32), excess_hi * halved
        else:
            hi, mass_hi = pivot, found
            excess_lo, excess_hi = excess_lo * halved, (limit - found).to(tl.float32) + 0.5
        if nothing_between:  # ties: draw the ends to the nearest keys, so that one shared key ends the search
            lo = tl.min(tl.where((key >= lo) & (mass > 0), key, 0x7FFFFFFF), 0)
            hi = tl.max(tl.where((key < hi) & (mass > 0), key, -0x80000000), 0) + 1
        rose = rises
        passes += 1
        a, b = _value(lo), _value(hi)
        pivot = _key(a + (b - a) * (excess_lo / (excess_lo + excess_hi)))
        if passes > INTERPOLATED_PASSES:
            pivot = (lo & hi) + ((lo ^ hi) >> 1)
        searching = lo + 1 < hi
        if WHOLE:
            searching = searching & (mass_lo != limit + 1)
    return lo


@triton.jit
def _normal_quantile(z, upper, V: tl.constexpr):
    """Where the upper tail of a normal row begins (Abramowitz and Stegun 26.2.22); from there 4 to 5 passes, not 8."""
    x = tl.where(z > -float("inf"), z, 0.0)
    mean = tl.sum(x, 0) * (1.0 / V)
    variance = tl.sum(x * x, 0) * (1.0 / V) - mean * mean
    s = tl.sqrt(-1.3862944 * tl.log2(tl.minimum(upper, 0.5)))
    quantile = s - (2.30753 + 0.27061 * s) / (1.0 + (0.99229 + 0.04481 * s) * s)
    return mean + tl.sqrt(tl.maximum(variance, 0.0)) * quantile


@triton.jit
def _key(x):
    """fp32 -> int32 in the same order. Its own inverse on bits: see `_value`."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
