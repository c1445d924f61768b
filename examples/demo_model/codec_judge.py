"""Figures of the demo codec on held-out sound, beside those of its unquantised half, of random codes and of mu-law.

Clips are float32 [N, n] at 16 kHz, whole frames. Everything runs in float32, as the codec will be used.
It neither trains nor writes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from musicgen_fast.evaluation.distance import codebook_perplexity, codec_figures, mu_law

from .codec_books import ResidualBooks
from .synth import RATE

_AT_ONCE = 4  # clips


@torch.no_grad()
def judge(model: Any, books: ResidualBooks, wav: Tensor, generator: torch.Generator | None = None) -> dict[str, Any]:
    """Spectral convergence, log-mel distance and SI-SNR by name of what was compared, and the books' perplexities.

    Args:
        model: transformers' EncodecModel, or anything with its encoder and decoder.
        books: left out of the report until they have started.
        wav: float32 [N, n].
        generator: also judge the yardsticks, random codes being drawn from it.
    """
    codes: list[Tensor] = []
    found: dict[str, list[Tensor]] = {"unquantised": []}
    for part in wav[:, None].split(_AT_ONCE):
        latents = model.encoder(part)
        found["unquantised"] += model.decoder(latents)[:, 0]
        if not books.ready:
            continue
        hits, quantised = books.encode(latents)
        codes.append(hits)
        found.setdefault("codec", []).extend(model.decoder(quantised)[:, 0])
        if generator is not None:
            drawn = torch.randint(books.entries.shape[1], hits.shape, generator=generator)
            found.setdefault("random codes", []).extend(model.decoder(books.decode(drawn))[:, 0])
    if generator is not None:
        found |= {f"mu-law {bits} bits": list(mu_law(wav, bits)) for bits in (2, 4)}
    report: dict[str, Any] = {name: _figures(wav, clips) for name, clips in found.items()}
    if codes:
        perplexities = codebook_perplexity(torch.cat(codes), books.entries.shape[1])
        report["perplexity"] = [round(p, 1) for p in perplexities.tolist()]
    return report


def wrong_in_bfloat16(model: Any, wav: Tensor, tolerance: float = 0.2) -> list[str]:
    """Names of what differs by more than `tolerance` of its norm under bfloat16 autocast: 'output', or a gradient's.

    Rounding makes 0.01. But torch 2.13's oneDNN has shapes that come out wrong (16 to 32 channels, kernel 8, stride 4,
    forward: 1.17 on an AMX machine), which trains into noise without an error. wav: float32 [B, 1, n], as in training.
    """
    weights = torch.randn(wav.shape, generator=torch.Generator().manual_seed(0))
    runs: list[dict[str, Tensor]] = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model.decoder(model.encoder(wav).float())
        # A smooth loss: the training loss has gradients that rounding alone can turn round.
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        found = torch.autograd.grad((output.float() * weights).sum(), [parameter for _, parameter in named])
        runs.append({"output": output.detach().float()} | {name: g for (name, _), g in zip(named, found, strict=True)})
    exact, rounded = runs
    return [name for name, x in exact.items() if not (rounded[name] - x).norm() <= tolerance * x.norm() + 1e-12]


def _figures(wav: Tensor, found: Sequence[Tensor]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(codec_figures(list(wav), found, RATE)).items()}
