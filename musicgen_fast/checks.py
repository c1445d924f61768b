"""Checks of what users pass: texts and waveforms. Errors say what is wrong and what to do; nothing is converted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Negative = str | Sequence[str | None] | None  # one for all requests, or one for each


def checked_texts(descriptions: Sequence[str | None]) -> list[str | None]:
    """The descriptions as a list. A single string is refused: audiocraft would take each character for a request."""
    if isinstance(descriptions, str):
        raise TypeError(f"descriptions must be a list of texts, got a str: write [{descriptions[:40]!r}]")
    try:
        texts = list(descriptions)
    except TypeError:
        raise TypeError(f"descriptions must be a list of texts, got {type(descriptions).__name__}") from None
    if not texts:
        raise ValueError("descriptions is empty: nothing to generate")
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise TypeError(f"descriptions must hold texts or None, got {type(text).__name__}")
    return texts


def checked_audio(wav: Tensor, name: str, sample_rate: int) -> Tensor:
    """A waveform tensor that can be used: floating point, not empty, finite, at a positive rate."""
    if not isinstance(wav, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(wav).__name__}")
    if not wav.is_floating_point():
        raise ValueError(f"{name} must hold floats in -1..1, got {wav.dtype}; divide integer PCM by its full scale")
    if wav.numel() == 0:
        raise ValueError(f"{name} holds no samples (shape {list(wav.shape)})")
    if not torch.isfinite(wav).all():
        raise ValueError(f"{name} holds NaN or infinite samples")
    if not sample_rate > 0:
        raise ValueError(f"the sample rate of {name} must be above 0 Hz, got {sample_rate}")
    return wav


def checked_negatives(negative: str | Sequence[str | None] | None, texts: Sequence[str | None]) -> list[str | None]:
    """One negative prompt per request: a single one serves all. They need a description each to lead away from."""
    if negative is None:
        return [None] * len(texts)
    out = [negative] * len(texts) if isinstance(negative, str) else checked_texts(negative)
    if len(out) != len(texts):
        raise ValueError(f"{len(out)} negative prompts were given for {len(texts)} descriptions")
    if any(out) and not any(texts):
        raise ValueError("a negative prompt needs a description: an unconditional run has no guidance to turn round")
    return list(out)
