// The sampler for CUDA: one block per (request, codebook), a row of at most 4096 logits in registers, one launch.
//
// mix, scale -> keys -> maximum -> top-k, min-p, top-p -> race of the survivors -> one token. Everything a draw depends
// on is read from device memory, nothing is allocated and nobody waits, so a CUDA graph captures it once for any mix of
// requests. The tokens are those of musicgen_fast/sampling/reference.py, bit for bit: see MODEL.md. Built with
// -fmad=false into a shared library that needs no torch; musicgen_fast/native.py calls the three functions at the end.
//
// Barriers of the default, top-k 250: one for the maximum, usually two for the search, one to gather the survivors, one
// for the winner.
#include <cuda_runtime.h>

#include "cpu/philox.h"
#include "cuda/select.cuh"

namespace mgf {
namespace {

constexpr int max_threads = 512;
constexpr uint32_t max_survivors = 2 * max_threads;

struct Survivor {
    uint32_t token;
    float exponent;
};

struct Shared {
    SelectMemory select;
    uint32_t maximum[max_warps];
    uint32_t num_survivors;
    Survivor survivors[max_survivors];
    Leader leaders[max_warps];
};

struct Cell {
    int64_t at;  // of `tokens`
    enum { leave, mask, draw } what;
};

// A cell of the sequence that is known is never overwritten; where the pattern has no frame, the special token goes.
MGF_DEVICE Cell find_cell(const SampleArgs& args, int b, int k) {
    const int64_t row = int64_t(b) * args.K + k;
    if (args.column == nullptr) return {row, Cell::draw};
    const int32_t column = args.column[b];
    if (column < 0 || column >= args.S) return {0, Cell::leave};
    const int64_t at = row * args.S + column;
    const bool unknown = args.tokens_are_64_bit ? static_cast<const int64_t*>(args.tokens)[at] == -1
                                                : static_cast<const int32_t*>(args.tokens)[at] == -1;
    const bool masked = args.frames[int64_t(column) * args.K + k] < 0;
    return {at, !unknown ? Cell::leave : masked ? Cell::mask : Cell::draw};
}

MGF_DEVICE void write(const SampleArgs& args, int64_t at, int32_t token) {
    if (args.tokens_are_64_bit) {
        static_cast<int64_t*>(args.tokens)[at] = token;
    } else {
        static_cast<int32_t*>(args.tokens)[at] = token;
    }
}

// The exponential variates of a row: read, or computed four at a time, as the words come.
class Noise {
  public:
    MGF_DEVICE Noise(const SampleArgs& args, int b, int k) {
        if (args.noise != nullptr) {
            given = args.noise + (int64_t(b) * args.K + k) * args.V;
        } else if (args.seed != nullptr) {  // null where all cells are greedy
            const uint64_t seed = args.seed[b];
            key = {uint32_t(seed), uint32_t(seed >> 32)};
            counter = {0, uint32_t(args.step[b]), uint32_t(k), uint32_t(args.stream[b])};
        }
    }

    MGF_DEVICE float of(uint32_t token) const {
        if (given != nullptr) return given[token];
        const Counter words = block(token / 4);
        const uint32_t low = token & 1 ? words.c1 : words.c0, high = token & 1 ? words.c3 : words.c2;
        return exponential(token & 2 ? high : low);
    }

    // Of those of the tokens first ... first + 3 whose bit is set; first is a multiple of 4.
    MGF_DEVICE void of_four(uint32_t first, uint32_t wanted, float (&out)[4]) const {
        if (given != nullptr) {
            for (int i = 0; i < 4; ++i) out[i] = wanted >> i & 1 ? given[first + i] : 0.0f;
        } else {
            const Counter words = block(first / 4);
            const uint32_t word[4] = {words.c0, words.c1, words.c2, words.c3};
            for (int i = 0; i < 4; ++i) out[i] = exponential(word[i]);
        }
    }

  private:
    MGF_DEVICE Counter block(uint32_t number) const {
        return philox4x32_10({number, counter.c1, counter.c2, counter.c3}, key);
    }

    const float* given = nullptr;
    Key key{};
    Counter counter{};
};

MGF_DEVICE Leader runner(uint32_t token, float exponent, float noise) {
    return {bits(noise * exp2_pair(exponent).iw), token};
}

// Noise is most of the work where the whole row runs: 2 Philox blocks and 8 logarithms a thread. So when few are left
// they are handed out evenly, one of each a survivor; which slot a token gets does not matter, its noise is its own.
MGF_DEVICE Leader race(const Noise& noise, const Keys& key, uint32_t keep, uint32_t top, int first, Shared& shared) {
    const uint32_t own = __popc(keep), through = inclusive_scan(own);
    uint32_t slot = 0;
    if (lane() == 31 && through > 0) slot = atomicAdd(&shared.num_survivors, through);
    slot = __shfl_sync(all_lanes, slot, 31) + through - own;
    for (int i = 0; i < tokens_per_thread; ++i) {
        if ((keep >> i & 1) == 0) continue;
        if (slot < max_survivors) shared.survivors[slot] = {uint32_t(first + i), exponent(key[i], top)};
        ++slot;
    }
    __syncthreads();
    Leader leader = nobody();
    if (shared.num_survivors <= 2 * blockDim.x) {
#pragma unroll 1  // one round or two
        for (uint32_t i = threadIdx.x; i < shared.num_survivors; i += blockDim.x) {
            const Survivor it = shared.survivors[i];
            leader = better(leader, runner(it.token, it.exponent, noise.of(it.token)));
        }
        return leader;
    }
    for (int four = 0; four < tokens_per_thread; four += 4) {
        const uint32_t wanted = keep >> four & 15;
        if (wanted == 0) continue;
        float E[4];
        noise.of_four(first + four, wanted, E);
        for (int i = 0; i < 4; ++i) {
            if (wanted >> i & 1) {
                leader = better(leader, runner(first + four + i, exponent(key[four + i], top), E[i]));
            }
        }
    }
    return leader;
}

struct Filters {
    int32_t k;
    float min_p, p;

