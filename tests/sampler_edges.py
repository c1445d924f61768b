"""Rows made to hit one edge each, for every backend: where one token too many or too few is kept, it shows.

`edge_draws` names them. Their noise lets the last kept token of the row win (`with_edge_noise`), so that a draw tells
where the filters cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from musicgen_fast.sampling import Draw, SamplingParams, reference

from .sampler_cases import random_draw


def with_edge_noise(draw: Draw) -> Draw:
    """The same draw, with noise with which the last kept token of the sorted row wins."""
    params = draw.params
    mixed = reference.mix_branches(draw.logits, params.cfg_coef, params.cfg_coef_beta)
    z = reference.scaled(mixed, params, draw.logits.dtype, divide=False)
    order = z.sort(dim=-1, descending=True, stable=True).indices
    score = 2 - torch.arange(z.shape[-1]) / z.shape[-1]
    by_token = torch.empty(z.shape).scatter_(-1, order, score.expand(z.shape))
    exponent = ((z - z.amax(-1, keepdim=True)) * reference.LOG2E).nan_to_num(0.0).clamp(-126, 0)
    draw.noise, draw.seed, draw.step, draw.stream = by_token * exponent.exp2(), None, None, None
    return draw


def row_draw(logits: Tensor, **params) -> Draw:
    """A draw for logits [V] with edge noise, a cell for each value of the parameter that is a list."""
    cells = next((len(value) for value in params.values() if isinstance(value, list)), 1)
    values = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in params.items()}
    tokens, status = torch.zeros(cells, 1, dtype=torch.int64), torch.zeros(cells, 1, dtype=torch.int32)
    draw = Draw(logits.expand(1, cells, 1, -1), SamplingParams.build(cells, 1, **values), tokens, status)
    return with_edge_noise(draw)


def power(exponent: int) -> float:
    """A logit whose weight beside one of 0 is exactly 2^exponent."""
    z = torch.tensor(exponent / reference.LOG2E)
    near = [z, z.nextafter(torch.tensor(0.0)), z.nextafter(torch.tensor(-math.inf))]
    return next(x.item() for x in near if x * reference.LOG2E == exponent)


def edge_draws(random_rows: int = 10) -> Iterator[tuple[str, Draw]]:
    """Each edge by name; `random_rows` draws of mixed rows on top."""
    yield from _top_k_edges()
    yield from _top_p_edges()
    below = torch.tensor([-(2.0**-99), 2.0**-100, 0.0, 2.0**-99, -0.0, 2.0**-98])
    yield "what becomes subnormal is zero", row_draw(below, top_k=[1, 3, 5], temperature=2.0**28)
    yield "signed zeros are one maximum", row_draw(torch.tensor([-1.0, -0.0, 0.0, -0.0]), temperature=0.0)
    yield "the smallest weight still counts", row_draw(torch.tensor([0.0, power(-126), -90.0]))
    yield "min-p includes its limit", row_draw(torch.tensor([0.0, power(-3), power(-4)]), min_p=[0.125, 0.1250001])
    for top_k in (0, 1):
        heat = row_draw(torch.arange(2048).remainder(4).eq(3).float() * 5, top_k=top_k)
        heat.noise = torch.where(heat.logits[0] > 0, 1.0, 1e4)
        yield f"a dead heat goes to the lowest token, top_k {top_k}", heat
    for seed in range(random_rows):
        draw = random_draw(seed, 48, column=False, noise=True)
        if not draw.params.all_greedy:
            yield f"random rows {seed}", with_edge_noise(draw)


def _top_k_edges() -> Iterator[tuple[str, Draw]]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for sign in (1, -1):
            # consecutive numbers of the dtype: a search must not stop a bit too early
            integer = torch.int32 if dtype == torch.float32 else torch.int16
            near = torch.tensor(0.1 * sign, dtype=dtype).view(integer) + torch.arange(64, dtype=integer)
            logits = torch.cat([torch.tensor([0.3], dtype=dtype), near.view(dtype)])
            yield f"top-k between neighbours of {dtype} {sign:+}", row_draw(logits, top_k=list(range(1, 66)))
    every = list(range(1, 65))
    rows = {
        "groups of eight": torch.arange(64).div(8, rounding_mode="floor").float(),
        "two values": torch.cat([torch.full((50,), -3.0), torch.full((14,), 2.0)]),
        "signed zeros": torch.cat([torch.tensor([9.0]), torch.tensor([0.0, -0.0]).repeat(32)[1:]]),
        "around 2^-126": torch.cat([torch.tensor([0.0]), torch.linspace(-86, -89, 63)]),
        "few finite": torch.cat([torch.full((56,), -math.inf), torch.arange(8.0)]),
        "overflow": torch.cat([torch.full((32,), 3e38), torch.arange(32.0)]),
    }
    for name, row in rows.items():
        yield f"top-k, {name}", row_draw(row, top_k=every)
        yield f"top-p, {name}", row_draw(row, top_p=[0.001, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999999])
    # Whoever looks at every 16th token first, to guess the threshold, guesses far too high here, or far too low.
    spread = torch.randn(2048, generator=torch.Generator().manual_seed(0))
    for offset in (30.0, -30.0):
        misled = spread + offset * (torch.arange(2048) % 16 == 0)
        yield f"top-k where a sample misleads by {offset}", row_draw(misled, top_k=[10, 127, 129, 250, 1000])


def _top_p_edges() -> Iterator[tuple[str, Draw]]:
    """The mass is a sum of 2^40 w; limit = floor(p x mass), and what begins at the limit exactly is inside."""
    # Before the third of four equal tokens lies 2^41, one unit more than the limit of 2^41 - 1.
    four = torch.tensor([0.0, 0.0, 0.0, 0.0, power(-22)])
    yield "top-p, one unit over the limit in a tie", row_draw(four, top_p=0.5 - 2.0**-25)
    # Two tokens of 2^40, 16 of 2^18, one of 8 and one of 1: p makes the limit 2^41, where the third token begins.
    two = torch.tensor([0.0, 0.0] + [power(-22)] * 16 + [power(-37), power(-40)])
    yield "top-p, at the limit between two values", row_draw(two, top_p=1 - 2.0**-19)
    # Without the unit of the last one the limit is 2^41 - 1, and the third token is out.
    yield "top-p, one unit over the limit between two values", row_draw(two[:-1], top_p=1 - 2.0**-19)
    for top_p in (0.01, 0.37, 0.5, 0.9999):
        for seed in range(3):  # a tie that spans many lanes, warps or blocks: index order splits it
            logits = torch.randint(0, 3, (4096,), generator=torch.Generator().manual_seed(seed)).float()
            yield f"top-p {top_p} within a tie {seed}", row_draw(logits, top_p=top_p, temperature=[1.7, 1.0, 0.5])
