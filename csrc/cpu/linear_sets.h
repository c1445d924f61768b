// The builds of the kernels, and the targets they are built for.
#pragma once

#include "cpu/isa.h"
#include "cpu/linear.h"

#if MGF_X86
#define MGF_TARGET_LINEAR_AVX2 __attribute__((target("avx2,fma")))
#define MGF_TARGET_LINEAR_AVXVNNI __attribute__((target("avx2,fma,avxvnni")))
#define MGF_TARGET_LINEAR_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,prefer-vector-width=512")))
#define MGF_TARGET_LINEAR_VNNI __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vnni,prefer-vector-width=512")))
#endif

// gcc 11 and clang 12 are the first to know AVX-VNNI; without it such a processor gets AVX2.
#if MGF_X86 && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define MGF_HAS_AVXVNNI 1
#else
#define MGF_HAS_AVXVNNI 0
#endif

// The tiles of AMX: asked for from the operating system, as only Linux can be.
#if MGF_HAS_AVXVNNI && defined(__linux__)
#define MGF_HAS_AMX 1
#define MGF_TARGET_LINEAR_AMX \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vnni,amx-tile,amx-int8,prefer-vector-width=512")))
#else
#define MGF_HAS_AMX 0
#endif

namespace mgf {

extern const LinearKernels linear_baseline;
#if MGF_X86
extern const LinearKernels linear_avx2;
extern const LinearKernels linear_avx512;
extern const LinearKernels linear_avx512vnni;
#endif
#if MGF_HAS_AVXVNNI
extern const LinearKernels linear_avxvnni;
#endif
#if MGF_HAS_AMX
extern const LinearKernels linear_amx;
#endif

}  // namespace mgf
