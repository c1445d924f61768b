// float16 and bfloat16 as fp32 arithmetic sees them: loading, and rounding a float to their grid, nearest even.
//
// Integer arithmetic instead of F16C or AVX512-BF16: the same bits on every processor, subnormals included whatever
// the flush-to-zero flags say, and the loops around it vectorise for every instruction set. NaN stays NaN.
#pragma once

#include "cpu/race.h"
#include "sample_args.h"

namespace mgf {

MGF_INLINE float float_from_f16(uint16_t h) {
    const uint32_t magnitude = h & 0x7FFFu, sign = uint32_t(h & 0x8000u) << 16;
    const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7C00 ? 0x70000000u : 0x38000000u);  // inf and NaN, rest
    const uint32_t subnormal = bits(float(int32_t(magnitude)) * 0x1p-24f);
    return from_bits((magnitude < 0x0400 ? subnormal : normal) | sign);
}

MGF_INLINE float round_to_f16(float x) {
    const uint32_t magnitude = bits(x) & 0x7FFFFFFFu, sign = bits(x) ^ magnitude;
    uint32_t r = (magnitude + 0xFFFu + ((magnitude >> 13) & 1)) & ~0x1FFFu;
    r = r >= 0x47800000u ? 0x7F800000u : r;                                 // 65520 and more: infinity
    const uint32_t subnormal = bits((from_bits(magnitude) + 0.5f) - 0.5f);  // a float in [0.5, 1) steps by 2^-24 too
    r = magnitude < 0x38800000u ? subnormal : r;
    return from_bits((magnitude > 0x7F800000u ? magnitude : r) | sign);
}

MGF_INLINE float round_to_bf16(float x) {
    const uint32_t b = bits(x);
    const uint32_t r = (b + 0x7FFFu + ((b >> 16) & 1)) & 0xFFFF0000u;
    return from_bits((b & 0x7FFFFFFFu) > 0x7F800000u ? b : r);
}

// How logits of one type are read, and where their arithmetic is rounded to.
template <DType>
struct Logits;

template <>
struct Logits<DType::float32> {
    using Element = float;
    static MGF_INLINE float load(float x) { return x; }
    static MGF_INLINE float round(float x) { return x; }
};

template <>
struct Logits<DType::float16> {
    using Element = uint16_t;
    static MGF_INLINE float load(uint16_t h) { return float_from_f16(h); }
    static MGF_INLINE float round(float x) { return round_to_f16(x); }
};

template <>
struct Logits<DType::bfloat16> {
    using Element = uint16_t;
    static MGF_INLINE float load(uint16_t h) { return from_bits(uint32_t(h) << 16); }
    static MGF_INLINE float round(float x) { return round_to_bf16(x); }
};

}  // namespace mgf
