// Integer products of attention, int8 x 16 bits: sixteen outputs, four inputs at a time, one per instruction set.
//
// A line is 64 bytes u = 1 ... 255, [16 outputs][4 inputs]. Inputs |x| <= 32512 arrive packed: 8 bytes for every four
// of them, as each set likes them. Dot::sum gives the sum of x * u for each output, exactly; at most 256 inputs, whose
// sum stays below 2^31. Constructors are written out: the compiler's own would not be compiled for the set.
#pragma once

#include "cpu/attention_math.h"

namespace mgf {
namespace {

constexpr int kPackedBytes = 8;  // four inputs

#if MGF_X86 && MGF_PART_BYTES == 64
// VNNI multiplies 8 bits by 8 bits: x = 256 * high + low, two products for each line.
MGF_INLINE void pack_inputs(I16 x, unsigned char* to) {
    using Bytes = int8_t __attribute__((vector_size(16)));
    const __m128i low = (__m128i) __builtin_convertvector(x, Bytes);  // the last byte, signed: the rest divides by 256
    const __m128i high = (__m128i) __builtin_convertvector(plus(x, all_int(128)) >> 8, Bytes);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(high, low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi32(high, low));
}

struct Dot {
    __m512i high, low;

    MGF_INLINE Dot() : high(_mm512_setzero_si512()), low(_mm512_setzero_si512()) {}
    MGF_INLINE void add(const unsigned char* line, const unsigned char* packed) {
        int32_t x[2];
        std::memcpy(x, packed, sizeof x);
        const __m512i u = _mm512_loadu_si512(line);
        high = _mm512_dpbusd_epi32(high, u, _mm512_set1_epi32(x[0]));
        low = _mm512_dpbusd_epi32(low, u, _mm512_set1_epi32(x[1]));
    }
    MGF_INLINE I16 sum() const { return plus(shifted_left((I16)high, 8), (I16)low); }
};
#elif MGF_X86 && MGF_PART_BYTES == 32
MGF_INLINE void pack_inputs(I16 x, unsigned char* to) {
    const __m256i mixed = _mm256_packs_epi32((__m256i)x.a, (__m256i)x.b);  // by halves of the registers
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(mixed, 0xD8));
}

struct Dot {
    __m256i pairs[4];  // four outputs each, inputs 0 and 1 beside inputs 2 and 3

    MGF_INLINE Dot() {
        for (__m256i& four : pairs) four = _mm256_setzero_si256();
    }
    MGF_INLINE void add(const unsigned char* line, const unsigned char* packed) {
        int64_t four;
        std::memcpy(&four, packed, sizeof four);
        const __m256i x = _mm256_set1_epi64x(four);
        for (int i = 0; i < 4; ++i) {
            const __m128i u = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line + 16 * i));
            pairs[i] = _mm256_add_epi32(pairs[i], _mm256_madd_epi16(_mm256_cvtepu8_epi16(u), x));
        }
    }
    MGF_INLINE I16 sum() const {
        const __m256i a = _mm256_hadd_epi32(pairs[0], pairs[1]), b = _mm256_hadd_epi32(pairs[2], pairs[3]);
        return {(IntPart)_mm256_permute4x64_epi64(a, 0xD8), (IntPart)_mm256_permute4x64_epi64(b, 0xD8)};
    }
};
#elif MGF_X86 && MGF_PART_BYTES == 16
MGF_INLINE void pack_inputs(I16 x, unsigned char* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packs_epi32((__m128i)x.a.a, (__m128i)x.a.b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm_packs_epi32((__m128i)x.b.a, (__m128i)x.b.b));
}

struct Dot {
    __m128i pairs[8];  // two outputs each, inputs 0 and 1 beside inputs 2 and 3

    MGF_INLINE Dot() {
        for (__m128i& two : pairs) two = _mm_setzero_si128();
    }
    MGF_INLINE void add(const unsigned char* line, const unsigned char* packed) {
        int64_t four;
        std::memcpy(&four, packed, sizeof four);
        const __m128i x = _mm_set1_epi64x(four), zero = _mm_setzero_si128();
        for (int i = 0; i < 4; ++i) {
            const __m128i u = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line + 16 * i));
            pairs[2 * i] = _mm_add_epi32(pairs[2 * i], _mm_madd_epi16(_mm_unpacklo_epi8(u, zero), x));
            pairs[2 * i + 1] = _mm_add_epi32(pairs[2 * i + 1], _mm_madd_epi16(_mm_unpackhi_epi8(u, zero), x));
        }
    }
    MGF_INLINE IntPart four_sums(int i) const {
        const __m128 a = _mm_castsi128_ps(pairs[i]), b = _mm_castsi128_ps(pairs[i + 1]);
        return (IntPart)_mm_shuffle_ps(a, b, 0x88) + (IntPart)_mm_shuffle_ps(a, b, 0xDD);
    }
    MGF_INLINE I16 sum() const { return {{four_sums(0), four_sums(2)}, {four_sums(4), four_sums(6)}}; }
};
#else  // elsewhere the compiler's own vectors have to do
MGF_INLINE void pack_inputs(I16 x, unsigned char* to) {
    alignas(64) int32_t wide[kLanes16];
    int16_t narrow[kLanes16];
    store(wide, x);
    for (int i = 0; i < kLanes16; ++i) narrow[i] = int16_t(wide[i]);
    std::memcpy(to, narrow, sizeof narrow);
}

struct Dot {
    int32_t sums[kLanes16] = {};

    MGF_INLINE void add(const unsigned char* line, const unsigned char* packed) {
        int16_t x[4];
        std::memcpy(x, packed, sizeof x);
        for (int i = 0; i < kLanes16; ++i) {
            const unsigned char* const u = line + 4 * i;
            sums[i] += (x[0] * u[0] + x[1] * u[1]) + (x[2] * u[2] + x[3] * u[3]);
        }
    }
    MGF_INLINE I16 sum() const { return load_int(sums); }
};
#endif

// n numbers, rounded up to 16 with zeros, as integers of 16 bits: x = scale * integer.
struct Scaled {
    float scale;
    int32_t sum;  // of the integers
};

constexpr float kTiny = 1e-30f;  // what is smaller has no usable reciprocal, and is zero here

MGF_INLINE Scaled scale_inputs(const float* x, int n, unsigned char* packed) {
    I16 most = all_int(0);
    for (int i = 0; i < n; i += kLanes16) most = larger(most, as_int(magnitude(load(x + i))));
    const float largest = largest_magnitude(most);
    const bool zero = largest < kTiny;
    const F16 inverse = all(zero ? 0.0f : 32500.0f / largest);
    I16 sums = all_int(0);
    for (int i = 0; i < n; i += kLanes16) {
        const I16 integers = rounded(load(x + i) * inverse);
        sums = plus(sums, integers);
        pack_inputs(integers, packed + i / 4 * kPackedBytes);
    }
    alignas(64) int32_t v[kLanes16];
    store(v, sums);
    uint32_t sum = 0;  // unsigned: of NaN anything may come, and NaN is the scale then
    for (int i = 0; i < kLanes16; ++i) sum += uint32_t(v[i]);
    return {zero ? 0.0f : largest / 32500.0f, int32_t(sum)};
}

// The products that Dot has summed, without the 128 in each u, as floats yet to be scaled.
MGF_INLINE F16 centred(const Dot& dot, const Scaled& x) {
    return converted(minus(dot.sum(), all_int(int32_t(128u * uint32_t(x.sum)))));
}

}  // namespace
}  // namespace mgf
