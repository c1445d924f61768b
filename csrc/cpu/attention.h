// Keys and values of the CPU decoder, and attention over them: self-attention, cross-attention, prefill.
//
// Plain functions over one (row, head) each, without allocation, for worker threads to call on their ranges. What they
// compute depends on that row and head alone: not on the batch, the thread or the range; and not on the instruction
// set: every format gives the same bits on all of them. Knows nothing of layers (one KvCache each), positions' meaning,
// or projections. A row attends to as many of its first positions as it says; what lies behind them is never used.
//
// Layout, little-endian, all of a (row, head) in one piece of `head_bytes`, a multiple of 64. In each format a line of
// 64 bytes is 16 outputs x g inputs, g = 1 (float32), 2 (bfloat16), 4 (int8), so that scores and weighted sums are the
// same streaming product. With D = head_dim rounded up to 16 (zeros) and C = capacity rounded up to 16:
//   keys    [C / 16][D / g][16][g]    tile, dim / g, position % 16, dim % g
//   values  [C / g][D][g]             position / g, dim, position % g
//   int8 only: float key_scale[C], value_scale[C]; x = scale * (u - 128), 1 <= u <= 255, scale = max |x| / 127 per
//   position. Its error is at most scale / 2 for each number; vectors below 1e-30 are zeros.
//
// Queries and, in blocks of 64 positions, the weights times value_scale enter the int8 products with 16 bits (|x| <=
// 32500), which loses 1.5e-5 of the largest. A sum is an integer below 2^31, exact on every machine: at most 256 terms
// of 32500 * 255. All else is fp32, one rounding per operation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"

namespace mgf {

enum class KvFormat { float32 = 0, bfloat16 = 1, int8 = 2 };

struct KvCache {
    KvFormat format;
    int rows, heads, head_dim, capacity;
    int dims, positions;                              // D and C
    int64_t values_at, key_scale_at, value_scale_at;  // bytes from the start of a (row, head)
    int64_t head_bytes;
    unsigned char* data = nullptr;  // bytes() of them, best on a 64-byte boundary; it need not be cleared

    int64_t bytes() const { return int64_t(rows) * heads * head_bytes; }
    unsigned char* at(int row, int head) const { return data + (int64_t(row) * heads + head) * head_bytes; }

    // Requests the lines that `append` will write, 20 of them in int8: unasked for they take 0.3 us to come, so call
    // this before the product that gives k and v.
    void prefetch(int row, int head, int position) const {
#if defined(__GNUC__)
        const int64_t size = values_at / positions;  // of a position: dims times 4, 2 or 1
        const int64_t group = 4 * dims / size;
        const unsigned char* const keys = at(row, head) + position / 16 * 16 * size;
        const unsigned char* const values = at(row, head) + values_at + position / group * group * size;
        for (int64_t i = 0; i < 16 * size; i += 64) __builtin_prefetch(keys + i, 1);
        for (int64_t i = 0; i < group * size; i += 64) __builtin_prefetch(values + i, 1);
#endif
    }
};

// All but `data`. int8 needs head_dim <= 256 (see above).
KvCache kv_layout(KvFormat format, int rows, int heads, int head_dim, int capacity);

// Floats that a thread lends to the functions below, best on a 64-byte boundary.
size_t attention_scratch(const KvCache& cache);

// One build for one instruction set. `q`, `k`, `v` and `out` have head_dim floats; `length` and positions <= capacity.
// A NaN in a key or a query makes NaN of all that attends to it, one in a value of that dim (int8: of the whole head).
struct AttentionKernels {
    // Stores one position.
    void (*append)(const KvCache& cache, int row, int head, int position, const float* k, const float* v);

    // out = softmax(scale * q K^T) V over the first `length` positions; zeros for length 0.
    void (*attend)(const KvCache& cache, int row, int head, const float* q, int length, float scale, float* out,
                   float* scratch);

    // Query i of n, at position first + i, attends to the first + i + 1 positions up to its own, all of them stored:
    // the bits that n calls of `attend` give, with the keys and values read once for several queries.
    void (*prefill)(const KvCache& cache, int row, int head, const float* q, ptrdiff_t q_stride, int first, int n,
                    float scale, float* out, ptrdiff_t out_stride, float* scratch);

    // The two halves, for the absorbed form (head_dim is then the model's width, and positions are (head, state)):
    // scores of tiles first <= t < last, 16 each, to out[0 ...]; of positions never stored, anything.
    void (*scores)(const KvCache& cache, int row, int head, const float* q, int first, int last, float scale,
                   float* out, float* scratch);
    // out[d] = sum of p[t] * V[t][d] over the first `length` positions, for first <= d < last, both multiples of 16 or
    // head_dim; out begins at dim `first`.
    void (*combine)(const KvCache& cache, int row, int head, const float* p, int length, int first, int last,
                    float* out, float* scratch);
};

const AttentionKernels& attention_kernels(Isa isa);

// The sets of attention and norms: avx512 stands for AVX-512 F, BW and VNNI here. Processors that lack one of them run
// avx2, with the same results.
Isa best_attention_isa();

extern const AttentionKernels baseline_attention;
#if MGF_X86
extern const AttentionKernels avx2_attention;
extern const AttentionKernels avx512_attention;
#endif

}  // namespace mgf
