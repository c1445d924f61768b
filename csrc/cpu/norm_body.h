// Bodies of norm.h, compiled once per instruction set; the arithmetic comes from attention_math.h.
#pragma once

#include <cmath>

#include "cpu/attention_math.h"
#include "cpu/norm.h"

namespace mgf {
namespace {

// What a pass over x does with 16 numbers and with the last few, which arrive padded with zeros.
template <class Step>
MGF_INLINE void by_sixteen(const float* x, ptrdiff_t n, const Step& step) {
    ptrdiff_t i = 0;
    for (; i + kLanes16 <= n; i += kLanes16) step(i, load(x + i), kLanes16);
    if (i < n) step(i, load_first(x + i, int(n - i)), int(n - i));
}

void layer_norm_body(const float* x, const float* weight, const float* bias, int n, float* y) {
    F16 sums = all(0.0f);
    by_sixteen(x, n, [&](ptrdiff_t, F16 v, int) MGF_LAMBDA { sums = sums + v; });
    const F16 mean = all(sum_of(sums) / float(n));
    F16 squares = all(0.0f);
    by_sixteen(x, n, [&](ptrdiff_t, F16 v, int count) MGF_LAMBDA {
        const F16 d = v - mean;
        squares = squares + select(first_lanes(count), d * d, all(0.0f));
    });
    const F16 inverse = all(1.0f / sqrtf(sum_of(squares) / float(n) + 1e-5f));
    by_sixteen(x, n, [&](ptrdiff_t i, F16 v, int count) MGF_LAMBDA {
        const F16 w = load_first(weight + i, count), b = load_first(bias + i, count);
        store_first(y + i, (v - mean) * inverse * w + b, count);
    });
}

// Phi(-|x|) = exp(-x^2 / 2) * t * P(t), t = 1 / (1 + 0.35 |x|): P has a relative error of 4e-8 for |x| <= 14, beyond
// which the exponential is 0. Of the upper half 1 - Phi is taken: nothing cancels on either side.
MGF_INLINE F16 gelu_of(F16 x) {
    const F16 size = magnitude(x);
    const F16 t = all(1.0f) / (all(1.0f) + all(0.35f) * size);
    F16 p = t * all(-2.9145427e-2f) + all(1.4396946e-1f);
    p = p * t + all(-2.5571010e-1f);
    p = p * t + all(1.5916996e-1f);
    p = p * t + all(-2.3107342e-2f);
    p = p * t + all(1.0550712e-1f);
    p = p * t + all(1.1983304e-1f);
    p = p * t + all(1.3986185e-1f);
    p = p * t + all(1.3962141e-1f);
    const F16 tail = exp_of(x * x * all(-0.5f)) * (t * p);
    return x * select(less(x, all(0.0f)), tail, all(1.0f) - tail);
}

void gelu_body(float* x, ptrdiff_t n) {
    by_sixteen(x, n, [&](ptrdiff_t i, F16 v, int count) MGF_LAMBDA { store_first(x + i, gelu_of(v), count); });
}

void add_body(float* x, const float* y, ptrdiff_t n) {
    by_sixteen(x, n, [&](ptrdiff_t i, F16 v, int count) MGF_LAMBDA {
        store_first(x + i, v + load_first(y + i, count), count);
    });
}

// x = e^(x - max); returns the sum. Lanes that are no numbers of x are taken for -inf in the maximum, 0 in the sum.
MGF_INLINE float exponentials(float* x, int n) {
    F16 most = all(-INFINITY);
    by_sixteen(x, n, [&](ptrdiff_t, F16 v, int count) MGF_LAMBDA {
        most = larger(most, select(first_lanes(count), v, all(-INFINITY)));
    });
    const F16 top = all(largest_of(most));
    F16 sums = all(0.0f);
    by_sixteen(x, n, [&](ptrdiff_t i, F16 v, int count) MGF_LAMBDA {
        const F16 e = select(first_lanes(count), exp_of(v - top), all(0.0f));
        sums = sums + e;
        store_first(x + i, e, count);
    });
    return sum_of(sums);
}

void softmax_body(float* x, int n) {
    if (n <= 0) return;
    const F16 sum = all(exponentials(x, n));
    by_sixteen(x, n, [&](ptrdiff_t i, F16 v, int count) MGF_LAMBDA { store_first(x + i, v / sum, count); });
}

template <bool bfloat16>
MGF_INLINE F16 table_row(const void* table, int64_t at, int count) {
    if (!bfloat16) return load_first(static_cast<const float*>(table) + at, count);
    alignas(64) int32_t x[kLanes16] = {};
    const uint16_t* const from = static_cast<const uint16_t*>(table) + at;
    for (int i = 0; i < count; ++i) x[i] = int32_t(uint32_t(from[i]) << 16);
    return as_float(load_int(x));
}

template <bool bfloat16>
MGF_INLINE void embed_typed(const int64_t* tokens, ptrdiff_t token_stride, int codebooks, const void* table,
                            int64_t rows, const float* position, int n, float* out) {
    by_sixteen(position, n, [&](ptrdiff_t i, F16 place, int count) MGF_LAMBDA {
        F16 sum = table_row<bfloat16>(table, tokens[0] * n + i, count);
        for (int k = 1; k < codebooks; ++k) {
            sum = sum + table_row<bfloat16>(table, (k * rows + tokens[k * token_stride]) * n + i, count);
        }
        store_first(out + i, sum + place, count);
    });
}

void embed_body(const int64_t* tokens, ptrdiff_t token_stride, int codebooks, const void* table, bool bfloat16,
                int64_t rows, const float* position, int n, float* out) {
    if (bfloat16) {
        embed_typed<true>(tokens, token_stride, codebooks, table, rows, position, n, out);
    } else {
        embed_typed<false>(tokens, token_stride, codebooks, table, rows, position, n, out);
    }
}

}  // namespace
}  // namespace mgf

#define MGF_NORM_INSTANCE(name) \
    const NormKernels name = {layer_norm_body, gelu_body, add_body, softmax_body, embed_body};
