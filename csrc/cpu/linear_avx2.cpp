// Linear layers with AVX2 and FMA.
#include "cpu/linear_avx2.h"

#if MGF_X86
namespace mgf {
namespace {

using Simd = SimdAvx2;

}  // namespace

MGF_LINEAR_KERNELS(linear_avx2, MGF_TARGET_LINEAR_AVX2)

}  // namespace mgf
#endif
