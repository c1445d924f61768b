"""How launches are shaped: tiles, slices, warps and batch buckets, as pure functions of sizes.

Two kinds. What decides the order of a sum (`parts`, `slices`, `slice_k`, `num_splits`) sees the model's sizes and
never the rows of the batch: so a row's bits are the same in every bucket. What only decides who computes which outputs
(`row_tile`, `weight_tile`, `block_k`, `one_shot`, `fused_norm`) may see the rows. Needs neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

WEIGHT_ROWS = 16  # the M of mma.m16n8k16
SMALLEST_ROW_TILE = 8  # its N; Triton 3.6 to 3.9 take it
POSITIONS_PER_SPLIT = 128

_SMS = 128  # a big GPU: A100 108, H100 132, B200 148
_MOST_PARTS = 4  # every CTA of the consumer reads all parts of its rows again
_PART_COLUMNS = 512  # 16 x 512 halves are 16 KB: what one SM of an H100 must have in flight to keep the memory busy
_IN_REGISTERS = 2048  # columns of 16 weight rows that 8 warps can hold: 64 registers a thread
_BUCKETS = (2, 4, 8, 16, 32, 64, 128)


def parts(n: int, k: int) -> int:
    """P: into how many ranges of K the product with a weight [n, k] is split, each summed by CTAs of its own.

    Grows until there are two CTAs per SM, but a range keeps 512 columns: at 16 KB of weights a CTA, more of them only
    give the consumer more to read. And it grows, up to 4, until a range fits into registers.
    """
    possible = [p for p in range(1, _MOST_PARTS + 1) if p == 1 or k % (p * _PART_COLUMNS) == 0]
    tiles = -(-n // WEIGHT_ROWS)
    for p in possible:
        if tiles * p >= 2 * _SMS and k // p <= _IN_REGISTERS:
            return p
    return possible[-1]


def slices(k: int) -> int:
    """The warps of a CTA, which share 16 weight rows, so that they divide a range of `k` columns: 4, or 8 from 1024 on.

    Also the warps of the LayerNorm's statistics, wherever those are taken: a sum's order is its layout's.
    """
    return 8 if k >= 1024 else 4


def slice_k(k: int, group: int | None = None) -> int:
    """Columns that one warp sums, in order, of a range of `k`: its share in whole k16 steps or groups of scales."""
    unit = group or 16
    return -(-k // (slices(k) * unit)) * unit


def block_k(k: int, dtype: str, group: int | None = None, *, looped: bool = False) -> int:
    """Columns that a warp takes per tl.dot, out of its slice of a range of `k`: a power of two, at least 16.

    dtype: "fp16", "bf16", "fp32" or "int8". A warp sums its slice in the same order whatever the block is, except for
    int8: there a block is one group, so that its scale belongs to a whole product. 128 halves are 256 bytes of a row;
    32 in the pipelined loop, whose stages are blocks of up to 96 rows; least for fp32, unrolled into single FMAs.
    """
    if dtype == "int8":
        if group not in (16, 32, 64, 128):
            raise ValueError(f"int8 weights need groups of 16, 32, 64 or 128 columns, not {group}")
        return group
    most = 16 if dtype == "fp32" else 32 if looped else 128
    block = 16
    while block < most and slice_k(k) % (2 * block) == 0:
        block *= 2
    return block


def row_tile(rows: int, dtype: str = "fp16") -> int:
    """Columns of the dot, which are rows of the batch: 8, 16, 32 or 64; the grid goes over tiles beyond that.

    At most 16 for fp32, and for int8: those are for single requests.
    """
    most = 64 if dtype in ("fp16", "bf16") else 16
    tile = SMALLEST_ROW_TILE
    while tile < min(rows, most):
        tile *= 2
    return tile


def weight_tile(n: int, count: int, rows: int, dtype: str = "fp16") -> int:
    """Rows of the weight per CTA of a product [rows, k] x [n, k] in `count` parts: 16, or 32 for many rows.

    Every tile of the weight reads all rows of the batch again, at 64 rows four times its own bytes: so the tile with
    the fewest bytes for the busiest SM. How a warp sums does not depend on it.
    """
    tile = row_tile(rows, dtype)

    def load(size: int) -> int:
        ctas = -(-n // size) * -(-rows // tile) * count
        return -(-ctas // _SMS) * (size + tile)

    return WEIGHT_ROWS if tile <= 16 else min((WEIGHT_ROWS, 2 * WEIGHT_ROWS), key=load)


def one_shot(k: int, rows: int, dtype: str) -> bool:
    """Whether a CTA requests all its weights of a range of `k` columns at once, before it waits for the activations.

    Otherwise a pipelined loop: for many rows the latency of the first weights is no longer what counts, and the
    accumulators want the registers. fp32 loops too; it is for exactness.
    """
    return k <= _IN_REGISTERS and (dtype == "int8" or (dtype != "fp32" and rows <= 16))


def fused_norm(rows: int, count: int, k: int, dtype: str) -> bool:
    """Whether every CTA closes the residual and takes the LayerNorm statistics itself, instead of a kernel before it.

    Up to 4 rows with 8 rows of parts in all (`count` parts each): 40 KB from L2 per CTA at d = 1024 and 2 rows, about
    what it reads of weights. Beyond that a kernel more, of about a microsecond, is cheaper. Only in one shot, and with
    few enough registers for two CTAs per SM: 2 rows of 2048.
    """
    return rows <= 4 and rows * count <= 8 and rows * k <= 2 * _IN_REGISTERS and one_shot(k, rows, dtype)


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
