"""The CPU decoder's KV cache and attention against fp64, on every instruction set and to the bit across them."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from musicgen_fast import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")

ISAS = ("baseline", "avx2", "avx512")
FORMATS = ("float32", "bfloat16", "int8")
HEAD_DIMS = (64, 16, 32, 48, 80, 96, 128, 8, 33)
POISON = 255  # of every byte: NaN as float32 and as bfloat16, 127 as an int8
# Relative to fp64 on the same stored numbers. int8: queries and weights have 16 bits.
STORED = {"float32": 1e-6, "bfloat16": 1e-6, "int8": 1e-4}


@pytest.fixture(scope="module")
def C() -> Any:
    return native.extension()


def need(C: Any, isa: str) -> str:
    if isa not in C.attention_isas():
        pytest.skip(f"this processor lacks {isa}")
    return isa


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def stored(x: np.ndarray, fmt: str) -> np.ndarray:
    """What a cache keeps of vectors [..., dh], as float64."""
    if fmt == "bfloat16":
        return torch.from_numpy(x).bfloat16().double().numpy()
    if fmt == "int8":
        largest = np.abs(x).max(-1, keepdims=True)
        steps = np.rint(x * (np.float32(127) / largest))
        return steps.astype(np.float64) * (largest / np.float32(127)).astype(np.float64)
    return x.astype(np.float64)


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, length: int) -> np.ndarray:
    """Attention of one query [dh] in float64."""
    scores = k[:length] @ q.astype(np.float64) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max())
    return weights @ v[:length] / weights.sum()


def attend(cache: Any, items: list, q: np.ndarray, isa: str = "", pool: Any = None) -> np.ndarray:
    out = np.full_like(q, np.nan)
    cache.attend(np.array(items, np.int32), q, 1 / math.sqrt(q.shape[1]), out, isa, pool)
    return out


def prefill(cache: Any, first: int, q: np.ndarray, isa: str) -> np.ndarray:
    out = np.full_like(q, np.nan)
    cache.prefill(0, 0, first, q, 1 / math.sqrt(q.shape[1]), out, isa)
    return out


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def filled(C: Any, fmt: str, head_dim: int, capacity: int, seed: int = 0) -> tuple[Any, np.ndarray, np.ndarray]:
    """A poisoned cache of one row and head, filled to its capacity, and what went in."""
    k, v = normal(capacity, head_dim, seed=seed), normal(capacity, head_dim, seed=seed + 1)
    cache = C.KvCache(fmt, 1, 1, head_dim, capacity, POISON)
    cache.append(0, 0, 0, k, v)
    return cache, k, v


# -- against fp64 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_attention_equals_fp64(C, fmt, head_dim, isa):
    need(C, isa)
    cache, k, v = filled(C, fmt, head_dim, 201)
    lengths = [1, 2, 3, 4, 5, 15, 16, 17, 33, 63, 64, 65, 66, 127, 128, 129, 130, 191, 201]
    q = normal(len(lengths), head_dim, seed=3)
    out = attend(cache, [(0, 0, n) for n in lengths], q, isa)
    k, v = stored(k, fmt), stored(v, fmt)
    for i, n in enumerate(lengths):
        assert relative(out[i], exact(q[i], k, v, n)) < STORED[fmt], n


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_length_of_a_poisoned_cache(C, fmt):
    """A position is stored, then attended: whatever lies behind it is NaN, and must not be used."""
    head_dim, capacity = 48, 133
    k, v, q = (normal(capacity, head_dim, seed=s) for s in range(3))
    cache = C.KvCache(fmt, 1, 1, head_dim, capacity, POISON)
    ks, vs = stored(k, fmt), stored(v, fmt)
    for n in range(1, capacity + 1):
        cache.append(0, 0, n - 1, k[n - 1 : n], v[n - 1 : n])
        for isa in C.attention_isas():
            out = attend(cache, [(0, 0, n)], q[n - 1 : n], isa)[0]
            assert relative(out, exact(q[n - 1], ks, vs, n)) < STORED[fmt], (n, isa)
            assert same_bits(prefill(cache, n - 1, q[n - 1 : n], isa)[0], out)


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_a_whole_window(C, spread):
    """1503 positions, with flat and with peaked weights. float32 stays within 1e-6 of fp64."""
    for fmt in FORMATS:
        cache, k, v = filled(C, fmt, 64, 1503)
        q = spread * normal(6, 64, seed=5)
        out = attend(cache, [(0, 0, 1503)] * 6, q)
        expected = np.stack([exact(x, stored(k, fmt), stored(v, fmt), 1503) for x in q])
        assert relative(out, expected) < STORED[fmt] * (2 if spread > 1 and fmt == "float32" else 1)


@pytest.mark.parametrize("isa", ISAS)
def test_torch_agrees(C, isa):
    """The operation itself: what scaled_dot_product_attention computes."""
    need(C, isa)
    cache, k, v = filled(C, "float32", 64, 77)
    q = normal(1, 64, seed=9)
    query, keys, values = (torch.from_numpy(x)[None, None] for x in (q, k, v))
    theirs = F.scaled_dot_product_attention(query, keys, values)
    np.testing.assert_allclose(attend(cache, [(0, 0, 77)], q, isa), theirs[0, 0].numpy(), rtol=2e-5, atol=1e-6)


# -- int8 ---------------------------------------------------------------------------------------------------------


def test_int8_against_what_was_stored(C):
    """Relative error of the output over 700 positions; a channel that is 20 times larger than the others costs most."""
    k, v, q = normal(700, 64), normal(700, 64, seed=1), normal(20, 64, seed=2)
    spoilt = k.copy()
    spoilt[:, 5] *= 20
    for keys, bound in ((k, 0.012), (spoilt, 0.15)):
        cache = C.KvCache("int8", 1, 1, 64, 700)
        cache.append(0, 0, 0, keys, v)
        out = attend(cache, [(0, 0, 700)] * len(q), q)
        error = relative(out, np.stack([exact(x, keys, v, 700) for x in q]))
        assert bound / 6 < error < bound


@pytest.mark.parametrize("isa", ISAS)
def test_int8_sums_do_not_overflow(C, isa):
    """The largest sums there are: 256 dims and 1503 equal positions, all of the largest number."""
    need(C, isa)
    k, v = np.full((1503, 256), -3, np.float32), np.full((1503, 256), 7, np.float32)
    cache = C.KvCache("int8", 1, 1, 256, 1503, POISON)
    cache.append(0, 0, 0, k, v)
    scores = np.empty(1504, np.float32)
    cache.scores(0, 0, np.full(256, 2, np.float32), 0, 1.0, scores, isa)
    np.testing.assert_allclose(scores[:1503], -3 * 2 * 256, rtol=1e-5)
    np.testing.assert_allclose(attend(cache, [(0, 0, 1503)], k[:1], isa), 7, rtol=1e-5)


def test_int8_of_nothing_and_of_little(C):
    k = np.zeros((3, 16), np.float32)
    v = np.stack([np.zeros(16), np.full(16, 1e-31), np.full(16, 1e-20)]).astype(np.float32)
    cache = C.KvCache("int8", 1, 1, 16, 3, POISON)
    cache.append(0, 0, 0, k, v)
    for isa in C.attention_isas():
        np.testing.assert_allclose(attend(cache, [(0, 0, 3)], k[:1] + 1, isa), 1e-20 / 3, rtol=1e-4)
    with pytest.raises(ValueError, match="256 dims"):
        C.KvCache("int8", 1, 1, 257, 3)


# -- to the bit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_instruction_sets_agree_to_the_bit(C, fmt, head_dim):
    isas = C.attention_isas()
    if len(isas) == 1:
        pytest.skip("this processor has one instruction set only")
    cache, k, v = filled(C, fmt, head_dim, 213)
    q = normal(213, head_dim, seed=3)
    items = [(0, 0, n + 1) for n in range(213)]
    expected = attend(cache, items, q, "baseline")
    for isa in isas:
        other = C.KvCache(fmt, 1, 1, head_dim, 213, POISON)
        other.append(0, 0, 0, k, v, isa)
        assert same_bits(attend(other, items, q, isa), expected), isa
        assert same_bits(prefill(other, 0, q, isa), expected), isa


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_prefill_is_its_steps(C, fmt, isa):
    """In blocks of any size: the bits of one `attend` for each query, with only the stored positions readable."""
    need(C, isa)
    longer, k, v = filled(C, fmt, 64, 300)
    q = normal(150, 64, seed=3)
    steps = attend(longer, [(0, 0, n + 1) for n in range(150)], q, isa)
    for size in (150, 1, 2, 3, 7, 64, 149):
        fresh = C.KvCache(fmt, 1, 1, 64, 150, POISON)
        for first in range(0, 150, size):
            last = min(150, first + size)
            fresh.append(0, 0, first, k[first:last], v[first:last], isa)
            assert same_bits(prefill(fresh, first, q[first:last], isa), steps[first:last]), (size, first)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_head_depends_on_nothing_else(C, fmt):
    """Rows, heads, order, companions and threads: the same bits for the same keys, values and query."""
    rows, heads, capacity = 3, 5, 90
    rng = np.random.default_rng(0)
    k, v = normal(rows, heads, capacity, 32), normal(rows, heads, capacity, 32, seed=1)
    cache = C.KvCache(fmt, rows, heads, 32, capacity, POISON)
    items = [(r, h, int(rng.integers(1, capacity + 1))) for r in range(rows) for h in range(heads)]
    for r, h, n in items:
        cache.append(r, h, 0, k[r, h, :n], v[r, h, :n])
    q = normal(len(items), 32, seed=2)
    together = attend(cache, items, q)
    assert np.isfinite(together).all()
    for threads in (2, 3, 7):
        assert same_bits(attend(cache, items, q, pool=C.Pool(threads)), together)
    order = rng.permutation(len(items))
    assert same_bits(attend(cache, [items[i] for i in order], q[order]), together[order])
    for i, (r, h, n) in enumerate(items):
        alone = C.KvCache(fmt, 1, 1, 32, n, POISON)
        alone.append(0, 0, 0, k[r, h, :n], v[r, h, :n])
        assert same_bits(attend(alone, [(0, 0, n)], q[i : i + 1])[0], together[i])


# -- NaN, texts, layout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_nan_goes_where_it_belongs(C, fmt, isa):
    need(C, isa)
    q = normal(3, 32, seed=2)
    for payload in (0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF):
        nan = np.array([payload], np.uint32).view(np.float32)[0]
        for what in range(3):
            k, v = normal(100, 32), normal(100, 32, seed=1)
            (k, v, q.copy())[what][70 if what < 2 else 1, 9] = nan
            queries = q.copy()
            if what == 2:
                queries[1, 9] = nan
            cache = C.KvCache(fmt, 1, 1, 32, 100)
            cache.append(0, 0, 0, k, v, isa)
            bad = np.isnan(attend(cache, [(0, 0, 100), (0, 0, 71), (0, 0, 70)], queries, isa))
            if what == 2:
                assert bad[1].all() and not bad[[0, 2]].any()
            else:
                assert not bad[2].any() and bad[:2, 9].all()
                assert bad[:2].all() or (what == 1 and fmt != "int8" and bad[:2].sum() == 2)
            steps = prefill(cache, 68, q, isa)  # a NaN of the last position must not reach queries before it
            if what < 2:
                assert not np.isnan(steps[:2]).any() and np.isnan(steps[2, 9])


@pytest.mark.parametrize("fmt", FORMATS)
def test_texts_of_any_length(C, fmt):
    """Cross-attention: N states per row, as many as the row's text has; none contributes exactly nothing."""
    lengths = [0, 1, 7, 20]
    k, v = normal(4, 20, 64), normal(4, 20, 64, seed=1)
    cache = C.KvCache(fmt, 4, 1, 64, 20, POISON)
    for r, n in enumerate(lengths):
        cache.append(r, 0, 0, k[r, :n], v[r, :n])
    q = normal(4, 64, seed=2)
    out = attend(cache, [(r, 0, n) for r, n in enumerate(lengths)], q)
    assert not out[0].any()
    for r, n in list(enumerate(lengths))[1:]:
        assert relative(out[r], exact(q[r], stored(k[r], fmt), stored(v[r], fmt), n)) < STORED[fmt]


