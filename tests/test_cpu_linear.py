"""The packed matrices of csrc/cpu/linear.h: layout, rounding, exact integer sums, and rows that do not see each other.

The layouts and the arithmetic are written out once more in numpy; int8 and int4 must agree with them to the bit on
every instruction set, float32 and bfloat16 with fp64 of the same weights.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from musicgen_fast import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")

FORMATS = ["float32", "bfloat16", "int8", "int4"]
INTEGERS = ["int8", "int4"]
ISAS = ["baseline", "avx2", "avxvnni", "avx512", "avx512vnni", "amx"]
TILE, GROUP = 16, 128
OFFSET = {"int8": 128, "int4": 8}
# Outputs, inputs: whole tiles and groups; a model of width 48; one of each; a group of 1, 2, 5, 44 and 127 at the end.
SHAPES = [(32, 256), (64, 48), (1, 1), (17, 129), (16, 130), (40, 133), (50, 300), (3, 255)]


@pytest.fixture(scope="module")
def C() -> Any:
    return native.extension()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, C: Any) -> str:
    if request.param not in C.linear_isas():
        pytest.skip("this processor lacks that instruction set")
    return request.param


def pack(C: Any, format: str, w: np.ndarray, finite: bool = True) -> np.ndarray:
    packed = np.full(C.linear_packed_bytes(format, *w.shape), 0xA5, np.uint8)
    assert C.linear_pack(format, w, packed) is finite
    return packed


def unpack(C: Any, format: str, packed: np.ndarray, n: int, k: int) -> np.ndarray:
    w = np.empty((n, k), np.float32)
    C.linear_unpack(format, packed, w)
    return w


def apply(C: Any, format: str, packed: np.ndarray, x: np.ndarray, n: int, isa: str, **tiles: int) -> np.ndarray:
    y = np.full((len(x), n), 7.0, np.float32)
    C.linear_apply(format, packed, x, y, isa=isa, **tiles)
    return y


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32)


def groups_of(k: int) -> list[tuple[int, int]]:
    return [(first, min(GROUP, k - first)) for first in range(0, k, GROUP)]


def parse(format: str, packed: np.ndarray, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(u [N, K] as stored, scale [N, groups]) of int8 or int4, by the layout that the header documents."""
    padded = -(-n // TILE) * TILE
    u, scale = np.zeros((padded, k), np.int64), np.zeros((padded, len(groups_of(k))), np.float32)
    at = 0
    for tile in range(0, padded, TILE):
        for g, (first, count) in enumerate(groups_of(k)):
            blocks = -(-count // 8)
            scale[tile : tile + TILE, g] = packed[at : at + 64].view(np.float32)
            body = packed[at + 64 : at + 64 + blocks * (128 if format == "int8" else 64)]
            at += 64 + len(body)
            if format == "int4":
                halves = body.reshape(blocks, TILE, 4)
                body = np.stack([halves & 15, halves >> 4], axis=1)
            rows = body.reshape(2 * blocks, TILE, 4).transpose(1, 0, 2).reshape(TILE, 8 * blocks)
            u[tile : tile + TILE, first : first + count] = rows[:, :count]
            assert (rows[:, count:] == OFFSET[format]).all()
    assert at == len(packed)
    return u[:n], scale[:n]


def reference(format: str, packed: np.ndarray, x: np.ndarray, n: int) -> np.ndarray:
    """What int8 and int4 compute, operation by operation."""
    k = x.shape[1]
    u, weight_scale = parse(format, packed, n, k)
    y = np.zeros((len(x), n), np.float32)
    for g, (first, count) in enumerate(groups_of(k)):
        part = x[:, first : first + count]
        largest = np.maximum(np.abs(part).max(axis=1, keepdims=True), np.float32(1e-30))
        q = np.rint(part * (np.float32(32512) / largest)).astype(np.int64)
        sums = q @ (u[:, first : first + count] - OFFSET[format]).T
        assert np.abs(sums).max() < 2**31 and (np.abs(q) @ u[:, first : first + count].T).max() < 2**31
        y += sums.astype(np.float32) * (weight_scale[:, g] * (largest / np.float32(32512)))
    return y


# ---- packing ----


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_float32_layout(C: Any, n: int, k: int) -> None:
    w = normal(0, n, k)
    padded = np.zeros((-(-n // TILE) * TILE, -(-k // 2) * 2), np.float32)
    padded[:n, :k] = w
    expected = np.concatenate([padded[t : t + TILE].T.ravel() for t in range(0, len(padded), TILE)])
    np.testing.assert_array_equal(pack(C, "float32", w).view(np.uint32), bits(expected))
    np.testing.assert_array_equal(unpack(C, "float32", pack(C, "float32", w), n, k), w)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_bfloat16_layout_and_rounding(C: Any, n: int, k: int) -> None:
    import torch

    w = normal(0, n, k)
    w.flat[0] = 1 + 2.0**-8  # a tie, to even
    rounded = torch.from_numpy(w).bfloat16().view(torch.int16).numpy().view(np.uint16)
    padded = np.zeros((-(-n // TILE) * TILE, -(-k // 2) * 2), np.uint16)
    padded[:n, :k] = rounded
    tiles = [padded[t : t + TILE].reshape(TILE, -1, 2).transpose(1, 0, 2).ravel() for t in range(0, len(padded), TILE)]
    np.testing.assert_array_equal(pack(C, "bfloat16", w).view(np.uint16), np.concatenate(tiles))
    np.testing.assert_array_equal(
        bits(unpack(C, "bfloat16", pack(C, "bfloat16", w), n, k)), rounded.astype(np.uint32) << 16
    )


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int8_rounds_to_the_nearest_of_255_steps(C: Any, n: int, k: int) -> None:
    w = normal(0, n, k)
    u, scale = parse("int8", pack(C, "int8", w), n, k)
    for g, (first, count) in enumerate(groups_of(k)):
        part = w[:, first : first + count]
        largest = np.abs(part).max(axis=1)
        np.testing.assert_array_equal(bits(scale[:, g]), bits(largest / np.float32(127)))
        expected = np.rint(part * (np.float32(127) / largest)[:, None]) + 128
        np.testing.assert_array_equal(u[:, first : first + count], expected)
    error = np.abs(unpack(C, "int8", pack(C, "int8", w), n, k) - w)
    assert (error <= np.repeat(scale, GROUP, axis=1)[:, :k] * 0.50001).all()


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int4_loses_at_most_what_plain_rounding_loses(C: Any, n: int, k: int) -> None:
    w = normal(0, n, k)
    packed = pack(C, "int4", w)
    u, scale = parse("int4", packed, n, k)
    unpacked = unpack(C, "int4", packed, n, k)
    assert u.min() >= 0 and u.max() <= 15
    for g, (first, count) in enumerate(groups_of(k)):
        part = w[:, first : first + count]
        values = (u[:, first : first + count] - 8) * scale[:, g, None].astype(np.float64)
        np.testing.assert_allclose(unpacked[:, first : first + count], values, rtol=1e-6)
        step = np.abs(part).max(axis=1, keepdims=True).astype(np.float64) / 7
        plain = np.square(np.rint(part / step) * step - part).sum(axis=1)
        assert (np.square(values - part).sum(axis=1) <= plain * 1.00001 + 1e-12).all()


def test_sizes_of_formats_on_normal_weights(C: Any) -> None:
    """Bytes per weight, and the relative error of the weights: what the README may promise of a format."""
    w = normal(1, 64, 1024)
    for format, per_weight, error in [("float32", 4, 0), ("bfloat16", 2, 2e-3), ("int8", 1.03125, 8e-3)]:
        packed = pack(C, format, w)
        assert len(packed) == per_weight * w.size
        assert np.linalg.norm(unpack(C, format, packed, *w.shape) - w) <= error * np.linalg.norm(w)
    packed = pack(C, "int4", w)
    assert len(packed) == 0.53125 * w.size
    assert 0.05 < np.linalg.norm(unpack(C, "int4", packed, *w.shape) - w) / np.linalg.norm(w) < 0.11


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_reported_and_felt(C: Any, format: str, bad: float, isa: str) -> None:
    w = normal(2, 20, 200)
    w[3, 150] = bad
    y = apply(C, format, pack(C, format, w, finite=False), normal(3, 2, 200), 20, isa)
    assert not np.isfinite(y[:, 3]).any()
    assert np.isfinite(np.delete(y, 3, axis=1)).all()


def test_bfloat16_reports_weights_that_round_to_infinity(C: Any) -> None:
    pack(C, "bfloat16", np.full((1, 1), 3.4e38, np.float32), finite=False)
    pack(C, "bfloat16", np.full((1, 1), 3.38e38, np.float32))


# ---- values ----


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_floats_agree_with_fp64(C: Any, format: str, n: int, k: int, isa: str) -> None:
    w, x = normal(4, n, k), normal(5, 7, k)
    packed = pack(C, format, w)
    wide = unpack(C, format, packed, n, k).astype(np.float64)
    size = np.abs(x.astype(np.float64)) @ np.abs(wide).T
    # 64 additions in a row for a group, then the groups: in practice ten times less.
    bound = (64 + len(groups_of(k)) + 2) * 2.0**-24
    assert (np.abs(apply(C, format, packed, x, n, isa) - x @ wide.T) <= bound * size).all()


@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_floats_are_alike_wherever_there_is_fma(C: Any, format: str, isa: str) -> None:
    w, x = normal(4, 50, 300), normal(5, 7, 300)
    packed = pack(C, format, w)
    if isa == "baseline":  # rounds twice: the same to a few units in the last place
        np.testing.assert_allclose(
            apply(C, format, packed, x, 50, isa), x @ unpack(C, format, packed, 50, 300).T, rtol=1e-3, atol=1e-4
        )
    else:
        np.testing.assert_array_equal(
            bits(apply(C, format, packed, x, 50, isa)), bits(apply(C, format, packed, x, 50, "avx2"))
        )


def test_bfloat16_is_float32_of_the_rounded_weights(C: Any, isa: str) -> None:
    w, x = normal(4, 50, 301), normal(5, 3, 301)
    packed = pack(C, "bfloat16", w)
    same = pack(C, "float32", unpack(C, "bfloat16", packed, 50, 301))
    np.testing.assert_array_equal(
        bits(apply(C, "bfloat16", packed, x, 50, isa)), bits(apply(C, "float32", same, x, 50, isa))
    )


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("format", INTEGERS)
def test_integers_agree_to_the_bit(C: Any, format: str, n: int, k: int, isa: str) -> None:
    """With their numpy twin, hence with each other."""
    w, x = normal(6, n, k), normal(7, 9, k)
    packed = pack(C, format, w)
    np.testing.assert_array_equal(bits(apply(C, format, packed, x, n, isa)), bits(reference(format, packed, x, n)))


@pytest.mark.parametrize("format", INTEGERS)
def test_16_bit_inputs_cost_nothing_next_to_fp32(C: Any, format: str) -> None:
    """Relative to fp64 of the same weights, 1 % of the inputs 30 times as large: 8-bit inputs would be off by 4 %."""
    w, x = normal(8, 64, 1024), normal(9, 4, 1024)
    x[:, ::100] *= 30
    packed = pack(C, format, w)
    exact = x.astype(np.float64) @ unpack(C, format, packed, 64, 1024).astype(np.float64).T
    y = apply(C, format, packed, x, 64, C.linear_isas()[-1])
    assert np.linalg.norm(y - exact) < 2e-4 * np.linalg.norm(exact)


@pytest.mark.parametrize("format", INTEGERS)
@pytest.mark.parametrize("signs", ["alike", "against", "mixed"])
def test_no_sum_overflows(C: Any, format: str, signs: str, isa: str) -> None:
    """Every weight and every input at its end of the range, for 4096 inputs: the largest sums there can be."""
    k = 4096
    w, x = np.full((16, k), 127.0, np.float32), np.full((3, k), 32512.0, np.float32)
    if signs == "against":
        x[:] = -x
    if signs == "mixed":
        w[::2] *= -1
        x[1] *= -1
        x[2, ::2] *= -1
    packed = pack(C, format, w)
    y = apply(C, format, packed, x, 16, isa)
    np.testing.assert_array_equal(bits(y), bits(reference(format, packed, x, 16)))
    exact = x.astype(np.float64) @ unpack(C, format, packed, 16, k).astype(np.float64).T
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-3)


def lattice(n: int, k: int, a: int, b: int, modulus: int, unit: int) -> np.ndarray:
    """Numbers that need no random generator: multiples of 1 / unit."""
    i, j = np.indices((n, k))
    return (((i * a + j * b) % modulus - modulus // 2) / unit).astype(np.float32)


EXACT = [1089457152, 1093329920, 3205513216, 3245096448, 1092831232, 1096908288]
GOLDEN = {
    "float32": ("6ffe88110888cfce", EXACT),
    "bfloat16": ("76e555e291b5c6f4", EXACT),
    "int8": ("09fc61d582ddebcb", [1088912865, 1093283662, 3205836740, 3245034498, 1092778382, 1096846972]),
    "int4": ("1931898e36aea8eb", [1086310189, 1090148595, 3214246162, 3241661123, 1095668460, 1096031114]),
}


@pytest.mark.parametrize("format", FORMATS)
def test_golden_bits(C: Any, format: str, isa: str) -> None:
    """Packed files stay readable, and int8 and int4 keep their bits (the floats' sums are exact here)."""
    w, x = lattice(3, 150, 37, 101, 257, 64), lattice(2, 150, 53, 29, 211, 32)
    packed = pack(C, format, w)
    digest, words = GOLDEN[format]
    assert hashlib.sha256(packed.tobytes()).hexdigest()[:16] == digest
    np.testing.assert_array_equal(bits(apply(C, format, packed, x, 3, isa)).ravel(), words)


# ---- rows and tiles ----


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [2, 3, 7, 16, 33, 46, 64, 65, 130])
def test_a_row_does_not_depend_on_the_others(C: Any, format: str, rows: int, isa: str) -> None:
    w, x = normal(10, 48, 300), normal(11, rows, 300)
    packed = pack(C, format, w)
    together = apply(C, format, packed, x, 48, isa)
    for r in range(rows):
        np.testing.assert_array_equal(bits(apply(C, format, packed, x[r : r + 1], 48, isa)[0]), bits(together[r]))


@pytest.mark.parametrize("format", FORMATS)
def test_ranges_of_tiles(C: Any, format: str, isa: str) -> None:
    """A range computes its own outputs, to the same bits, and touches no other; 70 outputs end in a tile of 6."""
    w, x = normal(12, 70, 200), normal(13, 5, 200)
    packed = pack(C, format, w)
    whole = apply(C, format, packed, x, 70, isa)
    for first, last in [(0, 5), (0, 1), (1, 4), (4, 5), (2, 2)]:
        part = apply(C, format, packed, x, 70, isa, first=first, last=last)
        inside = slice(first * TILE, last * TILE)
        np.testing.assert_array_equal(bits(part[:, inside]), bits(whole[:, inside]))
        assert (np.delete(part, np.arange(70)[inside], axis=1) == 7).all()


@pytest.mark.parametrize("format", INTEGERS)
def test_packed_bytes_may_lie_anywhere(C: Any, format: str, isa: str) -> None:
    w, x = normal(14, 20, 140), normal(15, 2, 140)
    packed = pack(C, format, w)
    moved = np.zeros(len(packed) + 1, np.uint8)[1:]
    moved[:] = packed
    np.testing.assert_array_equal(apply(C, format, moved, x, 20, isa), apply(C, format, packed, x, 20, isa))


# ---- extremes ----


@pytest.mark.parametrize("format", FORMATS)
def test_zeros(C: Any, format: str, isa: str) -> None:
    """A group of zero weights, an output of them, a row of zero inputs."""
    w, x = normal(16, 18, 300), normal(17, 3, 300)
    w[:, 128:256] = 0
    w[5] = 0
    x[1] = 0
    packed = pack(C, format, w)
    y = apply(C, format, packed, x, 18, isa)
    assert (y[:, 5] == 0).all() and (y[1] == 0).all()
    exact = x.astype(np.float64) @ unpack(C, format, packed, 18, 300).astype(np.float64).T
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("format", FORMATS)
def test_an_outlier_spoils_its_own_group_only(C: Any, format: str, isa: str) -> None:
    w, x = normal(18, 16, 384), normal(19, 2, 384)
    w[2, 200] = 1e4
    packed = pack(C, format, w)
    unpacked = unpack(C, format, packed, 16, 384)
    assert unpacked[2, 200] == pytest.approx(1e4, rel=4e-3)
    rest = np.abs(unpacked - w)
    rest[2, 128:256] = 0
    assert rest.max() < (1.5 if format == "int4" else 0.02)  # int4 clips the others
    exact = x.astype(np.float64) @ unpacked.astype(np.float64).T
    error = np.abs(apply(C, format, packed, x, 16, isa) - exact)
    assert np.delete(error, 2, axis=1).max() < 0.01
    assert error[:, 2].max() < 1e4 * np.abs(x).max() / 65024 + 0.01  # half a step of a 16-bit input


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-25, 1e25, 1e30])
def test_weights_and_inputs_of_any_size(C: Any, format: str, size: float, isa: str) -> None:
    """Tiny ones may vanish, huge ones stay exact; nothing becomes NaN."""
    w, x = normal(20, 16, 130), normal(21, 2, 130)
    for weights, inputs in [(w * np.float32(size), x), (w, x * np.float32(size))]:
        packed = pack(C, format, weights)
        exact = inputs.astype(np.float64) @ unpack(C, format, packed, 16, 130).astype(np.float64).T
        y = apply(C, format, packed, inputs, 16, isa)
        assert np.isfinite(y).all()
        np.testing.assert_allclose(y, exact, rtol=2e-3, atol=max(size * 0.01, 1e-30))
        if format in INTEGERS:
            np.testing.assert_array_equal(bits(y), bits(reference(format, packed, inputs, 16)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_spoil_their_own_row(C: Any, format: str, bad: float, isa: str) -> None:
    w, x = normal(22, 20, 300), normal(23, 9, 300)
    packed = pack(C, format, w)
    clean = apply(C, format, packed, x, 20, isa)
    x[4, 290] = bad
    y = apply(C, format, packed, x, 20, isa)
    assert not np.isfinite(y[4]).any()
    if np.isnan(bad) or format in INTEGERS:
        assert np.isnan(y[4]).all()
    np.testing.assert_array_equal(bits(np.delete(y, 4, axis=0)), bits(np.delete(clean, 4, axis=0)))


# ---- arguments ----


def test_the_best_instruction_set_is_the_default(C: Any) -> None:
    names = C.linear_isas()
    assert names[0] == "baseline" and [name for name in ISAS if name in names] == names
    w, x = normal(24, 16, 64), normal(25, 2, 64)
    packed = pack(C, "float32", w)
    y = np.empty((2, 16), np.float32)
    C.linear_apply("float32", packed, x, y)
    np.testing.assert_array_equal(bits(y), bits(apply(C, "float32", packed, x, 16, names[-1])))


def test_wrong_arguments_are_refused(C: Any) -> None:
    w, x = normal(26, 16, 64), normal(27, 2, 64)
    packed = pack(C, "int8", w)
    y = np.zeros((2, 16), np.float32)
    with pytest.raises(ValueError, match="float32, bfloat16, int8 or int4"):
        C.linear_packed_bytes("int5", 16, 64)
    with pytest.raises(ValueError, match="at least 1"):
        C.linear_packed_bytes("int8", 16, 0)
    with pytest.raises(ValueError, match="another size"):
        C.linear_pack("int8", w, packed[:-1])
    with pytest.raises(ValueError, match="another size"):
        C.linear_apply("int4", packed, x, y)
    with pytest.raises(ValueError, match="another size"):
        C.linear_unpack("int8", packed, np.zeros((16, 200), np.float32))
    with pytest.raises(ValueError, match="differ in rows"):
        C.linear_apply("int8", packed, x, y[:1])
    with pytest.raises(ValueError, match="no such tiles"):
        C.linear_apply("int8", packed, x, y, first=1, last=2)
    with pytest.raises(ValueError, match="no instruction set of that name"):
        C.linear_apply("int8", packed, x, y, isa="mmx")
    with pytest.raises(TypeError):  # a float64 output would be filled as a copy and lost
        C.linear_apply("int8", packed, x, y.astype(np.float64))
