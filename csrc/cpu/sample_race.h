// One row of the sampler, last part: noise for the candidates, and the smallest E / w.
//
// Only tokens that survived the filters get noise: at top-k 250 that halves the time of a row. `Simd` is what an
// instruction set brings itself: Philox for kLanes counters, and compaction.
#pragma once

#include "cpu/sample_keys.h"

namespace mgf {
namespace {

constexpr int kLanes = 64;  // Philox blocks in flight: 1 KB of words, stays in L1

struct Words {
    alignas(64) uint32_t word[4][kLanes];  // word j of every block
};

// E of the 4 * kLanes tokens from `first` on: each Philox block serves four of them.
template <class Simd>
MGF_INLINE void dense_noise(const Row& row, int first, float* __restrict E) {
    alignas(64) uint32_t block[kLanes];
    for (int j = 0; j < kLanes; ++j) block[j] = uint32_t(first / 4 + j);
    Words words;
    Simd::philox(block, row.counter, row.seed, words);
    alignas(64) uint32_t x[4 * kLanes];
    for (int j = 0; j < kLanes; ++j) {
        x[4 * j + 0] = words.word[0][j];
        x[4 * j + 1] = words.word[1][j];
        x[4 * j + 2] = words.word[2][j];
        x[4 * j + 3] = words.word[3][j];
    }
    for (int i = 0; i < 4 * kLanes; ++i) E[i] = exponential(x[i]);
}

// E of kLanes tokens anywhere: a Philox block each, of which one word is used.
template <class Simd>
MGF_INLINE void sparse_noise(const Row& row, const int32_t* __restrict id, float* __restrict E) {
    alignas(64) uint32_t block[kLanes];
    for (int j = 0; j < kLanes; ++j) block[j] = uint32_t(id[j]) >> 2;
    Words words;
    Simd::philox(block, row.counter, row.seed, words);
    for (int j = 0; j < kLanes; ++j) {
        const int32_t w0 = int32_t(words.word[0][j]), w1 = int32_t(words.word[1][j]);
        const int32_t w2 = int32_t(words.word[2][j]), w3 = int32_t(words.word[3][j]);
        E[j] = exponential(uint32_t(pick(id[j] & 2, pick(id[j] & 1, w3, w2), pick(id[j] & 1, w1, w0))));
    }
}

// finish = E / w of n candidates, as bits, whose order is that of the floats; dropped ones never finish.
MGF_INLINE int32_t run(const int32_t* __restrict key, const float* __restrict inverse, const float* __restrict E, int n,
                       int32_t* __restrict finish, int32_t best) {
    for (int i = 0; i < n; ++i) {
        const int32_t product = int32_t(bits(E[i] * inverse[i]));
        finish[i] = pick(key[i] == kDropped, kInfinity, product);
        best = std::min(best, finish[i]);
    }
    return best;
}

// The race among the candidates. The likeliest token always finishes, so that nobody does only if all were dropped.
template <class Simd>
MGF_INLINE Choice race(const Row& row, const Candidates& c, int32_t* __restrict finish) {
    int32_t best = kInfinity;
    alignas(64) float E[4 * kLanes];
    const int stride = c.id == nullptr ? 4 * kLanes : kLanes;
    for (int i = 0; i < c.n; i += stride) {
        const int count = std::min(stride, c.n - i);
        const float* noise = E;
        if (row.noise != nullptr && c.id == nullptr) {
            noise = row.noise + i;
        } else if (row.noise != nullptr) {
            for (int j = 0; j < count; ++j) E[j] = row.noise[c.id[i + j]];
        } else if (c.id == nullptr) {
            dense_noise<Simd>(row, i, E);
        } else {
            for (int j = count; j < kLanes; ++j) c.id[i + j] = 0;  // whole lanes: no scalar tail
            sparse_noise<Simd>(row, c.id + i, E);
        }
        best = run(c.key + i, c.inverse + i, noise, count, finish + i, best);
    }
    if (best == kInfinity) return {0, true};
    int32_t first = c.n;
    for (int i = 0; i < c.n; ++i) first = std::min(first, pick(finish[i] == best, i, c.n));
    return {c.id == nullptr ? first : c.id[first], false};
}

}  // namespace
}  // namespace mgf
