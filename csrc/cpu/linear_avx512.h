// Sums over a group with AVX-512 (F and BW): a tile's 16 outputs in one register.
#pragma once

#include "cpu/linear_body.h"
#include "cpu/linear_sets.h"

#if MGF_X86
#include <immintrin.h>

#define MGF_TARGET MGF_TARGET_LINEAR_AVX512

namespace mgf {
namespace {

MGF_TARGET inline __m512i widen(const void* from) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}

// Two weights of 4 bits in each 16: the low ones stay, the high ones go to another register.
MGF_TARGET inline void split(__m512i& low, __m512i& high) {
    high = _mm512_srli_epi16(low, 4);
    low = _mm512_and_si512(low, _mm512_set1_epi16(15));
}

MGF_TARGET inline __m512i four_inputs(const unsigned char* x) {
    long long four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_set1_epi64(four);
}

// See add_scaled in linear_body.h; no FMA, which would round less.
MGF_TARGET inline void add_scaled_16(__m512i sum, int32_t correction, float input_scale, const float* scale,
                                     float* sums) {
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(correction)));
    const __m512 factor = _mm512_mul_ps(_mm512_loadu_ps(scale), _mm512_set1_ps(input_scale));
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_mul_ps(exact, factor)));
}

struct SimdAvx512 {
    static constexpr int kFloatRows = 8, kIntegerRows = 8, kSides = 1;
    static constexpr bool kHalves = false;

    // The dot product of bfloat16 pairs is not used: its inputs are bfloat16 too, so that inputs exact to fp32 would
    // take three of them where two FMAs do, and it rounds by rules of its own.
    template <bool Half>
    struct Floats {
        struct Weights {
            __m512 even, odd;
        };
        __m512 even, odd;

        MGF_TARGET inline void clear() { even = odd = _mm512_setzero_ps(); }
        MGF_TARGET static inline void load(const unsigned char* w, int, Weights& weights) {
            if (Half) {
                const __m512i both = _mm512_loadu_si512(w);
                weights.even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
                weights.odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000))));
            } else {
                weights.even = _mm512_loadu_ps(w);
                weights.odd = _mm512_loadu_ps(w + 64);
            }
        }
        MGF_TARGET inline void add(const Weights& weights, const unsigned char* inputs) {
            const float* const x = reinterpret_cast<const float*>(inputs);
            even = _mm512_fmadd_ps(weights.even, _mm512_set1_ps(x[0]), even);
            odd = _mm512_fmadd_ps(weights.odd, _mm512_set1_ps(x[1]), odd);
        }
        MGF_TARGET inline void add_to(float* sums, int) const {
            _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_add_ps(even, odd)));
        }
    };

    // Bytes widened to 16 bits.
    template <bool FourBits, int>
    struct Integers {
        struct Weights {
            __m512i u[2][2];  // [inputs / 4][outputs / 8]
        };
        __m512i a, b;  // 8 outputs each, two partial sums per output

        MGF_TARGET inline void clear() { a = b = _mm512_setzero_si512(); }
        MGF_TARGET static inline void load(const unsigned char* u, int, Weights& weights) {
            weights.u[0][0] = widen(u), weights.u[0][1] = widen(u + 32);
            if (FourBits) {
                split(weights.u[0][0], weights.u[1][0]);
                split(weights.u[0][1], weights.u[1][1]);
            } else {
                weights.u[1][0] = widen(u + 64), weights.u[1][1] = widen(u + 96);
            }
        }
        MGF_TARGET inline void add(const Weights& weights, const unsigned char* x) {
            const __m512i q0 = four_inputs(x), q1 = four_inputs(x + 8);
            a = _mm512_add_epi32(a, _mm512_madd_epi16(weights.u[0][0], q0));
            b = _mm512_add_epi32(b, _mm512_madd_epi16(weights.u[0][1], q0));
            a = _mm512_add_epi32(a, _mm512_madd_epi16(weights.u[1][0], q1));
            b = _mm512_add_epi32(b, _mm512_madd_epi16(weights.u[1][1], q1));
        }
        MGF_TARGET inline void add_scaled(float* sums, int, const InputGroup& group, const float* scale) const {
            const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
            const __m512i first = _mm512_permutex2var_epi32(a, even, b);
            const __m512i second = _mm512_permutex2var_epi32(a, odd, b);
            add_scaled_16(_mm512_add_epi32(first, second), offset_of(FourBits) * group.sum, group.scale, scale, sums);
        }
    };
};

}  // namespace
}  // namespace mgf

#undef MGF_TARGET
#endif
