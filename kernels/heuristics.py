"""How launches are shaped: tiles, slices, warps and batch buckets, as pure functions of sizes.

Two kinds. What decides the order of a sum (`parts`, `block_k`, `SLICES`, `CLOSE_WARPS`, `num_splits`) sees the model's
sizes and never the rows of the batch: so a row's bits are the same in every bucket. What only decides who computes
which outputs (`row_tile`, `weight_tile`, `one_shot`, `fused_norm`) may see the rows. Needs neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

SLICES = 4  # of a K block, one per warp: the warps of a CTA share 16 weight rows, so they divide K instead
WARPS = SLICES  # of every kernel in linear.py; the LayerNorm reductions in two of them must be laid out alike
WEIGHT_ROWS = 16  # the M of mma.m16n8k16
SMALLEST_ROW_TILE = 8  # its N
POSITIONS_PER_SPLIT = 128

_CTAS = 256  # about two per SM of a big GPU (A100 108, H100 132, B200 148)
_MOST_PARTS = 4  # every CTA of the consumer reads all parts of its rows again
_HALF_BLOCK = 512  # 16 x 512 halves are 16 KB: what one SM of an H100 must have in flight to keep the memory busy
_FP32_BLOCK = 64
_IN_REGISTERS = 2048  # columns of 16 weight rows that 4 warps can hold: 128 registers a thread
_BUCKETS = (2, 4, 8, 16, 32, 64, 128)


def parts(n: int, k: int) -> int:
    """P: into how many slices of K the product with a weight [n, k] is split, each summed by CTAs of its own.

    Grows until there are two CTAs per SM, but a slice keeps 512 columns: at 16 KB of weights a CTA, more of them only
    give the consumer more to read. And it grows, up to 4, until a slice fits into registers.
    """
    possible = [p for p in range(1, _MOST_PARTS + 1) if p == 1 or k % (p * _HALF_BLOCK) == 0]
    tiles = -(-n // WEIGHT_ROWS)
    for p in possible:
        if tiles * p >= _CTAS and k // p <= _IN_REGISTERS:
            return p
    return possible[-1]


def block_k(k: int, dtype: str, group: int | None = None) -> int:
    """Columns of the weight that one tl.dot takes, of a slice of `k`: a power of two, at least 16 for each warp.

    dtype: "fp16", "bf16", "fp32" or "int8", whose group of 16 to 128 columns is one warp's share, so that a scale
    belongs to a whole product. Few for fp32, because there the dot is unrolled into single FMAs.
    """
    if dtype == "int8":
        if group is None or group not in (16, 32, 64, 128):
            raise ValueError(f"int8 weights need groups of 16, 32, 64 or 128 columns, not {group}")
        return SLICES * group
    most = _FP32_BLOCK if dtype == "fp32" else _HALF_BLOCK
    block = SLICES * 16
    while block < most and block < k:
        block *= 2
    if k > block and k % block:  # 768: three blocks of 256 instead of two of 512 with a masked half
        while block > SLICES * 16 and k % block:
            block //= 2
    return block


def row_tile(rows: int, smallest: int = SMALLEST_ROW_TILE) -> int:
    """Columns of the dot, which are rows of the batch: 8, 16, 32 or 64; the grid goes over tiles beyond that."""
    tile = smallest
    while tile < min(rows, 64):
        tile *= 2
    return tile


def one_shot(k: int, rows: int, dtype: str) -> bool:
    """Whether a CTA requests all its weights of a slice of `k` columns at once, before it waits for the activations.

    Otherwise a pipelined loop: for many rows the latency of the first weights is no longer what counts, and the
    accumulators want the registers. fp32 loops too; it is for exactness.
    """
    return dtype != "fp32" and rows <= 16 and k <= _IN_REGISTERS


def fused_norm(rows: int) -> bool:
    """Whether every CTA closes the residual and takes the LayerNorm statistics itself, instead of a kernel before it.

    Rows times (1 + parts) times d floats per CTA from L2: 40 KB for 2 rows at d = 1024, about its share of weights.
    """
    return rows <= 4


def num_splits(capacity: int) -> int:
    """CTAs among which decode attention divides a cache of `capacity` positions; those beyond a row's length exit."""
    return max(1, -(-capacity // POSITIONS_PER_SPLIT))


def bucket(rows: int, sizes: Sequence[int] | None = None) -> int:
    """The rows of the smallest captured step that holds `rows`: 2, 4, 8 ... 128, then multiples of 64; or of `sizes`.

    Raises:
        ValueError: no row, or more than the largest of `sizes`.
    """
    if rows < 1:
        raise ValueError(f"a step has at least one row, not {rows}")
    for size in sorted(sizes) if sizes is not None else _BUCKETS:
        if rows <= size:
            return size
    if sizes is not None:
        raise ValueError(f"{rows} rows do not fit into the largest bucket, {max(sizes)}")
    return -(-rows // 64) * 64


def buckets(most: int) -> list[int]:
    """All buckets up to the one that holds `most` rows, ascending."""
    found = [bucket(1)]
    while found[-1] < most:
        found.append(bucket(found[-1] + 1))
    return found
