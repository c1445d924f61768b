// What the kernels of attention and norms are written with: loads, reductions in a fixed order, rounding, e^x.
//
// On top of attention_lanes.h, hence compiled once per instruction set and with the same bits on each.
#pragma once

#include "cpu/attention_lanes.h"

namespace mgf {
namespace {

MGF_INLINE F16 all(float v) {
    F16 x;
    fill(x, v);
    return x;
}
MGF_INLINE I16 all_int(int32_t v) {
    I16 x;
    fill(x, v);
    return x;
}
MGF_INLINE F16 load(const float* from) {
    F16 x;
    load_to(x, from);
    return x;
}
MGF_INLINE I16 load_int(const void* from) {
    I16 x;
    load_to(x, from);
    return x;
}

alignas(64) constexpr int32_t kLane[kLanes16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// All ones in the first n lanes.
MGF_INLINE I16 first_lanes(int n) {
    return less(load_int(kLane), all_int(n));
}

// The first n of 16 floats, zeros behind; reads no others.
MGF_INLINE F16 load_first(const float* from, int n) {
    if (n >= kLanes16) return load(from);
    alignas(64) float x[kLanes16] = {};
    for (int i = 0; i < n; ++i) x[i] = from[i];
    return load(x);
}

MGF_INLINE void store_first(float* to, F16 x, int n) {
    if (n >= kLanes16) {
        store(to, x);
        return;
    }
    alignas(64) float values[kLanes16];
    store(values, x);
    for (int i = 0; i < n; ++i) to[i] = values[i];
}

MGF_INLINE F16 magnitude(F16 x) {
    return as_float(as_int(x) & all_int(0x7FFFFFFF));
}

// Over the lanes, always as ((i, i + 8), + 4, + 2, + 1).
MGF_INLINE float sum_of(F16 x) {
    alignas(64) float v[kLanes16];
    store(v, x);
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) v[i] += v[i + half];
    }
    return v[0];
}

MGF_INLINE float largest_of(F16 x) {
    alignas(64) float v[kLanes16];
    store(v, x);
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
    }
    return v[0];
}

// Of bit patterns of magnitudes: their order is that of the numbers, with NaN above infinity, so none is overlooked.
MGF_INLINE float largest_magnitude(I16 x) {
    alignas(64) int32_t v[kLanes16];
    store(v, x);
    for (int half = 8; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
    }
    return from_bits(uint32_t(v[0]));
}

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits, nearest even

// The integer nearest to each x, |x| < 2^22.
MGF_INLINE I16 rounded(F16 x) {
    return minus(as_int(x + all(kRound)), all_int(0x4B400000));
}

// e^x for x <= 0, to 1.3e-7 of it; 0 below -87, where floats end. NaN stays NaN: the power of two is multiplied in, as
// added bits could turn a NaN into a number.
MGF_INLINE F16 exp_of(F16 x) {
    const F16 big = x * all(1.44269504f) + all(kRound);
    const F16 n = big - all(kRound);
    const F16 r = (x - n * all(0.693359375f)) - n * all(-2.12194440e-4f);  // ln 2 in two parts, the first of 9 bits
    F16 p = r * all(1.3814464910e-3f) + all(8.3687808365e-3f);
    p = p * r + all(4.1668392718e-2f);
    p = p * r + all(1.6666519642e-1f);
    p = p * r + all(0.5f);
    p = p * (r * r) + r;
    p = p + all(1.0f);
    const F16 power = as_float(plus(shifted_left(as_int(big), 23), all_int(0x3F800000)));
    return select(less(x, all(-87.0f)), all(0.0f), p * power);
}

}  // namespace
}  // namespace mgf
