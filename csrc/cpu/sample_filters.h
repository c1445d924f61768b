// One row of the sampler, second part: which tokens survive top-k, min-p and top-p.
//
// Both searches narrow a pair of keys that occur in the row, so they end after a handful of passes, ties or not. Their
// pivots are guesses in floating point; what is kept rests on counts and integer sums alone.
#pragma once

#include <cmath>

#include "cpu/sample_keys.h"

namespace mgf {
namespace {

// What is known after one pass over the keys: what lies at or above a pivot, and the keys next to it on either side.
template <class Sum>
struct Cut {
    Sum above;                   // keys (or weights) >= pivot
    int32_t at_or_above, below;  // smallest key >= pivot, largest key < pivot
};

MGF_INLINE Cut<int32_t> count(const int32_t* __restrict key, int n, int32_t pivot) {
    int32_t above = 0, up = std::numeric_limits<int32_t>::max(), down = kDropped;
    for (int i = 0; i < n; ++i) {
        const bool in = key[i] >= pivot;
        above += in;
        up = std::min(up, pick(in, key[i], std::numeric_limits<int32_t>::max()));
        down = std::max(down, pick(in, kDropped, key[i]));
    }
    return {above, up, down};
}

MGF_INLINE Cut<int64_t> mass(const int32_t* __restrict key, const int64_t* __restrict weight, int n, int32_t pivot) {
    int64_t above = 0;
    for (int i = 0; i < n; ++i) above += weight[i] & -int64_t(key[i] >= pivot);
    const Cut<int32_t> next = count(key, n, pivot);
    return {above, next.at_or_above, next.below};
}

// A pivot in (low, high], near `fraction` of the way up in value, or half way in keys when that stopped paying.
MGF_INLINE int32_t pivot_between(int32_t low, int32_t high, float fraction, int pass) {
    const float from = value_of(low), to = value_of(high);
    const float guess = from + (to - from) * fraction;
    const bool inside = guess > from && guess < to;  // false for infinities too
    return pass < 12 && inside ? key_of(guess) : int32_t((int64_t(low) + high) >> 1) + 1;
}

// The k-th largest of n keys, 1 <= k < n; or a smaller key with no token between the two. Interpolates the count
// between two keys that occur, every third pass halves; ties end it at once, since then the two meet.
MGF_INLINE int32_t top_k_threshold(const int32_t* __restrict key, int n, int32_t k, int32_t top) {
    Cut<int32_t> cut = count(key, n, kMinusInfinity + 1);
    if (cut.above < k) return kMinusInfinity;
    int32_t low = cut.at_or_above, high = top;  // count(>= low) >= k; high is the largest key that may be the answer
    int32_t count_low = cut.above, count_above_high = 0;
    for (int pass = 0; low != high && count_low != k; ++pass) {
        const float fraction = float(count_low - k) / float(count_low - count_above_high);
        const int32_t pivot = pivot_between(low, high, pass % 3 == 2 ? 0.5f : fraction, pass);
        cut = count(key, n, pivot);
        if (cut.above >= k) {
            low = cut.at_or_above, count_low = cut.above;
        } else {
            high = cut.below, count_above_high = cut.above;
        }
    }
    return low;
}

// A key that at least k of V keys reach, nearly always, and few more do: the threshold of a sample, with a margin of
// three deviations. Searching what is left takes a fraction of the time: a row with top-k 250 2.3 us instead of 4.1.
MGF_INLINE int32_t coarse_threshold(const int32_t* __restrict key, int V, int32_t k) {
    constexpr int size = 128;
    const int stride = V / size;
    if (stride < 4 || k > V / 2) return kMinusInfinity + 1;
    alignas(64) int32_t sample[size];
    for (int i = 0; i < size; ++i) sample[i] = key[i * stride];
    const float expected = float(k) / float(stride);
    const int32_t rank = int32_t(expected + 3.0f * std::sqrt(expected)) + 1;
    if (rank >= size) return kMinusInfinity + 1;
    int32_t largest = sample[0];
    for (int i = 0; i < size; ++i) largest = std::max(largest, sample[i]);
    return std::max(top_k_threshold(sample, size, rank, largest), kMinusInfinity + 1);
}

// The tokens that reach the k-th largest key, ties included, and are above -inf.
template <class Simd>
MGF_INLINE Candidates keep_top_k(Scratch& s, int V, int32_t k, int32_t top) {
    int n = Simd::compact(s.key, V, coarse_threshold(s.key, V, k), s.survivor, s.id);
    if (n < k) n = Simd::compact(s.key, V, kMinusInfinity + 1, s.survivor, s.id);
    if (n > k) {
        int32_t* const where = s.key;  // not needed any more
        n = Simd::compact(s.survivor, n, top_k_threshold(s.survivor, n, k, top), s.survivor, where);
        for (int i = 0; i < n; ++i) s.id[i] = s.id[where[i]];
    }
    return {n, s.id, s.survivor, s.w, s.inverse};
}

// Weighs candidates against the largest logit; drops what is too small to count, and what min-p excludes.
MGF_INLINE void weigh(const Candidates& c, float top, float min_p) {
    for (int i = 0; i < c.n; ++i) {
        const float z = value_of(c.key[i]);
        const float difference = (z - top) * 1.44269504f;
        const float t = from_bits(uint32_t(pick(z == top, 0, int32_t(bits(difference)))));  // inf - inf is NaN
        const PowerOfTwo pair = exp2_pair(t < -126.0f ? -126.0f : t);
        c.w[i] = pair.w, c.inverse[i] = pair.iw;
        c.key[i] = pick((t >= -126.0f) & (pair.w >= min_p), c.key[i], kDropped);
    }
}

// trunc(w * 2^40) for w in [2^-126, 1]: the mantissa shifted into place. Conversions to int64 need AVX512-DQ.
MGF_INLINE int64_t fixed_point(float w) {
    const uint64_t mantissa = (bits(w) & 0x007FFFFFu) | 0x00800000u;
    const uint32_t right = 127 - (bits(w) >> 23);
    return int64_t((mantissa << 17) >> std::min(right, 63u));
}

// Top-p: drops everything but the tokens before which, in descending order (ties by index), at most p of the mass lies.
MGF_INLINE void keep_top_p(const Candidates& c, int64_t* __restrict weight, float top_p, int32_t top) {
    const int n = c.n;
    int32_t* __restrict const key = c.key;
    int64_t total = 0;
    int32_t low = top;
    for (int i = 0; i < n; ++i) {
        const bool dropped = key[i] == kDropped;
        weight[i] = fixed_point(c.w[i]) & -int64_t(!dropped);
        total += weight[i];
        low = std::min(low, pick(dropped, top, key[i]));
    }
    const uint64_t share = uint64_t(top_p * 0x1p31f), T = uint64_t(total);
    const int64_t limit = int64_t((T >> 32) * share * 2 + (((T & 0xFFFFFFFFu) * share) >> 31));
    int32_t high = top;
    int64_t above_high = 0, above_low = total;  // weight of the keys > high, at most limit; of the keys >= low, more
    for (int pass = 0; low != high; ++pass) {
        const int32_t pivot = pivot_between(low, high, 0.5f, pass);
        const Cut<int64_t> cut = mass(key, weight, n, pivot);
        if (cut.above > limit) {
            low = cut.at_or_above, above_low = cut.above;
        } else {
            high = cut.below, above_high = cut.above;
        }
    }
    int64_t each = 0;  // weight of a token of the boundary; there are several where logits tie
    for (int i = 0; i < n; ++i) {
        each |= weight[i] & -int64_t(key[i] == low);  // the same for all of them
        key[i] = pick(key[i] < low, kDropped, key[i]);
    }
    if (above_low - each <= limit) return;  // the last of them still begins within the limit
    int64_t before = above_high;
    for (int i = 0; i < n; ++i) {
        if (key[i] != low) continue;
        if (before > limit) key[i] = kDropped;
        before += each;
    }
}

// Closes the gaps that filters left, so that only survivors get noise.
template <class Simd>
MGF_INLINE Candidates close_gaps(const Candidates& c, Scratch& s) {
    int32_t* const where = c.id == nullptr ? s.id : s.key;
    const int n = Simd::compact(c.key, c.n, kDropped + 1, s.survivor, where);
    for (int i = 0; i < n; ++i) c.inverse[i] = c.inverse[where[i]];
    for (int i = 0; i < n && c.id != nullptr; ++i) s.id[i] = s.id[where[i]];
    return {n, s.id, s.survivor, c.w, c.inverse};
}

}  // namespace
}  // namespace mgf
