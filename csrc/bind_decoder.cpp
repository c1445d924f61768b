// Python's view of cpu/decoder.h: a decoder around weights that Python holds, caches, and passes over rows.
//
// Everything is checked here, once: what lies below takes pointers on trust. Outputs are the caller's arrays.
#include "bind_decoder.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "bind_attention.h"
#include "bind_linear.h"
#include "cpu/decoder.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const std::string& message) {
    if (!condition) throw nb::value_error(message.c_str());
}

// The weights of a decoder by name; keeps their arrays alive.
class Named {
  public:
    // A copy: the caller's may lose an array later.
    Named(const nb::dict& weights, const nb::dict& formats)
        : weights_(nb::cast<nb::dict>(weights.attr("copy")())), formats_(formats) {}

    mgf::PackedMatrix matrix(const std::string& name, int n, int k) {
        require(formats_.contains(name.c_str()), name + " has no format");
        const mgf::WeightFormat format = weight_format(nb::cast<std::string>(formats_[name.c_str()]));
        return {format, n, k, bytes(name, mgf::packed_bytes(format, n, k))};
    }

    const float* vector(const std::string& name, int n) {
        return reinterpret_cast<const float*>(bytes(name, 4 * size_t(n)));
    }

    mgf::Norm norm(const std::string& name, int n) { return {vector(name + ".weight", n), vector(name + ".bias", n)}; }

    size_t size(const std::string& name) { return array(name).shape(0); }

    const unsigned char* bytes(const std::string& name, size_t count) {
        const auto found = array(name);
        require(found.shape(0) == count, name + " has another size: " + std::to_string(found.shape(0)) +
                                             " bytes, expected " + std::to_string(count));
        require(reinterpret_cast<uintptr_t>(found.data()) % 64 == 0, name + " does not lie on a 64-byte boundary");
        return found.data();
    }

  private:
    Array<const uint8_t, 1> array(const std::string& name) {
        require(weights_.contains(name.c_str()), "the weights lack " + name);
        return nb::cast<Array<const uint8_t, 1>>(weights_[name.c_str()]);
    }

    nb::dict weights_, formats_;
};

mgf::DecoderWeights weights_of(Named& named, int dim, int heads, int layers, int ffn, int codebooks, int vocab,
                               bool cross) {
    require(dim >= 1 && heads >= 1 && dim % heads == 0 && layers >= 1 && ffn >= 1 && codebooks >= 1 && vocab >= 1,
            "CpuDecoder: sizes are at least 1, and heads divide dim");
    require(std::max({dim, layers, ffn, codebooks}) <= 1 << 16 && vocab <= 1 << 24 && codebooks <= (1 << 24) / vocab,
            "CpuDecoder: sizes are at most 2^16, and the logits 2^24");
    mgf::DecoderWeights w = {};
    w.dim = dim, w.heads = heads, w.ffn = ffn, w.codebooks = codebooks, w.vocab = vocab, w.cross = cross;
    for (int i = 0; i < layers; ++i) {
        const std::string at = "layers." + std::to_string(i) + ".";
        mgf::DecoderLayer layer;
        layer.norm1 = named.norm(at + "norm1", dim);
        layer.norm2 = named.norm(at + "norm2", dim);
        layer.qkv = named.matrix(at + "qkv.weight", 3 * dim, dim);
        layer.attn_out = named.matrix(at + "attn_out.weight", dim, dim);
        layer.ffn_in = named.matrix(at + "ffn_in.weight", ffn, dim);
        layer.ffn_out = named.matrix(at + "ffn_out.weight", dim, ffn);
        if (cross) {
            layer.norm_cross = named.norm(at + "norm_cross", dim);
            layer.cross_q = named.matrix(at + "cross_q.weight", dim, dim);
            layer.cross_kv = named.matrix(at + "cross_kv.weight", 2 * dim, dim);
            layer.cross_out = named.matrix(at + "cross_out.weight", dim, dim);
            require(i == 0 || layer.cross_kv.format == w.layers[0].cross_kv.format,
                    "CpuDecoder: the cross_kv of all layers have one format");  // a text is prepared for all at once
        }
        w.layers.push_back(layer);
    }
    w.norm = named.norm("norm", dim);
    w.logits = named.matrix("heads.weight", codebooks * vocab, dim);
    const size_t numbers = size_t(codebooks) * size_t(vocab + 1) * size_t(dim);
    w.table_is_bfloat16 = named.size("emb.weight") == 2 * numbers;
    w.table = named.bytes("emb.weight", (w.table_is_bfloat16 ? 2 : 4) * numbers);
    return w;
}

