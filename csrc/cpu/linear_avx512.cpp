// Linear layers with AVX-512 (F and BW).
#include "cpu/linear_avx512.h"

#if MGF_X86
namespace mgf {
namespace {

using Simd = SimdAvx512;

}  // namespace

MGF_LINEAR_KERNELS(linear_avx512, MGF_TARGET_LINEAR_AVX512)

}  // namespace mgf
#endif
