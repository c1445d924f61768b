"""From the logits of one column to one token per codebook: the public functions, and the way into the backends.

    params.build -> Draw -> backend (torch reference, C++, Triton, CUDA C++) -> tokens

`sample` and `filtered_probs` are for logits of your own; generation builds its parameters once and calls `draw` at
every step. What the sampler guarantees is a page of MODEL.md. Shapes: logits [NB, B, K, V], tokens [B, K].
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import reference
from .backends import choose
from .draw import DTYPES, MAX_VOCAB, Draw, SamplingParams, raise_on_failure, signed_seed

__all__ = ["Draw", "SamplingParams", "draw", "filtered_probs", "raise_on_failure", "sample", "signed_seed"]


def draw(inputs: Draw, backend: str = "auto") -> None:
    """Draws one column and writes it where `inputs` says; see `Draw`. Nothing is checked, and no device waited for.

    `backend`: as for `sample`.
    """
    choose(backend, inputs.logits.device)(inputs)


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
    backend: str = "auto",
) -> Tensor:
    """Draw one token per request and codebook from logits of your own.

    Guidance as in audiocraft; top-k, top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024); the noise is
    Philox4x32-10 (Salmon et al. 2011).

    Args:
        logits: [NB, B, K, V] float32, float16 or bfloat16, V up to 4096; NB = 1, 2 (conditional, null: CFG) or 3 (text
            and wav, wav, null: double CFG) branches. Half precision is mixed in half precision, as audiocraft does.
        cfg_coef, cfg_coef_beta: guidance, a number or [B]; ignored where NB does not use them. beta None is 1.
        temperature: <= 0 means greedy. A number, [B] or [B, K], like the filters:
        top_k, top_p, min_p: 0 means off; they compose in this order: top-k (ties are kept), min-p (relative to the
            largest probability), top-p of what is left. No filter switches another one off, as audiocraft's top_p does.
        seed: of the request, a number of 64 bits or int64 (or uint64) [B].
        step: a counter, the column of the generation; a number or int64 [B]. stream: a number or [B], for other draws
            from the same seed.
        backend: 'auto', 'torch', 'cpu', 'triton' or 'cuda'; all give the same tokens.

    Returns:
        int64 tokens [B, K] on the device of the logits. The same arguments give the same tokens on every device, in any
        batch.

    Raises:
        ValueError: wrong shapes, NaN parameters, an unknown backend, or a row without any token to choose (all NaN or
            -inf). TypeError: a seed or parameter that is no number. RuntimeError: a backend that is missing here.
    """
    logits = _checked(logits)
    _, batch, num_codebooks, _ = logits.shape
    run = choose(backend, logits.device)
    given = (cfg_coef, cfg_coef_beta, temperature, top_k, top_p, min_p)
    inputs = Draw(
        logits,
        _build(batch, num_codebooks, logits.device, *given),
        tokens=torch.empty(batch, num_codebooks, dtype=torch.int64, device=logits.device),
        status=torch.zeros(batch, num_codebooks, dtype=torch.int32, device=logits.device),
        seed=_counter("seed", seed, batch, logits.device),
        step=_counter("step", step, batch, logits.device),
        stream=_counter("stream", stream, batch, logits.device),
    )
    run(inputs)
    raise_on_failure(inputs.status)
    return inputs.tokens


def filtered_probs(
    logits: Tensor,
    *,
    cfg_coef: float | Tensor = 3.0,
    cfg_coef_beta: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 0.0,
    min_p: float | Tensor = 0.0,
) -> Tensor:
    """The distribution that `sample` draws from with the same arguments, for inspection and plots.

    `logits`, `cfg_coef`, `cfg_coef_beta`, `temperature`, `top_k`, `top_p`, `min_p`: as for `sample`.

    Returns:
        float32 [B, K, V] on the device of the logits: 0 outside of the filters, rows that sum to 1; one-hot where
        greedy.

    Raises:
        TypeError, ValueError: as for `sample`.
    """
    logits = _checked(logits)
    _, batch, num_codebooks, _ = logits.shape
    given = (cfg_coef, cfg_coef_beta, temperature, top_k, top_p, min_p)
    return reference.probabilities(logits, _build(batch, num_codebooks, logits.device, *given))


def _checked(logits: Tensor) -> Tensor:
    """The logits, V contiguous."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor [NB, B, K, V], got {type(logits).__name__}")
    if logits.dim() != 4 or logits.shape[0] not in (1, 2, 3) or 0 in logits.shape:
        raise ValueError(f"logits must be [NB, B, K, V] with 1 to 3 branches NB, got {list(logits.shape)}")
    if logits.shape[3] > MAX_VOCAB:
        raise ValueError(f"a vocabulary of 1 to {MAX_VOCAB} is supported, got {logits.shape[3]}")
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
    if logits.requires_grad:
        logits = logits.detach()
    return logits if logits.stride(3) == 1 else logits.contiguous()


def _build(batch: int, num_codebooks: int, device: torch.device, *given: float | Tensor | None) -> SamplingParams:
    """`SamplingParams.build`; where all are numbers, as in a loop over steps, built once (25 us -> 1 us a call)."""
    if all(value is None or type(value) in (int, float) for value in given):
        return _build_from_numbers(batch, num_codebooks, device, *given)
    return _build_anew(batch, num_codebooks, device, *given)


def _build_anew(batch: int, num_codebooks: int, device: torch.device, *given: float | Tensor | None) -> SamplingParams:
    names = ("cfg_coef", "cfg_coef_beta", "temperature", "top_k", "top_p", "min_p")
    return SamplingParams.build(batch, num_codebooks, device, **dict(zip(names, given, strict=True)))  # type: ignore[arg-type]


_build_from_numbers = functools.lru_cache(maxsize=64, typed=True)(_build_anew)


def _counter(name: str, value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """A number or [B] as contiguous int64 [B]; the bits of 64-bit numbers are kept."""
    if not isinstance(value, Tensor):
        return _counter_of_number(signed_seed(value), batch, device)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {value.dtype}")
    value = value.view(torch.int64) if value.dtype == torch.uint64 else value.to(torch.int64)
    if value.shape not in ((), (1,), (batch,)):
        raise ValueError(f"{name} of shape {list(value.shape)} does not fit [{batch}]")
    return value.to(device).expand(batch).contiguous()


@functools.lru_cache(maxsize=64)  # seed and stream are often the same for every step
def _counter_of_number(value: int, batch: int, device: torch.device) -> Tensor:
    return torch.full((batch,), value, dtype=torch.int64, device=device)
