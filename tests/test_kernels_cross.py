"""Attention to texts against its definitions, under Triton's interpreter: lengths, slots, null branches, folding.

The `check_` functions run in a child process, and on a device in tests/test_gpu_kernels_attention.py. What no row may
read is NaN.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from musicgen_fast.kernels import reference

from .test_kernels_attention import DTYPES, interpreted, wrong_outputs

# heads, d, T, P (0: no parts): one tile and several, widths that are no power of two
FOLDED = ((2, 32, 9, 1), (4, 48, 70, 3), (1, 1536, 40, 0))

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_attention(dtype: str) -> None:
    assert interpreted("test_kernels_cross", "check_cross", dtype) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_absorbed_cross_attention(dtype: str) -> None:
    assert interpreted("test_kernels_cross", "check_absorbed", dtype) == []


# -- cases ------------------------------------------------------------------------------------------------------------


@dataclass
class Folded:
    """The inputs of both absorbed kernels; `weights` are the definition's, given to `absorbed_output`."""

    x: Tensor
    parts: Tensor | None
    gamma: Tensor
    beta: Tensor
    to_scores: Tensor
    to_output: Tensor
    slot: Tensor
    length: Tensor
    weights: Tensor

    def scores(self, function: Any) -> tuple[Tensor, Tensor]:
        """x_out [R, d] and weights [R, H, T]."""
        x_out, weights = torch.full_like(self.x, torch.nan), torch.full_like(self.weights, torch.nan)
        function(
            self.x, self.parts, x_out, self.gamma, self.beta, self.to_scores, self.slot, self.length, weights
        )  # fmt: skip
        return x_out, weights

    def output(self, function: Any) -> Tensor:
        parts = torch.full_like(self.x, torch.nan)[None]
        function(self.weights, self.to_output, self.slot, self.length, parts)
        return parts[0]

    def rows(self, some: list[int]) -> Folded:
        """The same with some of the rows, in that order."""
        mine = {name: getattr(self, name)[some] for name in ("x", "slot", "length", "weights")}
        parts = None if self.parts is None else self.parts[:, some].contiguous()
        return Folded(**(vars(self) | mine | {"parts": parts}))

    def clean(self) -> Folded:
        """Without the NaN, which the definition would multiply by zero."""
        return Folded(**(vars(self) | {n: getattr(self, n).nan_to_num(0.0) for n in ("to_scores", "to_output")}))


def random_folded(dtype: str, device: str, heads: int, width: int, positions: int, count: int) -> Folded:
    g = torch.Generator().manual_seed(width)
    slot = torch.tensor([2, -1, 0, 5, 1])
    length = torch.tensor([positions, 0, 1, min(17, positions), 8])
    folded = torch.randn(2, 6, heads, positions, width, generator=g) / width**0.5
    for s in range(6):
        folded[:, s, :, int(length[slot == s].sum()) :] = torch.nan
    folded = folded.to(DTYPES[dtype])
    parts = torch.randn(count, 5, width, generator=g) if count else None
    gamma, beta = (torch.randn(2, width, generator=g) * 2).to(folded).unbind()
    x = torch.randn(5, width, generator=g) * 3 + 1
    inputs = [x, parts, gamma, beta, *folded, slot.int(), length.int(), torch.zeros(5, heads, positions)]
    case = Folded(*(None if t is None else t.to(device) for t in inputs))  # type: ignore[arg-type]
    case.weights = case.clean().scores(reference.absorbed_scores)[1]
    return case


# -- in the child, or on a device -------------------------------------------------------------------------------------


def check_cross(dtype: str, device: str = "cpu", heads: int = 3, head_dim: int = 12) -> list:
    """Texts of every length around a block, in any slot; a row alone, and rows in another order."""
    from musicgen_fast.kernels.cross import cross_attention

    g = torch.Generator().manual_seed(0)
    length = torch.tensor([0, 1, 17, 63, 64, 65, 130, 0])
    rows, width = len(length), heads * head_dim
    slot = torch.tensor([-1, 4, 2, 9, 0, 1, 3, 5])
    texts = torch.full((2, 10, heads, 130, head_dim), torch.nan)
    for s, n in zip(slot.tolist(), length.tolist(), strict=True):
        texts[:, s, :, :n] = torch.randn(2, heads, n, head_dim, generator=g)
    texts = texts.to(DTYPES[dtype]).to(device)
    slot, length = slot.int().to(device), length.int().to(device)
    q = (torch.randn(rows, width, generator=g) * 2).to(texts)
    out, expected = torch.full_like(q, torch.nan), torch.empty(rows, width, device=device)
    cross_attention(q, texts, slot, length, out)
    reference.cross_attention(q.float(), texts.float().nan_to_num(0.0), slot, length, expected)
    wrong = wrong_outputs(out, expected, length <= 0)
    for some in ([1, 0], [6, 3, 0, 2]):
        mine = torch.full_like(q[some], torch.nan)
        cross_attention(q[some], texts, slot[some], length[some], mine)
        wrong += [] if torch.equal(mine, out[some]) else [("batch", some)]
    return wrong


def check_absorbed(dtype: str, device: str = "cpu", shapes: Any = FOLDED) -> list:
    """Both kernels, each on the definition's inputs; null rows still close the residual sum."""
    from musicgen_fast.kernels.cross import absorbed_output, absorbed_scores

    wrong: list = []
    for shape in shapes:
        case = random_folded(dtype, device, *shape)
        clean, null = case.clean(), case.length <= 0
        new, weights = case.scores(absorbed_scores)
        parts = case.output(absorbed_output)
        wrong += [
            (shape, "x_out", *r) for r in wrong_outputs(new, clean.scores(reference.absorbed_scores)[0], null & False)
        ]
        # Both round the normed row to half, an ulp apart where the statistics differ in their last bit.
        rounded = weights.flatten(1).to(DTYPES[dtype])
        wrong += [(shape, "weights", *r) for r in wrong_outputs(rounded, case.weights.flatten(1), null)]
        wrong += [(shape, "parts", *r) for r in wrong_outputs(parts, clean.output(reference.absorbed_output), null)]
        some = case.rows([3, 1])
        mine = (*some.scores(absorbed_scores), some.output(absorbed_output))
        same = [torch.equal(a, b[[3, 1]]) for a, b in zip(mine, (new, weights, parts), strict=True)]
        wrong += [] if all(same) else [(shape, "batch")]
    return wrong
