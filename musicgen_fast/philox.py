"""Counter-based noise for the sampler, in plain torch: Philox4x32-10 and the two fp32 functions of the race.

The slow twin of `csrc/cpu/` (see `native.py`): both give the same bits. Every fp32 operation below is one multiply or
one add, rounded once, so that no compiler, libm or device can change a token. The polynomials are short on purpose:
their error (2e-7) is far below the noise that they feed. Tensors are int64 where they hold 32-bit words, because torch
has no unsigned arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MUL = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011): 128-bit counter and 64-bit key -> four 32-bit words.

    All arguments are int64 tensors holding 32-bit words and broadcast against each other; so are the four results.
    """
    for _ in range(10):
        # the 64-bit product wraps to a negative int64; its bits are right, so a shift and a mask read both halves
        product0, product1 = c0 * _MUL[0], c2 * _MUL[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def exponential(x: Tensor) -> Tensor:
    """-ln((x + 0.5) / 2**32) as float32 for 32-bit words x (int64): an exponential variate from a uniform word.

    Both tails are exact to fp32: near 1 the logarithm is taken of 1 - v with v computed from ~x.
    """
    u = (_uint_to_float(x) + 0.5) * 2.0**-32
    v = (_uint_to_float(x ^ _MASK) + 0.5) * 2.0**-32
    ix = u.view(torch.int32) - 0x3F3504F3  # exponent split at sqrt(1/2), so that f lies in [-0.293, 0.414]
    k = ix >> 23
    m = ((ix & 0x007FFFFF) + 0x3F3504F3).view(torch.float32)
    f = torch.where(k == 0, 0.0 - v, m - 1.0)
    p = f * 7.0376836292e-2 + -1.1514610310e-1
    for c in (
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ):
        p = p * f + c
    s = f * f
    y = (p * f) * s + s * -0.5
    return k.float() * -0.69314718 - (y + f)


def exp2_pair(t: Tensor) -> tuple[Tensor, Tensor]:
    """(2**t, 2**-t) as float32 for float32 t in [-126, 0]; the two share one polynomial, so no division is needed."""
    r = t + 12582912.0  # 1.5 * 2**23: the sum's low mantissa bits are round(t)
    n = r - 12582912.0
    ni = (r.view(torch.int32) - 0x4B400000) << 23
    f = t - n
    g = f * f
    even = ((g * 0.00015469732 + 0.0096181) * g + 0.24022651) * g + 1.0
    odd = ((g * 0.0013398874 + 0.05550341) * g + 0.6931472) * f
    w = ((even + odd).view(torch.int32) + ni).view(torch.float32)
    iw = ((even - odd).view(torch.int32) - ni).view(torch.float32)
    return w, iw


def race_noise(seed: Tensor, step: Tensor, stream: Tensor, num_codebooks: int, vocab_size: int) -> Tensor:
    """Exponential noise E [B, K, V] float32 for one column of B requests.

    Args:
        seed, step, stream: int64 [B]. The key is the seed's 64 bits; the counter is (token >> 2, step, codebook,
            stream) and word `token & 3` of the block is the token's. Nothing about the batch enters.
    """
    blocks = (vocab_size + 3) // 4
    device = seed.device
    seed, step, stream = (x.view(-1, 1, 1) for x in (seed, step & _MASK, stream & _MASK))
    block = torch.arange(blocks, device=device).view(1, 1, -1)
    codebook = torch.arange(num_codebooks, device=device).view(1, -1, 1)
    words = philox(block, step, codebook, stream, seed & _MASK, (seed >> 32) & _MASK)
    x = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :vocab_size]
    return exponential(x)


def _uint_to_float(x: Tensor) -> Tensor:
    """int64 holding a uint32 -> float32, rounded to nearest even once (an int64 conversion does just that)."""
    return x.to(torch.float32)
