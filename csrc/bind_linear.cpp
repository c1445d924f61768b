// Python's view of cpu/linear.h, for the converter and for tests: pack a matrix, read it back, apply it to rows.
//
// Formats and instruction sets go by name. Outputs are the caller's arrays.
#include "bind_linear.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstring>
#include <string>
#include <vector>

#include "cpu/linear.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

nb::list isas() {
    nb::list names;
    for (int i = 0; i < mgf::kLinearIsas; ++i) {
        if (mgf::linear_isa_supported(mgf::LinearIsa(i))) names.append(mgf::linear_isa_name(mgf::LinearIsa(i)));
    }
    return names;
}

size_t packed_bytes(const std::string& format, int n, int k) {
    require(n > 0 && k > 0, "linear_packed_bytes: n and k are at least 1");
    return mgf::packed_bytes(weight_format(format), n, k);
}

void require_packed(mgf::WeightFormat format, int n, int k, size_t bytes) {
    require(n > 0 && k > 0, "packed weights have at least one output and one input");
    require(bytes == mgf::packed_bytes(format, n, k), "the packed weights have another size: linear_packed_bytes");
}

bool pack(const std::string& format, Array<const float, 2> w, Array<uint8_t, 1> out) {
    const mgf::WeightFormat f = weight_format(format);
    const int n = int(w.shape(0)), k = int(w.shape(1));
    require_packed(f, n, k, out.shape(0));
    nb::gil_scoped_release released;
    return mgf::pack(f, w.data(), n, k, out.data());
}

void unpack(const std::string& format, Array<const uint8_t, 1> packed, Array<float, 2> out) {
    const mgf::WeightFormat f = weight_format(format);
    const int n = int(out.shape(0)), k = int(out.shape(1));
    require_packed(f, n, k, packed.shape(0));
    nb::gil_scoped_release released;
    mgf::unpack(f, packed.data(), n, k, out.data());
}

void apply(const std::string& format, Array<const uint8_t, 1> packed, Array<const float, 2> x, Array<float, 2> out,
           int first, int last, const std::string& isa) {
    const mgf::WeightFormat f = weight_format(format);
    const int rows = int(x.shape(0)), k = int(x.shape(1)), n = int(out.shape(1)), tiles = mgf::tile_count(n);
    require_packed(f, n, k, packed.shape(0));
    require(int(out.shape(0)) == rows, "linear_apply: x and out differ in rows");
    last = last < 0 ? tiles : last;
    require(0 <= first && first <= last && last <= tiles, "linear_apply: no such tiles");
    const mgf::LinearKernels& kernels = mgf::linear_kernels(linear_isa(isa));
    nb::gil_scoped_release released;
    // 64-byte lines, as in the decoder.
    std::vector<uint8_t> scratch(mgf::prepared_bytes(f, rows, k) + 64);
    uint8_t* const prepared = scratch.data() + (64 - uintptr_t(scratch.data()) % 64) % 64;
    kernels.prepare(f, x.data(), k, rows, k, prepared);
    mgf::linear(kernels, {f, n, k, packed.data()}, prepared, rows, first, last, out.data(), n);
}

// Not one kernel, but what none can beat: every byte is loaded, in order.
uint64_t read_all(Array<const uint8_t, 1> bytes) {
    constexpr size_t kWords = 16;
    uint64_t seen[kWords] = {};
    nb::gil_scoped_release released;
    for (size_t i = 0; i + sizeof seen <= bytes.shape(0); i += sizeof seen) {
#if defined(__GNUC__)
        __builtin_prefetch(bytes.data() + i + 1536);  // as the kernels do
        __builtin_prefetch(bytes.data() + i + 1600);
#endif
        uint64_t words[kWords];
        std::memcpy(words, bytes.data() + i, sizeof words);
        for (size_t j = 0; j < kWords; ++j) seen[j] ^= words[j];
    }
    for (size_t j = 1; j < kWords; ++j) seen[0] ^= seen[j];
    return seen[0];
}

}  // namespace

mgf::WeightFormat weight_format(const std::string& name) {
    if (name == "float32") return mgf::WeightFormat::float32;
    if (name == "bfloat16") return mgf::WeightFormat::bfloat16;
    if (name == "int8") return mgf::WeightFormat::int8;
    if (name == "int4") return mgf::WeightFormat::int4;
    throw nb::value_error("the format of packed weights is float32, bfloat16, int8 or int4");
}

mgf::LinearIsa linear_isa(const std::string& name) {
    if (name.empty()) return mgf::best_linear_isa();
    for (int i = 0; i < mgf::kLinearIsas; ++i) {
        const mgf::LinearIsa isa = mgf::LinearIsa(i);
        if (name != mgf::linear_isa_name(isa)) continue;
        require(mgf::linear_isa_supported(isa), "this processor lacks that instruction set");
        return isa;
    }
    throw nb::value_error("no instruction set of that name; linear_isas() lists them");
}

void bind_linear(nb::module_& m) {
    m.def("linear_isas", &isas, "The instruction sets that this processor has, the best one last.");
    m.def("linear_packed_bytes", &packed_bytes, "format"_a, "n"_a, "k"_a, "Size of a packed [n, k] matrix.");
    m.def("linear_pack", &pack, "format"_a, "w"_a, "out"_a.noconvert(),
          "Packs w [N, K] float32 into bytes; False if a weight is infinite or NaN.");
    m.def("linear_unpack", &unpack, "format"_a, "packed"_a, "out"_a.noconvert(),
          "The weights [N, K] float32 that the kernels see.");
    m.def(
        "linear_apply", &apply, "format"_a, "packed"_a, "x"_a, "out"_a.noconvert(), "first"_a = 0, "last"_a = -1,
        "isa"_a = "",
        "out [R, N] = x [R, K] * W^T for tiles first <= t < last of 16 outputs; other outputs stay. Without `isa` the "
        "best instruction set.");
    m.def("read_all", &read_all, "bytes"_a,
          "Reads the memory once, for benchmarks; returns what keeps that from being "
          "optimised away.");
}
