// The phases of a pass: each thread's part of them, and where they meet. Included by decoder.cpp alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/decoder.h"

namespace mgf {
namespace {

inline size_t rounded_up(size_t bytes) {
    return (bytes + 63) / 64 * 64;
}

struct Range {
    int first, last;
};

inline Range outputs(Range tiles, int n) {
    return {tiles.first * kTileOutputs, std::min(tiles.last * kTileOutputs, n)};
}

// A row that attends to a text.
struct TextRow {
    const Segment* segment;
    int row;
};

}  // namespace

// What the threads of a pass share, cut from one mapping.
struct Decoder::Scratch {
    float *x, *attended, *y;  // [R, d]
    float* wide;              // [R, wide_stride]: q, k and v, or the feed-forward layer
    unsigned char* prepared;  // the inputs of a product; for every thread its own, or one for all
    float* own;               // [threads, own_floats]: one row of d, and what attention needs
    int wide_stride;
    size_t prepared_each, own_floats;  // 0 prepared_each: one for all
};

// One thread's part of a pass.
class Decoder::Worker {
  public:
    Worker(Decoder& decoder, const Scratch& scratch, Region& region)
        : o_(decoder),
          w_(decoder.weights_),
          s_(scratch),
          region_(region),
          head_dim_(w_.head_dim()),
          own_heads_(w_.heads % region.threads == 0 && head_dim_ % kTileOutputs == 0),
          row_(s_.own + s_.own_floats * size_t(region.thread)),
          attention_(row_ + rounded_up(4 * size_t(w_.dim)) / 4),
          prepared_(s_.prepared + s_.prepared_each * size_t(region.thread)) {}

    void run(const Pass& pass, const std::vector<TextRow>& texts) {
        const int rows = int(pass.tokens.size());
        embed(pass);
        for (size_t i = 0; i < w_.layers.size(); ++i) {
            const DecoderLayer& layer = w_.layers[i];
            attend(pass, int(i), layer, rows);
            add_product(layer.attn_out, s_.attended, w_.dim, rows);
            meet(texts.empty() ? layer.ffn_in : layer.cross_q);
            if (!texts.empty()) attend_text(texts, int(i), layer);
            feed_forward(layer, rows);
            meet(i + 1 < w_.layers.size() ? w_.layers[i + 1].qkv : w_.logits);
        }
        write_logits(pass);
    }

    void project(const float* states, int n, const DecoderCache& text, int row) {
        prepare(w_.layers[0].cross_kv, n, [&](int r) { return states + ptrdiff_t(r) * w_.dim; });
        for (size_t i = 0; i < w_.layers.size(); ++i) {
            const PackedMatrix& matrix = w_.layers[i].cross_kv;
            multiply(matrix, n, head_tiles(matrix), s_.wide, s_.wide_stride);
            if (!own_heads_) region_.wait();
            each_head(1, [&](int, int h) {
                for (int r = 0; r < n; ++r) {
                    const float* const k = wide(r) + h * 2 * head_dim_;
                    o_.attention_.append(text.layer(int(i)), row, h, r, k, k + head_dim_);
                }
            });
            if (!own_heads_) region_.wait();  // the next layer overwrites what others may still read
        }
    }

  private:
    void embed(const Pass& pass) {
        const Range mine = part(int(pass.tokens.size()));
        int r = 0;
        for (const Segment& s : pass.segments) {
            for (int i = 0; i < s.count; ++i, ++r) {
                if (r < mine.first || r >= mine.last) continue;
                const float* const position = w_.positions + ptrdiff_t(s.first + i) * w_.dim;
                if (const int64_t* const tokens = pass.tokens[size_t(r)]) {
                    o_.norm_.embed(tokens, 1, w_.codebooks, w_.table, w_.table_is_bfloat16, w_.vocab + 1, position,
                                   w_.dim, x(r));
                } else {
                    std::copy_n(pass.states[size_t(r)], w_.dim, x(r));
                    o_.norm_.add(x(r), position, w_.dim);
                }
            }
        }
        meet(w_.layers[0].qkv);
    }

