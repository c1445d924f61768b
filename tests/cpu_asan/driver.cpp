// Tiny models of every format through Decoder::run, project and copy_from, for the sanitizers to watch.
//
//   driver SET      of cpu/linear.h by number; exits with 77 where this processor lacks it
// Arrays come from the heap with their exact sizes, so that a byte read too far is seen. Prints the number of passes.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/decoder.h"

namespace {

using namespace mgf;

uint32_t state = 1;

float number() {  // in [-1, 1)
    state = state * 1664525u + 1013904223u;
    return float(int32_t(state >> 8) - (1 << 23)) / float(1 << 23);
}

// On 64-byte boundaries, and not a byte longer than asked for.
struct Bytes {
    explicit Bytes(size_t size) {
        if (posix_memalign(&data, 64, size) != 0) std::abort();
    }
    ~Bytes() { std::free(data); }
    void* data = nullptr;
};

struct Sizes {
    int dim, heads, ffn, codebooks, vocab, layers;
    bool cross;
};

class Model {
  public:
    Model(const Sizes& sizes, WeightFormat format, bool bfloat16_table) {
        weights.dim = sizes.dim, weights.heads = sizes.heads, weights.ffn = sizes.ffn;
        weights.codebooks = sizes.codebooks, weights.vocab = sizes.vocab, weights.cross = sizes.cross;
        const int d = sizes.dim;
        for (int i = 0; i < sizes.layers; ++i) {
            DecoderLayer layer;
            layer.norm1 = norm(d), layer.norm2 = norm(d);
            layer.qkv = matrix(format, 3 * d, d), layer.attn_out = matrix(format, d, d);
            layer.ffn_in = matrix(format, sizes.ffn, d), layer.ffn_out = matrix(format, d, sizes.ffn);
            if (sizes.cross) {
                layer.norm_cross = norm(d);
                layer.cross_q = matrix(format, d, d), layer.cross_out = matrix(format, d, d);
                layer.cross_kv = matrix(format, 2 * d, d);
            }
            weights.layers.push_back(layer);
        }
        weights.norm = norm(d);
        const WeightFormat heads = format == WeightFormat::int4 ? WeightFormat::int8 : format;
        weights.logits = matrix(heads, sizes.codebooks * sizes.vocab, d);
        const size_t count = size_t(sizes.codebooks) * size_t(sizes.vocab + 1) * size_t(d);
        weights.table_is_bfloat16 = bfloat16_table;
        if (bfloat16_table) {
            auto* const table = static_cast<uint16_t*>(memory(2 * count));
            for (size_t i = 0; i < count; ++i) table[i] = uint16_t(0x3f00 + i % 128);
            weights.table = table;
        } else {
            weights.table = floats(count);
        }
    }

    DecoderWeights weights = {};

    float* floats(size_t count) {
        auto* const out = static_cast<float*>(memory(4 * count));
        for (size_t i = 0; i < count; ++i) out[i] = number();
        return out;
    }

  private:
    void* memory(size_t size) {
        kept_.push_back(std::make_unique<Bytes>(size));
        return kept_.back()->data;
    }

    Norm norm(int n) { return {floats(size_t(n)), floats(size_t(n))}; }

    PackedMatrix matrix(WeightFormat format, int n, int k) {
        std::vector<float> w(size_t(n) * size_t(k));
        for (float& x : w) x = number() * 0.3f;
        void* const out = memory(packed_bytes(format, n, k));
        if (!pack(format, w.data(), n, k, out)) std::abort();
        return {format, n, k, static_cast<const unsigned char*>(out)};
    }

