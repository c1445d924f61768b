"""The door to the C++ extension `_C`: the one module that imports it, when first asked and never before.

Knows where `_C` may be missing (no compiler at install, or turned off with MUSICGEN_FAST_NATIVE=0) and says why. Knows
nothing of sampling. Works on CPU tensors; its plain-torch twin, which gives the same bits, is `philox.py`.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

__all__ = ["available", "extension", "race_noise", "why_not"]


def available() -> bool:
    """Whether the C++ functions of this module can be called."""
    return not why_not()


def why_not() -> str:
    """Why `available()` is False, in a sentence that says what to do; empty where it is True."""
    if os.environ.get("MUSICGEN_FAST_NATIVE", "1") == "0":
        return "turned off by MUSICGEN_FAST_NATIVE=0"
    return _load()[1]


def extension() -> Any:
    """The module `_C` itself. Raises RuntimeError with the reason where there is none."""
    reason = why_not()
    if reason:
        raise RuntimeError(f"musicgen_fast was asked for its C++ extension, which is missing: {reason}")
    return _load()[0]


def race_noise(seeds: Tensor, steps: Tensor, streams: Tensor, num_codebooks: int, vocab_size: int) -> Tensor:
    """Exponential noise E [B, K, V] float32 of one column of B requests, as `philox.race_noise` gives it.

    Args:
        seeds: int64 or uint64 [B] on the CPU; the bit pattern counts.
        steps: int64 [B], the column of the whole generation; its low 32 bits count.
        streams: int [B], 0 for sampling; the low 32 bits count.

    Raises RuntimeError without the extension, ValueError for tensors of another shape, dtype or device.
    """
    binding = extension().race_noise
    names = ("seeds", "steps", "streams")
    words = [_words(x, name, seeds.shape) for x, name in zip((seeds, steps, streams), names, strict=True)]
    out = torch.empty(seeds.shape[0], num_codebooks, vocab_size)
    # numpy views instead of the tensors: 3 us a call by the buffer protocol, 9 to 13 by DLPack.
    binding(*(x.numpy() for x in words), out.numpy())
    return out


def _words(x: Tensor, name: str, shape: torch.Size) -> Tensor:
    """x as contiguous int64 [B], its bits unchanged."""
    if x.device.type != "cpu" or x.dim() != 1 or x.shape != shape:
        raise ValueError(f"{name} must be a CPU tensor [B] like seeds, got {list(x.shape)} on {x.device}")
    if x.is_floating_point() or x.is_complex():
        raise ValueError(f"{name} must hold integers, got {x.dtype}")
    return (x.view(torch.int64) if x.dtype == torch.uint64 else x.to(torch.int64)).contiguous()


@functools.cache
def _load() -> tuple[Any, str]:
    """(module, "") or (None, reason)."""
    try:
        return importlib.import_module("musicgen_fast._C"), ""
    except ImportError as error:
        return None, (
            f"musicgen_fast._C cannot be imported ({error}). Plain torch does its work. To build it, install a C++17 "
            "compiler, then: pip install -v --no-cache-dir --force-reinstall --no-deps musicgen-fast"
        )
