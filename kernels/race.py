"""The exact arithmetic of the race in Triton: random words, -ln of them, 2^t with 2^-t, rounding to half precision.

Every operation is one fp32 multiply or add, rounded once, so that all backends return the same bits: callers launch
with `enable_fp_fusion=False`, and nothing here is a division, a MUFU or a libm call. Knows nothing of filters. Blocks
of any power-of-two size.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter truncates fp32 -> bf16 where a GPU rounds to nearest even; there the rounding is done on the bits.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# ptxas 12.9, which Triton 3.6 ships for sm_100 and sm_120, fuses packed mul.rn.f32x2 and add.rn.f32x2 into FFMA2 even
# under --fmad=false; a scalar product in assembly is never packed. Triton 3.9 (ptxas 13.4) was seen not to fuse.
OPAQUE = tl.constexpr(not INTERPRETED.value and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9))


@triton.jit
def mul(a, b):
    """a * b for fp32, rounded before anything is added to it."""
    if OPAQUE:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)
    else:
        return a * b


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 x rounded to `dtype` and back."""
    if dtype == tl.bfloat16 and INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    else:
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def random_words(seed, step, codebook, stream, BLOCK: tl.constexpr):
    """The Philox4x32-10 words of tokens 0 .. BLOCK - 1, uint32: token i has word i & 3 of counter i >> 2."""
    block = tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = tl.philox(seed, block, step.to(tl.int32), codebook, stream.to(tl.int32))
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def exponential(x):
    """-ln((x + 0.5) / 2^32) of uint32 words."""
    u = (x.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = ((x ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 1 - u, exact where u is close to 1
    ix = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    k = ix >> 23
    m = ((ix & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = tl.where(k == 0, 0.0 - v, m - 1.0)
    p = mul(f, 7.0376836292e-2) + -1.1514610310e-1
    p = mul(p, f) + 1.1676998740e-1
    p = mul(p, f) + -1.2420140846e-1
    p = mul(p, f) + 1.4249322787e-1
    p = mul(p, f) + -1.6668057665e-1
    p = mul(p, f) + 2.0000714765e-1
    p = mul(p, f) + -2.4999993993e-1
    p = mul(p, f) + 3.3333331174e-1
    s = f * f
    y = mul(p * f, s) + mul(s, -0.5)
    return mul(k.to(tl.float32), -0.69314718) - (y + f)


@triton.jit
def exp2_pair(t):
    """(2^t, 2^-t) for fp32 t in [-126, 0]; the two share one polynomial, so the race needs no division."""
    r = t + 12582912.0  # 1.5 * 2^23: the low mantissa bits of the sum are round(t)
    n = r - 12582912.0
    exponent = (r.to(tl.int32, bitcast=True) - 0x4B400000) << 23
    f = t - n
    g = f * f
    even = mul(mul(mul(g, 0.00015469732) + 0.0096181, g) + 0.24022651, g) + 1.0
    odd = mul(mul(mul(g, 0.0013398874) + 0.05550341, g) + 0.6931472, f)
    w = ((even + odd).to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)
    iw = ((even - odd).to(tl.int32, bitcast=True) - exponent).to(tl.float32, bitcast=True)
    return w, iw