// A set of the linear kernels by name ("" is the best), and what the others have of it.
std::pair<mgf::LinearIsa, mgf::Isa> instruction_sets(const std::string& name) {
    const mgf::LinearIsa linear = linear_isa(name);
    const mgf::Isa wanted = linear == mgf::LinearIsa::baseline ? mgf::Isa::baseline
                            : linear < mgf::LinearIsa::avx512  ? mgf::Isa::avx2
                                                               : mgf::Isa::avx512;
    return {linear, std::min(wanted, mgf::best_attention_isa())};
}

class CpuCache {
  public:
    CpuCache(const std::string& format, int layers, int rows, int heads, int head_dim, int capacity)
        : cache(kv_format(format), layers, rows, heads, head_dim, capacity) {}

    mgf::DecoderCache cache;
};

class CpuDecoder {
  public:
    CpuDecoder(const nb::dict& weights, const nb::dict& formats, int dim, int heads, int layers, int ffn, int codebooks,
               int vocab, bool cross, int threads, const std::string& isa)
        : named_(weights, formats),
          decoder_(weights_of(named_, dim, heads, layers, ffn, codebooks, vocab, cross), checked_threads(threads),
                   instruction_sets(isa).first, instruction_sets(isa).second) {}

    mgf::Pool& pool() { return decoder_.pool(); }

    int positions() const { return decoder_.weights().num_positions; }

    // A table that is no longer than what is there changes nothing: two Python threads may come with one each.
    void set_positions(Array<const float, 2> table) {
        require(int(table.shape(1)) == decoder_.weights().dim, "set_positions: table [P, dim]");
        require(table.shape(0) <= 1 << 24, "set_positions: more than 2^24 positions");
        if (int(table.shape(0)) <= positions()) return;
        decoder_.set_positions(table.data(), int(table.shape(0)));
        positions_ = table;
    }

    void project(Array<const float, 2> states, CpuCache& text, int row) {
        const auto& w = decoder_.weights();
        require(w.cross, "project: the layers have no cross-attention");
        require(int(states.shape(1)) == w.dim && states.shape(0) >= 1, "project: states [N, dim]");
        check_cache(text.cache, row, int(states.shape(0)));
        nb::gil_scoped_release released;
        decoder_.project(states.data(), int(states.shape(0)), text.cache, row);
    }

    // segments [S, 8]: cache, row, first position, positions, text or -1, row of the text, its length, how many of the
    // positions take `states` (the first ones; the others take `tokens`).
    void run(const std::vector<CpuCache*>& caches, Array<const int32_t, 2> segments, Array<const int64_t, 2> tokens,
             Array<const float, 2> states, Array<const int32_t, 1> wanted, Array<float, 2> logits, bool alike) {
        const auto& w = decoder_.weights();
        require(segments.shape(1) == 8, "run: segments [S, 8]");
        require(int(tokens.shape(1)) == w.codebooks && int(states.shape(1)) == w.dim,
                "run: tokens [T, codebooks], states [E, dim]");
        mgf::Pass pass;
        size_t token = 0, state = 0;
        for (size_t i = 0; i < segments.shape(0); ++i) {
            const int32_t* const s = segments.data() + 8 * i;
            pass.segments.push_back(segment(caches, s));
            for (int j = 0; j < s[3]; ++j) {
                const bool embedded = j < s[7];
                require(embedded ? state < states.shape(0) : token < tokens.shape(0), "run: too few tokens or states");
                pass.states.push_back(embedded ? states.data() + state++ * size_t(w.dim) : nullptr);
                pass.tokens.push_back(embedded ? nullptr : checked(tokens.data() + token++ * size_t(w.codebooks)));
            }
        }
        require(token == tokens.shape(0) && state == states.shape(0), "run: tokens or states are left over");
        require_apart(pass.segments);
        require(!pass.tokens.empty(), "run: nothing to do");
        for (size_t i = 0; i < wanted.shape(0); ++i) {
            require(wanted(i) >= 0 && wanted(i) < int(pass.tokens.size()), "run: logits of a row that is not there");
            pass.wanted.push_back(wanted(i));
        }
        require(logits.shape(0) == wanted.shape(0) && int(logits.shape(1)) == w.logits.n,
                "run: logits [wanted, codebooks * vocab]");
        pass.logits = logits.data();
        nb::gil_scoped_release released;
        decoder_.run(pass, alike);
    }

