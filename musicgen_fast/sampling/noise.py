"""Noise mode: the random numbers of audiocraft and transformers, for the tokens of `torch.multinomial`.

`torch.multinomial(p, 1)` divides p by `exponential_` noise of torch's global generator and takes the largest. The same
numbers, drawn at the same moment and given to our race, choose the same tokens. Knows who of the two draws in which
order; knows nothing of Philox.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .draw import SamplingParams
from .reference import mix_branches, scaled

ORDERS = ("audiocraft", "transformers")


def divides(device: torch.device) -> bool:
    """Whether torch divides logits by a number there; a GPU multiplies by the inverse, which rounds differently."""
    return device.type == "cpu"


def multinomial_noise(logits: Tensor, params: SamplingParams, order: str = "audiocraft") -> Tensor:
    """E float32 [B, K, V] for one column of logits [NB, B, K, V], from the global generator of their device.

    With top-p audiocraft draws among the sorted probabilities: entry r of its noise belongs to the r-th token of that
    (unstable) sort. `order='transformers'` draws in the vocabulary's order.
    """
    _, batch, num_codebooks, vocab = logits.shape
    # softmax runs in fp32 in both references, so the noise is fp32 whatever the logits are
    noise = torch.empty(batch * num_codebooks, vocab, device=logits.device).exponential_(1)
    noise = noise.view(batch, num_codebooks, vocab)
    if not params.any_sorted or order == "transformers":
        return noise
    mixed = mix_branches(logits, params.cfg_coef, params.cfg_coef_beta)
    z = scaled(mixed, params, logits.dtype, divides(logits.device))
    ranked = z.softmax(-1).sort(dim=-1, descending=True).indices
    by_token = torch.empty_like(noise).scatter_(-1, ranked, noise)
    return torch.where((params.top_p > 0)[..., None], by_token, noise)
