// Python's view of cpu/attention.h and cpu/norm.h, for tests: caches and kernels one by one.
//
// Formats and instruction sets go by name ("" is the best that this processor has). Outputs are the caller's arrays.
#include "bind_attention.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/norm.h"
#include "cpu/pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

const char* const kIsaNames[] = {"baseline", "avx2", "avx512"};

mgf::Isa isa_of(const std::string& name) {
    if (name.empty()) return mgf::best_attention_isa();
    for (int i = 0; i < 3; ++i) {
        if (name != kIsaNames[i]) continue;
        require(i <= int(mgf::best_attention_isa()), "this processor lacks that instruction set");
        return mgf::Isa(i);
    }
    throw nb::value_error("the instruction set is baseline, avx2 or avx512");
}

nb::list isas() {
    nb::list names;
    for (int i = 0; i <= int(mgf::best_attention_isa()); ++i) names.append(kIsaNames[i]);
    return names;
}

// Memory on a 64-byte boundary.
template <class T>
class Aligned {
  public:
    explicit Aligned(size_t count) : data_(new (std::align_val_t(64)) T[count]) {}
    ~Aligned() { ::operator delete[](data_, std::align_val_t(64)); }
    Aligned(const Aligned&) = delete;
    T* get() const { return data_; }

  private:
    T* data_;
};

// A cache that owns its memory, every byte of it `fill` at first.
class Cache {
  public:
    Cache(const std::string& format, int rows, int heads, int head_dim, int capacity, int fill)
        : cache_(mgf::kv_layout(kv_format(format), rows, heads, head_dim, capacity)), memory_(size_t(cache_.bytes())) {
        std::memset(memory_.get(), fill, size_t(cache_.bytes()));
        cache_.data = memory_.get();
    }

    int64_t bytes() const { return cache_.bytes(); }
    int64_t head_bytes() const { return cache_.head_bytes; }
    uintptr_t address() const { return reinterpret_cast<uintptr_t>(cache_.data); }

    void append(int row, int head, int position, Array<const float, 2> k, Array<const float, 2> v,
                const std::string& isa) const {
        check(row, head, k.shape(1));
        require(v.shape(0) == k.shape(0) && v.shape(1) == k.shape(1), "append: k and v differ in shape");
        require(position >= 0 && position + int64_t(k.shape(0)) <= cache_.capacity, "append: beyond the capacity");
        const auto& kernels = mgf::attention_kernels(isa_of(isa));
        for (size_t i = 0; i < k.shape(0); ++i) {
            const size_t at = i * k.shape(1);
            kernels.append(cache_, row, head, position + int(i), k.data() + at, v.data() + at);
        }
    }

    // Item i: out[i] = attention of q[i] to the first items[i][2] positions of row items[i][0], head items[i][1].
    void attend(Array<const int32_t, 2> items, Array<const float, 2> q, float scale, Array<float, 2> out,
                const std::string& isa, mgf::Pool* pool) const {
        const int64_t count = int64_t(items.shape(0));
        require(items.shape(1) == 3 && int64_t(q.shape(0)) == count && int64_t(out.shape(0)) == count,
                "attend: items [N, 3], q [N, head_dim], out [N, head_dim]");
        for (int64_t i = 0; i < count; ++i) {
            check(items(i, 0), items(i, 1), q.shape(1));
            require(items(i, 2) >= 0 && items(i, 2) <= cache_.capacity, "attend: a length beyond the capacity");
        }
        require(out.shape(1) == q.shape(1), "attend: q and out differ in width");
        const auto& kernels = mgf::attention_kernels(isa_of(isa));
        const auto part = [&](int64_t first, int64_t last, float* scratch) {
            for (int64_t i = first; i < last; ++i) {
                const int32_t* const item = items.data() + 3 * i;
                const int64_t at = i * cache_.head_dim;
                kernels.attend(cache_, item[0], item[1], q.data() + at, item[2], scale, out.data() + at, scratch);
            }
        };
        const size_t each = mgf::attention_scratch(cache_);
        const Aligned<float> scratch(each * size_t(pool != nullptr ? pool->size() : 1));
        nb::gil_scoped_release released;
        if (pool == nullptr) {
            part(0, count, scratch.get());
        } else {
            pool->run([&](mgf::Region& region) {
                part(region.first(count), region.last(count), scratch.get() + each * size_t(region.thread));
            });
        }
    }

