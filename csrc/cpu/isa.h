// Which instruction set to run: asked of the processor once, never assumed at compile time.
//
// A kernel is written once as an always-inlined body and instantiated under one `target` attribute per set; the caller
// picks an instance by `Isa`. The bodies hold no intrinsics, the compiler vectorises them; what it does not vectorise
// well (Philox, compaction) each set brings itself. Floating-point contraction is off for the whole build, so every
// instance gives the same bits although AVX-512 machines have FMA.
#pragma once

#if defined(__GNUC__) && defined(__x86_64__)
#define MGF_X86 1
#define MGF_TARGET_AVX2 __attribute__((target("avx2")))
#define MGF_TARGET_AVX512 __attribute__((target("avx512f,prefer-vector-width=512")))
#else
#define MGF_X86 0
#endif

#if defined(__CUDACC__)
#define MGF_INLINE __host__ __device__ __forceinline__  // philox.h and race.h serve the CUDA sampler too
#elif defined(__GNUC__)
#define MGF_INLINE inline __attribute__((always_inline))
#else
#define MGF_INLINE inline
#endif

namespace mgf {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

inline Isa best_isa() {
#if MGF_X86
    static const Isa best = __builtin_cpu_supports("avx512f") ? Isa::avx512
                            : __builtin_cpu_supports("avx2")  ? Isa::avx2
                                                              : Isa::baseline;
    return best;
#else
    return Isa::baseline;  // on aarch64 this is NEON: always there, vectorised by default
#endif
}

}  // namespace mgf
