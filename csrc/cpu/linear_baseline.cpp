// Linear layers for any processor: SSE2 on x86-64, NEON on aarch64, by the compiler alone.
#include "cpu/linear_body.h"
#include "cpu/linear_sets.h"

namespace mgf {
namespace {

struct Simd {
    static constexpr int kFloatRows = 1, kIntegerRows = 1, kSides = 1;
    static constexpr bool kHalves = false;

    template <bool Half>
    struct Floats {
        using Weights = const unsigned char*;
        float even[kTileOutputs], odd[kTileOutputs];

        MGF_INLINE void clear() {
            for (float& sum : even) sum = 0;
            for (float& sum : odd) sum = 0;
        }
        static MGF_INLINE void load(const unsigned char* w, int, Weights& weights) { weights = w; }
        MGF_INLINE void add(Weights w, const unsigned char* inputs) {
            const float* const x = reinterpret_cast<const float*>(inputs);
            if (Half) {
                const uint32_t* const pairs = reinterpret_cast<const uint32_t*>(w);
                for (int i = 0; i < kTileOutputs; ++i) even[i] += from_bits(pairs[i] << 16) * x[0];
                for (int i = 0; i < kTileOutputs; ++i) odd[i] += from_bits(pairs[i] & 0xFFFF0000u) * x[1];
            } else {
                const float* const floats = reinterpret_cast<const float*>(w);
                for (int i = 0; i < kTileOutputs; ++i) even[i] += floats[i] * x[0];
                for (int i = 0; i < kTileOutputs; ++i) odd[i] += floats[kTileOutputs + i] * x[1];
            }
        }
        MGF_INLINE void add_to(float* sums, int) const {
            for (int i = 0; i < kTileOutputs; ++i) sums[i] += even[i] + odd[i];
        }
    };

    template <bool FourBits, int>
    struct Integers {
        using Weights = const unsigned char*;
        int32_t sum[kTileOutputs];

        MGF_INLINE void clear() {
            for (int32_t& s : sum) s = 0;
        }
        static MGF_INLINE void load(const unsigned char* u, int, Weights& weights) { weights = u; }
        MGF_INLINE void add(Weights u, const unsigned char* x) {
            const int16_t* const q = reinterpret_cast<const int16_t*>(x);
            for (int i = 0; i < kTileOutputs; ++i) {
                const unsigned char *const u0 = u + 4 * i, *const u1 = FourBits ? u0 : u0 + 4 * kTileOutputs;
                int32_t total = 0;
                for (int j = 0; j < 4; ++j) total += int16_t(FourBits ? u0[j] & 15 : u0[j]) * q[j];
                for (int j = 0; j < 4; ++j) total += int16_t(FourBits ? u1[j] >> 4 : u1[j]) * q[4 + j];
                sum[i] += total;
            }
        }
        MGF_INLINE void add_scaled(float* sums, int, const InputGroup& group, const float* scale) const {
            const int32_t correction = offset_of(FourBits) * group.sum;
            for (int i = 0; i < kTileOutputs; ++i) sums[i] += float(sum[i] - correction) * (scale[i] * group.scale);
        }
    };
};

}  // namespace

MGF_LINEAR_KERNELS(linear_baseline, )

}  // namespace mgf
