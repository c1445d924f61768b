// One row of the sampler, first part: V logits in one to three branches -> integer keys in the order of the logits.
//
// A key is the bits of z = logit / temperature made order-preserving: integer minima and maxima vectorise, those of
// floats do not (NaN, signed zeros), and comparing integers cannot depend on a machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/half.h"
#include "cpu/philox.h"
#include "cpu/race.h"
#include "sample_args.h"

namespace mgf {
namespace {

constexpr int kMaxVocab = 4096;
constexpr int32_t kDropped = std::numeric_limits<int32_t>::min();

// a or b by masks: gcc 12 turns `c ? a : b` in a reduction into branches, and then does not vectorise the loop.
MGF_INLINE int32_t pick(bool c, int32_t a, int32_t b) {
    const int32_t mask = -int32_t(c);
    return (a & mask) | (b & ~mask);
}

MGF_INLINE int32_t key_of(float z) {
    const int32_t b = int32_t(bits(z));
    return b ^ ((b >> 31) & 0x7FFFFFFF);
}

MGF_INLINE float value_of(int32_t key) {
    return from_bits(uint32_t(key ^ ((key >> 31) & 0x7FFFFFFF)));
}

constexpr int32_t kMinusInfinity = int32_t(0x807FFFFF);  // key_of(-inf)
constexpr int32_t kInfinity = 0x7F800000;                // bits of +inf

struct Row {
    const void *c, *w, *u;  // branches: conditional; melody or style alone; null. What NB does not have is null
    float cfg, beta, scale;
    bool divide;
    int32_t top_k;  // 0: off; likewise the next two
    float top_p, min_p;
    const float* noise;  // E of every token; null: by Philox
    Key seed;
    Counter counter;  // of which c0 is still the token's to fill in
    int V;
};

struct Choice {
    int32_t token;
    bool failed;
};

// Tokens that are still in the running, in the order of the vocabulary. Arrays of kMaxVocab, of which n hold something.
struct Candidates {
    int n;
    int32_t* id;     // null: candidate i is token i
    int32_t* key;    // kDropped: out, without having been moved
    float* w;        // 2^t, t = (z - largest z) / ln 2
    float* inverse;  // 2^-t
};

// What a row needs between its loops: 112 KB of the thread's stack, of which V = 2048 touches half.
struct alignas(64) Scratch {
    int32_t key[kMaxVocab];       // of every token
    int32_t survivor[kMaxVocab];  // keys and
    int32_t id[kMaxVocab];        // tokens of those that a filter left
    float w[kMaxVocab];           // before that the mixed logits
    float inverse[kMaxVocab];
    union {
        int64_t weight[kMaxVocab];  // w in fixed point, for top-p
        int32_t finish[kMaxVocab];  // after that: E / w as bits
    };
};

template <DType D>
MGF_INLINE void mix(const Row& row, float* __restrict out) {
    using L = Logits<D>;
    const auto* __restrict c = static_cast<const typename L::Element*>(row.c);
    const auto* __restrict w = static_cast<const typename L::Element*>(row.w);
    const auto* __restrict u = static_cast<const typename L::Element*>(row.u);
    const float cfg = row.cfg, beta = row.beta;
    if (u == nullptr) {
        for (int i = 0; i < row.V; ++i) out[i] = L::load(c[i]);
    } else if (w == nullptr) {
        for (int i = 0; i < row.V; ++i) {
            const float null = L::load(u[i]);
            out[i] = L::round(L::round(L::round(L::load(c[i]) - null) * cfg) + null);
        }
    } else {
        for (int i = 0; i < row.V; ++i) {
            const float both = L::load(c[i]), wav = L::load(w[i]), null = L::load(u[i]);
            const float m = L::round(wav + L::round(L::round(both - wav) * beta));
            out[i] = L::round(null + L::round(L::round(m - null) * cfg));
        }
    }
}

// Keys of z = l / temperature: NaN as -inf, what is smaller than the smallest normal number as +0. Returns the largest.
template <DType D, bool Divide>
MGF_INLINE int32_t scale_to_keys(const Row& row, const float* __restrict mixed, int32_t* __restrict key) {
    int32_t top = kDropped;
    for (int i = 0; i < row.V; ++i) {
        const float z = Logits<D>::round(Divide ? mixed[i] / row.scale : mixed[i] * row.scale);
        const uint32_t magnitude = bits(z) & 0x7FFFFFFFu;
        int32_t k = key_of(z);
        k = magnitude < 0x00800000u ? 0 : k;
        k = magnitude > 0x7F800000u ? kMinusInfinity : k;
        key[i] = k;
        top = std::max(top, k);
    }
    return top;
}

MGF_INLINE Choice greedy(const float* __restrict mixed, int32_t* __restrict key, int V) {
    int32_t top = kDropped;
    for (int i = 0; i < V; ++i) {
        const float l = mixed[i] + 0.0f;  // -0 becomes +0: they tie
        const int32_t k = (bits(l) & 0x7FFFFFFFu) > 0x7F800000u ? kMinusInfinity : key_of(l);
        key[i] = k;
        top = std::max(top, k);
    }
    if (top == kMinusInfinity) return {0, true};
    int32_t token = V;
    for (int i = 0; i < V; ++i) token = std::min(token, pick(key[i] == top, i, V));
    return {token, false};
}

}  // namespace
}  // namespace mgf