    MGF_DEVICE Filters(const SampleArgs& args, int64_t row)
        : k(args.top_k != nullptr ? args.top_k[row] : 0),
          min_p(args.min_p != nullptr ? args.min_p[row] : 0.0f),
          p(args.top_p != nullptr ? args.top_p[row] : 0.0f) {
        if (k >= args.V) k = 0;
    }

    // Top-k, then min-p, then top-p among what is left.
    MGF_DEVICE uint32_t keep(const Keys& key, uint32_t top, int zero_bits, SelectMemory& memory) const {
        uint32_t kept = 0;
        for (int i = 0; i < tokens_per_thread; ++i) kept |= uint32_t(exponent(key[i], top) >= -126.0f) << i;
        int pass = 0;
        if (k > 0) kept = keep_largest(Count{uint32_t(k)}, key, kept, top, zero_bits, memory, pass);
        if (min_p > 0.0f) {
            for (int i = 0; i < tokens_per_thread; ++i) {
                if (kept >> i & 1 && exp2_pair(exponent(key[i], top)).w < min_p) kept &= ~(1u << i);
            }
        }
        if (p > 0.0f && p < 1.0f) kept = keep_largest(Mass{p}, key, kept, top, zero_bits, memory, pass);
        return kept;
    }
};

// One kernel, no template: dtype, branches and filters are branches that all threads take alike, and only the first
// hundred instructions know the dtype. So one kernel serves every call, and its code is loaded once. The 1 stands for
// blocks a multiprocessor: without it ptxas aims at two of 512 threads, which is 64 registers, and spills on sm_90.
__global__ void __launch_bounds__(max_threads, 1) sample_row(const SampleArgs args) {
    __shared__ Shared shared;
    const int b = blockIdx.x, k = blockIdx.y, first = threadIdx.x * tokens_per_thread;
    const int64_t row = int64_t(b) * args.K + k;
    const float scale = args.scale[row];
    // All that memory holds is asked for before it is known whether it is needed: the cell alone takes two dependent
    // loads, and cells that need no draw are few.
    const Cell cell = find_cell(args, b, k);
    const Filters filters(args, row);
    const Noise noise(args, b, k);
    Keys key;
    const int zero_bits = load_keys(args, b, k, scale, first, key);
    if (cell.what != Cell::draw) {  // a slower warp may find the cell known already; both do nothing more
        if (cell.what == Cell::mask && threadIdx.x == 0) write(args, cell.at, args.V);
        return;
    }

    clear(shared.select.bins[0]);
    if (threadIdx.x == 0) shared.num_survivors = 0;
    uint32_t highest = 0;
    for (int i = 0; i < tokens_per_thread; ++i) highest = max(highest, key[i]);
    const uint32_t top = block_max(highest, shared.maximum);

    Leader leader = nobody();
    if (top > key_of_minus_infinity) {
        if (scale < 0.0f) {
            for (int i = tokens_per_thread - 1; i >= 0; --i) {
                if (key[i] == top) leader = {0, uint32_t(first + i)};
            }
        } else {
            const uint32_t keep = filters.keep(key, top, zero_bits, shared.select);
            leader = race(noise, key, keep, top, first, shared);
        }
    }
    leader = block_leader(leader, shared.leaders);
    if (threadIdx.x == 0) {
        const bool failed = leader.token == nobody().token;
        write(args, cell.at, failed ? 0 : int32_t(leader.token));
        if (failed) args.status[row] = 1;
    }
}

cudaError_t check(const SampleArgs* args) {
    if (args == nullptr || args->size != sizeof(SampleArgs)) return cudaErrorInvalidValue;  // another version of us
    const bool shape = args->NB >= 1 && args->NB <= 3 && args->B >= 0 && args->K >= 0 && args->K <= 65535 &&
                       args->V >= 1 && args->V <= max_threads * tokens_per_thread;
    const bool dtype = args->dtype == DType::float32 || args->dtype == DType::float16 || args->dtype == DType::bfloat16;
    const bool mixing = (args->NB == 1 || args->cfg != nullptr) && (args->NB < 3 || args->cfg_beta != nullptr);
    const bool placed = args->column == nullptr || args->frames != nullptr;
    // On a GPU torch, too, multiplies by the inverse of the temperature; nvcc's rounded division is made of FMAs.
    const bool valid = shape && dtype && mixing && placed && args->divide == 0;
    return valid ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace
}  // namespace mgf

#if defined(_WIN32)
#define MGF_EXPORT extern "C" __declspec(dllexport)
#else
#define MGF_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Queues one column on `stream` of the current device. Returns a cudaError_t; what `args` points to is on that device.
MGF_EXPORT int mgf_sample(const mgf::SampleArgs* args, cudaStream_t stream) {
    const cudaError_t refused = mgf::check(args);
    if (refused != cudaSuccess || args->B == 0 || args->K == 0) return refused;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(args->B, args->K);
    launch.blockDim = dim3((args->V + 255) / 256 * 32);  // 8 tokens a thread, whole warps
    launch.stream = stream;
    return cudaLaunchKernelEx(&launch, mgf::sample_row, *args);
}

// 0 if the current device can run the kernel: the library holds code for it, and its driver is new enough.
MGF_EXPORT int mgf_usable() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, mgf::sample_row);
}

MGF_EXPORT const char* mgf_error_string(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}
