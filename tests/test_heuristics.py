"""The shapes of launches: every range and tile covers its product, and nothing that orders a sum sees the rows."""

from __future__ import annotations

import inspect

import pytest

from musicgen_fast.kernels import heuristics as h

RELEASED = (1024, 1536, 2048)
TINY = (16, 32, 48, 64, 80, 256, 512, 768, 1280)
DTYPES = ("fp16", "bf16", "fp32", "int8")


def power_of_two(x: int) -> bool:
    return x > 0 and x & (x - 1) == 0


def test_parts_at_the_released_sizes() -> None:
    assert [h.parts(d, d) for d in RELEASED] == [2, 3, 2]
    assert [h.parts(d, 4 * d) for d in RELEASED] == [4, 3, 4]


@pytest.mark.parametrize("d", RELEASED + TINY)
def test_parts_divide_k_and_keep_enough(d: int) -> None:
    for k in (d, 4 * d):
        p = h.parts(d, k)
        assert 1 <= p <= 4 and k % p == 0
        assert p == 1 or (k // p) % 512 == 0
        assert d not in RELEASED or k // p <= 2048  # in one shot


def test_parts_of_tiny_models() -> None:
    assert {h.parts(d, k) for d in (16, 32, 48, 64) for k in (d, 4 * d)} == {1}


@pytest.mark.parametrize("group", (None, 16, 128))
@pytest.mark.parametrize("k", (16, 32, 48, 80, 512, 1024, 1536, 2048, 4096))
def test_slices_cover_k(k: int, group: int | None) -> None:
    size = h.slice_k(k, group)
    assert h.slices(k) in (4, 8)
    assert size % (group or 16) == 0 and h.slices(k) * size >= k
    assert h.slices(k) * (size - (group or 16)) < k  # and no more than needed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", (16, 48, 80, 512, 768, 1024, 1536, 2048, 4096))
def test_blocks_divide_slices(k: int, dtype: str) -> None:
    group = 64 if dtype == "int8" else None
    for looped in (False, True):
        block = h.block_k(k, dtype, group, looped=looped)
        assert power_of_two(block) and block >= 16 and h.slice_k(k, group) % block == 0


def test_blocks_at_the_released_sizes() -> None:
    assert [h.block_k(d, "fp16") for d in RELEASED] == [128, 64, 128]
    assert [h.block_k(d, "fp16", looped=True) for d in RELEASED] == [32, 32, 32]
    assert h.block_k(1024, "int8", 128) == 128 and h.block_k(1024, "fp32", looped=True) == 16


@pytest.mark.parametrize("group", (None, 8, 48, 256))
def test_groups_that_no_block_fits(group: int | None) -> None:
    with pytest.raises(ValueError, match="groups of 16, 32, 64 or 128"):
        h.block_k(1024, "int8", group)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_tiles_hold_the_rows(dtype: str) -> None:
    for rows in (1, 2, 8, 9, 16, 17, 33, 64, 65, 192):
        tile = h.row_tile(rows, dtype)
        assert tile in (8, 16, 32, 64)
        assert tile >= rows or tile == h.row_tile(10_000, dtype)
    assert [h.row_tile(rows) for rows in (1, 8, 9, 17, 33, 500)] == [8, 8, 16, 32, 64, 64]


def test_weight_tiles_grow_only_for_many_rows() -> None:
    assert {h.weight_tile(n, 1, rows) for n in (1024, 8192) for rows in range(1, 17)} == {16}
    assert h.weight_tile(3072, 1, 64) == 32  # 96 CTAs in one round instead of 192 in two
    assert h.weight_tile(1024, 2, 64) == 16  # 128 CTAs in one round already
    assert h.weight_tile(3072, 1, 64, "fp32") == h.weight_tile(3072, 1, 64, "int8") == 16


def test_one_shot_for_few_rows_in_registers() -> None:
    assert all(h.one_shot(d, rows, "fp16") for d in RELEASED for rows in (1, 2, 16))
    assert not h.one_shot(1024, 17, "fp16") and not h.one_shot(4096, 2, "fp16") and not h.one_shot(64, 2, "fp32")
    assert h.one_shot(1024, 64, "int8")  # whose loop would keep too much in shared memory


def test_who_takes_the_statistics() -> None:
    assert [h.fused_norm(2, 4, d, "fp16") for d in RELEASED] == [True] * 3
    assert h.fused_norm(4, 2, 1024, "fp16") and not h.fused_norm(4, 4, 1024, "fp16")
    assert not h.fused_norm(4, 2, 2048, "fp16") and not h.fused_norm(5, 0, 64, "fp16")
    assert not h.fused_norm(2, 1, 1024, "fp32") and not h.fused_norm(1, 1, 4096, "fp16")


def test_splits_of_the_cache() -> None:
    assert [h.num_splits(c) for c in (0, 1, 128, 129, 1503)] == [1, 1, 1, 2, 12]


def test_buckets() -> None:
    assert h.buckets(1) == [2] and h.buckets(16) == [2, 4, 8, 16]
    assert h.buckets(300) == [2, 4, 8, 16, 32, 64, 128, 192, 256, 320]
    for rows in range(1, 400):
        size = h.bucket(rows)
        assert size >= rows and size in h.buckets(rows) and h.bucket(size) == size


def test_buckets_of_ones_own() -> None:
    assert [h.bucket(rows, (12, 3)) for rows in (1, 3, 4, 12)] == [3, 3, 12, 12]
    with pytest.raises(ValueError, match="13 rows do not fit into the largest bucket, 12"):
        h.bucket(13, (12, 3))
    with pytest.raises(ValueError, match="at least one row"):
        h.bucket(0)


def test_what_orders_a_sum_sees_no_rows() -> None:
    for function in (h.parts, h.slices, h.slice_k, h.num_splits):
        assert not {"rows", "tile"} & set(inspect.signature(function).parameters)
    assert h.block_k(1024, "int8", 128) == h.block_k(1024, "int8", 128, looped=True)
