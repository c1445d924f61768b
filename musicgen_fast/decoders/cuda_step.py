"""One step of the transformer as launches on fixed memory: eight kernels a layer.

    embed | L x (norm+qkv, attention, out, norm+q, text, out, norm+ffn+gelu, ffn) | norm+heads | draw | advance

The residual stream is closed by whoever reads it next: a product writes fp32 parts, and the norm before the next
product adds them up. So nothing is summed by atomics, and a row's numbers do not depend on the batch. Letters as in
kernels/reference.py, whose functions these are, or those of their twins in Triton (kernels/step.py).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..board import Board
from ..kernels import heuristics
from ..model import Layer, Transformer, position_table
from .cuda_pool import Pool
from .cuda_rows import Filters, Rows

Text = Literal["none", "plain", "folded"]  # what the rows attend to beside themselves


class Step:
    """The launches for up to `rows` rows. Its memory is sized at construction, and is nobody's between two steps."""

    def __init__(
        self, model: Transformer, ops: Any, cache: Pool, texts: Pool, folded: Pool | None, rows: int, pdl: bool
    ):
        """`ops`: the functions of kernels/reference.py and `sample_rows`."""
        dtype = model.dtype
        c = self._config = model.config
        self._model, self._ops, self._pdl = model, ops, pdl
        self._cache, self._texts, self._folded = cache, texts, folded
        self._layers: list[Layer] = list(model.layers)  # type: ignore[arg-type]
        device = model.device
        self._parts = {n: heuristics.parts(c.dim, n) for n in (c.dim, c.ffn_dim)}
        self._residual = [torch.zeros(rows, c.dim, device=device) for _ in range(2)]
        self._normed_rows = torch.zeros(rows, c.dim, dtype=dtype, device=device)  # scratch of `norm_linear`
        self._sums = torch.zeros(max(self._parts.values()) * rows * c.dim, device=device)
        self._qkv = torch.zeros(rows, 3 * c.dim, dtype=dtype, device=device)
        self._q = torch.zeros(rows, c.dim, dtype=dtype, device=device)
        self._attended = torch.zeros(rows, c.dim, dtype=dtype, device=device)
        self._hidden = torch.zeros(rows, c.ffn_dim, dtype=dtype, device=device)
        self._logits = torch.zeros(rows, c.num_codebooks * c.vocab_size, dtype=dtype, device=device)
        splits = heuristics.num_splits(cache.capacity)
        self._scratch = torch.zeros(rows, c.num_heads, splits, c.head_dim + 2, device=device)
        self._arrived = torch.zeros(rows, c.num_heads, dtype=torch.int32, device=device)
        self._positions = position_table(cache.capacity, c.dim, device).contiguous()
        positions = 0 if folded is None else folded.capacity
        self._weights = torch.zeros(rows, c.num_heads, positions, device=device)
        self._never = torch.full((rows,), -1, dtype=torch.int32, device=device)

    def logits(self, rows: int) -> Tensor:
        """[R, K, V] of the last `forward`."""
        return self._logits[:rows].unflatten(1, (self._config.num_codebooks, -1))

    def forward(self, table: Rows, sequence: Tensor, text: Text) -> None:
        """From the column that each row reads to its logits; keys and values are appended."""
        ops, pdl, model = self._ops, self._pdl, self._model
        rows = len(table.request)
        x, other = (buffer[:rows] for buffer in self._residual)
        ops.embed(sequence, table.request, table.fed, table.length, model.emb.weight, self._positions, x, pdl=pdl)
        parts: Tensor | None = None
        for index, layer in enumerate(self._layers):
            cache, scales = self._cache.tensor[index], self._cache.scales
            qkv, attended = self._qkv[:rows], self._attended[:rows]
            x, other = self._normed(x, parts, other, layer.norm1, layer.qkv, qkv)
            own_scales = None if scales is None else scales[index]
            ops.attention(
                qkv, cache, own_scales, table.slot, table.length, attended,
                self._scratch[:rows], self._arrived[:rows], pdl=pdl,
            )  # fmt: skip
            parts = self._product(attended, layer.attn_out)
            if text == "folded":
                parts = self._folded_text(table, index, x, parts, other)
                x, other = other, x
            elif text == "plain":
                x, other = self._normed(x, parts, other, layer.norm_cross, layer.cross_q, self._q[:rows])
                texts = self._texts.tensor[index]
                ops.cross_attention(self._q[:rows], texts, table.text_slot, table.text_length, attended, pdl=pdl)
                parts = self._product(attended, layer.cross_out)
            x, other = self._normed(x, parts, other, layer.norm2, layer.ffn_in, self._hidden[:rows], gelu=True)
            parts = self._product(self._hidden[:rows], layer.ffn_out)
        self._normed(x, parts, other, model.norm, model.heads, self._logits[:rows])

    def _folded_text(self, table: Rows, index: int, x: Tensor, parts: Tensor, other: Tensor) -> Tensor:
        """Cross-attention without its projections, the closed residual in `other`; parts [1, R, d]."""
        assert self._folded is not None
        norm = self._layers[index].norm_cross
        to_scores, to_output = self._folded.tensor[index]
        weights = self._weights[: len(x)]
        self._ops.absorbed_scores(
            x,
            parts,
            other,
            norm.weight,
            norm.bias,
            to_scores,
            table.text_slot,
            table.text_length,
            weights,
            pdl=self._pdl,
        )
        out = self._sums[-x.numel() :].view(1, *x.shape)
        self._ops.absorbed_output(weights, to_output, table.text_slot, table.text_length, out, pdl=self._pdl)
        return out

    def draw(self, table: Rows, board: Board, filters: Filters) -> None:
        """Tokens of the requests that draw, from counters; see `Sampler`."""
        params, place = board.params, board.place
        chosen = [getattr(params, n) if used else None for n, used in zip(_FILTERS, filters, strict=True)]
        self._ops.sample_rows(
            self.logits(len(table.drawn)), table.branches, table.drawn, place.sequence, place.status,
            scale=params.scale, cfg_coef=params.cfg_coef, cfg_coef_beta=params.cfg_coef_beta,
            top_k=chosen[0], top_p=chosen[1], min_p=chosen[2], seed=board.seeds, step=place.step, stream=None,
            noise=None, column=place.column, frames=place.frames, pdl=self._pdl,
        )  # fmt: skip

    def advance(self, table: Rows, place: Any, drew: bool) -> None:
        """Count the step: of the rows, and of the requests that drew in it."""
        request = table.drawn if drew else self._never[: len(table.drawn)]
        self._ops.advance(table.fed, table.length, request, place.column, place.step, pdl=self._pdl)

    def _normed(
        self, x: Tensor, parts: Tensor | None, other: Tensor, norm: nn.LayerNorm, linear: nn.Linear, out: Tensor,
        gelu: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The product of the closed and normed residual; it, and the buffer that is free now."""
        self._ops.norm_linear(
            x, parts, None if parts is None else other, self._normed_rows[: len(x)], norm.weight, norm.bias,
            linear.weight, getattr(linear, "scales", None), out, gelu=gelu, pdl=self._pdl,
        )  # fmt: skip
        return (x, other) if parts is None else (other, x)

    def _product(self, a: Tensor, linear: nn.Linear) -> Tensor:
        """[P, R, d], the parts of a product that nobody has added up."""
        count = self._parts[a.shape[1]]
        parts = self._sums[: count * len(a) * self._config.dim].view(count, len(a), -1)
        self._ops.linear_parts(a, linear.weight, getattr(linear, "scales", None), parts, pdl=self._pdl)
        return parts


_FILTERS = ("top_k", "top_p", "min_p")
