// The sampler for any processor: SSE2 on x86-64, NEON on aarch64, by the compiler alone.
#include "cpu/sample.h"
#include "cpu/sample_rows.h"

namespace mgf {
namespace {

struct Simd {
    static MGF_INLINE void philox(const uint32_t* block, Counter rest, Key key, Words& out) {
        for (int j = 0; j < kLanes; ++j) {
            const Counter c = philox4x32_10({block[j], rest.c1, rest.c2, rest.c3}, key);
            out.word[0][j] = c.c0, out.word[1][j] = c.c1, out.word[2][j] = c.c2, out.word[3][j] = c.c3;
        }
    }

    // Packs the keys >= threshold in order, and where they were; returns how many. `to` may be `key`. Without a branch:
    // one key in eight survives, in no order that a predictor would learn.
    static MGF_INLINE int compact(const int32_t* key, int n, int32_t threshold, int32_t* to, int32_t* where) {
        int kept = 0;
        for (int i = 0; i < n; ++i) {
            const int32_t k = key[i];
            to[kept] = k, where[kept] = i;
            kept += k >= threshold;
        }
        return kept;
    }
};

}  // namespace

MGF_INSTANCE(baseline_instance, )

}  // namespace mgf
