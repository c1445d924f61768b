"""Which sampler runs: torch, C++ (`cpu`), Triton or CUDA C++. All give the same tokens; they differ in where they run.

`auto` takes the fastest that can serve the device: C++ on a CPU; CUDA C++, then Triton on a GPU; torch anywhere else.
`MUSICGEN_FAST_SAMPLER=NAME` says what `auto` means. A backend that is asked for by name and cannot serve raises and
says why; it is never replaced in silence. Libraries are loaded at the first draw that needs them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

from .. import native
from . import reference
from .draw import Draw
from .native_args import pack

BACKENDS = ("torch", "cpu", "triton", "cuda")
VARIABLE = "MUSICGEN_FAST_SAMPLER"

_PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}


def choose(name: str, device: torch.device) -> Callable[[Draw], None]:
    """The function that draws on `device`; `name` is 'auto' or one of `BACKENDS`.

    Raises ValueError for an unknown name, RuntimeError for a backend that cannot serve the device, with the reason.
    """
    source = "backend"
    if name == "auto" and os.environ.get(VARIABLE, "auto") != "auto":
        name, source = os.environ[VARIABLE], VARIABLE
    if name == "auto":
        candidates = _PREFERENCE.get(device.type, ("torch",))
        name = next(candidate for candidate in candidates if not why_not(candidate, device))
    elif name not in BACKENDS:
        raise ValueError(f"{source} must be auto, {', '.join(BACKENDS)}; got {name!r}")
    elif reason := why_not(name, device):
        raise RuntimeError(f"the {name} sampler ({source}={name}) cannot draw from logits on {device}: {reason}")
    return _DRAW[name]


def why_not(name: str, device: torch.device) -> str:
    """Why a backend cannot serve `device`; empty where it can."""
    if name == "torch":
        return ""
    if name == "cpu":
        if device.type != "cpu":
            return "it reads the memory of the CPU only"
        return native.why_not()
    if name == "triton" and _interpreted():
        return _triton_missing()
    if device.type != "cuda":
        return "it needs logits on a CUDA device"
    if name == "triton":
        return _triton_missing()
    return native.cuda_why_not(device)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_missing() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install it with: pip install triton"
    return ""


def _draw_cpu(inputs: Draw) -> None:
    native.sample(pack(inputs))


def _draw_cuda(inputs: Draw) -> None:
    native.cuda_sample(pack(inputs), inputs.logits.device)


def _draw_triton(inputs: Draw) -> None:
    from ..kernels.sample import sample_column

    params = inputs.params
    sample_column(
        inputs.logits,
        inputs.tokens,
        inputs.status,
        scale=params.scale,
        cfg_coef=params.cfg_coef,
        cfg_coef_beta=params.cfg_coef_beta,
        top_k=params.top_k if params.any_top_k else None,
        top_p=params.top_p if params.any_top_p else None,
        min_p=params.min_p if params.any_min_p else None,
        seed=inputs.seed,
        step=inputs.step,
        stream=inputs.stream,
        noise=inputs.noise,
        column=inputs.column,
        frames=inputs.frames,
    )


_DRAW: dict[str, Callable[[Draw], None]] = {
    "torch": reference.draw,
    "cpu": _draw_cpu,
    "triton": _draw_triton,
    "cuda": _draw_cuda,
}
