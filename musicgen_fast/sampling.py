"""The reference sampler: logits of one column -> one token per codebook, in torch, on any device.

It follows the normative definition of this project's samplers step for step: mix the CFG branches, scale by the
temperature, keep the top k / top p / min p, and let the kept tokens race (the smallest E / w wins, E exponential
noise): the same draw as `torch.multinomial(p, 1)`. No floating-point sum decides anything, so every backend can return
the same token bit for bit. Noise comes from Philox counters (`sample`, a seed per request) or from a tensor that the
caller filled (`sample_with_noise`: the tokens of audiocraft and transformers for the same torch seed).

Shapes: logits [NB, B, K, V]; NB = 1 (conditional), 2 (conditional, null) or 3 (text and wav, wav, null).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native
from .philox import exp2_pair, race_noise

LOG2E = 1.44269504
TINY = 2.0**-126  # smallest normal fp32: anything closer to 0 is 0


@dataclass(frozen=True)
class SamplingParams:
    """Per-request parameters as tensors. `temperature`, `top_k`, `top_p`, `min_p` are [B, K]; the coefficients [B].

    `flags` say on the host which filters any request uses, so that the common case never pays for the others.
    """

    cfg_coef: Tensor
    cfg_coef_beta: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    any_sorted: bool  # top_p = 1 keeps everything, but audiocraft still draws in sorted order

    @staticmethod
    def build(
        batch: int,
        num_codebooks: int,
        device: torch.device | str = "cpu",
        *,
        cfg_coef: float | Tensor = 3.0,
        cfg_coef_beta: float | Tensor | None = None,
        temperature: float | Tensor = 1.0,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 0.0,
        min_p: float | Tensor = 0.0,
    ) -> SamplingParams:
        """Broadcast scalars, [B] or [B, K] values (coefficients: scalar or [B]). NaN raises ValueError."""

        def fill(name: str, value, shape: tuple[int, ...], dtype=torch.float32) -> Tensor:
            tensor = torch.as_tensor(value, dtype=dtype, device=device)
            if tensor.is_floating_point() and tensor.isnan().any():
                raise ValueError(f"{name} is NaN")
            if tensor.dim() == 1 and len(shape) == 2:
                tensor = tensor[:, None]
            try:
                return tensor.expand(shape).contiguous()
            except RuntimeError:
                raise ValueError(f"{name} of shape {list(tensor.shape)} does not fit {list(shape)}") from None

        cells = (batch, num_codebooks)
        k = fill("top_k", top_k, cells, torch.int64)
        p, m = fill("top_p", top_p, cells), fill("min_p", min_p, cells)
        return SamplingParams(
            cfg_coef=fill("cfg_coef", cfg_coef, (batch,)),
            cfg_coef_beta=fill("cfg_coef_beta", 1.0 if cfg_coef_beta is None else cfg_coef_beta, (batch,)),
            temperature=fill("temperature", temperature, cells),
            top_k=k,
            top_p=p,
            min_p=m,
            any_top_k=bool((k > 0).any()),
            any_top_p=bool(((p > 0) & (p < 1)).any()),
            any_min_p=bool((m > 0).any()),
            any_sorted=bool((p > 0).any()),
        )


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


def _scaled(mixed: Tensor, params: SamplingParams, dtype: torch.dtype, divide: bool) -> Tensor:
    """Step 3: temperature, signed zeros to +0, NaN to -inf. Greedy cells are scaled by 1; their race is not read."""
    temperature = torch.where(params.temperature < TINY, 1.0, params.temperature)[..., None]
    z = mixed / temperature if divide else mixed * (1.0 / temperature)
    if dtype != torch.float32:
        z = z.to(dtype).float()
    z = torch.where(z.abs() < TINY, 0.0, z)
    return torch.where(z.isnan(), -torch.inf, z)


def _kept_weights(z: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 5 to 10, z [B, K, V]: which tokens survive, their weights w relative to the largest, and 1/w."""
    vocab = z.shape[-1]
    keep = z > -torch.inf
    if params.any_top_k:
        k = torch.where((params.top_k <= 0) | (params.top_k >= vocab), vocab, params.top_k)
        descending = z.topk(int(k.max()), dim=-1).values
        keep &= z >= descending.gather(-1, k[..., None] - 1)
    top = z.amax(-1, keepdim=True)
    t = torch.where(z == top, 0.0, (z - top) * LOG2E)
    keep &= t >= -126.0
    w, iw = exp2_pair(torch.where(keep, t, 0.0).clamp(-126.0, 0.0))
    if params.any_min_p:
        keep &= w >= params.min_p[..., None]
    if params.any_top_p:
        keep &= _nucleus(z, torch.where(keep, w, 0.0), params.top_p)
    return keep, w, iw


def _nucleus(z: Tensor, w: Tensor, top_p: Tensor) -> Tensor:
    """Step 10: in descending order, tokens before which at most p of the mass lies; 40-bit fixed point, so exact."""
    weight = (w.double() * 2.0**40).to(torch.int64)
    total = weight.sum(-1, keepdim=True)
    off = (top_p <= 0) | (top_p >= 1)
    share = torch.where(off, 1.0, top_p).double().mul(2.0**31).to(torch.int64)[..., None]
    limit = (total >> 32) * share * 2 + (((total & 0xFFFFFFFF) * share) >> 31)
    order = z.sort(dim=-1, descending=True, stable=True).indices
    ranked = weight.gather(-1, order)
    inside = ranked.cumsum(-1) - ranked <= limit
    return torch.empty_like(inside).scatter_(-1, order, inside) | off[..., None]


