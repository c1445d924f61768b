// Sums over a group with AVX-512 and VNNI, whose instruction multiplies and adds 64 pairs of bytes.
#pragma once

#include "cpu/linear_avx512.h"

#if MGF_X86
#define MGF_TARGET MGF_TARGET_LINEAR_VNNI

namespace mgf {
namespace {

struct SimdVnni : SimdAvx512 {
    static constexpr bool kHalves = true;

    template <bool FourBits, int Rows>
    struct Integers {
        static constexpr bool kTwoChains = Rows <= 4;  // few rows would wait for the latency of 5 cycles
        struct Weights {
            __m512i u[2];
        };
        __m512i high, low, high2, low2;

        MGF_TARGET inline void clear() { high = low = high2 = low2 = _mm512_setzero_si512(); }
        MGF_TARGET static inline void load(const unsigned char* u, int, Weights& weights) {
            weights.u[0] = _mm512_loadu_si512(u);
            if (FourBits) {
                const __m512i low = _mm512_set1_epi8(15);
                weights.u[1] = _mm512_and_si512(_mm512_srli_epi16(weights.u[0], 4), low);
                weights.u[0] = _mm512_and_si512(weights.u[0], low);
            } else {
                weights.u[1] = _mm512_loadu_si512(u + 64);
            }
        }
        // Four bytes of x, broadcast. Written out because gcc 12 copies every sum of eight rows twice around the
        // intrinsic, and does not fold the broadcast into it.
        MGF_TARGET static inline void multiply_add(__m512i& sum, __m512i u, const unsigned char* x) {
            __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(*reinterpret_cast<const int32_t*>(x)));
        }
        MGF_TARGET inline void add(const Weights& weights, const unsigned char* x) {
            multiply_add(high, weights.u[0], x);
            multiply_add(low, weights.u[0], x + kGroupInputs);
            multiply_add(kTwoChains ? high2 : high, weights.u[1], x + 4);
            multiply_add(kTwoChains ? low2 : low, weights.u[1], x + kGroupInputs + 4);
        }
        MGF_TARGET inline void add_scaled(float* sums, int, const InputGroup& group, const float* scale) const {
            const __m512i h = _mm512_add_epi32(high, high2), l = _mm512_add_epi32(low, low2);
            const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(h, 8), l);
            add_scaled_16(sum, offset_of(FourBits) * group.sum, group.scale, scale, sums);
        }
    };
};

}  // namespace

}  // namespace mgf

#undef MGF_TARGET
#endif
