// Top-k and top-p as one search: which of the largest keys of a row weigh `wanted` together, without sorting.
//
// A radix select over 256 bins in shared memory. A token weighs 1 for top-k and its probability, as an integer, for
// top-p: sums of integers do not depend on the order of the atomics, which is why every run and every machine finds the
// same set. What a thread knows of its eight tokens is a mask of bits; no threshold is ever written down.
#pragma once

#include "cuda/keys.cuh"

namespace mgf {

constexpr int num_bins = 256;

struct alignas(16) Bins {
    uint32_t low[num_bins], high[num_bins];  // halves of 64-bit sums; counts need `low` only
};

struct SelectMemory {
    Bins bins[3];  // pass n adds to n % 3 and clears the next: the third may still be read by a slow warp
    uint32_t partial[max_warps];
};

MGF_DEVICE void clear(Bins& bins) {
    uint4* words = reinterpret_cast<uint4*>(&bins);
#pragma unroll 1  // unrolled, it would begin with a division by the size of the block
    for (unsigned i = threadIdx.x; i < sizeof(Bins) / sizeof(uint4); i += blockDim.x) words[i] = uint4{0, 0, 0, 0};
}

// log2 of a token's weight relative to the largest, which has exactly 0; NaN for NaN.
MGF_DEVICE float exponent(uint32_t key, uint32_t top) {
    return key == top ? 0.0f : (value_of(key) - value_of(top)) * 1.44269504f;
}

// The weight in units of 2^-40. 4096 of them fill 53 bits.
MGF_DEVICE uint64_t mass(uint32_t key, uint32_t top) {
    return uint64_t(exp2_pair(exponent(key, top)).w * 0x1p40f);
}

struct Count {
    using Sum = uint32_t;
    static constexpr bool splits_ties = false;  // all tokens as large as the k-th stay
    Sum k;

    MGF_DEVICE Sum wanted(Sum) const { return k; }
    static MGF_DEVICE Sum weight(uint32_t, uint32_t) { return 1; }
    static MGF_DEVICE void add(Bins& bins, uint32_t bin, Sum) { atomicAdd(&bins.low[bin], 1u); }
    static MGF_DEVICE Sum sum(const Bins& bins, uint32_t bin) { return bins.low[bin]; }
};

struct Mass {
    using Sum = uint64_t;
    static constexpr bool splits_ties = true;  // index order decides which of them are inside
    float p;

    // A token stays while at most floor(total * p) lies before it: the bins are crossed where the sum exceeds that.
    MGF_DEVICE Sum wanted(Sum total) const {
        const uint64_t share = uint64_t(p * 0x1p31f);
        return (total >> 32) * share * 2 + (((total & 0xFFFFFFFF) * share) >> 31) + 1;
    }
    static MGF_DEVICE Sum weight(uint32_t key, uint32_t top) { return mass(key, top); }
    // Shared memory has no 64-bit add in hardware (the compiler loops over a compare-and-swap); two of 32 bits do,
    // and the second is needed only by weights of 2^-8 and more, or on a carry.
    static MGF_DEVICE void add(Bins& bins, uint32_t bin, Sum x) {
        const uint32_t low = uint32_t(x), before = atomicAdd(&bins.low[bin], low);
        const uint32_t high = uint32_t(x >> 32) + (before + low < before);
        if (high != 0) atomicAdd(&bins.high[bin], high);
    }
    static MGF_DEVICE Sum sum(const Bins& bins, uint32_t bin) { return uint64_t(bins.high[bin]) << 32 | bins.low[bin]; }
};

// How a pass maps keys to bins, the largest key to bin 0. Float keys are logarithmic: by their leading bits nearly all
// logits would share two or three bins. So the first pass goes by the distance to the largest, 1/8 a bin; any later
// one by the key within the bin before. Passes a row, of normal logits with a deviation of 2.5: 2.0 for top-k 250 and
// for top-p of fp16 and bf16, 4.0 for top-p of fp32. Never more than 5.
struct Digit {
    uint32_t top, highest;
    int shift;  // < 0: the first pass

    // Of keys whose exponent is at least -126; of others the result means nothing.
    MGF_DEVICE void bins_of(const Keys& key, Keys& bin) const {
        if (shift >= 0) {
            for (int i = 0; i < tokens_per_thread; ++i) bin[i] = (highest - key[i]) >> shift;
        } else {
            for (int i = 0; i < tokens_per_thread; ++i) {
                const float distance = (value_of(top) - value_of(key[i])) * 8.0f;  // NaN for two infinities
                bin[i] = uint32_t(fminf(key[i] == top ? 0.0f : distance, num_bins - 1.0f));
            }
        }
    }

