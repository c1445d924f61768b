// Sums over a group with AVX2 and FMA: half a tile, 8 outputs, at a time, as 16 registers do not hold more rows of it.
#pragma once

#include "cpu/linear_body.h"
#include "cpu/linear_sets.h"

#if MGF_X86
#include <immintrin.h>

#define MGF_TARGET MGF_TARGET_LINEAR_AVX2

namespace mgf {
namespace {

MGF_TARGET inline __m256i load256(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

MGF_TARGET inline __m256i widen(const void* from) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

// Two weights of 4 bits in each 16: the low ones stay, the high ones go to another register.
MGF_TARGET inline void split(__m256i& low, __m256i& high) {
    high = _mm256_srli_epi16(low, 4);
    low = _mm256_and_si256(low, _mm256_set1_epi16(15));
}

MGF_TARGET inline __m256i four_inputs(const unsigned char* x) {
    long long four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi64x(four);
}

// See add_scaled in linear_body.h; no FMA, which would round less.
MGF_TARGET inline void add_scaled_8(__m256i sum, int32_t correction, float input_scale, const float* scale,
                                    float* sums) {
    const __m256 exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(sum, _mm256_set1_epi32(correction)));
    const __m256 factor = _mm256_mul_ps(_mm256_loadu_ps(scale), _mm256_set1_ps(input_scale));
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), _mm256_mul_ps(exact, factor)));
}

struct SimdAvx2 {
    static constexpr int kFloatRows = 4, kIntegerRows = 4, kSides = 2;
    static constexpr bool kHalves = false;

    template <bool Half>
    struct Floats {
        struct Weights {
            __m256 even, odd;
        };
        __m256 even, odd;

        MGF_TARGET inline void clear() { even = odd = _mm256_setzero_ps(); }
        MGF_TARGET static inline void load(const unsigned char* w, int side, Weights& weights) {
            const float* const floats = reinterpret_cast<const float*>(w) + 8 * side;
            if (Half) {
                const __m256i both = load256(floats);
                weights.even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
                weights.odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xFFFF0000))));
            } else {
                weights.even = _mm256_loadu_ps(floats);
                weights.odd = _mm256_loadu_ps(floats + kTileOutputs);
            }
        }
        MGF_TARGET inline void add(const Weights& weights, const unsigned char* inputs) {
            const float* const x = reinterpret_cast<const float*>(inputs);
            even = _mm256_fmadd_ps(weights.even, _mm256_broadcast_ss(x), even);
            odd = _mm256_fmadd_ps(weights.odd, _mm256_broadcast_ss(x + 1), odd);
        }
        MGF_TARGET inline void add_to(float* sums, int side) const {
            const __m256 sum = _mm256_loadu_ps(sums + 8 * side);
            _mm256_storeu_ps(sums + 8 * side, _mm256_add_ps(sum, _mm256_add_ps(even, odd)));
        }
    };

    // Bytes widened to 16 bits: the instruction that multiplies bytes would saturate its sums of two.
    template <bool FourBits, int>
    struct Integers {
        struct Weights {
            __m256i u[2][2];  // [inputs / 4][outputs / 4]
        };
        __m256i a, b;  // 4 outputs each, two partial sums per output

        MGF_TARGET inline void clear() { a = b = _mm256_setzero_si256(); }
        MGF_TARGET static inline void load(const unsigned char* u, int side, Weights& weights) {
            const unsigned char* const line = u + 32 * side;
            weights.u[0][0] = widen(line), weights.u[0][1] = widen(line + 16);
            if (FourBits) {
                split(weights.u[0][0], weights.u[1][0]);
                split(weights.u[0][1], weights.u[1][1]);
            } else {
                weights.u[1][0] = widen(line + 64), weights.u[1][1] = widen(line + 80);
            }
        }
        MGF_TARGET inline void add(const Weights& weights, const unsigned char* x) {
            const __m256i q0 = four_inputs(x), q1 = four_inputs(x + 8);
            a = _mm256_add_epi32(a, _mm256_madd_epi16(weights.u[0][0], q0));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(weights.u[0][1], q0));
            a = _mm256_add_epi32(a, _mm256_madd_epi16(weights.u[1][0], q1));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(weights.u[1][1], q1));
        }
        MGF_TARGET inline void add_scaled(float* sums, int side, const InputGroup& group, const float* scale) const {
            const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xD8);
            add_scaled_8(sum, offset_of(FourBits) * group.sum, group.scale, scale + 8 * side, sums + 8 * side);
        }
    };
};

}  // namespace
}  // namespace mgf

#undef MGF_TARGET
#endif