@pytest.mark.parametrize(("fmt", "bound"), [("float32", 2e-6), ("bfloat16", 6e-3)])
def test_absorbed_cross_attention(C, fmt, bound):
    """h A^T -> softmax per head -> p B, with the projections folded into A and B [H * N, d]."""
    heads, states, width, dh = 4, 11, 96, 24
    h, wq, wo = normal(width), normal(width, width, seed=1), normal(width, width, seed=2)
    k, v = normal(heads, states, dh, seed=3) / 10, normal(heads, states, dh, seed=4)
    A = np.einsum("hne,hed->hnd", k, wq.reshape(heads, dh, width)).reshape(-1, width) / math.sqrt(dh)
    B = np.einsum("hne,dhe->hnd", v, wo.reshape(width, heads, dh)).reshape(-1, width)
    cache = C.KvCache(fmt, 1, 1, width, heads * states, POISON)
    cache.append(0, 0, 0, A, B)
    for isa in C.attention_isas():
        scores = np.empty(48, np.float32)
        cache.scores(0, 0, h, 0, 1.0, scores[:32], isa)
        cache.scores(0, 0, h, 2, 1.0, scores[32:], isa)
        weights = scores[: heads * states].reshape(heads, states).copy()
        for row in weights:
            C.softmax(row, isa)
        x = np.full(width, np.nan, np.float32)
        cache.combine(0, 0, weights.reshape(-1), 0, x[:32], isa)
        cache.combine(0, 0, weights.reshape(-1), 32, x[32:], isa)
        q = (wq.astype(np.float64) @ h).reshape(heads, dh)
        expected = wo.astype(np.float64) @ np.concatenate([exact(q[i], k[i], v[i], states) for i in range(heads)])
        assert relative(x, expected) < bound


