"""The CPU decoder's layer norm, GELU, softmax, residual and embeddings against fp64, with the same bits everywhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from musicgen_fast import native

from .test_cpu_attention import normal, same_bits

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.why_not()}")


@pytest.fixture(scope="module")
def C() -> Any:
    return native.extension()


def each_isa(C: Any, run: Any) -> np.ndarray:
    """run(isa) on every instruction set: the same bits everywhere."""
    results = [run(isa) for isa in C.attention_isas()]
    assert all(same_bits(r, results[0]) for r in results)
    return results[0]


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 100, 1024, 1536, 2048])
def test_layer_norm(C, n):
    x = normal(4, n) * np.array([[1], [1e-3], [30], [1]], np.float32) + np.array([[0], [1], [3], [100]], np.float32)
    w, b = normal(n, seed=1), normal(n, seed=2)

    def run(isa: str) -> np.ndarray:
        out = np.full_like(x, np.nan)
        C.layer_norm(x, w, b, out, isa)
        return out

    out = each_isa(C, run)
    doubles = [torch.from_numpy(t).double() for t in (x, w, b)]
    expected = F.layer_norm(doubles[0], (n,), doubles[1], doubles[2], 1e-5).numpy()
    scale = np.sqrt(x.astype(float).var(1) + 1e-5)
    for row in range(4):  # the mean itself is only known to an ulp of x
        assert np.abs(out[row] - expected[row]).max() < 2e-6 * (1 + np.abs(x[row]).max() / scale[row])
    alone = np.empty((1, n), np.float32)
    C.layer_norm(x[2:3], w, b, alone)
    assert same_bits(alone[0], out[2])
    C.layer_norm(x, w, b, x)  # in place
    assert same_bits(x, out)


def test_gelu(C):
    x = np.concatenate([np.linspace(-20, 20, 400_001), normal(100_003) * 3, [0.0, -0.0, 1e-30, -1e-30]]).astype(
        np.float32
    )

    def run(isa: str) -> np.ndarray:
        y = x.copy()
        C.gelu(y, isa)
        return y

    y = each_isa(C, run).astype(np.float64)
    expected = F.gelu(torch.from_numpy(x).double()).numpy()
    size = np.abs(x.astype(np.float64))
    assert (np.abs(y - expected) <= 2.2e-7 * np.maximum(size, 0.2)).all()
    near = (size < 10) & (x != 0)
    tail = torch.special.erfc(-torch.from_numpy(x[near]).double() / math.sqrt(2)).numpy() / 2 * x[near]
    assert (np.abs(y[near] / tail - 1) < 2.5e-6).all()  # torch's own is off by a quarter at -5
    special = np.array([np.inf, 1e30, -1e30, -100, np.nan, -np.inf], np.float32)
    C.gelu(special)
    assert special[0] == np.inf and special[1] == np.float32(1e30) and not special[2:4].any()
    assert np.isnan(special[4:]).all()  # torch gives -inf * 0 too


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 64, 1503])
def test_softmax(C, n):
    for spread in (1, 30, 1000):
        x = normal(n, seed=n) * spread

        def run(isa: str, x: np.ndarray = x) -> np.ndarray:
            y = x.copy()
            C.softmax(y, isa)
            return y

        y = each_isa(C, run)
        expected = torch.from_numpy(x).double().softmax(0).numpy()
        np.testing.assert_allclose(y, expected, rtol=1e-5 if spread > 1 else 1e-6, atol=1e-37)
    for bad in (np.nan, np.inf):
        x[n // 2] = bad
        assert np.isnan(each_isa(C, lambda isa, x=x: run(isa, x))).all()


@pytest.mark.parametrize("n", [1, 16, 33, 1024])
def test_add(C, n):
    x, y = normal(n), normal(n, seed=1)

    def run(isa: str) -> np.ndarray:
        total = x.copy()
        C.add(total, y, isa)
        return total

    assert same_bits(each_isa(C, run), x + y)


@pytest.mark.parametrize("n", [16, 20, 1024])
@pytest.mark.parametrize("fmt", ["float32", "bfloat16"])
def test_embed(C, fmt, n):
    """embed_tokens and the position's row, to the bit."""
    from musicgen_fast.model import embed_tokens, position_table

    table = torch.from_numpy(normal(4 * 9, n))
    tokens = torch.randint(0, 9, (5, 4), generator=torch.Generator().manual_seed(0))
    positions = position_table(5, n).contiguous()
    table = table.to(getattr(torch, fmt))
    given = table.numpy() if fmt == "float32" else table.view(torch.int16).numpy().view(np.uint16)

    def run(isa: str) -> np.ndarray:
        out = np.full((5, n), np.nan, np.float32)
        C.embed(tokens.numpy(), given, positions.numpy(), out, isa)
        return out

    expected = embed_tokens(table, tokens[..., None])[:, 0] + positions
    assert same_bits(each_isa(C, run), expected.numpy())
    with pytest.raises(ValueError, match="token"):
        C.embed(tokens.numpy() + 3, given, positions.numpy(), np.empty((5, n), np.float32))
