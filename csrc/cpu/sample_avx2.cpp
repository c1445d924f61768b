// The sampler with AVX2: 8 lanes, survivors packed through a table of permutations.
#include "cpu/sample.h"
#include "cpu/sample_rows.h"

#if MGF_X86
#include <immintrin.h>

#define MGF_TARGET MGF_TARGET_AVX2
#include "cpu/philox_simd.h"

namespace mgf {
namespace {

// For each mask of 8 lanes, the lanes that are set, in order: 2 KB.
struct Packing {
    uint8_t lanes[256][8];
    constexpr Packing() : lanes{} {
        for (int mask = 0; mask < 256; ++mask) {
            int kept = 0;
            for (int lane = 0; lane < 8; ++lane) {
                if (mask >> lane & 1) lanes[mask][kept++] = uint8_t(lane);
            }
        }
    }
};

constexpr Packing kPacking;

MGF_TARGET inline __m256i load8(const void* x) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(x));
}

MGF_TARGET inline void store8(void* to, __m256i x) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), x);
}

struct Lanes {
    using Vector = __m256i;
    static constexpr int kCount = 8;
    MGF_TARGET static inline Vector load(const uint32_t* x) { return load8(x); }
    MGF_TARGET static inline void store(uint32_t* to, Vector x) { store8(to, x); }
    MGF_TARGET static inline Vector set(uint32_t x) { return _mm256_set1_epi32(int(x)); }
    MGF_TARGET static inline Vector multiply(Vector a, Vector b) { return _mm256_mul_epu32(a, b); }
    MGF_TARGET static inline Vector odd(Vector x) { return _mm256_srli_epi64(x, 32); }
    MGF_TARGET static inline Vector high(Vector even, Vector odd) {
        return _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
    }
    MGF_TARGET static inline Vector low(Vector even, Vector odd) {
        return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    }
    MGF_TARGET static inline Vector exclusive_or(Vector a, Vector b, Vector c) {
        return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
    }
};

struct Simd {
    MGF_TARGET static inline void philox(const uint32_t* block, Counter rest, Key key, Words& out) {
        philox_lanes<Lanes>(block, rest, key, out);
    }

    // Packs the keys >= threshold in order, and where they were; returns how many. `to` may be `key`.
    MGF_TARGET static inline int compact(const int32_t* key, int n, int32_t threshold, int32_t* to, int32_t* where) {
        int kept = 0, i = 0;
        const __m256i below = _mm256_set1_epi32(threshold - 1);  // kDropped, the smallest, is never a threshold
        __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        for (; i + 8 <= n; i += 8) {
            const __m256i k = load8(key + i);
            const int in = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(k, below)));
            const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPacking.lanes[in]));
            const __m256i order = _mm256_cvtepu8_epi32(lanes);
            // Stored whole: what lands behind the kept ones is overwritten or never read; kept <= i, so no key is lost.
            store8(to + kept, _mm256_permutevar8x32_epi32(k, order));
            store8(where + kept, _mm256_permutevar8x32_epi32(index, order));
            kept += __builtin_popcount(unsigned(in));
            index = _mm256_add_epi32(index, _mm256_set1_epi32(8));
        }
        for (; i < n; ++i) {
            const int32_t k = key[i];
            to[kept] = k, where[kept] = i;
            kept += k >= threshold;
        }
        return kept;
    }
};

}  // namespace

MGF_INSTANCE(avx2_instance, MGF_TARGET)

}  // namespace mgf
#endif
