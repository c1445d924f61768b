"""The device side of `linear.py`: the kernels and what they are made of.

Letters as there: a weight [M, K], S slices of K (one per warp), blocks of BM rows of the weight, BN rows of the batch
and BK columns of every slice. What a mask is for is known when compiling, so that none is left at the released sizes.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"
# Tuples grow in unrolled loops here, which is Triton's way to keep several tiles.

from __future__ import annotations

import triton
import triton.language as tl

from .race import INTERPRETED, round_to

EPS = tl.constexpr(1e-5)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    a, parts, x_out, stats, gamma, beta, weight, scales, out, rows,
    M: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    S: tl.constexpr, SLICE: tl.constexpr, GROUP: tl.constexpr,
    P: tl.constexpr, FUSED: tl.constexpr, GELU: tl.constexpr, HALF: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PAD: tl.constexpr,
    ONE_SHOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    start = tl.program_id(2) * WIDTH
    BLOCKS: tl.constexpr = (SLICE + BK - 1) // BK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if ONE_SHOT:
        weights = ()
        for c in tl.static_range(BLOCKS):
            weights = weights + (_weights(weight, scales, m, start, c * BK, M, K, WIDTH, S, SLICE, GROUP, BM, BK),)
    if FUSED > 0:
        k, inside = _columns(K, S, SLICE, PAD)
        g = tl.load(gamma + k, mask=inside, other=0.0)
        b = tl.load(beta + k, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    mean, rstd = 0.0, 1.0
    if stats is not None:
        mean = tl.load(stats + 2 * row, mask=row < rows, other=0.0)
        rstd = tl.load(stats + 2 * row + 1, mask=row < rows, other=0.0)
    if FUSED > 0:
        closed = _closed_rows(a, parts, x_out, g, b, rows, K, P, FUSED, S, SLICE, PAD, HALF)
    sums = tl.zeros([S, BM, BN], tl.float32)
    if ONE_SHOT:
        for c in tl.static_range(BLOCKS):
            if FUSED > 0:
                h = _tile(closed, c, S, PAD, BK, BN)
            else:
                h = _activations(a, parts, mean, rstd, gamma, beta, row, rows, start, c * BK, K, WIDTH, S, SLICE, P,
                                 BK, HALF)  # fmt: skip
            w, scale = weights[c]
            sums = _multiplied(w, scale, h, sums, GROUP, HALF)
    else:
        for c in tl.range(0, BLOCKS, num_stages=2 if gamma is None else 1):
            w, scale = _weights(weight, scales, m, start, c * BK, M, K, WIDTH, S, SLICE, GROUP, BM, BK)
            h = _activations(a, parts, mean, rstd, gamma, beta, row, rows, start, c * BK, K, WIDTH, S, SLICE, P,
                             BK, HALF)  # fmt: skip
            sums = _multiplied(w, scale, h, sums, GROUP, HALF)
    y = _over_slices(sums, S, BM, BN)
    if GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    at = (tl.program_id(2) * rows + row)[None, :] * M + m[:, None]
    tl.store(out + at, _rounded(y, out.dtype.element_ty), mask=(row < rows)[None, :] & (m < M)[:, None])


@triton.jit
def close_kernel(
    x, parts, x_out, stats, normed, gamma, beta,
    D: tl.constexpr, P: tl.constexpr, S: tl.constexpr, SLICE: tl.constexpr, PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    new, mean, rstd = _residual_row(x, parts, row, tl.num_programs(0), D, P, S, SLICE, PAD)
    k, inside = _columns(D, S, SLICE, PAD)
    if x_out is not None:
        tl.store(x_out + row * D + k, new, mask=inside)
    if normed is not None:
        g = tl.load(gamma + k, mask=inside, other=0.0)
        b = tl.load(beta + k, mask=inside, other=0.0)
        tl.store(normed + row * D + k, _norm(new, mean, rstd, g, b, normed.dtype.element_ty), mask=inside)
    else:
        tl.store(stats + 2 * row, mean)
        tl.store(stats + 2 * row + 1, rstd)


@triton.jit
def _columns(D: tl.constexpr, S: tl.constexpr, SLICE: tl.constexpr, PAD: tl.constexpr):
    """The columns of a row in the order of its S slices, each padded to a power of two; and which exist."""
    i = tl.arange(0, S * PAD)
    if PAD == SLICE:
        k = i
        inside = k < D
    else:
        k = i // PAD * SLICE + i % PAD
        inside = (i % PAD < SLICE) & (k < D)
    # Four columns a thread everywhere: the store of a half row would otherwise make it eight, in one kernel and not in
    # the other, and the sums over a row would differ in their last bits.
    return tl.max_contiguous(k, 4), inside


@triton.jit
def _residual_row(x, parts, row, rows, D: tl.constexpr, P: tl.constexpr, S: tl.constexpr, SLICE: tl.constexpr,
                  PAD: tl.constexpr):  # fmt: skip
    """x + (part 0 + part 1 + ...) of one row, its mean and 1 / sqrt(variance + eps); 1-D over `_columns`."""
    k, inside = _columns(D, S, SLICE, PAD)
    new = tl.load(x + row * D + k, mask=inside, other=0.0)
    if parts is not None:
        total = tl.load(parts + row * D + k, mask=inside, other=0.0)
        for p in tl.static_range(1, P):
            total += tl.load(parts + (p * rows + row) * D + k, mask=inside, other=0.0)
        new += total
    mean = tl.sum(new, 0) * (1.0 / D)
    centred = tl.where(inside, new - mean, 0.0)
    variance = tl.sum(centred * centred, 0) * (1.0 / D)
    return new, mean, tl.div_rn(1.0, tl.sqrt_rn(variance + EPS))


@triton.jit
def _closed_rows(x, parts, x_out, g, b, rows, D: tl.constexpr, P: tl.constexpr, FUSED: tl.constexpr,
                 S: tl.constexpr, SLICE: tl.constexpr, PAD: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """The FUSED rows of the batch, closed and normed: half [S * PAD, 1, 2 or 4]. The first CTA writes the residual."""
    k, inside = _columns(D, S, SLICE, PAD)
    normed = ()
    for r in tl.static_range(FUSED):
        new, mean, rstd = _residual_row(x, parts, r, rows, D, P, S, SLICE, PAD)
        if x_out is not None:
            if tl.program_id(0) == 0:
                tl.store(x_out + r * D + k, new, mask=inside)
        normed = normed + (_norm(new, mean, rstd, g, b, HALF),)
    if FUSED == 1:
        h = normed[0][:, None]
    elif FUSED == 2:
        h = tl.join(normed[0], normed[1])
    else:  # the fourth of three is never stored
        h = tl.join(tl.join(normed[0], normed[2]), tl.join(normed[1], normed[FUSED - 1]))
        h = tl.reshape(h, (S * PAD, 4))
    return h


@triton.jit
def _tile(closed, c: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    """[S, BK, BN]: block c of every slice of the closed rows, which fill the BN columns several times over."""
    ROWS: tl.constexpr = closed.shape[1]
    if PAD == 2 * BK:
        first, second = tl.split(tl.permute(tl.reshape(closed, (S, 2, BK, ROWS)), (0, 2, 3, 1)))
        h = first if c == 0 else second
    elif PAD > BK:
        h = tl.reshape(closed, (S, PAD // BK, BK, ROWS))
        mine = (tl.arange(0, PAD // BK) == c)[None, :, None, None]
        h = tl.sum(tl.where(mine, h, 0.0).to(tl.float32), 1).to(closed.dtype)
    else:
        h = tl.reshape(closed, (S, BK, ROWS))
    h = tl.broadcast_to(h[:, :, None, :], (S, BK, BN // ROWS, ROWS))
    return tl.reshape(h, (S, BK, BN))


@triton.jit
def _norm(x, mean, rstd, gamma, beta, dtype: tl.constexpr):
    return _rounded((x - mean) * rstd * gamma.to(tl.float32) + beta.to(tl.float32), dtype)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return round_to(x, dtype).to(dtype)


@triton.jit
def _weights(weight, scales, m, start, first, M: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, S: tl.constexpr,
             SLICE: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """[S, BM, BK] of the weight, slice s the columns from start + s * SLICE + first on; with its scales [S, BM]."""
    k = tl.arange(0, S)[:, None, None] * SLICE + first + tl.arange(0, BK)[None, None, :]
    at = weight + m[None, :, None] * K + (start + k)
    if M % BM != 0 or WIDTH != S * SLICE or SLICE % BK != 0:
        inside = (first + tl.arange(0, BK) < SLICE)[None, None, :] & (k < WIDTH)
        w = tl.load(at, mask=(m < M)[None, :, None] & inside, other=0.0)
    else:
        w = tl.load(at)
    scale = 0.0
    if GROUP > 0:
        k = tl.arange(0, S)[:, None] * SLICE + first
        at = scales + m[None, :] * (K // GROUP) + (start + k) // GROUP
        scale = tl.load(at, mask=(m < M)[None, :] & (k < WIDTH), other=0.0)
    return w, scale


@triton.jit
def _activations(a, parts, mean, rstd, gamma, beta, row, rows, start, first, K: tl.constexpr, WIDTH: tl.constexpr,
                 S: tl.constexpr, SLICE: tl.constexpr, P: tl.constexpr, BK: tl.constexpr,
                 HALF: tl.constexpr):  # fmt: skip
    """[S, BK, BN], the columns of `_weights`: the rows as they are, or closed and normed, rounded to half."""
    k = tl.arange(0, S)[:, None, None] * SLICE + first + tl.arange(0, BK)[None, :, None]
    inside = (row < rows)[None, None, :]
    if WIDTH != S * SLICE or SLICE % BK != 0:
        inside = inside & (first + tl.arange(0, BK) < SLICE)[None, :, None] & (k < WIDTH)
    at = row[None, None, :] * K + (start + k)
    h = tl.load(a + at, mask=inside, other=0.0)
    if gamma is not None:
        if parts is not None:
            total = tl.load(parts + at, mask=inside, other=0.0)
            for p in tl.static_range(1, P):
                total += tl.load(parts + p * rows * K + at, mask=inside, other=0.0)
            h += total
        g = tl.load(gamma + start + k, mask=k < WIDTH, other=0.0)
        b = tl.load(beta + start + k, mask=k < WIDTH, other=0.0)
        h = _norm(h, mean[None, None, :], rstd[None, None, :], g, b, HALF)
    return h


@triton.jit
def _multiplied(w, scale, h, sums, GROUP: tl.constexpr, HALF: tl.constexpr):
    """sums + w h: an int8 block gets its scales afterwards, in fp32."""
    if INTERPRETED and HALF == tl.bfloat16:  # the interpreter's dot would take the bits for integers
        w = w.to(tl.float32)
        h = h.to(tl.float32)
    if GROUP > 0:
        sums += tl.dot(w.to(h.dtype), h, input_precision="ieee") * scale[:, :, None]
    else:
        sums = tl.dot(w, h, sums, input_precision="ieee")
    return sums


@triton.jit
def _over_slices(sums, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """[S, BM, BN] -> [BM, BN]: each half onto the other until one is left, spelt out so that no compiler chooses."""
    if S == 8:
        a, b = tl.split(tl.permute(tl.reshape(sums, (2, 4, BM, BN)), (1, 2, 3, 0)))
        sums = a + b
    a, b = tl.split(tl.permute(tl.reshape(sums, (2, 2, BM, BN)), (1, 2, 3, 0)))
    a, b = tl.split(tl.permute(a + b, (1, 2, 0)))
    return a + b