  private:
    static int checked_threads(int threads) {
        require(threads >= 0 && threads <= 4096, "CpuDecoder: threads are 0 (all that there are) to 4096");
        return threads;
    }

    // Threads append to the rows of a pass side by side.
    static void require_apart(const std::vector<mgf::Segment>& segments) {
        std::vector<std::pair<const mgf::DecoderCache*, int>> rows;
        for (const mgf::Segment& s : segments) rows.emplace_back(s.cache, s.row);
        std::sort(rows.begin(), rows.end());
        require(std::adjacent_find(rows.begin(), rows.end()) == rows.end(), "run: two segments in one row of a cache");
    }

    mgf::Segment segment(const std::vector<CpuCache*>& caches, const int32_t* s) const {
        const auto cache = [&](int i) {
            require(i >= 0 && size_t(i) < caches.size() && caches[size_t(i)] != nullptr, "run: no such cache");
            return &caches[size_t(i)]->cache;
        };
        mgf::Segment segment = {cache(s[0]), s[1], s[2], s[3], nullptr, 0, 0};
        require(s[2] >= 0 && s[3] >= 1 && s[7] >= 0 && s[7] <= s[3], "run: positions of a segment");
        require(s[2] <= positions() - s[3], "run: beyond the table of positions");
        check_cache(*segment.cache, s[1], s[2] + s[3]);
        if (s[4] >= 0) {
            require(decoder_.weights().cross, "run: the layers have no cross-attention");
            segment.text = cache(s[4]), segment.text_row = s[5], segment.text_length = s[6];
            check_cache(*segment.text, s[5], s[6]);
        }
        return segment;
    }

    void check_cache(const mgf::DecoderCache& cache, int row, int positions) const {
        const auto& w = decoder_.weights();
        require(cache.layers() == int(w.layers.size()) && cache.layer(0).heads == w.heads &&
                    cache.layer(0).head_dim == w.head_dim(),
                "a cache of another model");
        require(row >= 0 && row < cache.rows(), "no such row in the cache");
        require(positions >= 1 && positions <= cache.capacity(), "the cache has no room for that position");
    }

    const int64_t* checked(const int64_t* tokens) const {
        const auto& w = decoder_.weights();
        for (int k = 0; k < w.codebooks; ++k) require(tokens[k] >= 0 && tokens[k] <= w.vocab, "run: an unknown token");
        return tokens;
    }

    Named named_;
    Array<const float, 2> positions_;
    mgf::Decoder decoder_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<CpuCache>(m, "CpuCache", "Keys and values of all layers (csrc/cpu/decoder.h).",
                         nb::is_weak_referenceable())
        .def(nb::init<const std::string&, int, int, int, int, int>(), "format"_a, "layers"_a, "rows"_a, "heads"_a,
             "head_dim"_a, "capacity"_a)
        .def_prop_ro("rows", [](const CpuCache& c) { return c.cache.rows(); })
        .def_prop_ro("capacity", [](const CpuCache& c) { return c.cache.capacity(); })
        .def_prop_ro("bytes", [](const CpuCache& c) { return c.cache.bytes(); })
        .def(
            "clear", [](CpuCache& c) { c.cache.clear(); }, nb::call_guard<nb::gil_scoped_release>())
        .def(
            "copy_from", [](CpuCache& c, const CpuCache& other, int n) { c.cache.copy_from(other.cache, n); },
            "other"_a, "positions"_a, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<CpuDecoder>(m, "CpuDecoder", "The transformer on the CPU (csrc/cpu/decoder.h).")
        .def(nb::init<const nb::dict&, const nb::dict&, int, int, int, int, int, int, bool, int, const std::string&>(),
             "weights"_a, "formats"_a, "dim"_a, "heads"_a, "layers"_a, "ffn"_a, "codebooks"_a, "vocab"_a, "cross"_a,
             "threads"_a = 0, "isa"_a = "")
        .def_prop_ro("pool", &CpuDecoder::pool, nb::rv_policy::reference_internal)
        .def_prop_ro("positions", &CpuDecoder::positions)
        .def("set_positions", &CpuDecoder::set_positions, "table"_a.noconvert(), nb::lock_self())
        .def("project", &CpuDecoder::project, "states"_a, "text"_a, "row"_a)
        .def("run", &CpuDecoder::run, "caches"_a, "segments"_a.noconvert(), "tokens"_a.noconvert(),
             "states"_a.noconvert(), "wanted"_a.noconvert(), "logits"_a.noconvert(), "alike"_a = true);
}
