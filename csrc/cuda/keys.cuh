// From the logits of one row in memory to sortable keys in registers, eight consecutive tokens a thread.
//
// Mixes the branches of classifier-free guidance, scales by the temperature, rounds like the dtype of the logits after
// every operation. The build has no contraction (-fmad=false), so `*`, `+` and `-` each round once. Knows nothing of
// filters and noise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cpu/race.h"
#include "cuda/block.cuh"
#include "sample_args.h"

namespace mgf {

constexpr int tokens_per_thread = 8;  // 2048 tokens are 256 threads; consecutive, so that index order is thread order
using Keys = uint32_t[tokens_per_thread];

// `zero_bits`: the low bits in which no two keys of rounded numbers differ, so that no search need look at them.
struct Float32 {
    using Raw = uint32_t;
    static constexpr int zero_bits = 0;
    static MGF_DEVICE float widen(Raw x) { return from_bits(x); }
    static MGF_DEVICE float round(float x) { return x; }
};

struct Float16 {
    using Raw = uint16_t;
    static constexpr int zero_bits = 13;
    static MGF_DEVICE float widen(Raw x) { return __half2float(__ushort_as_half(x)); }
    static MGF_DEVICE float round(float x) { return __half2float(__float2half_rn(x)); }
};

struct Bfloat16 {
    using Raw = uint16_t;
    static constexpr int zero_bits = 16;
    static MGF_DEVICE float widen(Raw x) { return from_bits(uint32_t(x) << 16); }
    static MGF_DEVICE float round(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }
};

// Sorts as unsigned like the floats do: negative numbers have all bits turned, the others the sign. NaN is last.
MGF_DEVICE uint32_t key_of(float z) {
    const uint32_t b = bits(z);
    return z != z ? 0 : b ^ (uint32_t(int32_t(b) >> 31) | 0x80000000u);
}

// Key 0, which is no float's, becomes a NaN again.
MGF_DEVICE float value_of(uint32_t key) {
    return from_bits(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

constexpr uint32_t key_of_minus_infinity = 0x007FFFFF;  // what is not above it can never be chosen

// Tokens [first, first + 8) of a row; NaN past its end. Rows of an odd V or a view may begin anywhere: 16-byte loads
// where the addresses allow them.
template <class Format>
MGF_DEVICE void load(const void* logits, int64_t row, int first, int V, float (&out)[tokens_per_thread]) {
    using Raw = typename Format::Raw;
    const Raw* from = static_cast<const Raw*>(logits) + row + first;
    if (first + tokens_per_thread <= V && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        alignas(16) Raw raw[tokens_per_thread];
        for (int i = 0; i < int(sizeof raw / 16); ++i) {
            reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(from)[i];
        }
        for (int i = 0; i < tokens_per_thread; ++i) out[i] = Format::widen(raw[i]);
    } else {
        for (int i = 0; i < tokens_per_thread; ++i) {
            out[i] = first + i < V ? Format::widen(from[i]) : from_bits(0x7FC00000);
        }
    }
}

// NB = 1: c. NB = 2: u + (c - u) * cfg. NB = 3: the same with w + (c - w) * beta in the place of c.
template <class Format>
MGF_DEVICE void mix(const SampleArgs& args, int b, int k, int first, float (&out)[tokens_per_thread]) {
    const int64_t row = b * args.stride_b + k * args.stride_k;
    load<Format>(args.logits, row, first, args.V, out);
    if (args.NB == 1) return;
    float u[tokens_per_thread];
    load<Format>(args.logits, row + (args.NB - 1) * args.stride_nb, first, args.V, u);
    const float cfg = args.cfg[b];
    if (args.NB == 3) {
        float w[tokens_per_thread];
        load<Format>(args.logits, row + args.stride_nb, first, args.V, w);
        const float beta = args.cfg_beta[b];
        for (int i = 0; i < tokens_per_thread; ++i) {
            out[i] = Format::round(w[i] + Format::round(Format::round(out[i] - w[i]) * beta));
        }
    }
    for (int i = 0; i < tokens_per_thread; ++i) {
        out[i] = Format::round(u[i] + Format::round(Format::round(out[i] - u[i]) * cfg));
    }
}

// Negative scale: greedy, the keys are of the mixed logits themselves.
template <class Format>
MGF_DEVICE int load_keys_as(const SampleArgs& args, int b, int k, float scale, int first, Keys& key) {
    float z[tokens_per_thread];
    mix<Format>(args, b, k, first, z);
    // Signed zeros are one key. So are subnormals once they are scaled, because some processors flush them.
    const float smallest = scale < 0 ? 0x1p-149f : 0x1p-126f;
    for (int i = 0; i < tokens_per_thread; ++i) {
        if (scale >= 0) z[i] = Format::round(z[i] * scale);
        key[i] = key_of(fabsf(z[i]) < smallest ? 0.0f : z[i]);
    }
    return Format::zero_bits;
}

// The dtype matters for the first hundred instructions only, so it is a branch and not a template of the whole kernel.
MGF_DEVICE int load_keys(const SampleArgs& args, int b, int k, float scale, int first, Keys& key) {
    if (args.dtype == DType::float32) return load_keys_as<Float32>(args, b, k, scale, first, key);
    if (args.dtype == DType::float16) return load_keys_as<Float16>(args, b, k, scale, first, key);
    return load_keys_as<Bfloat16>(args, b, k, scale, first, key);
}

}  // namespace mgf