def _choose(mixed: Tensor, keep: Tensor, iw: Tensor, noise: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Step 11 and the greedy rule: tokens int64 [B, K] and status [B, K] (1 where nothing could be chosen)."""
    race = torch.where(keep, noise * iw, torch.inf).argmin(-1)
    finite = torch.where(mixed.isnan(), -torch.inf, mixed)
    greedy = params.temperature < TINY
    tokens = torch.where(greedy, finite.argmax(-1), race)
    status = torch.where(greedy, finite.amax(-1) == -torch.inf, ~keep.any(-1))
    return torch.where(status, 0, tokens), status.to(torch.int32)


def sample_with_noise(
    logits: Tensor, params: SamplingParams, noise: Tensor | None, order: str = "audiocraft"
) -> tuple[Tensor, Tensor]:
    """One column drawn with the caller's noise: the tokens of the reference that fills the same noise.

    Args:
        logits: [NB, B, K, V].
        noise: [B*K, V] from `exponential_(1)`, rows b * K + k; None where every cell is greedy (nothing is drawn then).
        order: with top-p, audiocraft draws in the order of its sort; 'transformers' draws in vocabulary order.

    Returns:
        tokens int64 [B, K], status int32 [B, K].
    """
    mixed = mix_branches(logits, params.cfg_coef, params.cfg_coef_beta)
    if noise is None:
        keep = torch.zeros_like(mixed, dtype=torch.bool)
        return _choose(mixed, keep, mixed, mixed, params)
    z = _scaled(mixed, params, logits.dtype, divide=logits.device.type == "cpu")
    keep, _, iw = _kept_weights(z, params)
    noise = noise.view_as(z).float()
    if params.any_sorted and order == "audiocraft":
        ranked = z.softmax(-1).sort(dim=-1, descending=True).indices
        by_token = torch.empty_like(noise).scatter_(-1, ranked, noise)
        noise = torch.where((params.top_p > 0)[..., None], by_token, noise)
    return _choose(mixed, keep, iw, noise, params)


def sample_seeded(
    logits: Tensor, params: SamplingParams, seed: Tensor, step: Tensor, stream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One column drawn with Philox noise; seed, step, stream int64 [B]. Returns tokens int64, status int32 [B, K]."""
    _, _, num_codebooks, vocab = logits.shape
    stream = torch.zeros_like(seed) if stream is None else stream
    fill = native.race_noise if logits.device.type == "cpu" and native.available() else race_noise
    noise = fill(seed, step, stream, num_codebooks, vocab)
    mixed = mix_branches(logits, params.cfg_coef, params.cfg_coef_beta)
    keep, _, iw = _kept_weights(_scaled(mixed, params, logits.dtype, divide=False), params)
    return _choose(mixed, keep, iw, noise, params)


def sample(
    logits: Tensor,
    *,
    cfg_coef: float | Tensor = 3.0,
    cfg_coef_beta: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 0.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    step: int | Tensor,
    stream: int | Tensor = 0,
) -> Tensor:
    """Draw one token per request and codebook from logits of your own.

    Args:
        logits: [NB, B, K, V] float32, float16 or bfloat16, V up to 4096; NB = 1, 2 (CFG) or 3 (double CFG) branches.
        cfg_coef, cfg_coef_beta: guidance, a number or [B]; ignored where NB does not use them.
        temperature: <= 0 means greedy. top_k, top_p, min_p: 0 means off; all three compose. A number, [B] or [B, K].
        seed: of the request, a number or int64 [B]. step: a counter, the column of the generation. stream: for other
            uses of the same seed.

    Returns:
        int64 tokens [B, K]. The same arguments give the same tokens on every device and backend.

    Raises:
        ValueError: wrong shapes or NaN parameters, or a row without any token to choose (all NaN or -inf).
    """
    if logits.dim() != 4 or logits.shape[0] not in (1, 2, 3):
        raise ValueError(f"logits must be [NB, B, K, V] with 1 to 3 branches NB, got {list(logits.shape)}")
    if not 1 <= logits.shape[3] <= 4096:
        raise ValueError(f"a vocabulary of 1 to 4096 is supported, got {logits.shape[3]}")
    _, batch, num_codebooks, _ = logits.shape
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
    params = SamplingParams.build(
        batch,
        num_codebooks,
        logits.device,
        cfg_coef=cfg_coef,
        cfg_coef_beta=cfg_coef_beta,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    if not isinstance(seed, Tensor):
        seed = signed_seed(seed)
    counters = [torch.as_tensor(x, dtype=torch.int64, device=logits.device) for x in (seed, step, stream)]
    seeds, steps, streams = (x.expand(batch) for x in counters)
    tokens, status = sample_seeded(logits, params, seeds, steps, streams)
    raise_on_failure(status)
    return tokens


def signed_seed(seed: int) -> int:
    """A seed of 64 bits, signed or unsigned, as int64: the bit pattern counts. Anything else raises."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"a seed must be an int, got {type(seed).__name__}")
    value = operator.index(seed)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"a seed has 64 bits, got {value}")
    return (value + 2**63) % 2**64 - 2**63


def raise_on_failure(status: Tensor) -> None:
    """ValueError that names the (request, codebook) cells where no token could be chosen."""
    if status.any():
        cells = [tuple(cell) for cell in status.nonzero()[:8].tolist()]
        raise ValueError(
            f"no token can be drawn for (request, codebook) {cells}: all logits are NaN or -inf. "
            "The weights or the conditioning hold NaN, or the precision overflows; try float32"
        )