    void prefill(int row, int head, int first, Array<const float, 2> q, float scale, Array<float, 2> out,
                 const std::string& isa) const {
        check(row, head, q.shape(1));
        require(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1), "prefill: q and out differ in shape");
        require(first >= 0 && first + int64_t(q.shape(0)) <= cache_.capacity, "prefill: beyond the capacity");
        const Aligned<float> scratch(mgf::attention_scratch(cache_));
        const auto stride = ptrdiff_t(cache_.head_dim);
        const auto& kernels = mgf::attention_kernels(isa_of(isa));
        nb::gil_scoped_release released;
        kernels.prefill(cache_, row, head, q.data(), stride, first, int(q.shape(0)), scale, out.data(), stride,
                        scratch.get());
    }

    void scores(int row, int head, Array<const float, 1> q, int first, float scale, Array<float, 1> out,
                const std::string& isa) const {
        check(row, head, q.shape(0));
        const int last = first + int(out.shape(0) / 16);
        require(out.shape(0) % 16 == 0 && first >= 0 && last * 16 <= cache_.positions, "scores: whole tiles of 16");
        const Aligned<float> scratch(mgf::attention_scratch(cache_));
        mgf::attention_kernels(isa_of(isa))
            .scores(cache_, row, head, q.data(), first, last, scale, out.data(), scratch.get());
    }

    void combine(int row, int head, Array<const float, 1> p, int first, Array<float, 1> out,
                 const std::string& isa) const {
        const int last = first + int(out.shape(0));
        check(row, head, size_t(cache_.head_dim));
        require(int64_t(p.shape(0)) <= cache_.capacity, "combine: more weights than positions");
        require(first >= 0 && first % 16 == 0 && last <= cache_.head_dim && (last % 16 == 0 || last == cache_.head_dim),
                "combine: dims begin and end at multiples of 16");
        const Aligned<float> scratch(mgf::attention_scratch(cache_));
        mgf::attention_kernels(isa_of(isa))
            .combine(cache_, row, head, p.data(), int(p.shape(0)), first, last, out.data(), scratch.get());
    }

  private:
    void check(int row, int head, size_t width) const {
        require(row >= 0 && row < cache_.rows && head >= 0 && head < cache_.heads, "no such row or head");
        require(int64_t(width) == cache_.head_dim, "vectors must have head_dim numbers");
    }

    mgf::KvCache cache_;
    Aligned<unsigned char> memory_;
};

// ---- norms ----

void layer_norm(Array<const float, 2> x, Array<const float, 1> weight, Array<const float, 1> bias, Array<float, 2> out,
                const std::string& isa) {
    const size_t n = x.shape(1);
    require(weight.shape(0) == n && bias.shape(0) == n && out.shape(0) == x.shape(0) && out.shape(1) == n,
            "layer_norm: x [R, n], weight [n], bias [n], out [R, n]");
    const auto& kernels = mgf::norm_kernels(isa_of(isa));
    for (size_t r = 0; r < x.shape(0); ++r) {
        kernels.layer_norm(x.data() + r * n, weight.data(), bias.data(), int(n), out.data() + r * n);
    }
}

void gelu(Array<float, 1> x, const std::string& isa) {
    mgf::norm_kernels(isa_of(isa)).gelu(x.data(), ptrdiff_t(x.shape(0)));
}

void add(Array<float, 1> x, Array<const float, 1> y, const std::string& isa) {
    require(x.shape(0) == y.shape(0), "add: x and y differ in length");
    mgf::norm_kernels(isa_of(isa)).add(x.data(), y.data(), ptrdiff_t(x.shape(0)));
}

