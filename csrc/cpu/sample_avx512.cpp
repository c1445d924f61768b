// The sampler with AVX-512F: 16 lanes, and survivors packed by one instruction.
#include "cpu/sample.h"
#include "cpu/sample_rows.h"

#if MGF_X86
#include <immintrin.h>

#define MGF_TARGET MGF_TARGET_AVX512
#include "cpu/philox_simd.h"

namespace mgf {
namespace {

struct Lanes {
    using Vector = __m512i;
    static constexpr int kCount = 16;
    MGF_TARGET static inline Vector load(const uint32_t* x) { return _mm512_loadu_si512(x); }
    MGF_TARGET static inline void store(uint32_t* to, Vector x) { _mm512_storeu_si512(to, x); }
    MGF_TARGET static inline Vector set(uint32_t x) { return _mm512_set1_epi32(int(x)); }
    MGF_TARGET static inline Vector multiply(Vector a, Vector b) { return _mm512_mul_epu32(a, b); }
    MGF_TARGET static inline Vector odd(Vector x) { return _mm512_srli_epi64(x, 32); }
    MGF_TARGET static inline Vector high(Vector even, Vector odd) {
        return _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
    }
    MGF_TARGET static inline Vector low(Vector even, Vector odd) {
        return _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
    }
    MGF_TARGET static inline Vector exclusive_or(Vector a, Vector b, Vector c) {
        return _mm512_ternarylogic_epi32(a, b, c, 0x96);
    }
};

struct Simd {
    MGF_TARGET static inline void philox(const uint32_t* block, Counter rest, Key key, Words& out) {
        philox_lanes<Lanes>(block, rest, key, out);
    }

    // Packs the keys >= threshold in order, and where they were; returns how many. `to` may be `key`.
    MGF_TARGET static inline int compact(const int32_t* key, int n, int32_t threshold, int32_t* to, int32_t* where) {
        const __m512i least = _mm512_set1_epi32(threshold);
        __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        int kept = 0;
        for (int i = 0; i < n; i += 16) {
            const __mmask16 present = n - i >= 16 ? __mmask16(0xFFFF) : __mmask16((1 << (n - i)) - 1);
            const __m512i k = _mm512_maskz_loadu_epi32(present, key + i);
            const __mmask16 in = _mm512_mask_cmpge_epi32_mask(present, k, least);
            // Packed in a register and stored whole: a packing store takes over 100 cycles on Zen 4. What lands behind
            // the kept ones is overwritten or never read; kept <= i, so no key is lost, and arrays end on 16.
            _mm512_storeu_si512(to + kept, _mm512_maskz_compress_epi32(in, k));
            _mm512_storeu_si512(where + kept, _mm512_maskz_compress_epi32(in, index));
            kept += __builtin_popcount(in);
            index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
        }
        return kept;
    }
};

}  // namespace

MGF_INSTANCE(avx512_instance, MGF_TARGET)

}  // namespace mgf
#endif
