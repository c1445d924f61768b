// The two products of attention, compiled once per instruction set: scores and weighted sums, for one or more queries.
//
// Every number has one order of operations, however many queries run at once: a score sums even and odd dims apart; a
// weighted sum goes through blocks of 64 positions, each summed from zero and then added.
#pragma once

#include "cpu/attention.h"
#include "cpu/attention_dot.h"
#include "cpu/norm_body.h"

namespace mgf {
namespace {

constexpr int kBlock = 64;
constexpr int kAhead = 2048;  // bytes: two lines of work at 25 GB/s cover some 80 ns of latency each

#if MGF_PART_BYTES == 64
constexpr int kQueries = 4;  // of a prefill at once; more accumulators than there are registers are slower than fewer
constexpr int kGroups[2][2] = {{4, 4}, {4, 2}};  // of 16 dims at once: [int8?][several queries?]
#elif MGF_PART_BYTES == 32
constexpr int kQueries = 2;
constexpr int kGroups[2][2] = {{4, 2}, {2, 1}};
#else
constexpr int kQueries = 1;
constexpr int kGroups[2][2] = {{2, 2}, {1, 1}};
#endif

// One (row, head), and what a thread lent.
struct Head {
    const unsigned char *keys, *values;
    const float *key_scale, *value_scale;
    int dims, positions;
    float* query;           // [kQueries][dims]
    unsigned char* packed;  // [kQueries][dims / 4 * 8]
    float* total;           // [kQueries][dims]
    float* weight;          // [kQueries][positions]
};

MGF_INLINE Head head_of(const KvCache& cache, int row, int head, float* scratch) {
    const unsigned char* const at = cache.at(row, head);
    Head h = {at,     at + cache.values_at, nullptr, nullptr, cache.dims, cache.positions, scratch, nullptr, nullptr,
              nullptr};
    h.key_scale = reinterpret_cast<const float*>(at + cache.key_scale_at);
    h.value_scale = reinterpret_cast<const float*>(at + cache.value_scale_at);
    h.packed = reinterpret_cast<unsigned char*>(scratch + kQueries * h.dims);
    h.total = scratch + 2 * kQueries * h.dims;
    h.weight = scratch + 3 * kQueries * h.dims;
    return h;
}

MGF_INLINE void prefetch(const unsigned char* line) {
#if defined(__GNUC__)
    __builtin_prefetch(line);
#else
    (void)line;
#endif
}

// Two inputs that follow one another, for 16 outputs: bfloat16 keeps them in one line, float32 `next` bytes apart.
// What lies `ahead` bytes further is requested.
template <KvFormat F>
MGF_INLINE void two_inputs(const unsigned char* line, ptrdiff_t next, ptrdiff_t ahead, F16& first, F16& second) {
    prefetch(line + ahead);
    if (F == KvFormat::bfloat16) {
        const I16 both = load_int(line);
        first = as_float(shifted_left(both, 16));
        second = as_float(both & all_int(int32_t(0xFFFF0000u)));
    } else {
        prefetch(line + next + ahead);
        load_to(first, line);
        load_to(second, line + next);
    }
}

// ---- scores ----

template <int Q>
struct Queries {
    const float* x[Q];  // dims of them, padded with zeros
    const unsigned char* packed[Q];
    Scaled scaled[Q];  // int8 only
};

template <KvFormat F, int Q>
MGF_INLINE Queries<Q> take_queries(const Head& h, const float* q, ptrdiff_t stride, int head_dim) {
    Queries<Q> queries = {};
    for (int j = 0; j < Q; ++j) {
        float* const x = h.query + j * h.dims;
        for (int d = 0; d < head_dim; ++d) x[d] = q[j * stride + d];
        for (int d = head_dim; d < h.dims; ++d) x[d] = 0.0f;
        queries.x[j] = x;
        if (F != KvFormat::int8) continue;
        unsigned char* const packed = h.packed + j * h.dims / 4 * kPackedBytes;
        queries.packed[j] = packed;
        queries.scaled[j] = scale_inputs(x, h.dims, packed);
    }
    return queries;
}

// Scores of 16 positions for each query.
template <KvFormat F, int Q>
MGF_INLINE void score_tile(const Head& h, const Queries<Q>& q, int tile, ptrdiff_t ahead, float scale, F16* score) {
    if constexpr (F == KvFormat::int8) {
        const unsigned char* const lines = h.keys + ptrdiff_t(tile) * h.dims * kLanes16;
        Dot dot[Q];
        for (int i = 0; i < h.dims / 4; ++i) {
            prefetch(lines + 64 * i + ahead);
            for (int j = 0; j < Q; ++j) dot[j].add(lines + 64 * i, q.packed[j] + kPackedBytes * i);
        }
        const F16 key_scale = load(h.key_scale + kLanes16 * tile);
        for (int j = 0; j < Q; ++j)
            score[j] = centred(dot[j], q.scaled[j]) * all(q.scaled[j].scale * scale) * key_scale;
    } else {
        constexpr ptrdiff_t pair = F == KvFormat::bfloat16 ? 64 : 128;
        const unsigned char* const lines = h.keys + ptrdiff_t(tile) * (h.dims / 2) * pair;
        F16 even[Q], odd[Q];
        for (int j = 0; j < Q; ++j) even[j] = odd[j] = all(0.0f);
        for (int d = 0; d < h.dims; d += 2) {
            F16 k0, k1;
            two_inputs<F>(lines + d / 2 * pair, 64, ahead, k0, k1);
            for (int j = 0; j < Q; ++j) {
                even[j] = even[j] + k0 * all(q.x[j][d]);
                odd[j] = odd[j] + k1 * all(q.x[j][d + 1]);
            }
        }
        for (int j = 0; j < Q; ++j) score[j] = (even[j] + odd[j]) * all(scale);
    }
}

// Behind the last tile it is the values that are requested ahead.
template <KvFormat F, int Q>
MGF_INLINE void score_tiles(const Head& h, const Queries<Q>& q, int first, int last, float scale, float* out,
                            ptrdiff_t stride) {
    constexpr int size = F == KvFormat::float32 ? 4 : F == KvFormat::bfloat16 ? 2 : 1;
    const ptrdiff_t tile_bytes = ptrdiff_t(h.dims) * kLanes16 * size;
    const ptrdiff_t to_values = h.values - (h.keys + last * tile_bytes);
    for (int tile = first; tile < last; ++tile) {
        const bool inside = (last - tile) * tile_bytes > kAhead;
        F16 score[Q];
        score_tile<F, Q>(h, q, tile, inside ? kAhead : kAhead + to_values, scale, score);
        for (int j = 0; j < Q; ++j) store(out + j * stride + (tile - first) * kLanes16, score[j]);
    }
}

// ---- weighted sums ----

template <int Q>
struct Weights {
    const float* p[Q];  // of the block's positions
    alignas(64) unsigned char packed[Q][kBlock / 4 * kPackedBytes];
    Scaled scaled[Q];  // int8 only
};

// n <= kBlock weights times the values' scales, packed; behind the n-th nothing is read that could be NaN.
MGF_INLINE Scaled weigh_block(const float* p, const float* value_scale, int n, unsigned char* packed) {
    alignas(64) float w[kBlock];
    for (int i = 0; i < n; i += kLanes16) {
        store(w + i, load_first(p + i, n - i) * load_first(value_scale + i, n - i));
    }
    return scale_inputs(w, n, packed);
}

// total[j] += the block's weighted sum of G groups of 16 dims, from group `group` on.
template <KvFormat F, int Q, int G>
MGF_INLINE void add_groups(const Head& h, const Weights<Q>& w, int position, int n, int group, float* total,
                           ptrdiff_t stride) {
    F16 sum[Q][G];
    if constexpr (F == KvFormat::int8) {
        const unsigned char* const lines = h.values + ptrdiff_t(position) * h.dims + 64 * group;
        Dot dot[Q][G];
        for (int i = 0; 4 * i < n; ++i) {
            const unsigned char* const line = lines + ptrdiff_t(i) * h.dims * 4;
            for (int g = 0; g < G; ++g) {
                prefetch(line + 64 * g + kAhead);
                for (int j = 0; j < Q; ++j) dot[j][g].add(line + 64 * g, w.packed[j] + kPackedBytes * i);
            }
        }
        for (int j = 0; j < Q; ++j) {
            for (int g = 0; g < G; ++g) sum[j][g] = centred(dot[j][g], w.scaled[j]) * all(w.scaled[j].scale);
        }
    } else {
        const ptrdiff_t next = ptrdiff_t(h.dims) * 4, pair = F == KvFormat::bfloat16 ? next : 2 * next;
        const unsigned char* const lines = h.values + position / 2 * pair + 64 * group;
        for (int j = 0; j < Q; ++j) {
            for (int g = 0; g < G; ++g) sum[j][g] = all(0.0f);
        }
        int t = 0;
        for (; t + 2 <= n; t += 2) {
            for (int g = 0; g < G; ++g) {
                F16 v0, v1;
                two_inputs<F>(lines + t / 2 * pair + 64 * g, next, kAhead, v0, v1);
                for (int j = 0; j < Q; ++j) {
                    sum[j][g] = sum[j][g] + v0 * all(w.p[j][t]);
                    sum[j][g] = sum[j][g] + v1 * all(w.p[j][t + 1]);
                }
            }
        }
        for (int g = 0; g < G && t < n; ++g) {  // the position behind the last one is not the row's: no 0 * NaN
            F16 v0, unused;
            two_inputs<F>(lines + t / 2 * pair + 64 * g, 0, 0, v0, unused);
            for (int j = 0; j < Q; ++j) sum[j][g] = sum[j][g] + v0 * all(w.p[j][t]);
        }
    }
    for (int j = 0; j < Q; ++j) {
        for (int g = 0; g < G; ++g) {
            float* const to = total + j * stride + (group + g) * kLanes16;
            store(to, load(to) + sum[j][g]);
        }
    }
}

// total[j] += the weighted sum of n <= kBlock positions, in the groups first <= g < last; p and total are `stride` and
// h.dims apart from query to query.
template <KvFormat F, int Q>
MGF_INLINE void add_block(const Head& h, const float* p, ptrdiff_t stride, int position, int n, int first, int last,
                          float* total) {
    constexpr int G = kGroups[F == KvFormat::int8][Q > 1];
    Weights<Q> w;
    for (int j = 0; j < Q; ++j) {
        w.p[j] = p + j * stride + position;
        if (F != KvFormat::int8) continue;
        w.scaled[j] = weigh_block(w.p[j], h.value_scale + position, n, w.packed[j]);
    }
    int group = first;
    for (; group + G <= last; group += G) add_groups<F, Q, G>(h, w, position, n, group, total, h.dims);
    for (; group < last; ++group) add_groups<F, Q, 1>(h, w, position, n, group, total, h.dims);
}

template <KvFormat F>
MGF_INLINE void add_positions(const Head& h, const float* p, int from, int length, int first, int last, float* total) {
    for (int t = from; t < length; t += kBlock) {
        add_block<F, 1>(h, p, 0, t, length - t < kBlock ? length - t : kBlock, first, last, total);
    }
}

}  // namespace
}  // namespace mgf