void softmax(Array<float, 1> x, const std::string& isa) {
    mgf::norm_kernels(isa_of(isa)).softmax(x.data(), int(x.shape(0)));
}

template <typename T>
void embed(Array<const int64_t, 2> tokens, Array<const T, 2> table, Array<const float, 2> positions,
           Array<float, 2> out, const std::string& isa) {
    const size_t R = tokens.shape(0), K = tokens.shape(1), n = table.shape(1);
    require(K > 0 && table.shape(0) % K == 0, "embed: the table needs the same number of rows for each codebook");
    const int64_t rows = int64_t(table.shape(0) / K);
    require(positions.shape(0) == R && positions.shape(1) == n && out.shape(0) == R && out.shape(1) == n,
            "embed: tokens [R, K], table [K * rows, n], positions [R, n], out [R, n]");
    for (size_t i = 0; i < R * K; ++i) {
        require(tokens.data()[i] >= 0 && tokens.data()[i] < rows, "embed: a token that the table does not have");
    }
    const auto& kernels = mgf::norm_kernels(isa_of(isa));
    for (size_t r = 0; r < R; ++r) {
        kernels.embed(tokens.data() + r * K, 1, int(K), table.data(), sizeof(T) == 2, rows, positions.data() + r * n,
                      int(n), out.data() + r * n);
    }
}

}  // namespace

mgf::KvFormat kv_format(const std::string& name) {
    if (name == "float32") return mgf::KvFormat::float32;
    if (name == "bfloat16") return mgf::KvFormat::bfloat16;
    if (name == "int8") return mgf::KvFormat::int8;
    throw nb::value_error("the format of a KV cache is float32, bfloat16 or int8");
}

void bind_attention(nb::module_& m) {
    bind_pool(m);  // first: caches take pools
    m.def("attention_isas", &isas, "The instruction sets of attention and norms that this processor has.");
    nb::class_<Cache>(m, "KvCache", "A KV cache with its memory (csrc/cpu/attention.h).")
        .def(nb::init<const std::string&, int, int, int, int, int>(), "format"_a, "rows"_a, "heads"_a, "head_dim"_a,
             "capacity"_a, "fill"_a = 0)
        .def_prop_ro("bytes", &Cache::bytes)
        .def_prop_ro("head_bytes", &Cache::head_bytes)
        .def_prop_ro("address", &Cache::address)
        .def("append", &Cache::append, "row"_a, "head"_a, "position"_a, "k"_a, "v"_a, "isa"_a = "")
        .def("attend", &Cache::attend, "items"_a, "q"_a, "scale"_a, "out"_a.noconvert(), "isa"_a = "",
             "pool"_a.none() = nb::none())
        .def("prefill", &Cache::prefill, "row"_a, "head"_a, "first"_a, "q"_a, "scale"_a, "out"_a.noconvert(),
             "isa"_a = "")
        .def("scores", &Cache::scores, "row"_a, "head"_a, "q"_a, "first"_a, "scale"_a, "out"_a.noconvert(),
             "isa"_a = "")
        .def("combine", &Cache::combine, "row"_a, "head"_a, "p"_a, "first"_a, "out"_a.noconvert(), "isa"_a = "");
    m.def("layer_norm", &layer_norm, "x"_a, "weight"_a, "bias"_a, "out"_a.noconvert(), "isa"_a = "");
    m.def("gelu", &gelu, "x"_a.noconvert(), "isa"_a = "");
    m.def("add", &add, "x"_a.noconvert(), "y"_a, "isa"_a = "");
    m.def("softmax", &softmax, "x"_a.noconvert(), "isa"_a = "");
    m.def("embed", &embed<float>, "tokens"_a, "table"_a, "positions"_a, "out"_a.noconvert(), "isa"_a = "");
    m.def("embed", &embed<uint16_t>, "tokens"_a, "table"_a, "positions"_a, "out"_a.noconvert(), "isa"_a = "",
          "A uint16 table holds bfloat16.");
}