    std::vector<std::unique_ptr<Bytes>> kept_;
};

// Positions [first, last) of all rows in one pass; the first `embedded` ones of a row 0 are states. Checks the logits.
void pass(Decoder& decoder, const DecoderCache& cache, const DecoderCache* text, int first, int last, int embedded) {
    const DecoderWeights& w = decoder.weights();
    const int rows = cache.rows(), n = last - first;
    std::vector<int64_t> tokens(size_t(rows * n * w.codebooks));
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = int64_t(i * 7) % (w.vocab + 1);
    std::vector<float> states(size_t(embedded * w.dim), 0.5f);
    Pass p;
    for (int row = 0; row < rows; ++row) {
        const bool attends = text != nullptr && row < text->rows();  // the last row attends to nothing
        p.segments.push_back({&cache, row, first, n, attends ? text : nullptr, row, attends ? row + 1 : 0});
        for (int i = 0; i < n; ++i) {
            const bool state = row == 0 && i < embedded;
            p.states.push_back(state ? states.data() + i * w.dim : nullptr);
            p.tokens.push_back(state ? nullptr : tokens.data() + (row * n + i) * w.codebooks);
        }
        p.wanted.push_back(row * n + n - 1);
        for (int i = 0; i < 20; ++i) p.wanted.push_back(row * n);  // more logits than rows
    }
    std::vector<float> logits(p.wanted.size() * size_t(w.logits.n), NAN);
    p.logits = logits.data();
    decoder.run(p, n == 1);
    for (const float x : logits) {
        if (!std::isfinite(x)) std::abort();
    }
}

int exercise(const Sizes& sizes, WeightFormat format, KvFormat kv, int threads, LinearIsa linear, Isa attention) {
    Model model(sizes, format, format != WeightFormat::float32);
    Decoder decoder(model.weights, threads, linear, attention);
    constexpr int kPositions = 90;
    decoder.set_positions(model.floats(size_t(kPositions) * size_t(sizes.dim)), kPositions);
    const int rows = 3, head_dim = sizes.dim / sizes.heads;
    int passes = 0;
    std::unique_ptr<DecoderCache> text;
    if (sizes.cross) {
        text = std::make_unique<DecoderCache>(KvFormat::bfloat16, sizes.layers, rows - 1, sizes.heads, head_dim, 19);
        for (int row = 0; row < rows - 1; ++row) {
            const int n = row == 0 ? 1 : 19;
            const std::vector<float> states(size_t(n * sizes.dim), 0.25f);
            decoder.project(states.data(), n, *text, row);
        }
    }
    DecoderCache cache(kv, sizes.layers, rows, sizes.heads, head_dim, 41);
    pass(decoder, cache, text.get(), 0, 17, 2), ++passes;
    for (int at = 17; at < 20; ++at) pass(decoder, cache, text.get(), at, at + 1, 0), ++passes;
    DecoderCache longer(kv, sizes.layers, rows, sizes.heads, head_dim, kPositions);
    longer.copy_from(cache, 20);
    pass(decoder, longer, text.get(), 20, kPositions, 0), ++passes;  // 210 rows
    DecoderCache shorter(kv, sizes.layers, rows, sizes.heads, head_dim, 33);
    shorter.copy_from(longer, 32);
    pass(decoder, shorter, text.get(), 32, 33, 1), ++passes;
    return passes;
}

}  // namespace

int main(int count, char** arguments) {
    const int set = count == 2 ? std::atoi(arguments[1]) : -1;
    if (set < 0 || set >= kLinearIsas) return 2;
    const LinearIsa linear = LinearIsa(set);
    if (!linear_isa_supported(linear)) return 77;
    const Isa wanted = set == 0 ? Isa::baseline : linear < LinearIsa::avx512 ? Isa::avx2 : Isa::avx512;
    const Isa attention = wanted < best_attention_isa() ? wanted : best_attention_isa();
    // Heads of 16 for two threads; heads of 12 and nothing a multiple of 16; a group and a quarter.
    const Sizes models[] = {{32, 2, 64, 4, 50, 2, true}, {36, 3, 70, 8, 5, 2, false}, {160, 5, 200, 1, 37, 1, true}};
    int passes = 0;
    for (const Sizes& sizes : models) {
        for (int format = 0; format < 4; ++format) {
            for (int kv = 0; kv < 3; ++kv) {
                const int threads = 1 + (format + kv) % 3;
                passes += exercise(sizes, WeightFormat(format), KvFormat(kv), threads, linear, attention);
            }
        }
    }
    std::printf("%d\n", passes);
    return 0;
}
