// Rows of the sampler: mix -> keys -> top-k -> weights -> min-p, top-p -> race -> the cell of the sequence.
//
// Included once per instruction set (sample_baseline.cpp, sample_avx2.cpp, sample_avx512.cpp), each of which brings
// what the compiler does not vectorise well by itself, `Simd`. Decisions rest on integers and on separately rounded
// fp32 operations, so that every instance, and every other backend, chooses the same token.
#pragma once

#include "cpu/sample_filters.h"
#include "cpu/sample_race.h"

namespace mgf {
namespace {

template <DType D, class Simd>
MGF_INLINE Choice choose(const Row& row, Scratch& s) {
    float* const mixed = s.w;
    mix<D>(row, mixed);
    if (row.scale < 0) return greedy(mixed, s.key, row.V);
    const int32_t top =
        row.divide ? scale_to_keys<D, true>(row, mixed, s.key) : scale_to_keys<D, false>(row, mixed, s.key);
    if (top == kMinusInfinity) return {0, true};
    Candidates c = {row.V, nullptr, s.key, s.w, s.inverse};
    if (row.top_k > 0 && row.top_k < row.V) c = keep_top_k<Simd>(s, row.V, row.top_k, top);
    weigh(c, value_of(top), row.min_p);
    if (row.top_p > 0 && row.top_p < 1) keep_top_p(c, s.weight, row.top_p, top);
    if (row.top_p > 0 || row.min_p > 0) c = close_gaps<Simd>(c, s);
    return race<Simd>(row, c, s.finish);
}

MGF_INLINE float value_or_zero(const float* values, int cell) {
    return values == nullptr ? 0.0f : values[cell];
}

MGF_INLINE int64_t token_at(const SampleArgs& a, int64_t place) {
    if (a.tokens_are_64_bit) return static_cast<const int64_t*>(a.tokens)[place];
    return static_cast<const int32_t*>(a.tokens)[place];
}

MGF_INLINE void put_token(const SampleArgs& a, int64_t place, int32_t token) {
    if (a.tokens_are_64_bit) {
        static_cast<int64_t*>(a.tokens)[place] = token;
    } else {
        static_cast<int32_t*>(a.tokens)[place] = token;
    }
}

template <DType D>
MGF_INLINE Row row_of(const SampleArgs& a, int b, int k) {
    using Element = typename Logits<D>::Element;
    const Element* const first = static_cast<const Element*>(a.logits) + b * a.stride_b + k * a.stride_k;
    const int cell = b * a.K + k;
    const uint64_t seed = a.seed ? uint64_t(a.seed[b]) : 0;
    Row row = {};
    row.c = first;
    row.w = a.NB == 3 ? first + a.stride_nb : nullptr;
    row.u = a.NB == 1 ? nullptr : first + (a.NB - 1) * a.stride_nb;
    row.cfg = value_or_zero(a.cfg, b);
    row.beta = value_or_zero(a.cfg_beta, b);
    row.scale = a.scale[cell];
    row.divide = a.divide;
    row.top_k = a.top_k ? a.top_k[cell] : 0;
    row.top_p = value_or_zero(a.top_p, cell);
    row.min_p = value_or_zero(a.min_p, cell);
    row.noise = a.noise ? a.noise + int64_t(cell) * a.V : nullptr;
    row.seed = {uint32_t(seed), uint32_t(seed >> 32)};
    row.counter = {0, a.step ? uint32_t(a.step[b]) : 0, uint32_t(k), a.stream ? uint32_t(a.stream[b]) : 0};
    row.V = a.V;
    return row;
}

template <DType D, class Simd>
MGF_INLINE void sample_rows(const SampleArgs& a, int first, int last) {
    Scratch scratch;
    for (int cell = first; cell < last; ++cell) {
        const int b = cell / a.K, k = cell % a.K;
        int64_t place = cell;
        if (a.column != nullptr) {
            const int32_t column = a.column[b];
            if (column < 0 || column >= a.S) continue;
            place = int64_t(cell) * a.S + column;
            if (token_at(a, place) != -1) continue;  // known: of a prompt
            if (a.frames[int64_t(column) * a.K + k] < 0) {
                put_token(a, place, a.V);
                continue;
            }
        }
        const Choice choice = choose<D, Simd>(row_of<D>(a, b, k), scratch);
        put_token(a, place, choice.token);
        if (choice.failed) a.status[cell] = 1;
    }
}

template <class Simd>
MGF_INLINE void sample_rows(const SampleArgs& a, int first, int last) {
    if (a.dtype == DType::float32) sample_rows<DType::float32, Simd>(a, first, last);
    if (a.dtype == DType::float16) sample_rows<DType::float16, Simd>(a, first, last);
    if (a.dtype == DType::bfloat16) sample_rows<DType::bfloat16, Simd>(a, first, last);
}

// ---- what tests look at ----

template <class Simd>
MGF_INLINE void noise_row(Key seed, Counter counter, int V, float* E) {
    Row row = {};
    row.seed = seed, row.counter = counter;
    float chunk[4 * kLanes];
    for (int i = 0; i < V; i += 4 * kLanes) {
        dense_noise<Simd>(row, i, chunk);
        std::copy(chunk, chunk + std::min(4 * kLanes, V - i), E + i);
    }
}

MGF_INLINE void exponentials(const uint32_t* __restrict x, int64_t n, float* __restrict E) {
    for (int64_t i = 0; i < n; ++i) E[i] = exponential(x[i]);
}

MGF_INLINE void exp2_pairs(const float* __restrict t, int64_t n, float* __restrict w, float* __restrict inverse) {
    for (int64_t i = 0; i < n; ++i) {
        const PowerOfTwo pair = exp2_pair(t[i]);
        w[i] = pair.w, inverse[i] = pair.iw;
    }
}

}  // namespace
}  // namespace mgf

// The functions of an instance: the templates above, compiled under the `target` attribute of an instruction set.
#define MGF_INSTANCE(name, target)                                                \
    namespace {                                                                   \
    target void rows(const SampleArgs& a, int first, int last) {                  \
        sample_rows<Simd>(a, first, last);                                        \
    }                                                                             \
    target void noise(Key seed, Counter counter, int V, float* E) {               \
        noise_row<Simd>(seed, counter, V, E);                                     \
    }                                                                             \
    target void exponential_(const uint32_t* x, int64_t n, float* E) {            \
        exponentials(x, n, E);                                                    \
    }                                                                             \
    target void exp2_pair_(const float* t, int64_t n, float* w, float* inverse) { \
        exp2_pairs(t, n, w, inverse);                                             \
    }                                                                             \
    }                                                                             \
    const Instance name = {rows, noise, exponential_, exp2_pair_};