def test_positions_are_written_again(C):
    """A window that starts over: what a position held before is gone."""
    for fmt in FORMATS:
        cache, _, _ = filled(C, fmt, 32, 40, seed=7)
        fresh, k, v = filled(C, fmt, 32, 40)
        cache.append(0, 0, 20, k[20:], v[20:])
        cache.append(0, 0, 0, k[:20], v[:20])
        q = normal(1, 32, seed=2)
        assert same_bits(attend(cache, [(0, 0, 40)], q), attend(fresh, [(0, 0, 40)], q))


@pytest.mark.parametrize(("fmt", "size"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_layout(C, fmt, size):
    """The addresses that attention.h promises, and not a byte outside a position's own."""
    dims, positions, group = 32, 48, 4 // size
    cache = C.KvCache(fmt, 2, 3, 20, 40)  # rounded up to 32 and 48
    scales = 8 * positions if fmt == "int8" else 0
    assert cache.head_bytes == 2 * dims * positions * size + scales and cache.bytes == 6 * cache.head_bytes
    assert cache.address % 64 == 0
    memory = np.ctypeslib.as_array((ctypes.c_ubyte * cache.bytes).from_address(cache.address))
    k, v = normal(1, 20), normal(1, 20, seed=1)
    cache.append(1, 2, 37, k, v)
    head = memory[5 * cache.head_bytes :]
    kind = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.uint8}[fmt]
    lines = head[: 2 * dims * positions * size].view(kind)
    keys = lines[: dims * positions].reshape(positions // 16, dims // group, 16, group)
    values = lines[dims * positions :].reshape(positions // group, dims, group)
    got_k, got_v = keys[37 // 16, :, 37 % 16].reshape(-1)[:20], values[37 // group, :20, 37 % group]
    if fmt == "int8":
        at = head[2 * dims * positions :].view(np.float32)
        assert at[37] == np.abs(k).max() / np.float32(127)
        got_k = (got_k.astype(np.float32) - 128) * at[37]
        got_v = (got_v.astype(np.float32) - 128) * at[positions + 37]
    elif fmt == "bfloat16":
        got_k, got_v = ((x.astype(np.uint32) << 16).view(np.float32) for x in (got_k, got_v))
    np.testing.assert_allclose(got_k, stored(k, fmt)[0], rtol=1e-6)
    np.testing.assert_allclose(got_v, stored(v, fmt)[0], rtol=1e-6)
    assert np.count_nonzero(memory) <= 2 * 20 * size + (8 if fmt == "int8" else 0)


def test_refusals(C):
    with pytest.raises(ValueError, match="float32, bfloat16 or int8"):
        C.KvCache("float16", 1, 1, 64, 10)
    with pytest.raises(ValueError, match="at least one"):
        C.KvCache("float32", 1, 0, 64, 10)
    cache, k, v = filled(C, "float32", 16, 10)
    for bad in ((0, 0, 11), (1, 0, 1), (0, 1, 1), (0, 0, -1)):
        with pytest.raises(ValueError):
            attend(cache, [bad], k[:1])
    with pytest.raises(ValueError, match="capacity"):
        cache.append(0, 0, 9, k[:2], v[:2])
    with pytest.raises(ValueError, match="instruction set"):
        attend(cache, [(0, 0, 1)], k[:1], "sse9")
    with pytest.raises(MemoryError):
        C.KvCache("float32", 2**15, 2**10, 128, 2**12)
