// Bodies of attention.h, compiled once per instruction set: what they offer, made of attention_products.h, and storing.
#pragma once

#include "cpu/attention_products.h"
#include "cpu/half.h"

namespace mgf {
namespace {

// Q queries that follow one another; the first attends to `length` >= 1 positions, each next one to one more.
template <KvFormat F, int Q>
MGF_INLINE void attend_queries(const Head& h, const float* q, ptrdiff_t q_stride, int head_dim, int length, float scale,
                               float* out, ptrdiff_t out_stride) {
    const Queries<Q> queries = take_queries<F, Q>(h, q, q_stride, head_dim);
    const int tiles = (length + Q - 1 + kLanes16 - 1) / kLanes16, groups = h.dims / kLanes16;
    score_tiles<F, Q>(h, queries, 0, tiles, scale, h.weight, h.positions);
    float sums[Q];
    for (int j = 0; j < Q; ++j) sums[j] = exponentials(h.weight + j * h.positions, length + j);
    for (int i = 0; i < Q * h.dims; ++i) h.total[i] = 0.0f;
    const int common = length / kBlock * kBlock;  // whole blocks of the shortest
    for (int t = 0; t < common; t += kBlock) add_block<F, Q>(h, h.weight, h.positions, t, kBlock, 0, groups, h.total);
    for (int j = 0; j < Q; ++j) {
        float* const total = h.total + j * h.dims;
        add_positions<F>(h, h.weight + j * h.positions, common, length + j, 0, groups, total);
        for (int d = 0; d < head_dim; ++d) out[j * out_stride + d] = total[d] / sums[j];
    }
}

template <KvFormat F>
MGF_INLINE void prefill_typed(const Head& h, const float* q, ptrdiff_t q_stride, int head_dim, int first, int n,
                              float scale, float* out, ptrdiff_t out_stride) {
    int i = 0;
    for (; i + kQueries <= n; i += kQueries) {
        attend_queries<F, kQueries>(h, q + i * q_stride, q_stride, head_dim, first + i + 1, scale, out + i * out_stride,
                                    out_stride);
    }
    for (; i < n && kQueries > 1; ++i) {
        attend_queries<F, 1>(h, q + i * q_stride, q_stride, head_dim, first + i + 1, scale, out + i * out_stride,
                             out_stride);
    }
}

template <KvFormat F>
MGF_INLINE void combine_typed(const Head& h, const float* p, int length, int first, int last, float* out) {
    const int from = first / kLanes16, to = (last + kLanes16 - 1) / kLanes16;
    for (int d = from * kLanes16; d < to * kLanes16; ++d) h.total[d] = 0.0f;
    add_positions<F>(h, p, 0, length, from, to, h.total);
    for (int d = first; d < last; ++d) out[d - first] = h.total[d];
}

template <KvFormat F>
MGF_INLINE void scores_typed(const Head& h, const float* q, int head_dim, int first, int last, float scale,
                             float* out) {
    score_tiles<F, 1>(h, take_queries<F, 1>(h, q, 0, head_dim), first, last, scale, out, 0);
}

// Calls FUNCTION<format>(...) for the format of the cache.
#define MGF_BY_FORMAT(FUNCTION, ...)                                                       \
    do {                                                                                   \
        if (cache.format == KvFormat::float32) FUNCTION<KvFormat::float32>(__VA_ARGS__);   \
        if (cache.format == KvFormat::bfloat16) FUNCTION<KvFormat::bfloat16>(__VA_ARGS__); \
        if (cache.format == KvFormat::int8) FUNCTION<KvFormat::int8>(__VA_ARGS__);         \
    } while (false)

template <KvFormat F>
MGF_INLINE void attend_typed(const Head& h, const float* q, int head_dim, int length, float scale, float* out) {
    attend_queries<F, 1>(h, q, 0, head_dim, length, scale, out, 0);
}

void attend_body(const KvCache& cache, int row, int head, const float* q, int length, float scale, float* out,
                 float* scratch) {
    if (length <= 0) {
        for (int d = 0; d < cache.head_dim; ++d) out[d] = 0.0f;
        return;
    }
    const Head h = head_of(cache, row, head, scratch);
    MGF_BY_FORMAT(attend_typed, h, q, cache.head_dim, length, scale, out);
}

void prefill_body(const KvCache& cache, int row, int head, const float* q, ptrdiff_t q_stride, int first, int n,
                  float scale, float* out, ptrdiff_t out_stride, float* scratch) {
    const Head h = head_of(cache, row, head, scratch);
    MGF_BY_FORMAT(prefill_typed, h, q, q_stride, cache.head_dim, first, n, scale, out, out_stride);
}

void scores_body(const KvCache& cache, int row, int head, const float* q, int first, int last, float scale, float* out,
                 float* scratch) {
    const Head h = head_of(cache, row, head, scratch);
    MGF_BY_FORMAT(scores_typed, h, q, cache.head_dim, first, last, scale, out);
}

void combine_body(const KvCache& cache, int row, int head, const float* p, int length, int first, int last, float* out,
                  float* scratch) {
    const Head h = head_of(cache, row, head, scratch);
    MGF_BY_FORMAT(combine_typed, h, p, length, first, last, out);
}

// ---- storing ----

// u of one vector at to[d / 4 * step + d % 4 * inner], and its scale.
MGF_INLINE float quantise(const float* x, int n, unsigned char* to, ptrdiff_t step, ptrdiff_t inner) {
    uint32_t most = 0;
    for (int d = 0; d < n; ++d) {
        const uint32_t size = bits(x[d]) & 0x7FFFFFFFu;
        most = size > most ? size : most;  // NaN counts as more than infinity
    }
    const float largest = from_bits(most);
    const bool zero = largest < kTiny;
    const float inverse = zero ? 0.0f : 127.0f / largest;
    for (int d = 0; d < n; ++d) {
        to[d / 4 * step + d % 4 * inner] = (unsigned char)(bits(x[d] * inverse + kRound) - 0x4B400000u + 128u);
    }
    return zero ? 0.0f : largest / 127.0f;
}

MGF_INLINE void append_int8(const KvCache& cache, unsigned char* at, int position, const float* k, const float* v) {
    unsigned char* const keys = at + position / kLanes16 * kLanes16 * ptrdiff_t(cache.dims) + position % kLanes16 * 4;
    unsigned char* const values = at + cache.values_at + position / 4 * 4 * ptrdiff_t(cache.dims) + position % 4;
    float* const key_scale = reinterpret_cast<float*>(at + cache.key_scale_at);
    float* const value_scale = reinterpret_cast<float*>(at + cache.value_scale_at);
    key_scale[position] = quantise(k, cache.head_dim, keys, 64, 1);
    value_scale[position] = quantise(v, cache.head_dim, values, 16, 4);
}

// Nearest even. A NaN whose payload lies in the half that goes would become an infinity: it gets another.
MGF_INLINE uint16_t bfloat16_of(float x) {
    const uint32_t high = bits(round_to_bf16(x)) >> 16;
    return uint16_t((bits(x) & 0x7FFFFFFFu) > 0x7F800000u ? high | 0x40u : high);
}

// Keys of the dims that fill up 16 are zeros: memory that was never written may hold NaN, and 0 * NaN is NaN.
void append_body(const KvCache& cache, int row, int head, int position, const float* k, const float* v) {
    unsigned char* const at = cache.at(row, head);
    const ptrdiff_t tile = position / kLanes16 * kLanes16 * ptrdiff_t(cache.dims);  // elements before it
    const int lane = position % kLanes16;
    if (cache.format == KvFormat::float32) {
        float* const keys = reinterpret_cast<float*>(at) + tile + lane;
        float* const values = reinterpret_cast<float*>(at + cache.values_at) + position * ptrdiff_t(cache.dims);
        for (int d = 0; d < cache.head_dim; ++d) keys[d * kLanes16] = k[d], values[d] = v[d];
        for (int d = cache.head_dim; d < cache.dims; ++d) keys[d * kLanes16] = 0.0f;
    } else if (cache.format == KvFormat::bfloat16) {
        uint16_t* const keys = reinterpret_cast<uint16_t*>(at) + tile + 2 * lane;
        uint16_t* const values =
            reinterpret_cast<uint16_t*>(at + cache.values_at) + position / 2 * 2 * ptrdiff_t(cache.dims) + position % 2;
        for (int d = 0; d < cache.head_dim; ++d) {
            keys[d / 2 * 2 * kLanes16 + d % 2] = bfloat16_of(k[d]);
            values[2 * d] = bfloat16_of(v[d]);
        }
        for (int d = cache.head_dim; d < cache.dims; ++d) keys[d / 2 * 2 * kLanes16 + d % 2] = 0;
    } else {
        append_int8(cache, at, position, k, v);
    }
}

}  // namespace
}  // namespace mgf

#define MGF_ATTENTION_INSTANCE(name) \
    const AttentionKernels name = {append_body, attend_body, prefill_body, scores_body, combine_body};
