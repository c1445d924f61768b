// What one launch of the sampler is given: plain pointers and sizes, the same for the CPU and for CUDA.
//
// Python fills a ctypes twin of this struct (musicgen_fast/sampling/native_args.py), in which `size` guards against a
// library of another version. Every pointer is to memory of the device that runs the kernel. Parameters are arrays per
// request [B] or per request and codebook [B, K], contiguous, so that one captured CUDA graph serves any mix of them.
#pragma once

#include <cstdint>

namespace mgf {

enum class DType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2 };

struct SampleArgs {
    int64_t size;  // sizeof(SampleArgs)

    const void* logits;                     // [NB, B, K, V]; V is contiguous
    int64_t stride_nb, stride_b, stride_k;  // in elements
    DType dtype;
    int32_t NB, B, K, V;    // 1 <= NB <= 3, 1 <= V <= 4096
    int32_t divide;         // 1: z = l / scale, as the references do on a CPU; 0: z = l * scale
    const float* scale;     // [B, K] 1 / temperature, or the temperature if `divide`; negative: greedy
    const float* cfg;       // [B]; null where NB = 1
    const float* cfg_beta;  // [B]; null unless NB = 3
    const int32_t* top_k;   // [B, K] off where <= 0 or >= V; null: off everywhere (likewise the next two)
    const float* top_p;     // [B, K] off where <= 0 or >= 1
    const float* min_p;     // [B, K] off where <= 0

    const float* noise;     // [B, K, V] E of every token; null: from the counters below
    const int64_t* seed;    // [B] the Philox key
    const int64_t* step;    // [B] low 32 bits count
    const int64_t* stream;  // [B] low 32 bits count

    void* tokens;               // [B, K], or with `column` the sequence [B, K, S]: -1 = unknown
    int32_t tokens_are_64_bit;  // int64 rather than int32
    int32_t S;
    const int32_t* column;  // [B] place in the sequence; outside of [0, S): nothing is done. Null: tokens are [B, K]
    const int32_t* frames;  // [S, K] frame of each cell, -1 = masked by the pattern: V is written there
    int32_t* status;        // [B, K] becomes 1 where no token could be chosen; otherwise left as it was
};

}  // namespace mgf
