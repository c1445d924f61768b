"""Many positions of some rows through the reference's weights in one pass: what decoders do with prefixes and prompts.

Where keys and values go is the caller's business. Shapes: R rows of n positions, padded at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Layer, Transformer, embed_tokens
from .state import State

Append = Callable[[int, Tensor, Tensor], Any]  # layer, keys and values [R, H, n, d/H]: told what to keep


def known_rows(model: Transformer, state: State, last: int) -> list[Tensor]:
    """The inputs of every row, [P_r + n, d] without positions: its prefix, then the columns before `last`."""
    conditions = state.conditions
    x = embed_tokens(model.emb.weight, state.fed_tokens(0, last)).repeat(len(conditions.branches), 1, 1)
    prefixes = [p for b in conditions.branches for p in (b.prefix or [])]
    if not prefixes:
        return list(x)
    return [torch.cat([p.to(x.dtype), row]) for p, row in zip(prefixes, x, strict=True)]


def prefill_rows(
    model: Transformer,
    rows: Sequence[Tensor],
    positions: Tensor,
    append: Append,
    texts: Sequence[Tensor] = (),
    mask: Tensor | None = None,
) -> Tensor:
    """The residual [R, n, d] after all layers, of rows that start at position 0.

    Args:
        rows: R of [n_r, d]; causality keeps the padding of the shorter ones out of every real position.
        positions: fp32 [n or more, d].
        texts: per layer keys and values [2, Rc, H, N, d/H] of the first Rc rows; the others attend to nothing.
        mask: bool [Rc, 1, 1, N] where texts differ in length.
    """
    x = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    x = x + positions[: x.shape[1]]
    for index, layer in enumerate(model.layers):
        part = texts[index] if texts else None
        x = _layer(layer, x, model.dtype, index, append, part, mask)  # type: ignore[arg-type]
    return x


def _layer(
    layer: Layer, x: Tensor, dtype: torch.dtype, index: int, append: Append, text: Tensor | None, mask: Tensor | None
) -> Tensor:
    qkv = layer.qkv(layer.norm1(x).to(dtype)).unflatten(-1, (3, layer.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    append(index, k, v)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + layer.attn_out(attended.transpose(1, 2).flatten(2)).to(x.dtype)
    if text is not None:
        keys, values = text
        count = len(keys)
        q = layer.heads(layer.cross_q(layer.norm_cross(x[:count]).to(dtype)))
        attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x[:count] += layer.cross_out(attended.transpose(1, 2).flatten(2)).to(x.dtype)
    return x + layer.ffn_out(F.gelu(layer.ffn_in(layer.norm2(x).to(dtype)))).to(x.dtype)
