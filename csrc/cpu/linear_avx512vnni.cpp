// Linear layers with AVX-512 and VNNI.
#include "cpu/linear_avx512vnni.h"

#if MGF_X86
namespace mgf {
namespace {

using Simd = SimdVnni;

}  // namespace

MGF_LINEAR_KERNELS(linear_avx512vnni, MGF_TARGET_LINEAR_VNNI)

}  // namespace mgf
#endif