    // The digit of the next pass, for the keys of `bin`. A distance is rounded, so a neighbour's keys are allowed for.
    MGF_DEVICE Digit inside(uint32_t bin) const {
        if (shift >= 0) return {top, highest - (bin << shift), shift > 8 ? shift - 8 : 0};
        const float z = value_of(top), nearest = float(bin) - 1.0f;
        const float farthest = bin < num_bins - 1 ? float(bin) + 2.0f : 8 * 88.0f;  // 2^-126 lies at 87.4
        const uint32_t from = bin < 2 ? top : key_of(z - nearest * 0.125f), to = key_of(z - farthest * 0.125f);
        const int width = 32 - __clz(from - to);
        return {top, from, width > 8 ? width - 8 : 0};
    }
};

// Where the sum over the bins reaches `wanted`, and the sums before and in that bin. Every warp finds it for itself, as
// in block_max. False where all bins together do not reach it.
template <class Weight>
struct Crossing {
    using Sum = typename Weight::Sum;
    static constexpr int per_lane = num_bins / 32;
    uint32_t bin;
    Sum before, here;

    MGF_DEVICE bool find(const Bins& bins, const Weight& weight, Sum& wanted, bool first) {
        Sum own[per_lane], total = 0;
        for (int i = 0; i < per_lane; ++i) total += own[i] = Weight::sum(bins, lane() * per_lane + i);
        const Sum through = inclusive_scan(total);
        if (first) wanted = weight.wanted(__shfl_sync(all_lanes, through, 31));
        const uint32_t reached = __ballot_sync(all_lanes, through >= wanted);
        if (reached == 0) return false;
        bin = lane() * per_lane;
        before = through - total;
        here = own[0];
        bool going = true;
        for (int i = 1; i < per_lane; ++i) {  // meaningful in the first lane that reaches it
            going = going && before + here < wanted;
            if (going) {
                before += here;
                here = own[i];
                ++bin;
            }
        }
        const int who = __ffs(reached) - 1;
        bin = __shfl_sync(all_lanes, bin, who);
        before = __shfl_sync(all_lanes, before, who);
        here = __shfl_sync(all_lanes, here, who);
        return true;
    }
};

// Of the tokens in `keep` those that stay. `pass` counts the passes of all searches of this block; bins[pass % 3] is
// clear and a barrier lies behind that.
template <class Weight>
MGF_DEVICE uint32_t keep_largest(const Weight& weight, const Keys& key, uint32_t keep, uint32_t top, int zero_bits,
                                 SelectMemory& memory, int& pass) {
    uint32_t open = keep;  // undecided: in the bin where the sum is reached
    typename Weight::Sum wanted = 0;
    Digit digit{top, top, -1};
    for (;;) {
        const bool first = digit.shift < 0;
        Bins& bins = memory.bins[pass % 3];
        ++pass;
        clear(memory.bins[pass % 3]);
        Keys bin;
        digit.bins_of(key, bin);
        for (int i = 0; i < tokens_per_thread; ++i) {
            if (open >> i & 1) Weight::add(bins, bin[i], Weight::weight(key[i], top));
        }
        __syncthreads();
        Crossing<Weight> crossing;
        if (!crossing.find(bins, weight, wanted, first)) return keep;
        for (int i = 0; i < tokens_per_thread; ++i) {
            const uint32_t bit = open & 1u << i;
            if (bin[i] > crossing.bin) keep &= ~bit;
            if (bin[i] != crossing.bin) open &= ~bit;
        }
        wanted -= crossing.before;
        if (!Weight::splits_ties && crossing.here == wanted) return keep;
        const bool one_key = !first && digit.shift <= zero_bits;
        if (one_key) break;
        digit = digit.inside(crossing.bin);
    }
    if (!Weight::splits_ties) return keep;
    // All open tokens of the block have one key, hence one weight. Those with less than `wanted` before them stay.
    const uint32_t rank = block_exclusive_scan(__popc(open), memory.partial);
    uint32_t tied = top;
    for (int i = 0; i < tokens_per_thread; ++i) tied = open >> i & 1 ? key[i] : tied;
    const uint64_t each = Weight::weight(tied, top);
    uint64_t before = rank * each;
    for (int i = 0; i < tokens_per_thread; ++i) {
        if ((open >> i & 1) == 0) continue;
        if (before >= wanted) keep &= ~(1u << i);
        before += each;
    }
    return keep;
}

}  // namespace mgf
