// Linear layers with AVX2 and the byte products of AVX-VNNI: desktop processors from 2021 on that lack AVX-512.
#include "cpu/linear_avx2.h"

#if MGF_HAS_AVXVNNI
#define MGF_TARGET MGF_TARGET_LINEAR_AVXVNNI

namespace mgf {
namespace {

struct Simd : SimdAvx2 {
    static constexpr bool kHalves = true;

    template <bool FourBits, int>
    struct Integers {
        struct Weights {
            __m256i u[2];
        };
        __m256i high, low;

        MGF_TARGET inline void clear() { high = low = _mm256_setzero_si256(); }
        MGF_TARGET static inline void load(const unsigned char* u, int side, Weights& weights) {
            weights.u[0] = load256(u + 32 * side);
            if (FourBits) {
                const __m256i low = _mm256_set1_epi8(15);
                weights.u[1] = _mm256_and_si256(_mm256_srli_epi16(weights.u[0], 4), low);
                weights.u[0] = _mm256_and_si256(weights.u[0], low);
            } else {
                weights.u[1] = load256(u + 32 * side + 64);
            }
        }
        // Written out because gcc 12 copies the sums of several rows around the intrinsic.
        MGF_TARGET static inline void multiply_add(__m256i& sum, __m256i u, const unsigned char* x) {
            int32_t four;
            std::memcpy(&four, x, sizeof four);
            __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u), "x"(_mm256_set1_epi32(four)));
        }
        MGF_TARGET inline void add(const Weights& weights, const unsigned char* x) {
            multiply_add(high, weights.u[0], x);
            multiply_add(low, weights.u[0], x + kGroupInputs);
            multiply_add(high, weights.u[1], x + 4);
            multiply_add(low, weights.u[1], x + kGroupInputs + 4);
        }
        MGF_TARGET inline void add_scaled(float* sums, int side, const InputGroup& group, const float* scale) const {
            const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high, 8), low);
            add_scaled_8(sum, offset_of(FourBits) * group.sum, group.scale, scale + 8 * side, sums + 8 * side);
        }
    };
};

}  // namespace

MGF_LINEAR_KERNELS(linear_avxvnni, MGF_TARGET_LINEAR_AVXVNNI)

}  // namespace mgf
#endif
