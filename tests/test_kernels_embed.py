"""The first and the last kernel of a step under Triton's interpreter: embeddings bit for bit, counters exactly."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from musicgen_fast.kernels import reference

from .test_kernels_attention import DTYPES, interpreted

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_gives_the_same_bits(dtype: str) -> None:
    assert interpreted("test_kernels_embed", "check_embed", dtype) == []


def test_advance() -> None:
    assert interpreted("test_kernels_embed", "check_advance") == []


# -- in the child, or on a device -------------------------------------------------------------------------------------


def check_embed(dtype: str, device: str = "cpu") -> list:
    """K, d, V, R, Q: one codebook, a width in two blocks, rows that take no part."""
    from musicgen_fast.kernels.embed import embed

    wrong: list = []
    for shape in ((1, 32, 10, 2, 1), (4, 48, 64, 9, 5), (8, 1536, 20, 4, 4)):
        num_codebooks, width, vocab, rows, requests = shape
        g = torch.Generator().manual_seed(width)
        sequence = torch.randint(0, vocab + 1, (requests, num_codebooks, 30), generator=g)
        sequence[0, :, 3] = -1  # unknown, as while nothing has been drawn: counts as 0
        request = torch.arange(rows) % requests
        fed = torch.randint(4, 30, (rows,), generator=g)
        length = torch.randint(0, 40, (rows,), generator=g)
        fed[0], length[0] = 3, 0
        fed[-1], length[-1], request[-1] = -1, -1, -1
        table = torch.randn(num_codebooks * (vocab + 1), width, generator=g).to(DTYPES[dtype])
        positions, x = torch.randn(40, width, generator=g), torch.full((rows, width), torch.nan)
        inputs = [sequence, request.int(), fed.int(), length.int(), table, positions]
        expected, x = x.clone(), x.to(device)
        reference.embed(*inputs, expected)
        embed(*(t.to(device) for t in inputs), x)
        if not torch.equal(x.cpu(), expected) or x[-1].any():
            wrong.append((shape, (x.cpu() - expected).abs().max().item()))
    return wrong


def check_advance(device: str = "cpu") -> list:
    from musicgen_fast.kernels.embed import advance

    wrong: list = []
    for rows, requests, board in ((1, 1, 1), (2, 1, 3), (6, 3, 3), (192, 96, 130)):
        g = torch.Generator().manual_seed(rows)
        length = torch.randint(-1, 5, (rows,), generator=g).int()
        fed, column = (torch.randint(0, 9, (n,), generator=g).int() for n in (rows, board))
        step = torch.randint(0, 2**40, (board,), generator=g)
        request = torch.randperm(board, generator=g)[:requests].int()
        request[torch.rand(requests, generator=g) < 0.3] = -1
        mine = [t.to(device, copy=True) for t in (fed, length, request, column, step)]
        theirs = [t.clone() for t in (fed, length, request, column, step)]
        advance(*mine)
        reference.advance(*theirs)
        wrong += [(rows, i) for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if not torch.equal(a.cpu(), b)]
    return wrong
