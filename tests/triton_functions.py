"""Kernels that only apply single functions of the sampler; a module of its own, since Triton resolves only globals."""

from __future__ import annotations

import triton
import triton.language as tl

from musicgen_fast.kernels.race import exp2_pair, exponential, round_to
from musicgen_fast.kernels.sample import _mixed


@triton.jit
def functions_kernel(x, t, e, w, iw, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(e + i, exponential(tl.load(x + i).to(tl.uint32, bitcast=True)))
    power, inverse = exp2_pair(tl.load(t + i))
    tl.store(w + i, power)
    tl.store(iw + i, inverse)


@triton.jit
def rounding_kernel(x, half, bfloat, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(half + i, round_to(tl.load(x + i), tl.float16))
    tl.store(bfloat + i, round_to(tl.load(x + i), tl.bfloat16))


@triton.jit
def mixing_kernel(logits, stride_nb, cfg_coef, cfg_coef_beta, out, V: tl.constexpr, NB: tl.constexpr):
    i = tl.arange(0, V)
    tl.store(out + i, _mixed(logits, stride_nb, cfg_coef, cfg_coef_beta, i, V, NB))
