// A decoding step of the whole transformer: one call, one parallel region, six barriers a layer.
//
// Rows of activations go through all layers together, whatever they belong to: the rows of many requests at one column
// each (a step), or many positions of one row (a prefill). Plain C++ on memory that the caller owns; knows nothing of
// sampling, patterns or Python. fp32 residual stream. A row's result depends on that row's inputs, its cache and the
// weights alone: not on the other rows, the threads, or how its positions were cut into passes.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/attention.h"
#include "cpu/linear.h"
#include "cpu/memory.h"
#include "cpu/norm.h"
#include "cpu/pool.h"

namespace mgf {

struct Norm {
    const float* weight = nullptr;
    const float* bias = nullptr;
};

// `qkv` has the outputs of one head side by side: q, k, v of head 0, then those of head 1; likewise `cross_kv` k, v.
// A thread thus computes what its heads attend with from one stream of weights, and needs to wait for nobody.
struct DecoderLayer {
    Norm norm1, norm_cross, norm2;
    PackedMatrix qkv = {}, attn_out = {}, cross_q = {}, cross_kv = {}, cross_out = {}, ffn_in = {}, ffn_out = {};
};

struct DecoderWeights {
    int dim, heads, ffn, codebooks, vocab;
    bool cross;                   // the layers attend to a text
    const void* table = nullptr;  // [codebooks * (vocab + 1), dim]
    bool table_is_bfloat16 = false;
    const float* positions = nullptr;  // [num_positions, dim]
    int num_positions = 0;
    std::vector<DecoderLayer> layers;
    Norm norm;
    PackedMatrix logits = {};  // [codebooks * vocab, dim]

    int head_dim() const { return dim / heads; }
};

// Keys and values of all layers, for some rows; also what a text was projected to.
class DecoderCache {
  public:
    DecoderCache(KvFormat format, int layers, int rows, int heads, int head_dim, int capacity);

    const KvCache& layer(int index) const { return layers_[size_t(index)]; }
    int layers() const { return int(layers_.size()); }
    int rows() const { return layers_[0].rows; }
    int capacity() const { return layers_[0].capacity; }
    int64_t bytes() const { return int64_t(memory_.size()); }

    // Writes zeros to all of it.
    void clear();

    // The first positions of all rows of a cache with as many layers and rows, of the same format.
    void copy_from(const DecoderCache& other, int positions);

  private:
    Pages memory_;
    std::vector<KvCache> layers_;
};

// Consecutive positions of one row of a cache. With `text` they attend to the first `text_length` positions of its row.
struct Segment {
    const DecoderCache* cache;
    int row, first, count;
    const DecoderCache* text;
    int text_row, text_length;
};

// The rows of a pass are those of its segments, in their order. No two segments share a row of a cache.
struct Pass {
    std::vector<Segment> segments;
    std::vector<const int64_t*> tokens;  // per row: `codebooks` tokens, or null
    std::vector<const float*> states;    // per row: `dim` numbers in the place of embedded tokens, or null
    std::vector<int> wanted;             // rows whose logits are computed
    float* logits = nullptr;             // [wanted, codebooks * vocab]
};

class Decoder {
  public:
    // What the pointers of `weights` name must outlive the decoder. Sizes are the caller's to check.
    Decoder(DecoderWeights weights, int threads, LinearIsa linear, Isa attention);
    ~Decoder();
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    const DecoderWeights& weights() const { return weights_; }
    Pool& pool() { return pool_; }
    void set_positions(const float* table, int count);

    // Runs a pass: appends its positions to the caches, which must have room, and writes the logits. `alike`: one of
    // many such passes, by whose waits the pool decides how many threads are worth having. One pass at a time: another
    // thread of the program waits.
    void run(const Pass& pass, bool alike);

    // Keys and values of a text's states [n, dim] in every layer, into the first n positions of a row of `text`.
    void project(const float* states, int n, DecoderCache& text, int row);

  private:
    class Worker;
    struct Scratch;
    struct Desk;
    Desk& desk();
    Scratch scratch(Desk& desk, int rows) const;

    DecoderWeights weights_;
    const LinearKernels& linear_;
    const AttentionKernels& attention_;
    const NormKernels& norm_;
    Pool pool_;
    std::atomic<Desk*> desk_;
    size_t prepared_each_ = 0;
};

}  // namespace mgf