    // Into `attended`.
    void attend(const Pass& pass, int index, const DecoderLayer& layer, int rows) {
        for (const Segment& s : pass.segments) {
            if (s.count > 1 || !own_heads_) continue;
            const Range heads = part(w_.heads);
            for (int h = heads.first; h < heads.last; ++h) s.cache->layer(index).prefetch(s.row, h, s.first);
        }
        prepare(layer.qkv, rows, [&](int r) { return normed(x(r), layer.norm1); });
        multiply(layer.qkv, rows, head_tiles(layer.qkv), s_.wide, s_.wide_stride);
        if (!own_heads_) region_.wait();
        firsts_.clear();
        int r = 0;
        for (const Segment& s : pass.segments) firsts_.push_back(r), r += s.count;
        each_head(int(pass.segments.size()), [&](int segment, int h) {
            const Segment& s = pass.segments[size_t(segment)];
            attend_head(s, s.cache->layer(index), h, firsts_[size_t(segment)]);
        });
        meet(layer.attn_out);
    }

    void attend_head(const Segment& s, const KvCache& cache, int head, int r) {
        const float scale = 1.0f / std::sqrt(float(head_dim_));
        const float* const q = wide(r) + head * 3 * head_dim_;
        float* const out = attended(r) + head * head_dim_;
        for (int i = 0; i < s.count; ++i) {
            const float* const k = wide(r + i) + (head * 3 + 1) * head_dim_;
            o_.attention_.append(cache, s.row, head, s.first + i, k, k + head_dim_);
        }
        o_.attention_.prefill(cache, s.row, head, q, s_.wide_stride, s.first, s.count, scale, out, w_.dim, attention_);
    }

    // Rows with a text go side by side through `wide`, `attended` and `y`.
    void attend_text(const std::vector<TextRow>& texts, int index, const DecoderLayer& layer) {
        const int rows = int(texts.size());
        const float scale = 1.0f / std::sqrt(float(head_dim_));
        prepare(layer.cross_q, rows, [&](int t) { return normed(x(texts[size_t(t)].row), layer.norm_cross); });
        multiply(layer.cross_q, rows, head_tiles(layer.cross_q), s_.wide, s_.wide_stride);
        if (!own_heads_) region_.wait();
        each_head(rows, [&](int t, int h) {
            const Segment& s = *texts[size_t(t)].segment;
            o_.attention_.attend(s.text->layer(index), s.text_row, h, wide(t) + h * head_dim_, s.text_length, scale,
                                 attended(t) + h * head_dim_, attention_);
        });
        meet(layer.cross_out);
        const Range own = product(layer.cross_out, s_.attended, w_.dim, rows);
        for (int t = 0; t < rows; ++t) add(texts[size_t(t)].row, t, own);
        meet(layer.ffn_in);
    }

    void feed_forward(const DecoderLayer& layer, int rows) {
        prepare(layer.ffn_in, rows, [&](int r) { return normed(x(r), layer.norm2); });
        const Range tiles = part(tile_count(w_.ffn)), own = outputs(tiles, w_.ffn);
        multiply(layer.ffn_in, rows, tiles, s_.wide, s_.wide_stride);
        for (int r = 0; r < rows; ++r) o_.norm_.gelu(wide(r) + own.first, own.last - own.first);
        meet(layer.ffn_out);
        add_product(layer.ffn_out, s_.wide, s_.wide_stride, rows);
    }

    void write_logits(const Pass& pass) {
        const int rows = int(pass.wanted.size());
        prepare(w_.logits, rows, [&](int i) { return normed(x(pass.wanted[size_t(i)]), w_.norm); });
        multiply(w_.logits, rows, part(tile_count(w_.logits.n)), pass.logits, w_.logits.n);
    }

    // ---- the parts of a phase ----

