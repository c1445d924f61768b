"""The kernels of a decoding step in plain torch: what each one computes, and in which order it rounds.

Every function here has a twin of the same name and arguments in Triton (`step.py` lists them). These run on any device
without a compiler: they are the oracle of the tests, and, captured in a CUDA graph, the decoder's version 1. All
outputs are written in place, nothing about a request is a shape or a Python number, and no call waits for the device.

Letters: R rows of a batch (a request has one per CFG branch), d width, H heads, L layers, V vocabulary, K codebooks,
Q requests, N rows of the board that holds the sequences, S columns, C positions of a cache, P parts of a sum.
`length` int32 [R]: positions that a row holds before this step; negative for a row that takes no part: its numbers are
never read by another row. Weights and activations have one dtype ("half": fp16, bf16, or fp32), the residual is fp32.
`pdl` (programmatic dependent launch) is for the twins and changes nothing here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of every LayerNorm


def embed(
    sequence: Tensor, request: Tensor, fed: Tensor, length: Tensor, table: Tensor, positions: Tensor, x: Tensor,
    *, pdl: bool = False,
) -> None:  # fmt: skip
    """The input of the first layer: the embeddings of a column's K tokens, summed in order in fp32, plus the position.

    Args:
        sequence: int64 [N, K, S]. request: int32 [R], a row's place in it. fed: int32 [R], the column it reads.
        table: half [K * (V + 1), d]; codebook k begins at row k * (V + 1). positions: fp32 [C, d].
        x: fp32 [R, d], written; zeros in rows without a length.
    """
    num_codebooks = sequence.shape[1]
    each = table.shape[0] // num_codebooks
    takes_part = (length >= 0)[:, None]
    tokens = sequence[request.clamp(min=0).long(), :, fed.clamp(min=0).long()]
    total = F.embedding(tokens[:, 0].clamp(min=0), table).float()
    for k in range(1, num_codebooks):
        total = total + F.embedding(tokens[:, k].clamp(min=0) + k * each, table).float()
    x.copy_(torch.where(takes_part, total + positions[length.clamp(min=0).long()], 0.0))


def norm_linear(
    x: Tensor, parts: Tensor | None, x_out: Tensor | None, stats: Tensor, gamma: Tensor, beta: Tensor,
    weight: Tensor, scales: Tensor | None, out: Tensor, *, gelu: bool = False, pdl: bool = False,
) -> None:  # fmt: skip
    """Close the residual sum, normalise it, multiply: out = act(LN(x + sum of parts) W^T).

    Args:
        x: fp32 [R, d]. parts: fp32 [P, R, d], summed in order, then added; None: nothing is added.
        x_out: fp32 [R, d], not x: the new residual; None where nobody reads it.
        stats: scratch, fp32 [R, 2] or half [R, d]: room of the twin.
        gamma, beta: fp32 or half [d]; the normed row is rounded to half.
        weight: half [M, d], or int8 with scales fp32 [M, d / group].
        out: [R, M], the product in fp32, after the exact (erf) GELU if asked for, rounded to its dtype.
    """
    new = x if parts is None else x + _sum(parts)
    if x_out is not None:
        x_out.copy_(new)
    half = out.dtype if weight.dtype == torch.int8 else weight.dtype
    h = F.layer_norm(new, (x.shape[1],), gamma.float(), beta.float(), EPS).to(half)
    y = _product(h, weight, scales)
    out.copy_(F.gelu(y.float()) if gelu else y)


def linear_parts(a: Tensor, weight: Tensor, scales: Tensor | None, parts: Tensor, *, pdl: bool = False) -> None:
    """a W^T as P sums over the P slices of K, each in fp32: a half [R, K], weight [M, K], parts fp32 [P, R, M].

    K is a multiple of P. The next `norm_linear` adds them up: no CTA waits for another one, and no atomics.
    """
    count = parts.shape[0]
    width = a.shape[1] // count
    for p in range(count):
        part = slice(p * width, (p + 1) * width)
        own = None if scales is None else scales[:, p * scales.shape[1] // count : (p + 1) * scales.shape[1] // count]
        parts[p].copy_(_product(a[:, part], weight[:, part], own))


def attention(
    qkv: Tensor, cache: Tensor, cache_scales: Tensor | None, slot: Tensor, length: Tensor, out: Tensor,
    scratch: Tensor, arrived: Tensor, *, pdl: bool = False,
) -> None:  # fmt: skip
    """Append the step's keys and values to the cache, then attend to all positions up to and including them.

    Args:
        qkv: half [R, 3 * d], queries, keys, values, each [H, d / H].
        cache: half [2, slots, H, C, d / H]; or int8 with cache_scales fp32 [2, slots, H, C]: one scale per head of a
            position, the largest magnitude / 127. The step's own keys and values are attended to as they are.
        slot: int32 [R], a row's place in the cache. out: half [R, d], zeros in rows without a length.
        scratch: fp32 [R, H, splits, d / H + 2] and arrived: int32 [R, H], all zeros before and after: room of the twin.
    """
    heads, head_dim = cache.shape[2], cache.shape[4]
    q, k, v = qkv.unflatten(1, (3, heads, head_dim)).unbind(1)
    takes_part = length >= 0
    place, at = slot.clamp(min=0).long(), length.clamp(min=0).long()
    keys, values = _appended(cache, cache_scales, place, at, torch.stack([k, v]), takes_part)
    inside = torch.arange(cache.shape[3], device=qkv.device) <= at[:, None]
    a = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=inside[:, None, None, :])
    out.copy_(torch.where(takes_part[:, None], a.flatten(1), 0.0))


def _appended(
    cache: Tensor, scales: Tensor | None, place: Tensor, at: Tensor, new: Tensor, takes_part: Tensor
) -> tuple[Tensor, Tensor]:
    """Write new [2, R, H, d/H] where it belongs; keys and values [R, H, C, d/H] as they are attended to."""
    rows = torch.arange(len(place), device=new.device)
    # No shape may depend on who takes part: the others write what the first of those that do writes, or what is there.
    same = torch.where(takes_part, rows, takes_part.int().argmax())
    there, then, any_writes = place[same], at[same], takes_part.any()
    mine = new[:, same].transpose(0, 1)  # [R, 2, H, d/H], as what is indexed below: indexed dimensions come first
    if scales is None:
        cache[:, there, :, then] = torch.where(any_writes, mine, cache[:, there, :, then])
        keys, values = cache[:, place]
    else:
        size = mine.float().abs().amax(-1) / 127
        rounded = (mine.float() / size.clamp(min=1e-30)[..., None]).round().clamp(-127, 127).to(torch.int8)
        cache[:, there, :, then] = torch.where(any_writes, rounded, cache[:, there, :, then])
        scales[:, there, :, then] = torch.where(any_writes, size, scales[:, there, :, then])
        keys, values = (cache[:, place].float() * scales[:, place][..., None]).to(new.dtype)
    keys[rows, :, at], values[rows, :, at] = new.unbind(0)
    return keys, values


def cross_attention(
    q: Tensor, texts: Tensor, text_slot: Tensor, text_length: Tensor, out: Tensor, *, pdl: bool = False
) -> None:
    """Attend to a row's text: q half [R, d], texts half [2, slots, H, T, d / H], out half [R, d].

    text_slot, text_length: int32 [R]; zeros come out where the length is 0, as of a null branch.
    """
    heads = texts.shape[2]
    keys, values = texts[:, text_slot.clamp(min=0).long()]
    inside = torch.arange(texts.shape[3], device=q.device) < text_length[:, None]
    inside[:, 0] |= text_length <= 0  # a softmax over nothing is NaN
    q = q.unflatten(1, (heads, 1, -1))
    a = F.scaled_dot_product_attention(q, keys, values, attn_mask=inside[:, None, None, :])
    out.copy_(torch.where((text_length > 0)[:, None], a.flatten(1), 0.0))


def absorbed_scores(
    x: Tensor, parts: Tensor | None, x_out: Tensor, gamma: Tensor, beta: Tensor, to_scores: Tensor,
    text_slot: Tensor, text_length: Tensor, weights: Tensor, *, pdl: bool = False,
) -> None:  # fmt: skip
    """`norm_linear` and the softmax of `cross_attention` where the query projection is folded into the text's keys.

    scores = (h Wq) K^T = h (Wq K^T): to_scores half [slots, H, T, d], the scale 1 / sqrt(d / H) included. x, parts,
    x_out, gamma, beta as in `norm_linear`; weights fp32 [R, H, T], zeros beyond the text and without one.
    """
    new = x if parts is None else x + _sum(parts)
    x_out.copy_(new)
    h = F.layer_norm(new, (x.shape[1],), gamma.float(), beta.float(), EPS).to(to_scores.dtype)
    scores = torch.einsum("rhtd,rd->rht", to_scores[text_slot.clamp(min=0).long()].float(), h.float())
    inside = torch.arange(scores.shape[2], device=x.device) < text_length[:, None]
    scores = scores.masked_fill(~inside[:, None], -torch.inf)
    weights.copy_(torch.where(inside[:, None], scores.softmax(-1), 0.0))


def absorbed_output(
    weights: Tensor, to_output: Tensor, text_slot: Tensor, text_length: Tensor, parts: Tensor, *, pdl: bool = False
) -> None:
    """(p V) Wo = p (V Wo): weights fp32 [R, H, T], to_output half [slots, H, T, d]; parts fp32 [1, R, d], zeros
    without a text."""
    y = torch.einsum("rht,rhtd->rd", weights, to_output[text_slot.clamp(min=0).long()].float())
    parts[0].copy_(torch.where((text_length > 0)[:, None], y, 0.0))


def advance(fed: Tensor, length: Tensor, request: Tensor, column: Tensor, step: Tensor, *, pdl: bool = False) -> None:
    """Count a step: fed and length int32 [R] of the rows that take part; column int32 [N] and step int64 [N] of the
    requests int32 [Q] that drew; negative: none."""
    takes_part = (length >= 0).to(length.dtype)
    fed.add_(takes_part)
    length.add_(takes_part)
    drew = request >= 0
    place = request.clamp(min=0).long()
    column.index_add_(0, place, drew.to(column.dtype))
    step.index_add_(0, place, drew.to(step.dtype))


def _sum(parts: Tensor) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _product(a: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
    """[R, K] x [M, K] -> [R, M]; int8 weights group by group: whole numbers times halves, then the scale in fp32."""
    if scales is None:
        return F.linear(a, weight)
    groups = scales.shape[1]
    products = torch.einsum("rgk,mgk->rmg", a.float().unflatten(1, (groups, -1)),
                            weight.float().unflatten(1, (groups, -1)))  # fmt: skip
    return (products * scales).sum(-1)
