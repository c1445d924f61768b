// Weights into their packed layout and back (cpu/linear.h describes it). Runs once per model; one build serves all
// instruction sets, so that a file packed on one machine equals that of another.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/half.h"
#include "cpu/linear_group.h"

namespace mgf {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// One group of one output: `count` weights and where they go.
struct Slice {
    const float* w;
    int count;
    unsigned char* group;  // of the tile
    int output;            // 0 to 15 in the tile
};

float largest_of(const Slice& s) {
    float largest = 0;
    for (int i = 0; i < s.count; ++i) {
        if (!std::isfinite(s.w[i])) return kNaN;
        if (std::fabs(s.w[i]) > std::fabs(largest)) largest = s.w[i];
    }
    return largest;
}

void put_float(unsigned char* to, float x) {
    std::memcpy(to, &x, sizeof x);
}

float get_float(const unsigned char* from) {
    float x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

int nearest_of_4_bits(float x) {
    return std::max(-8, std::min(7, nearest(x)));
}

// The step that loses least: a little clipping pays where few weights are large. A negative one puts the largest weight
// at -8, which the other sign does not have.
float best_step_of_4_bits(const Slice& s, float largest) {
    constexpr int kLanes = 8;  // of the sum, so that it vectorises
    float w[kGroupInputs] = {};
    std::copy(s.w, s.w + s.count, w);
    float best = 0, least = std::numeric_limits<float>::infinity();
    for (int halves = 14; halves <= 22; ++halves) {  // the largest weight at 7 to 11 steps
        const float step = -largest / (0.5f * float(halves)), inverse = 1.0f / step;
        float error[kLanes] = {};
        for (int i = 0; i < kGroupInputs; i += kLanes) {
            for (int j = 0; j < kLanes; ++j) {
                const float off = w[i + j] * inverse - float(nearest_of_4_bits(w[i + j] * inverse));
                error[j] += off * off;
            }
        }
        float sum = 0;
        for (const float e : error) sum += e;
        sum = sum / (float(halves) * float(halves));  // in steps until here
        if (sum < least) best = step, least = sum;
    }
    return best;
}

bool pack_float32(const Slice& s) {
    bool finite = true;
    for (int i = 0; i < s.count; ++i) {
        finite = finite && std::isfinite(s.w[i]);
        put_float(s.group + 4 * (i * kTileOutputs + s.output), s.w[i]);
    }
    return finite;
}

bool pack_bfloat16(const Slice& s) {
    bool finite = true;
    for (int i = 0; i < s.count; ++i) {
        const float rounded = round_to_bf16(s.w[i]);
        finite = finite && std::isfinite(rounded);
        const uint16_t half = uint16_t(bits(rounded) >> 16 | (std::isnan(rounded) ? 0x40 : 0));  // a NaN stays one
        std::memcpy(s.group + 4 * (i / 2 * kTileOutputs + s.output) + 2 * (i % 2), &half, sizeof half);
    }
    return finite;
}

bool pack_int8(const Slice& s) {
    const float largest = largest_of(s), m = std::max(std::fabs(largest), kSmallest), inverse = 127.0f / m;
    put_float(s.group + 4 * s.output, std::isnan(largest) ? kNaN : m / 127.0f);
    for (int i = 0; i < s.count && !std::isnan(largest); ++i) {
        s.group[byte_of_int8(i, s.output)] = (unsigned char)(128 + nearest(s.w[i] * inverse));
    }
    return !std::isnan(largest);
}

bool pack_int4(const Slice& s) {
    const float largest = largest_of(s);
    if (std::isnan(largest)) {
        put_float(s.group + 4 * s.output, kNaN);
        return false;
    }
    const float step = std::fabs(largest) < kSmallest ? kSmallest : best_step_of_4_bits(s, largest);
    put_float(s.group + 4 * s.output, step);
    for (int i = 0; i < s.count; ++i) {
        const int u = 8 + nearest_of_4_bits(s.w[i] * (1.0f / step));
        unsigned char& byte = s.group[byte_of_int4(i, s.output)];
        byte = (unsigned char)(i & 4 ? (byte & 0x0F) | u << 4 : (byte & 0xF0) | u);
    }
    return true;
}

bool pack_slice(WeightFormat format, const Slice& s) {
    switch (format) {
        case WeightFormat::float32:
            return pack_float32(s);
        case WeightFormat::bfloat16:
            return pack_bfloat16(s);
        case WeightFormat::int8:
            return pack_int8(s);
        default:
            return pack_int4(s);
    }
}

float unpacked(WeightFormat format, const unsigned char* group, int i, int output) {
    const int line = 4 * (i / 2 * kTileOutputs + output);
    uint16_t half;
    switch (format) {
        case WeightFormat::float32:
            return get_float(group + 4 * (i * kTileOutputs + output));
        case WeightFormat::bfloat16:
            std::memcpy(&half, group + line + 2 * (i % 2), sizeof half);
            return from_bits(uint32_t(half) << 16);
        case WeightFormat::int8:
            return get_float(group + 4 * output) * float(int(group[byte_of_int8(i, output)]) - 128);
        default:
            return get_float(group + 4 * output) * float((group[byte_of_int4(i, output)] >> (i & 4 ? 4 : 0) & 15) - 8);
    }
}

// Zero weights, whichever the format, and scales of zero for outputs that do not exist.
void clear_group(WeightFormat format, unsigned char* group, size_t bytes) {
    const int zero = format == WeightFormat::int8 ? 128 : format == WeightFormat::int4 ? 0x88 : 0;
    std::memset(group, 0, bytes);
    if (zero != 0) std::memset(group + kScaleBytes, zero, bytes - kScaleBytes);
}

}  // namespace

size_t tile_bytes(WeightFormat format, int k) {
    const size_t whole = size_t(k / kGroupInputs) * group_bytes(format, kGroupInputs);
    return k % kGroupInputs == 0 ? whole : whole + group_bytes(format, k % kGroupInputs);
}

size_t packed_bytes(WeightFormat format, int n, int k) {
    return size_t(tile_count(n)) * tile_bytes(format, k);
}

size_t prepared_bytes(WeightFormat format, int rows, int k) {
    const bool integers = format == WeightFormat::int8 || format == WeightFormat::int4;
    return size_t(integers && rows >= kMatrixRows ? round_up(rows, 16) : rows) * prepared_row_bytes(format, k);
}

bool pack(WeightFormat format, const float* w, int n, int k, void* out) {
    unsigned char* group = static_cast<unsigned char*>(out);
    bool finite = true;
    for (int tile = 0; tile < n; tile += kTileOutputs) {
        for (int first = 0; first < k; first += kGroupInputs) {
            const int count = std::min(kGroupInputs, k - first);
            const size_t bytes = group_bytes(format, count);
            clear_group(format, group, bytes);
            for (int i = 0; i < std::min(kTileOutputs, n - tile); ++i) {
                finite &= pack_slice(format, {w + size_t(tile + i) * size_t(k) + first, count, group, i});
            }
            group += bytes;
        }
    }
    return finite;
}

void unpack(WeightFormat format, const void* packed, int n, int k, float* w) {
    const unsigned char* group = static_cast<const unsigned char*>(packed);
    for (int tile = 0; tile < n; tile += kTileOutputs) {
        for (int first = 0; first < k; first += kGroupInputs) {
            const int count = std::min(kGroupInputs, k - first);
            for (int output = tile; output < std::min(tile + kTileOutputs, n); ++output) {
                float* const row = w + size_t(output) * size_t(k) + first;
                for (int i = 0; i < count; ++i) row[i] = unpacked(format, group, i, output - tile);
            }
            group += group_bytes(format, count);
        }
    }
}

}  // namespace mgf
