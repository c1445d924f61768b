// The noise of the sampler's race: an exponential variate E per token, and the powers of two that weigh the tokens.
//
// The sampler picks the token with the smallest E / w, w = 2^t; P(token) is then proportional to w. Which token wins
// must not depend on the machine, so both functions are fixed to the bit: single-precision multiplies and adds, each
// rounded once, in the order written. The python twin is musicgen_fast/philox.py; tests compare every bit.
#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"

#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "float expressions must be rounded to float (32-bit x86: compile with -msse2 -mfpmath=sse)"
#endif

namespace mgf {

MGF_INLINE uint32_t bits(float x) {
    uint32_t b;
    std::memcpy(&b, &x, sizeof b);
    return b;
}

MGF_INLINE float from_bits(uint32_t b) {
    float x;
    std::memcpy(&x, &b, sizeof x);
    return x;
}

// Nearest even, like a plain cast. AVX2 and SSE2 convert signed integers only; both halves are exact in a float, so
// the sum is the only rounding, and the loop stays vectorised.
MGF_INLINE float to_float(uint32_t x) {
    return float(int32_t(x >> 16)) * 65536.0f + float(int32_t(x & 0xFFFF));
}

// E = -ln((x + 0.5) / 2^32), finite for every x. Near u = 1 the mantissa of u has no bits left for 1 - u, so the
// logarithm is taken of 1 - v with v = 1 - u computed from ~x: that keeps the small E, which decide the race, exact.
MGF_INLINE float exponential(uint32_t x) {
    constexpr uint32_t sqrt_half = 0x3F3504F3;  // mantissas split here, so that f lies in [-0.293, 0.414]
    const float u = (to_float(x) + 0.5f) * 0x1p-32f;
    const float v = (to_float(~x) + 0.5f) * 0x1p-32f;
    const uint32_t ix = bits(u) - sqrt_half;
    const int32_t k = int32_t(ix) >> 23;
    const float m = from_bits((ix & 0x007FFFFF) + sqrt_half);
    const float near_one = 0.0f - v, elsewhere = m - 1.0f;
    const float f = k == 0 ? near_one : elsewhere;
    float p = f * 7.0376836292e-2f + -1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f + -1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f + -1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f + -2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float s = f * f;
    const float y = (p * f) * s + s * -0.5f;
    return float(k) * -0.69314718f - (y + f);
}

struct PowerOfTwo {
    float w, iw;  // 2^t and 2^-t
};

// For t in [-126, 0]. Even and odd parts of one polynomial serve both signs, which saves a division per token.
MGF_INLINE PowerOfTwo exp2_pair(float t) {
    const float r = t + 12582912.0f;  // 1.5 * 2^23: the low bits of r hold round(t)
    const float n = r - 12582912.0f;
    const uint32_t shift = (bits(r) - 0x4B400000u) << 23;
    const float f = t - n;
    const float g = f * f;
    const float even = ((g * 0.00015469732f + 0.0096181f) * g + 0.24022651f) * g + 1.0f;
    const float odd = ((g * 0.0013398874f + 0.05550341f) * g + 0.6931472f) * f;
    return {from_bits(bits(even + odd) + shift), from_bits(bits(even - odd) - shift)};
}

}  // namespace mgf