    // The inputs of the next product, for this thread or for all: row(r) says where their numbers are.
    template <class Row>
    void prepare(const PackedMatrix& matrix, int rows, const Row& row) {
        const size_t each = prepared_bytes(matrix.format, 1, matrix.k);
        const Range mine = s_.prepared_each > 0 ? Range{0, rows} : part(rows);
        for (int r = mine.first; r < mine.last; ++r) {
            o_.linear_.prepare(matrix.format, row(r), 0, 1, matrix.k, prepared_ + each * size_t(r));
        }
        if (s_.prepared_each == 0) region_.wait();
    }

    void multiply(const PackedMatrix& matrix, int rows, Range tiles, float* y, ptrdiff_t stride) {
        linear(o_.linear_, matrix, prepared_, rows, tiles.first, tiles.last, y, stride);
    }

    // y = x W^T for this thread's outputs, which are returned.
    Range product(const PackedMatrix& matrix, const float* x, ptrdiff_t stride, int rows) {
        prepare(matrix, rows, [&](int r) { return x + r * stride; });
        const Range tiles = part(tile_count(w_.dim));
        multiply(matrix, rows, tiles, s_.y, w_.dim);
        return outputs(tiles, w_.dim);
    }

    // residual += x W^T.
    void add_product(const PackedMatrix& matrix, const float* x, ptrdiff_t stride, int rows) {
        const Range own = product(matrix, x, stride, rows);
        for (int r = 0; r < rows; ++r) add(r, r, own);
    }

    void add(int row, int y_row, Range own) {
        o_.norm_.add(x(row) + own.first, s_.y + ptrdiff_t(y_row) * w_.dim + own.first, own.last - own.first);
    }

    const float* normed(const float* x, const Norm& norm) {
        o_.norm_.layer_norm(x, norm.weight, norm.bias, w_.dim, row_);
        return row_;
    }

    Range part(int count) const { return {int(region_.first(count)), int(region_.last(count))}; }

    // Tiles of a matrix whose outputs are ordered by heads: those of this thread's heads where these are whole tiles.
    Range head_tiles(const PackedMatrix& matrix) const {
        if (!own_heads_) return part(tile_count(matrix.n));
        const int each = matrix.n / w_.heads / kTileOutputs;
        const Range heads = part(w_.heads);
        return {heads.first * each, heads.last * each};
    }

    // use(item, head) for this thread's part of `items` x heads: whole heads where it computed what they need.
    template <class Use>
    void each_head(int items, const Use& use) const {
        const Range heads = own_heads_ ? part(w_.heads) : Range{0, w_.heads};
        const Range mine = own_heads_ ? Range{0, items * (heads.last - heads.first)} : part(items * w_.heads);
        for (int i = mine.first; i < mine.last; ++i) use(i % items, heads.first + i / items);
    }

    // Meets the others, with the first lines of this thread's next weights on their way: a stream takes a while to
    // start, and there are 144 of them in a step.
    void meet(const PackedMatrix& next) {
#if defined(__GNUC__)
        const size_t each = tile_bytes(next.format, next.k);
        const unsigned char* const from = next.data + each * size_t(region_.first(tile_count(next.n)));
        for (size_t i = 0; i < std::min<size_t>(4096, each); i += 64) __builtin_prefetch(from + i);
#endif
        region_.wait();
    }

    float* x(int r) const { return s_.x + ptrdiff_t(r) * w_.dim; }
    float* attended(int r) const { return s_.attended + ptrdiff_t(r) * w_.dim; }
    float* wide(int r) const { return s_.wide + ptrdiff_t(r) * s_.wide_stride; }

    Decoder& o_;
    const DecoderWeights& w_;
    const Scratch& s_;
    Region& region_;
    const int head_dim_;
    const bool own_heads_;  // a thread computes q, k and v of the heads that it attends with, and waits for nobody
    float *const row_, *const attention_;
    unsigned char* const prepared_;
    std::vector<int> firsts_;  // per segment its first row
};

}  // namespace mgf
