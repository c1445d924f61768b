"""What every backend of the sampler is given: the parameters of a batch, and one draw with its inputs and outputs.

Knows the shapes and dtypes that the kernels rely on, nothing of how a token is chosen. A `SamplingParams` is built once
a generation and checked there; a `Draw` is made at every step and costs nothing.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 2.0**-126  # smallest normal fp32: what is closer to 0 counts as 0
MAX_VOCAB = 4096
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SamplingParams:
    """Parameters per request as contiguous tensors on the device of the logits; build with `SamplingParams.build`.

    Attributes:
        cfg_coef, cfg_coef_beta: float32 [B].
        scale, divisor: float32 [B, K], 1 / temperature and temperature; both -1 where the cell is greedy.
        top_k: int32 [B, K], off where <= 0 or >= V. top_p, min_p: float32 [B, K], off where <= 0 (top_p also >= 1).
        any_top_k, any_top_p, any_min_p: whether any cell uses the filter; known on the host, so that a kernel without
            it can be picked and no device is waited for.
        all_greedy: no cell draws.
        any_sorted: some top_p > 0; at top_p = 1 everything is kept, but audiocraft still draws in sorted order.
    """

    cfg_coef: Tensor
    cfg_coef_beta: Tensor
    scale: Tensor
    divisor: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    any_sorted: bool
    all_greedy: bool

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
        """Numbers, [B] or [B, K] values (coefficients: numbers or [B]) become tensors on `device`; B is `batch` and K
        `num_codebooks`.

        Raises ValueError for NaN and for shapes that do not fit, TypeError for what is no number.
        """
        rows, cells = (batch,), (batch, num_codebooks)
        beta = 1.0 if cfg_coef_beta is None else cfg_coef_beta
        # The flags are read here, before anything lies on a device.
        t = _values("temperature", temperature, cells)
        k = _values("top_k", top_k, cells, torch.int32)
        p, m = _values("top_p", top_p, cells), _values("min_p", min_p, cells)
        greedy = t < TINY
        inverse = 1.0 / t
        inverse = torch.where(inverse < TINY, 0.0, inverse)  # subnormal: processors differ in what they make of it

        def there(x: Tensor) -> Tensor:
            return x.contiguous().to(device)

        return SamplingParams(
            cfg_coef=there(_values("cfg_coef", cfg_coef, rows)),
            cfg_coef_beta=there(_values("cfg_coef_beta", beta, rows)),
            scale=there(torch.where(greedy, -1.0, inverse)),
            divisor=there(torch.where(greedy, -1.0, t)),
            top_k=there(k),
            top_p=there(p),
            min_p=there(m),
            any_top_k=bool((k > 0).any()),
            any_top_p=bool(((p > 0) & (p < 1)).any()),
            any_min_p=bool((m > 0).any()),
            any_sorted=bool((p > 0).any()),
            all_greedy=bool(greedy.all()),
        )


@dataclass
class Draw:
    """One column of every request: what a backend reads, and where it writes.

    Attributes:
        logits: [NB, B, K, V], a dtype of `DTYPES`, the last dimension contiguous.
        params: guidance, temperature and filters of every cell.
        seed, step, stream: int64 [B], the counters of the noise; None where `noise` is given or all cells are greedy.
        noise: float32 [B, K, V], E of every token, for the tokens of audiocraft and transformers.
        divide: divide by the temperature, as those two do on a CPU, instead of multiplying by its inverse.
        tokens: int32 or int64, contiguous: [B, K], or with `column` the sequence [B, K, S], -1 where unknown.
        status: int32 [B, K], set to 1 where no token could be chosen (the token is 0 there); never set to 0.
        column: int32 [B], the place in the sequence; outside of [0, S) the request is left alone. Cells that are known
            are never overwritten.
        frames: int32 [S, K], -1 where the pattern masks the cell: the special token V is written there.
    """

    logits: Tensor
    params: SamplingParams
    tokens: Tensor
    status: Tensor
    seed: Tensor | None = None
    step: Tensor | None = None
    stream: Tensor | None = None
    noise: Tensor | None = None
    divide: bool = False
    column: Tensor | None = None
    frames: Tensor | None = None


def signed_seed(seed: int) -> int:
    """A seed of 64 bits, signed or unsigned, as int64: the bit pattern counts. TypeError for what is no int, ValueError
    for more bits."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"a seed must be an int, got {type(seed).__name__}")
    value = operator.index(seed)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"a seed has 64 bits, got {value}")
    return (value + 2**63) % 2**64 - 2**63


def raise_on_failure(status: Tensor) -> None:
    """ValueError that names the cells of `status` [B, K] where no token could be chosen. Waits for the device."""
    if status.any():
        cells = [tuple(cell) for cell in status.nonzero()[:8].tolist()]
        raise ValueError(
            f"no token can be drawn for (request, codebook) {cells}: all logits are NaN or -inf. "
            "The weights or the conditioning hold NaN, or the precision overflows; try float32"
        )


def _values(name: str, value: object, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A number, [B] or [B, K] as a tensor that broadcasts to `shape`."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}") from None
    if tensor.is_floating_point() and tensor.isnan().any():
        raise ValueError(f"{name} is NaN")
    if dtype == torch.int32:
        if tensor.is_floating_point():
            raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
        tensor = tensor.long().clamp(-1, 2**31 - 1)
    columns = tensor[:, None] if tensor.dim() == 1 and len(shape) == 2 else tensor
    try:
        return columns.to(dtype).expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} of shape {list(tensor.shape)} does not fit {list(shape)}") from None
