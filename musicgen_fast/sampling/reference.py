"""The reference sampler: logits of one column -> one token per codebook, in plain torch, on any device.

It follows the normative definition of this project's samplers step for step: mix the CFG branches, scale by the
temperature, keep the top k / top p / min p, and let the kept tokens race (the smallest E / w wins, E exponential
noise): the same draw as `torch.multinomial(p, 1)`. Both filters read one stable *sort*, which no fast backend does, so
that algorithm and reference cannot share a bug. No floating-point sum decides anything, so every backend can return the
same token bit for bit; nothing waits for the device.

Shapes: logits [NB, B, K, V]; NB = 1 (conditional), 2 (conditional, null) or 3 (text and wav, wav, null).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import exp2_pair, race_noise
from .draw import TINY, Draw, SamplingParams, raise_on_failure

LOG2E = 1.44269504


def draw(inputs: Draw) -> None:
    """Chooses the tokens of one column and writes them; see `Draw`."""
    params, logits = inputs.params, inputs.logits
    mixed = mix_branches(logits, params.cfg_coef, params.cfg_coef_beta)
    if params.all_greedy:
        keep, scores = torch.zeros_like(mixed, dtype=torch.bool), mixed
    else:
        keep, _, inverse = kept_weights(scaled(mixed, params, logits.dtype, inputs.divide), params)
        scores = _noise(inputs) * inverse
    tokens, failed = _choose(mixed, keep, scores, params.scale < 0)
    _write(inputs, tokens, failed)


def mix_branches(logits: Tensor, cfg_coef: Tensor, cfg_coef_beta: Tensor) -> Tensor:
    """Classifier-free guidance: logits [NB, B, K, V] -> [B, K, V] fp32; every operation rounds to the logits' dtype.

    NB = 2: u + (c - u) * cfg. NB = 3: u + cfg * (w + beta * (c - w) - u).
    """
    dtype = logits.dtype
    if logits.shape[0] == 1:
        return logits[0].float()

    def rnd(x: Tensor) -> Tensor:
        return x if dtype == torch.float32 else x.to(dtype).float()

    cfg, beta = cfg_coef[:, None, None], cfg_coef_beta[:, None, None]
    branches = logits.float()
    if logits.shape[0] == 2:
        c, u = branches
        return rnd(rnd(rnd(c - u) * cfg) + u)
    c, w, u = branches
    m = rnd(w + rnd(rnd(c - w) * beta))
    return rnd(u + rnd(rnd(m - u) * cfg))


def scaled(mixed: Tensor, params: SamplingParams, dtype: torch.dtype, divide: bool) -> Tensor:
    """z [B, K, V]: the temperature, signed zeros to +0, NaN to -inf. In greedy cells z has no meaning."""
    z = mixed / params.divisor[..., None] if divide else mixed * params.scale[..., None]
    if dtype != torch.float32:
        z = z.to(dtype).float()
    z = torch.where(z.abs() < TINY, 0.0, z)
    return torch.where(z.isnan(), -torch.inf, z)


def kept_weights(z: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens of z [B, K, V] survive the filters, their weights w relative to the largest, and 1 / w."""
    vocab = z.shape[-1]
    keep = z > -torch.inf
    order = z.sort(dim=-1, descending=True, stable=True).indices if params.any_top_k or params.any_top_p else None
    if params.any_top_k and order is not None:
        k = torch.where((params.top_k <= 0) | (params.top_k >= vocab), vocab, params.top_k).long()
        kth = order.gather(-1, k[..., None] - 1)
        keep &= z >= z.gather(-1, kth)
    top = z.amax(-1, keepdim=True)
    t = torch.where(z == top, 0.0, (z - top) * LOG2E)
    keep &= t >= -126.0
    w, iw = exp2_pair(torch.where(keep, t, 0.0).clamp(-126.0, 0.0))
    if params.any_min_p:
        keep &= w >= params.min_p[..., None]
    if params.any_top_p and order is not None:
        keep &= _nucleus(torch.where(keep, w, 0.0), params.top_p, order)
    return keep, w, iw


def _nucleus(w: Tensor, top_p: Tensor, order: Tensor) -> Tensor:
    """In descending order, the tokens before which at most p of the mass lies; 40-bit fixed point, so exact."""
    weight = (w.double() * 2.0**40).to(torch.int64)
    total = weight.sum(-1, keepdim=True)
    off = (top_p <= 0) | (top_p >= 1)
    share = torch.where(off, 1.0, top_p).double().mul(2.0**31).to(torch.int64)[..., None]
    limit = (total >> 32) * share * 2 + (((total & 0xFFFFFFFF) * share) >> 31)
    ranked = weight.gather(-1, order)
    inside = ranked.cumsum(-1) - ranked <= limit
    return torch.empty_like(inside).scatter_(-1, order, inside) | off[..., None]


def _noise(inputs: Draw) -> Tensor:
    """E [B, K, V] of every token."""
    if inputs.noise is not None:
        return inputs.noise
    assert inputs.seed is not None and inputs.step is not None and inputs.stream is not None
    _, _, num_codebooks, vocab = inputs.logits.shape
    return race_noise(inputs.seed, inputs.step, inputs.stream, num_codebooks, vocab)


def _choose(mixed: Tensor, keep: Tensor, scores: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
    """The winner of the race, or the largest logit in greedy cells; the lowest index on a tie, 0 where all failed."""
    race = torch.where(keep, scores, torch.inf).argmin(-1)
    finite = torch.where(mixed.isnan(), -torch.inf, mixed)
    tokens = torch.where(greedy, finite.argmax(-1), race)
    failed = torch.where(greedy, finite.amax(-1) == -torch.inf, ~keep.any(-1))
    return torch.where(failed, 0, tokens), failed


def _write(inputs: Draw, tokens: Tensor, failed: Tensor) -> None:
    """Into [B, K], or into the cells of the sequence that are unknown and not masked."""
    if inputs.column is None:
        inputs.tokens.copy_(tokens)
        inputs.status.masked_fill_(failed, 1)
        return
    assert inputs.frames is not None
    sequence, num_steps = inputs.tokens, inputs.tokens.shape[2]
    inside = ((inputs.column >= 0) & (inputs.column < num_steps))[:, None]
    column = inputs.column.clamp(0, num_steps - 1).long()
    cells = column[:, None, None].expand(-1, sequence.shape[1], 1)
    present = sequence.gather(2, cells)[..., 0]
    masked = inputs.frames[column] < 0
    unknown = (present == -1) & inside
    value = torch.where(masked, inputs.logits.shape[3], tokens).to(sequence.dtype)
    sequence.scatter_(2, cells, torch.where(unknown, value, present)[..., None])
    inputs.status.masked_fill_(failed & unknown & ~masked, 1)


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """The law of the draw, float32 [B, K, V]; one-hot where greedy. ValueError for a row with nothing to choose."""
    mixed = mix_branches(logits, params.cfg_coef, params.cfg_coef_beta)
    keep, w, _ = kept_weights(scaled(mixed, params, logits.dtype, divide=False), params)
    mass = torch.where(keep, w, 0.0).double()
    greedy = params.scale < 0
    token, failed = _choose(mixed, keep, w, greedy)
    raise_on_failure(failed)
    one_hot = torch.zeros_like(mass).scatter_(-1, token[..., None], 1.0)
    return torch.where(greedy[..., None], one_hot, mass / mass.sum(-1, keepdim=True)).float()
