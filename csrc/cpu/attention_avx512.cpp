// Attention and norms with AVX-512 (F, BW, VNNI): one register for every 16 numbers.
//
// The pragma compiles all that follows for AVX-512; whatever does not depend on it is included before, so that no
// function which other files share is compiled for it.
#include <cmath>

#include "cpu/attention.h"
#include "cpu/half.h"
#include "cpu/norm.h"

#if MGF_X86
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vnni")
#endif

#define MGF_PART_BYTES 64
#include "cpu/attention_body.h"

namespace mgf {

MGF_ATTENTION_INSTANCE(avx512_attention)
MGF_NORM_INSTANCE(avx512_norm)

}  // namespace mgf

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
