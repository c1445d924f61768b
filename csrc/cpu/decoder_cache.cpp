// One mapping for the keys and values of all layers.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu/decoder.h"

namespace mgf {

DecoderCache::DecoderCache(KvFormat format, int layers, int rows, int heads, int head_dim, int capacity) {
    if (layers < 1) throw std::invalid_argument("a cache needs at least one layer");
    constexpr int kMost = 1 << 24;  // of each; keeps the products below within 64 bits, after the check of their size
    if (std::max({layers, rows, heads, head_dim, capacity}) > kMost) {
        throw std::invalid_argument("a cache of more than 2^24 layers, rows, heads, dims or positions");
    }
    constexpr double kBytes = double(int64_t(1) << 56);  // no machine has so many
    if (16.0 * layers * rows * heads * (head_dim + 15.0) * (capacity + 15.0) > kBytes) {
        throw NoRoom(size_t(kBytes), "keys and values");
    }
    KvCache layer = kv_layout(format, rows, heads, head_dim, capacity);
    memory_ = Pages(size_t(layer.bytes()) * size_t(layers), "keys and values");
    for (int i = 0; i < layers; ++i) {
        layer.data = memory_.get() + layer.bytes() * i;
        layers_.push_back(layer);
    }
}

void DecoderCache::clear() {
    std::memset(memory_.get(), 0, memory_.size());
}

// Capacities may differ: the layout of a (row, head) is four arrays, each of which begins with its first positions.
void DecoderCache::copy_from(const DecoderCache& other, int positions) {
    if (other.layers_.size() != layers_.size() || other.rows() != rows() ||
        other.layers_[0].format != layers_[0].format || other.layers_[0].dims != layers_[0].dims ||
        other.layers_[0].heads != layers_[0].heads) {
        throw std::invalid_argument("only a cache of the same model, rows and format can be copied");
    }
    if (positions < 0 || positions > std::min(capacity(), other.capacity())) {
        throw std::invalid_argument("copy_from: more positions than the caches have");
    }
    if (&other == this) return;
    const size_t whole = size_t(positions + 15) / 16 * 16;
    for (size_t i = 0; i < layers_.size(); ++i) {
        const KvCache &to = layers_[i], &from = other.layers_[i];
        const size_t numbers = whole * size_t(to.values_at / to.positions);
        const size_t scales = to.format == KvFormat::int8 ? whole * sizeof(float) : 0;
        for (int n = 0; n < to.rows * to.heads; ++n) {
            unsigned char* const out = to.data + n * to.head_bytes;
            const unsigned char* const in = from.data + n * from.head_bytes;
            std::memcpy(out, in, numbers);
            std::memcpy(out + to.values_at, in + from.values_at, numbers);
            std::memcpy(out + to.key_scale_at, in + from.key_scale_at, scales);
            std::memcpy(out + to.value_scale_at, in + from.value_scale_at, scales);
        }
    }
}

}  // namespace mgf
