// Stands in for CUDA's header when g++ compiles a .cu file as plain C++: a block runs on one CPU thread, for tests.
//
// Every CUDA thread is a fiber with its own stack. It runs until it has to wait for others, at a barrier or in a warp
// collective, and then the next one runs; in which order is the test's choice (emulator_order), so that a missing
// barrier shows as a wrong result in some order. Shared memory is filled with garbage before each block. Undefined
// behaviour becomes an error: a barrier that some threads never reach, collectives that lanes of a warp call at
// different places of the program, masks with absent lanes. Pointers are the CPU's; nothing of speed is emulated.
//
// It knows what csrc/cuda uses, no more. A launch is synchronous, so a stream means nothing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

struct cudaFuncAttributes {};

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
    return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t code) {
    return code == cudaErrorLaunchFailure ? emulator::machine().error.c_str()
           : code == cudaSuccess          ? "no error"
                                          : "invalid argument";
}

inline dim3 blockIdx, blockDim, gridDim;

struct ThreadIndex {
    struct X {
        operator unsigned() const { return emulator::machine().current; }
    } x;
};
inline ThreadIndex threadIdx;

extern "C" unsigned char __start_emulated_shared[], __stop_emulated_shared[];

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* launch, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
    gridDim = launch->gridDim;
    blockDim = launch->blockDim;
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
            emulator::fill_with_garbage(__start_emulated_shared, __stop_emulated_shared);
            if (!emulator::machine().run(blockDim.x, [&] { kernel(arguments...); })) return cudaErrorLaunchFailure;
        }
    }
    return cudaSuccess;
}

// Barriers and collectives. `place` tells calls at different lines of the program apart: lanes that meet in one
// collective from two places are an error on real warps too.
#define __syncthreads() emulator::machine().barrier()
#define MGF_PLACE const char *file = __builtin_FILE(), int place = __builtin_LINE()

template <class T>
struct Lanes {
    static_assert(sizeof(T) <= 8, "one value is at most 64 bits");
    const uint64_t* raw;
    T operator[](unsigned lane) const {
        T x;
        std::memcpy(&x, raw + lane % 32, sizeof x);
        return x;
    }
};

template <class T>
Lanes<T> exchange(unsigned mask, T x, const char* file, int place) {
    uint64_t raw = 0;
    std::memcpy(&raw, &x, sizeof x);
    return {emulator::machine().collective(mask, raw, file, place)};
}

inline unsigned lane_id() {
    return threadIdx.x % 32;
}

template <class T>
T __shfl_sync(unsigned mask, T x, int lane, MGF_PLACE) {
    return exchange(mask, x, file, place)[lane];
}

template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned distance, MGF_PLACE) {
    const Lanes<T> all = exchange(mask, x, file, place);
    return lane_id() < distance ? x : all[lane_id() - distance];
}

inline unsigned __ballot_sync(unsigned mask, int predicate, MGF_PLACE) {
    const Lanes<int> all = exchange(mask, predicate, file, place);
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= unsigned(all[i] != 0) << i;
    return votes;
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned x, MGF_PLACE) {
    const Lanes<unsigned> all = exchange(mask, x, file, place);
    for (int i = 0; i < 32; ++i) x = all[i] > x ? all[i] : x;
    return x;
}

inline unsigned __reduce_min_sync(unsigned mask, unsigned x, MGF_PLACE) {
    const Lanes<unsigned> all = exchange(mask, x, file, place);
    for (int i = 0; i < 32; ++i) x = all[i] < x ? all[i] : x;
    return x;
}

// Another thread may come in between any two atomics.
inline unsigned atomicAdd(unsigned* address, unsigned x) {
    emulator::machine().maybe_yield();
    const unsigned before = *address;
    *address = before + x;
    return before;
}

inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline int __clz(int x) {
    return x == 0 ? 32 : __builtin_clz(x);
}
inline unsigned max(unsigned a, unsigned b) {
    return a > b ? a : b;
}
using std::fabs;
