"""Random draws for the samplers: every kind of row, filter, counter and output, mixed within a batch, by seed.

`random_draw` fills one `Draw` with vectorised torch, fast enough for millions of rows; `compare` runs it through a
backend and through the reference, and says which cells differ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from musicgen_fast.sampling import Draw, SamplingParams, reference
from musicgen_fast.sampling.draw import DTYPES

VOCABS = (1, 5, 400, 1000, 1024, 2048, 4096)
KINDS = (
    "normal", "narrow", "wide", "ties", "flat", "half -inf", "few finite", "nan", "+inf", "-inf", "spike", "zeros",
    "negative", "huge",
)  # fmt: skip


def random_draws(seed: int, rows: int, batch_rows: int, *, divide: bool = False) -> Iterator[Draw]:
    """Draws of about `batch_rows` cells each until there are `rows`; see `random_draw`."""
    index = 0
    while rows > 0:
        draw = random_draw(seed * 1_000_003 + index, min(rows, batch_rows), divide=divide)
        yield draw
        rows -= draw.status.numel()
        index += 1


def random_draw(
    seed: int,
    rows: int,
    *,
    vocab: int | None = None,
    branches: int | None = None,
    dtype: torch.dtype | None = None,
    noise: bool | None = None,
    column: bool | None = None,
    divide: bool = False,
) -> Draw:
    """At least `rows` cells (requests x codebooks), on the CPU; what is None is chosen by the seed."""
    g = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=g))]

    vocab = vocab or pick(*VOCABS)
    branches = branches or pick(1, 2, 3)
    dtype = dtype or pick(*DTYPES)
    num_codebooks = min(pick(1, 4, 8), max(rows, 1))
    batch = -(-rows // num_codebooks)
    cells = (batch, num_codebooks)

    logits = _strided(random_logits((branches, *cells, vocab), g).to(dtype), pick("dense", "padded", "requests first"))
    # Absent filters are compiled out, so every subset is drawn; where a filter is present, some cells turn it off.
    flags = [pick(False, True) for _ in range(3)]
    params = _params(cells, vocab, flags, g, all_greedy=pick(*[False] * 15, True))
    use_noise = pick(False, False, True) if noise is None else noise
    use_column = pick(False, True) if column is None else column
    draw = Draw(logits, params, torch.empty(0), torch.zeros(cells, dtype=torch.int32), divide=divide)
    if use_noise:
        draw.noise = torch.empty(*cells, vocab).exponential_(1, generator=g)
    elif not (params.all_greedy and pick(False, True)):
        draw.seed, draw.step, draw.stream = _counters(batch, g)
    _add_output(draw, pick(torch.int32, torch.int64), use_column, g)
    return draw


def random_logits(shape: tuple[int, int, int, int], g: torch.Generator) -> Tensor:
    """fp32 [NB, B, K, V], each cell of a random kind (`KINDS`)."""
    branches, *cells, vocab = shape
    base = torch.randn(shape, generator=g)
    u = torch.rand(shape, generator=g)
    kind = torch.randint(len(KINDS), (1, *cells, 1), generator=g)
    kind[torch.rand(kind.shape, generator=g) < 0.3] = 0  # more of what models give
    spread = 0.5 + 3.5 * torch.rand(kind.shape, generator=g)

    def put(name: str, values: Tensor | float, where: Tensor | bool = True) -> None:
        nonlocal logits
        logits = torch.where((kind == KINDS.index(name)) & torch.as_tensor(where), values, logits)

    logits = base * spread
    put("narrow", 8 + base * 1e-3)
    put("wide", logits * 20)
    put("ties", (logits * 4).round() / 4)
    put("flat", spread)
    put("half -inf", -math.inf, u[:1] < 0.5)  # the same tokens in all branches, or CFG makes NaN of them
    put("few finite", -math.inf, u[:1] < 1 - 20 / vocab)
    put("nan", math.nan, u < 0.02)
    put("+inf", math.inf, u < 0.01)
    put("-inf", -math.inf)
    put("spike", logits + 25, u[:1] < 3 / vocab)
    put("zeros", torch.where(u < 0.3, 0.0, torch.where(u < 0.6, -0.0, base * 2.0**-90)))
    put("negative", -logits.abs().exp())
    put("huge", base * 1e30)
    # One request in a hundred cannot be served by NaN either, next to neighbours that can.
    return torch.where(torch.rand((1, *cells, 1), generator=g) < 0.01, math.nan, logits)


def compare(draw: Draw, backend: Callable[[Draw], None]) -> list[tuple]:
    """(index, token of the backend, of the reference) where outputs differ, and likewise for the status."""
    outputs = []
    for run in (backend, reference.draw):
        mine = copy.copy(draw)
        mine.tokens, mine.status = draw.tokens.clone(), draw.status.clone()
        run(mine)
        outputs.append((mine.tokens, mine.status))
    return [
        (tuple(index), actual[tuple(index)].item(), expected[tuple(index)].item())
        for actual, expected in zip(*outputs, strict=True)
        for index in (actual != expected).nonzero().tolist()
    ]


def describe(draw: Draw) -> str:
    """For the message of a failed comparison."""
    p = draw.params
    parts = [f"logits {list(draw.logits.shape)} {draw.logits.dtype} strides {draw.logits.stride()}"]
    parts += [name for name in ("any_top_k", "any_top_p", "any_min_p", "all_greedy") if getattr(p, name)]
    parts += [name for name in ("noise", "column") if getattr(draw, name) is not None]
    return ", ".join(parts)


def _strided(logits: Tensor, layout: str) -> Tensor:
    """The same values in memory that is dense, has gaps, or keeps the branches of a request together."""
    if layout == "padded":
        branches, batch, num_codebooks, vocab = logits.shape
        memory = torch.full((branches, batch, num_codebooks + 1, vocab + 8), math.nan, dtype=logits.dtype)
        memory[:, :, :num_codebooks, :vocab] = logits
        return memory[:, :, :num_codebooks, :vocab]
    if layout == "requests first":
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    return logits


def _params(cells, vocab: int, flags: list[bool], g: torch.Generator, all_greedy: bool) -> SamplingParams:
    def among(*choices: float) -> Tensor:
        return torch.tensor(choices)[torch.randint(len(choices), cells, generator=g)]

    top_k, top_p, min_p = flags
    any_k = torch.randint(1, vocab + 1, cells, generator=g)
    k = torch.where(torch.rand(cells, generator=g) < 0.3, any_k, among(-1, 0, 1, 3, 50, 250, vocab - 1, vocab, 9999))
    any_p = torch.rand(cells, generator=g)
    p = torch.where(torch.rand(cells, generator=g) < 0.3, any_p, among(0.0, 1e-9, 0.05, 0.5, 0.9, 0.999, 1.0))
    temperature = among(1.0, 1.0, 0.7, 1.3, 2.0, 0.05, 1e-3, 0.0)
    return SamplingParams.build(
        *cells,
        cfg_coef=torch.rand(cells[0], generator=g) * 6,
        cfg_coef_beta=torch.rand(cells[0], generator=g) * 6,
        temperature=0.0 if all_greedy else temperature,
        top_k=k if top_k else 0,
        top_p=p if top_p else 0.0,
        # above 1 nothing is kept
        min_p=among(0.0, 0.0, 1e-6, 0.02, 0.3, 1.0, 1.5) if min_p else 0.0,
    )


def _counters(batch: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Seeds of all 64 bits, steps beyond 32 bits, streams with a domain tag in the top byte."""
    word = torch.randint(-(2**63), 2**63 - 1, (3, batch), generator=g)
    small = torch.randint(0, 1500, (batch,), generator=g)
    step = torch.where(torch.rand(batch, generator=g) < 0.5, small, word[1])
    stream = torch.where(torch.rand(batch, generator=g) < 0.5, 0, word[2] & 0xFFFFFFFF)
    return word[0].contiguous(), step, stream


def _add_output(draw: Draw, dtype: torch.dtype, use_column: bool, g: torch.Generator) -> None:
    batch, num_codebooks = draw.status.shape
    if not use_column:
        draw.tokens = torch.full((batch, num_codebooks), -7, dtype=dtype)
        return
    steps = 9
    known = torch.randint(0, draw.logits.shape[3], (batch, num_codebooks, steps), generator=g)
    unknown = torch.rand(known.shape, generator=g) < 0.8
    draw.tokens = torch.where(unknown, -1, known).to(dtype)
    draw.column = torch.randint(-1, steps + 1, (batch,), generator=g).to(torch.int32)
    frames = torch.arange(steps)[:, None] - torch.arange(num_codebooks) % 4
    draw.frames = torch.where(frames < 2, -1, frames).to(torch.int32)
