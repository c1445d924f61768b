// The kernels of cpu/linear.h, once for all instruction sets: preparing inputs, and the walk over tiles, groups, rows.
//
// Included once per instruction set (linear_*.cpp), each of which brings what the compiler does not vectorise well: the
// sums of one row over one group, in `Simd`.
//
// Simd has
//   kFloatRows, kIntegerRows  rows whose sums fit the registers: 1, 4 or 8
//   kSides                    1, or 2 where half of a tile is taken at a time
//   kHalves                   whether it multiplies bytes: which half of InputGroup it reads
//   Floats<Half>              a row's sums; load(w, side, weights): of two inputs; add(weights, x); add_to(sums, side)
//   Integers<FourBits, Rows>  a row's sums; load(u, side, weights): of eight inputs; add(weights, x);
//                             add_scaled(sums, side, group, scale): see there
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/linear_group.h"

#if defined(__GNUC__)
#define MGF_INLINED __attribute__((always_inline))         // of a lambda
#define MGF_PREFETCH(address) __builtin_prefetch(address)  // into all caches: the non-temporal hint halves the speed
#else
#define MGF_INLINED
#define MGF_PREFETCH(address)
#endif

namespace mgf {
namespace {

constexpr int kRowsAtOnce = 64;             // per pass over the weights; their sums take 4 KB
constexpr ptrdiff_t kPrefetchAhead = 1536;  // bytes

// ---- inputs ----

template <class Simd>
MGF_INLINE void quantise(const float* x, int count, InputGroup& group) {
    alignas(64) float v[kGroupInputs] = {};
    std::copy(x, x + count, v);
    int32_t largest = 0;
    for (int i = 0; i < kGroupInputs; ++i) largest = std::max(largest, int32_t(bits(v[i]) & 0x7FFFFFFFu));
    if (largest >= 0x7F800000) {  // infinite or NaN
        std::memset(&group, 0, sizeof group);
        group.scale = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    const float m = std::max(from_bits(uint32_t(largest)), kSmallest), inverse = kFullInput / m;
    alignas(64) int32_t q[kGroupInputs];
    int32_t sum = 0;
    for (int i = 0; i < kGroupInputs; ++i) q[i] = nearest(v[i] * inverse), sum += q[i];
    if (Simd::kHalves) {
        for (int i = 0; i < kGroupInputs; ++i) group.half[0][i] = int8_t((q[i] + 128) >> 8);
        for (int i = 0; i < kGroupInputs; ++i) group.half[1][i] = int8_t(q[i]);
    } else {
        for (int i = 0; i < kGroupInputs; ++i) group.q[i] = int16_t(q[i]);
    }
    group.scale = m / kFullInput;
    group.sum = sum;
}

template <class Simd>
MGF_INLINE void prepare(WeightFormat format, const float* x, ptrdiff_t stride, int rows, int k, void* prepared) {
    const size_t row_bytes = prepared_row_bytes(format, k);
    for (int r = 0; r < rows; ++r, x += stride) {
        unsigned char* const row = static_cast<unsigned char*>(prepared) + size_t(r) * row_bytes;
        if (format == WeightFormat::float32 || format == WeightFormat::bfloat16) {
            std::memcpy(row, x, size_t(k) * sizeof(float));
            std::memset(row + size_t(k) * sizeof(float), 0, row_bytes - size_t(k) * sizeof(float));
        } else {
            InputGroup* const groups = reinterpret_cast<InputGroup*>(row);
            for (int i = 0; i < k; i += kGroupInputs) {
                quantise<Simd>(x + i, std::min(kGroupInputs, k - i), groups[i / kGroupInputs]);
            }
        }
    }
}

// ---- one group: weights, up to kRowsAtOnce rows ----

// The sums of N rows, one after the other. Not an array: gcc 12 would keep that in memory, or copy every register
// twice.
template <class Row, int N>
struct Rows {
    Row first;
    Rows<Row, N - 1> rest;

    MGF_INLINE void clear() {
        first.clear();
        rest.clear();
    }
    template <class Weights>
    MGF_INLINE void add(const Weights& weights, const unsigned char* x, size_t row_bytes) {
        first.add(weights, x);
        rest.add(weights, x + row_bytes, row_bytes);
    }
    MGF_INLINE void add_to(float (*sums)[kTileOutputs], int side) const {
        first.add_to(sums[0], side);
        rest.add_to(sums + 1, side);
    }
    MGF_INLINE void add_scaled(float (*sums)[kTileOutputs], int side, const unsigned char* x, size_t row_bytes,
                               const float* scale) const {
        first.add_scaled(sums[0], side, *reinterpret_cast<const InputGroup*>(x), scale);
        rest.add_scaled(sums + 1, side, x + row_bytes, row_bytes, scale);
    }
};

template <class Row>
struct Rows<Row, 0> {
    MGF_INLINE void clear() {}
    template <class Weights>
    MGF_INLINE void add(const Weights&, const unsigned char*, size_t) {}
    MGF_INLINE void add_to(float (*)[kTileOutputs], int) const {}
    MGF_INLINE void add_scaled(float (*)[kTileOutputs], int, const unsigned char*, size_t, const float*) const {}
};

// Calls block(first row, how many as a type, prefetch distance) with as many rows as the registers hold. The later
// blocks find the group's weights in the first-level cache.
template <int Most, class Block>
MGF_INLINE void in_blocks(int rows, const Block& block) {
    int r = 0;
    ptrdiff_t ahead = kPrefetchAhead;
    if constexpr (Most >= 8) {
        for (; rows - r >= 8; r += 8, ahead = 0) block(r, std::integral_constant<int, 8>(), ahead);
    }
    if constexpr (Most >= 4) {
        for (; rows - r >= 4; r += 4, ahead = 0) block(r, std::integral_constant<int, 4>(), ahead);
        for (; rows - r >= 3; r += 3, ahead = 0) block(r, std::integral_constant<int, 3>(), ahead);
        for (; rows - r >= 2; r += 2, ahead = 0) block(r, std::integral_constant<int, 2>(), ahead);
    }
    for (; rows - r >= 1; r += 1, ahead = 0) block(r, std::integral_constant<int, 1>(), ahead);
}

// Walks over a group: `count` times `Bytes` of weights and `Inputs` bytes of each row.
template <int Bytes, int Inputs, class Row, int N>
MGF_INLINE void walk(Rows<Row, N>& sums, int side, const unsigned char* w, int count, const unsigned char* x,
                     size_t row_bytes, ptrdiff_t ahead) {
    sums.clear();
    for (int i = 0; i < count; ++i, w += Bytes, x += Inputs) {
        MGF_PREFETCH(w + ahead);
        if (Bytes > 64) MGF_PREFETCH(w + ahead + 64);
        typename Row::Weights weights;
        Row::load(w, side, weights);
        sums.add(weights, x, row_bytes);
    }
}

using Sums = float (*)[kTileOutputs];  // a row each

template <class Simd, bool Half>
MGF_INLINE void add_float_group(const unsigned char* w, int count, const unsigned char* x, size_t row_bytes, int rows,
                                Sums sums) {
    in_blocks<Simd::kFloatRows>(rows, [&](int r, auto block, ptrdiff_t ahead) MGF_INLINED {
        using Row = typename Simd::template Floats<Half>;
        for (int side = 0; side < Simd::kSides; ++side) {
            Rows<Row, block()> some;
            walk<Half ? 64 : 128, 8>(some, side, w, (count + 1) / 2, x + size_t(r) * row_bytes, row_bytes,
                                     side == 0 ? ahead : 0);
            some.add_to(sums + r, side);
        }
    });
}

// What add_scaled computes of a row's integer sums, for each output and with every operation rounded by itself, so that
// all instruction sets agree: sums[output] += float(sum - offset * group.sum) * (scale[output] * group.scale).
template <class Simd, bool FourBits>
MGF_INLINE void add_integer_group(const unsigned char* w, int count, const unsigned char* prepared, size_t row_bytes,
                                  int rows, Sums sums) {
    alignas(64) float scale[kTileOutputs];
    std::memcpy(scale, w, sizeof scale);
    in_blocks<Simd::kIntegerRows>(rows, [&](int r, auto block, ptrdiff_t ahead) MGF_INLINED {
        using Row = typename Simd::template Integers<FourBits, block()>;
        const unsigned char* const x = prepared + size_t(r) * row_bytes;
        for (int side = 0; side < Simd::kSides; ++side) {
            Rows<Row, block()> some;
            walk<FourBits ? 64 : 128, Simd::kHalves ? 8 : 16>(some, side, w + kScaleBytes, (count + 7) / 8, x,
                                                              row_bytes, side == 0 ? ahead : 0);
            some.add_scaled(sums + r, side, x, row_bytes, scale);
        }
    });
}

// ---- tiles ----

template <class Simd, WeightFormat F>
MGF_INLINE void add_group(const unsigned char* w, int count, const unsigned char* prepared, size_t row_bytes, int rows,
                          Sums sums) {
    if constexpr (F == WeightFormat::float32) add_float_group<Simd, false>(w, count, prepared, row_bytes, rows, sums);
    if constexpr (F == WeightFormat::bfloat16) add_float_group<Simd, true>(w, count, prepared, row_bytes, rows, sums);
    if constexpr (F == WeightFormat::int8) add_integer_group<Simd, false>(w, count, prepared, row_bytes, rows, sums);
    if constexpr (F == WeightFormat::int4) add_integer_group<Simd, true>(w, count, prepared, row_bytes, rows, sums);
}

template <class Simd, WeightFormat F>
MGF_INLINE void apply(const PackedMatrix& matrix, const void* prepared, int rows, int first, int last, float* y,
                      ptrdiff_t stride) {
    const size_t row_bytes = prepared_row_bytes(F, matrix.k);
    const size_t x_bytes =
        F == WeightFormat::float32 || F == WeightFormat::bfloat16 ? kGroupInputs * sizeof(float) : sizeof(InputGroup);
    alignas(64) float sums[kRowsAtOnce][kTileOutputs];
    for (int r = 0; r < rows; r += kRowsAtOnce) {
        const int some = std::min(kRowsAtOnce, rows - r);
        const unsigned char* w = matrix.data + size_t(first) * tile_bytes(F, matrix.k);
        for (int tile = first; tile < last; ++tile) {
            std::memset(sums, 0, size_t(some) * sizeof sums[0]);
            const unsigned char* x = static_cast<const unsigned char*>(prepared) + size_t(r) * row_bytes;
            for (int i = 0; i < matrix.k; i += kGroupInputs, x += x_bytes) {
                const int count = std::min(kGroupInputs, matrix.k - i);
                add_group<Simd, F>(w, count, x, row_bytes, some, sums);
                w += group_bytes(F, count);
            }
            const int output = tile * kTileOutputs, outputs = std::min(kTileOutputs, matrix.n - output);
            for (int i = 0; i < some; ++i) {
                std::memcpy(y + (r + i) * stride + output, sums[i], size_t(outputs) * sizeof(float));
            }
        }
    }
}

}  // namespace
}  // namespace mgf

// The functions of one instruction set: the templates above, compiled under its `target` attribute.
#define MGF_LINEAR_APPLY(name, target, format)                                                                  \
    target void name(const PackedMatrix& matrix, const void* prepared, int rows, int first, int last, float* y, \
                     ptrdiff_t stride) {                                                                        \
        apply<Simd, WeightFormat::format>(matrix, prepared, rows, first, last, y, stride);                      \
    }

#define MGF_LINEAR_PREPARE(target)                                                                                 \
    target void prepare_(WeightFormat format, const float* x, ptrdiff_t stride, int rows, int k, void* prepared) { \
        prepare<Simd>(format, x, stride, rows, k, prepared);                                                       \
    }

#define MGF_LINEAR_KERNELS(name, target)               \
    namespace {                                        \
    MGF_LINEAR_PREPARE(target)                         \
    MGF_LINEAR_APPLY(apply_float32, target, float32)   \
    MGF_LINEAR_APPLY(apply_bfloat16, target, bfloat16) \
    MGF_LINEAR_APPLY(apply_int8, target, int8)         \
    MGF_LINEAR_APPLY(apply_int4, target, int4)         \
    }                                                  \
    const LinearKernels name = {prepare_, {apply_float32, apply_bfloat16, apply_int8, apply_int4}};
