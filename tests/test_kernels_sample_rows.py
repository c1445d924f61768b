"""Drawing for the requests of a board: like the sampler's definition on gathered rows, bit for bit.

Under Triton's interpreter; on a device in tests/test_gpu_kernels_attention.py.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from musicgen_fast.sampling import Draw, SamplingParams
from musicgen_fast.sampling import reference as sampler

from .test_kernels_attention import interpreted

COLUMNS = 6

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_rows_of_a_board(branches: int) -> None:
    assert interpreted("test_kernels_sample_rows", "check_rows", branches, 12) == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_request_without_cfg_names_one_row_for_all_branches(dtype: str) -> None:
    assert interpreted("test_kernels_sample_rows", "check_one_row", dtype) == []


# -- cases ------------------------------------------------------------------------------------------------------------


@dataclass
class Board:
    """The arguments of `sample_rows`, by name."""

    arguments: dict[str, Any]
    params: SamplingParams

    def expected(self) -> tuple[Tensor, Tensor]:
        """tokens [N, K, S] and status [N, K], by the sampler's definition applied to what each request names."""
        a = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in self.arguments.items()}
        tokens, status = a["tokens"].clone(), a["status"].clone()
        for q, n in enumerate(a["request"].tolist()):
            if n < 0:
                continue
            board, place = {"device": "cpu"}, slice(n, n + 1)
            for name in ("cfg_coef", "cfg_coef_beta", "top_k", "top_p", "min_p"):
                board[name] = getattr(self.params, name)[place]
            temperature = self.params.divisor[place].clamp(min=0.0)
            params = SamplingParams.build(1, tokens.shape[1], temperature=temperature, **board)  # type: ignore[arg-type]
            draw = Draw(a["logits"][a["branches"][q].long()][:, None], params, tokens[place], status[place])
            draw.column, draw.frames = a["column"][place], a["frames"]
            if a["noise"] is not None:
                draw.noise = a["noise"][place]
            else:
                draw.seed, draw.step = a["seed"][place], a["step"][place]
                draw.stream = torch.zeros_like(draw.seed) if a["stream"] is None else a["stream"][place]
            sampler.draw(draw)  # writes into the views
        return tokens, status


def random_board(seed: int, branches: int, device: str = "cpu", vocab: int = 130) -> Board:
    """Some of a board's requests in any order, a silent one among them; rows that nobody names are NaN."""
    g = torch.Generator().manual_seed(seed)
    board, num_codebooks, requests = 7, 1 + seed % 4, 5
    dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
    rows = requests * branches + 2
    named = torch.randperm(rows, generator=g)[: requests * branches].view(requests, branches)
    logits = torch.full((rows, num_codebooks, vocab), torch.nan)
    logits[named.flatten()] = torch.randn(requests * branches, num_codebooks, vocab, generator=g) * 3
    if seed % 5 == 4:
        logits[named[0]] = torch.nan  # no token can be drawn
    request = torch.randperm(board, generator=g)[:requests]
    request[2] = -1
    named[2] = -1  # not to be read
    cells = (board, num_codebooks)
    greedy = torch.rand(cells, generator=g) < 0.2
    params = SamplingParams.build(
        board, num_codebooks,
        cfg_coef=torch.rand(board, generator=g) * 4, cfg_coef_beta=torch.rand(board, generator=g) * 4,
        temperature=torch.where(greedy, 0.0, 0.5 + torch.rand(cells, generator=g)),
        top_k=torch.randint(-1, 60, cells, generator=g), top_p=torch.rand(cells, generator=g) * 1.3,
        min_p=torch.rand(cells, generator=g) * 0.1,
    )  # fmt: skip
    tokens = torch.where(torch.rand(*cells, COLUMNS, generator=g) < 0.2, 5, -1)
    frames = torch.randint(-1, 3, (COLUMNS, num_codebooks), generator=g)
    arguments = {
        "logits": logits.to(dtype), "branches": named.int(), "request": request.int(), "tokens": tokens,
        "status": torch.zeros(cells, dtype=torch.int32), "scale": params.scale,
        "cfg_coef": params.cfg_coef, "cfg_coef_beta": params.cfg_coef_beta,
        "top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p,
        "seed": torch.randint(-(2**62), 2**62, (board,), generator=g), "step": torch.arange(board) * 10,
        "stream": torch.arange(board) if seed % 2 else None,
        "noise": torch.empty(*cells, vocab).exponential_(1, generator=g) if seed % 4 == 3 else None,
        "column": torch.randint(-1, COLUMNS + 1, (board,), generator=g).int(), "frames": frames.int(),
    }  # fmt: skip
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return Board(there, params)


# -- in the child, or on a device -------------------------------------------------------------------------------------


def check_rows(branches: int, boards: int, device: str = "cpu", vocab: int = 130) -> list:
    from musicgen_fast.kernels.sample import sample_rows

    wrong: list = []
    drawn = failed = 0
    for seed in range(boards):
        board = random_board(seed, branches, device, vocab)
        before = board.arguments["tokens"].cpu().clone()
        tokens, status = board.expected()
        sample_rows(**board.arguments)
        if not torch.equal(board.arguments["tokens"].cpu(), tokens):
            wrong.append((seed, "tokens"))
        if not torch.equal(board.arguments["status"].cpu(), status):
            wrong.append((seed, "status"))
        drawn += int((tokens != before).sum())
        failed += int(status.sum())
    return wrong + ([] if drawn > 3 * boards and failed else [("the boards try too little", drawn, failed)])


def check_one_row(dtype: str, device: str = "cpu", vocab: int = 130) -> list:
    """With 2 and 3 branches, draws and greedy cells, what one branch gives; -inf stays barred."""
    from musicgen_fast.kernels.sample import sample_rows

    wrong: list = []
    for seed in range(6):
        a = random_board(seed, 1, device, vocab).arguments
        a["logits"] = a["logits"].nan_to_num(0.5).to(getattr(torch, dtype))
        a["logits"][..., ::7] = -torch.inf
        a["logits"][..., 1::7] = -0.0
        a["column"][:] = torch.arange(len(a["column"])) % COLUMNS
        results = []
        for branches in (1, 2, 3):
            mine = a | {name: a[name].clone() for name in ("tokens", "status")}
            mine["branches"] = a["branches"].expand(-1, branches).contiguous()
            sample_rows(**mine)
            results.append(mine["tokens"])
        wrong += [(seed, n) for n, tokens in enumerate(results) if not torch.equal(tokens, results[0])]
        wrong += [(seed, "nothing drawn")] if torch.equal(results[0], a["tokens"]) else []
        wrong += [(seed, "barred")] if ((results[0] % 7 == 0) & (results[0] != a["tokens"])).any() else []
    return wrong
