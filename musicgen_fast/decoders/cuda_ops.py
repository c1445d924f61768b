"""The functions of the CUDA decoder's step: torch's own (version 1), or the Triton kernels (version 3).

Version 1 is the baseline that parity is shown against, serves fp32, and runs on a CPU, where the tests are. What both
have beside kernels/reference.py is `sample_rows`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..sampling import Draw, SamplingParams
from ..sampling.reference import draw

_NORMS_AND_PRODUCTS = ("embed", "norm_linear", "linear_parts", "advance")
_ATTENTION = ("attention", "cross_attention", "absorbed_scores", "absorbed_output")


def torch_ops(device: torch.device) -> Any:
    """Version 1; on a GPU tokens are drawn by Triton."""
    functions = {name: getattr(reference, name) for name in _NORMS_AND_PRODUCTS + _ATTENTION}
    if device.type != "cuda":
        return SimpleNamespace(sample_rows=sample_rows, **functions)
    from ..kernels.sample import sample_rows as in_triton

    return SimpleNamespace(sample_rows=in_triton, **functions)


def triton_ops() -> Any:
    """Version 3. ImportError without Triton."""
    from ..kernels import step

    return step


def sample_rows(
    logits: Tensor, branches: Tensor, request: Tensor, tokens: Tensor, status: Tensor, *, scale: Tensor,
    cfg_coef: Tensor, cfg_coef_beta: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
    seed: Tensor, step: Tensor, stream: Tensor | None, noise: Tensor | None, column: Tensor, frames: Tensor,
    pdl: bool = False,
) -> None:  # fmt: skip
    """The function of kernels/sample.py by the reference sampler; unlike it, this one looks at who draws."""
    own = request[request >= 0].long()
    if len(own) == 0:
        return
    off = torch.zeros_like(scale[own])
    params = SamplingParams(
        cfg_coef[own], cfg_coef_beta[own], scale[own], scale[own],
        off.int() if top_k is None else top_k[own], off if top_p is None else top_p[own],
        off if min_p is None else min_p[own],
        top_k is not None, top_p is not None, min_p is not None, False, False,
    )  # fmt: skip
    inputs = Draw(
        logits[branches[request >= 0].long().T], params, tokens[own], status[own],
        seed=seed[own], step=step[own], stream=torch.zeros_like(step[own]) if stream is None else stream[own],
        column=column[own], frames=frames,
    )  # fmt: skip
    draw(inputs)
    tokens[own], status[own] = inputs.tokens, inputs.status
