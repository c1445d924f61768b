// What packing and the kernels of cpu/linear.h share: where things lie inside a group, and how a prepared row looks.
#pragma once

#include <limits>

#include "cpu/isa.h"
#include "cpu/linear.h"
#include "cpu/race.h"

namespace mgf {

constexpr size_t kScaleBytes = sizeof(float) * kTileOutputs;
constexpr int kMatrixRows = 5;       // from so many rows of integers on a matrix unit is faster
constexpr float kSmallest = 1e-30f;  // the largest of a group counts as at least this: inverses stay finite
constexpr float kFullInput = 32512;  // 127 * 256: the largest input whose upper half, rounded, still fits 8 bits

MGF_INLINE int round_up(int x, int multiple) {
    return (x + multiple - 1) / multiple * multiple;
}

// To the nearest integer, ties to even, for |x| < 2^22. Vectorises everywhere, unlike std::nearbyint.
MGF_INLINE int32_t nearest(float x) {
    return int32_t(bits(x + 12582912.0f)) - 0x4B400000;  // 1.5 * 2^23: above it floats step by 1
}

// Of a group of `count` inputs and 16 outputs.
MGF_INLINE size_t group_bytes(WeightFormat format, int count) {
    switch (format) {
        case WeightFormat::float32:
            return size_t(round_up(count, 2)) * 4 * kTileOutputs;
        case WeightFormat::bfloat16:
            return size_t(round_up(count, 2)) * 2 * kTileOutputs;
        case WeightFormat::int8:
            return kScaleBytes + size_t(round_up(count, 8)) * kTileOutputs;
        default:
            return kScaleBytes + size_t(round_up(count, 8)) / 2 * kTileOutputs;
    }
}

inline size_t byte_of_int8(int i, int output) {
    return kScaleBytes + size_t(4 * (i / 4 * kTileOutputs + output) + i % 4);
}

inline size_t byte_of_int4(int i, int output) {
    return kScaleBytes + size_t(4 * (i / 8 * kTileOutputs + output) + i % 4);
}

// A group of a prepared row for int8 and int4: x = scale * q, |q| <= 32512, zeros behind the last. Instruction sets
// that multiply bytes want q = 256 * high + low instead, both signed.
struct InputGroup {
    union {
        int16_t q[kGroupInputs];
        int8_t half[2][kGroupInputs];  // high, low
    };
    float scale;
    int32_t sum;         // of all q: weights are stored with an offset
    int32_t unused[14];  // whole cache lines: AMX loads 64 bytes of 16 rows at once
};

// What the weights are stored with: the sum over u is too large by this times the sum of the inputs.
constexpr int32_t offset_of(bool four_bits) {
    return four_bits ? 8 : 128;
}

inline size_t prepared_row_bytes(WeightFormat format, int k) {
    if (format == WeightFormat::float32 || format == WeightFormat::bfloat16) {
        return size_t(round_up(k, 16)) * sizeof(float);
    }
    return size_t(round_up(k, kGroupInputs) / kGroupInputs) * sizeof(InputGroup);
}

}  // namespace mgf
