// Noise for one column of B requests, arithmetic only: one row is V tokens of one codebook; rows are independent.
//
// One column of MusicGen (4 x 2048) takes about 17 us with AVX-512, 29 us with SSE2 and 560 us in the torch twin (one
// core of a shared Xeon, gcc 12, best of many, called from Python). Nothing to gain from threads.
#include "cpu/race.h"

#include <algorithm>

#include "cpu/philox.h"

namespace mgf {
namespace {

constexpr int64_t kBlocks = 64;          // Philox blocks in flight: 1 KB of words, stays in L1
constexpr int64_t kChunk = 4 * kBlocks;  // tokens

using Row = void(Key key, uint32_t step, uint32_t codebook, uint32_t stream, int64_t V, float* E);

MGF_INLINE void row(Key key, uint32_t step, uint32_t codebook, uint32_t stream, int64_t V, float* E) {
    uint32_t words[kChunk];
    for (int64_t first = 0; first < V; first += kChunk) {
        // Whole chunks of words even at the end of a row: constant trip counts vectorise without a scalar tail.
        for (int64_t j = 0; j < kBlocks; ++j) {
            const Counter c = philox4x32_10({uint32_t(first / 4 + j), step, codebook, stream}, key);
            words[4 * j + 0] = c.c0;
            words[4 * j + 1] = c.c1;
            words[4 * j + 2] = c.c2;
            words[4 * j + 3] = c.c3;
        }
        const int64_t count = std::min(kChunk, V - first);
        for (int64_t i = 0; i < count; ++i) E[first + i] = exponential(words[i]);
    }
}

void row_baseline(Key key, uint32_t step, uint32_t codebook, uint32_t stream, int64_t V, float* E) {
    row(key, step, codebook, stream, V, E);
}

#if MGF_X86
MGF_TARGET_AVX2 void row_avx2(Key key, uint32_t step, uint32_t codebook, uint32_t stream, int64_t V, float* E) {
    row(key, step, codebook, stream, V, E);
}

MGF_TARGET_AVX512 void row_avx512(Key key, uint32_t step, uint32_t codebook, uint32_t stream, int64_t V, float* E) {
    row(key, step, codebook, stream, V, E);
}

Row* row_for(Isa isa) {
    return isa == Isa::avx512 ? row_avx512 : isa == Isa::avx2 ? row_avx2 : row_baseline;
}
#else
Row* row_for(Isa) {
    return row_baseline;
}
#endif

}  // namespace

void race_noise(const RaceNoise& noise, Isa isa) {
    Row* const fill = row_for(isa);
    for (int64_t b = 0; b < noise.B; ++b) {
        const uint64_t seed = uint64_t(noise.seed[b]);
        const Key key = {uint32_t(seed), uint32_t(seed >> 32)};
        for (int64_t k = 0; k < noise.K; ++k) {
            float* const E = noise.E + (b * noise.K + k) * noise.V;
            fill(key, uint32_t(noise.step[b]), uint32_t(k), uint32_t(noise.stream[b]), noise.V, E);
        }
    }
}

}  // namespace mgf
