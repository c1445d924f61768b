// Attention and norms with AVX2: two registers of 8 lanes for every 16 numbers.
//
// The pragma compiles all that follows for AVX2; whatever does not depend on it is included before, so that no function
// which other files share is compiled for it.
#include <cmath>

#include "cpu/attention.h"
#include "cpu/half.h"
#include "cpu/norm.h"

#if MGF_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif

#define MGF_PART_BYTES 32
#include "cpu/attention_body.h"

namespace mgf {

MGF_ATTENTION_INSTANCE(avx2_attention)
MGF_NORM_INSTANCE(avx2_norm)

}  // namespace mgf

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
