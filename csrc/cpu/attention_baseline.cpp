// Attention and norms for any processor: SSE2 on x86-64, NEON on aarch64, by the compiler's vector types.
#include "cpu/half.h"

#if MGF_X86
#include <immintrin.h>
#endif

#define MGF_PART_BYTES 16
#include "cpu/attention_body.h"

namespace mgf {

MGF_ATTENTION_INSTANCE(baseline_attention)
MGF_NORM_INSTANCE(baseline_norm)

}  // namespace mgf
