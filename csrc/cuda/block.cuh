// What the threads of a warp and of a block tell each other: scans, maxima and the winner of a race.
//
// All of it is on integers, so no order of threads can change a bit. A block is 1 to 16 full warps, and every thread
// calls every function here. Knows nothing of tokens or logits.
#pragma once

#include <cstdint>

#define MGF_DEVICE __device__ __forceinline__

namespace mgf {

constexpr uint32_t all_lanes = 0xFFFFFFFF;
constexpr int max_warps = 16;

MGF_DEVICE unsigned lane() {
    return threadIdx.x % 32;
}
MGF_DEVICE unsigned warp() {
    return threadIdx.x / 32;
}

// The sum over this lane and those below it.
template <class Integer>
MGF_DEVICE Integer inclusive_scan(Integer x) {
    for (unsigned distance = 1; distance < 32; distance *= 2) {
        const Integer below = __shfl_up_sync(all_lanes, x, distance);
        if (lane() >= distance) x += below;
    }
    return x;
}

// One barrier: every warp then reduces the partial results again, which is cheaper than a second barrier with which
// one warp would tell the others.
MGF_DEVICE uint32_t block_max(uint32_t x, uint32_t (&partial)[max_warps]) {
    x = __reduce_max_sync(all_lanes, x);
    if (lane() == 0) partial[warp()] = x;
    __syncthreads();
    return __reduce_max_sync(all_lanes, lane() < blockDim.x / 32 ? partial[lane()] : 0);
}

// The sum over the threads before this one.
MGF_DEVICE uint32_t block_exclusive_scan(uint32_t x, uint32_t (&partial)[max_warps]) {
    const uint32_t inclusive = inclusive_scan(x);
    if (lane() == 31) partial[warp()] = inclusive;
    __syncthreads();
    const uint32_t before = inclusive_scan(lane() < blockDim.x / 32 ? partial[lane()] : 0);
    const uint32_t of_warp = __shfl_sync(all_lanes, before, (warp() + 31) % 32);  // of the warp before this one
    return inclusive - x + (warp() > 0 ? of_warp : 0);
}

// Who leads a race. Scores are never negative, so their bits sort like the numbers do; of equal scores the lowest token
// wins.
struct Leader {
    uint32_t score, token;
};

MGF_DEVICE Leader nobody() {
    return {0xFFFFFFFF, 0xFFFFFFFF};
}

MGF_DEVICE Leader better(Leader a, Leader b) {
    return b.score < a.score || (b.score == a.score && b.token < a.token) ? b : a;
}

MGF_DEVICE Leader warp_leader(Leader x) {
    const uint32_t score = __reduce_min_sync(all_lanes, x.score);
    const uint32_t token = __reduce_min_sync(all_lanes, x.score == score ? x.token : 0xFFFFFFFF);
    return {score, token};
}

// For the first warp only: the others are done when they have handed in their leader.
MGF_DEVICE Leader block_leader(Leader x, Leader (&partial)[max_warps]) {
    x = warp_leader(x);
    if (lane() == 0) partial[warp()] = x;
    __syncthreads();
    if (warp() > 0) return nobody();
    return warp_leader(lane() < blockDim.x / 32 ? partial[lane()] : nobody());
}

}  // namespace mgf
