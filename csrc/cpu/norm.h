// The small operations between the matrices of a decoding step: layer norm, GELU, residual, embeddings, softmax.
//
// fp32, over the rows or the range a caller names, any length, no allocation. As in attention.h every instruction set
// gives the same bits, and a row's result depends on that row alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"

namespace mgf {

struct NormKernels {
    // y = (x - mean) / sqrt(variance + 1e-5) * weight + bias over n numbers. y may be x.
    void (*layer_norm)(const float* x, const float* weight, const float* bias, int n, float* y);

    // x = x * Phi(x), the exact (erf) GELU: off by at most 2.2e-7 * max(|x|, 0.2) (torch: 3.6e-7), and by 2.5e-6 of
    // its own size above x = -10, where torch has lost every digit.
    void (*gelu)(float* x, ptrdiff_t n);

    // x += y.
    void (*add)(float* x, const float* y, ptrdiff_t n);

    // x = softmax(x); n = 0 does nothing. NaN anywhere, or +inf, or nothing but -inf: all NaN.
    void (*softmax)(float* x, int n);

    // out = table[0 * rows + tokens[0]] + table[1 * rows + tokens[1]] + ... + position, in that order: `codebooks`
    // tables of `rows` rows, n wide, one after the other. `bfloat16`: the table's type, else float32.
    void (*embed)(const int64_t* tokens, ptrdiff_t token_stride, int codebooks, const void* table, bool bfloat16,
                  int64_t rows, const float* position, int n, float* out);
};

const NormKernels& norm_kernels(Isa isa);  // of the sets that best_attention_isa() knows

extern const NormKernels baseline_norm;
#if MGF_X86
extern const NormKernels avx2_norm;
extern const NormKernels avx512_norm;
#endif

}  // namespace mgf
