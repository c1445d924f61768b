// musicgen_fast._C: checks arguments, releases the GIL, calls csrc/cpu. The only file that knows Python.
//
// No torch header is included: arrays arrive through the buffer protocol or DLPack, so one build serves every torch.
// Outputs are the caller's arrays. Shapes and dtypes are part of the signatures; a mismatch is a TypeError there.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

#include "bind_attention.h"
#include "bind_decoder.h"
#include "bind_linear.h"
#include "cpu/isa.h"
#include "cpu/philox.h"
#include "cpu/sample.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

mgf::Isa checked_isa(int isa) {
    require(isa <= int(mgf::best_isa()), "this processor lacks that instruction set");
    return isa < 0 ? mgf::best_isa() : mgf::Isa(isa);
}

void race_noise(Array<const int64_t, 1> seed,    // [B]
                Array<const int64_t, 1> step,    // [B]
                Array<const int64_t, 1> stream,  // [B]
                Array<float, 3> out,             // [B, K, V]
                int isa) {
    const int64_t B = int64_t(out.shape(0)), K = int64_t(out.shape(1)), V = int64_t(out.shape(2));
    require(int64_t(seed.shape(0)) == B && int64_t(step.shape(0)) == B && int64_t(stream.shape(0)) == B,
            "race_noise: seed, step and stream need one entry per row of out");
    const mgf::Instance& instance = mgf::instance_for(checked_isa(isa));
    for (int64_t b = 0; b < B; ++b) {
        const uint64_t key = uint64_t(seed(b));
        for (int64_t k = 0; k < K; ++k) {
            instance.noise({uint32_t(key), uint32_t(key >> 32)},
                           {0, uint32_t(step(b)), uint32_t(k), uint32_t(stream(b))}, int(V),
                           out.data() + (b * K + k) * V);
        }
    }
}

void philox(Array<const uint32_t, 2> counter,  // [N, 4]
            Array<const uint32_t, 2> key,      // [N, 2]
            Array<uint32_t, 2> out) {          // [N, 4]
    const size_t N = counter.shape(0);
    require(counter.shape(1) == 4 && key.shape(0) == N && key.shape(1) == 2 && out.shape(0) == N && out.shape(1) == 4,
            "philox: counter [N, 4], key [N, 2], out [N, 4]");
    for (size_t i = 0; i < N; ++i) {
        const uint32_t* const c = counter.data() + 4 * i;
        const mgf::Counter words = mgf::philox4x32_10({c[0], c[1], c[2], c[3]}, {key(i, 0), key(i, 1)});
        uint32_t* const o = out.data() + 4 * i;
        o[0] = words.c0, o[1] = words.c1, o[2] = words.c2, o[3] = words.c3;
    }
}

void exponential(Array<const uint32_t, 1> x, Array<float, 1> out, int isa) {
    require(x.shape(0) == out.shape(0), "exponential: x and out differ in length");
    mgf::instance_for(checked_isa(isa)).exponential(x.data(), int64_t(x.shape(0)), out.data());
}

void exp2_pair(Array<const float, 1> t, Array<float, 1> w, Array<float, 1> iw, int isa) {
    require(w.shape(0) == t.shape(0) && iw.shape(0) == t.shape(0), "exp2_pair: t, w and iw differ in length");
    mgf::instance_for(checked_isa(isa)).exp2_pair(t.data(), int64_t(t.shape(0)), w.data(), iw.data());
}

// The one function that takes addresses on trust: a dozen array views would cost more than the draw itself. Python
// fills the struct from tensors that it has checked (musicgen_fast/sampling/).
void sample(uintptr_t address, int threads, int isa) {
    const mgf::SampleArgs& args = *reinterpret_cast<const mgf::SampleArgs*>(address);
    require(args.size == int64_t(sizeof(mgf::SampleArgs)), "sample: built for another version of musicgen_fast");
    require(args.NB >= 1 && args.NB <= 3 && args.V >= 1 && args.V <= 4096, "sample: 1 to 3 branches, V up to 4096");
    const mgf::Isa chosen = checked_isa(isa);
    nb::gil_scoped_release released;
    mgf::sample(args, chosen, threads);
}

}  // namespace

NB_MODULE(_C, m) {
    nb::set_leak_warnings(false);  // a model that lives in a module is still there when the interpreter ends
    m.doc() = "The C++ parts of musicgen_fast; use musicgen_fast.native, which also works without this module.";
    m.attr("ISA_BASELINE") = int(mgf::Isa::baseline);
    m.attr("ISA_AVX2") = int(mgf::Isa::avx2);
    m.attr("ISA_AVX512") = int(mgf::Isa::avx512);
    m.attr("BEST_ISA") = int(mgf::best_isa());
    // noconvert on outputs: a conversion would fill a copy and leave the caller's array as it was.
    m.def("race_noise", &race_noise, "seed"_a, "step"_a, "stream"_a, "out"_a.noconvert(), "isa"_a = -1,
          "Fills out [B, K, V] float32 with exponential noise; isa < 0 takes the best the processor has.");
    m.def("sample", &sample, "args"_a, "threads"_a = 1, "isa"_a = -1,
          "Draws the column of a SampleArgs at that address.");
    m.def("philox", &philox, "counter"_a, "key"_a, "out"_a.noconvert(), "Philox4x32-10, one block per row.");
    m.def("exponential", &exponential, "x"_a, "out"_a.noconvert(), "isa"_a = -1,
          "-ln((x + 0.5) / 2^32) of uint32 words.");
    m.def("exp2_pair", &exp2_pair, "t"_a, "w"_a.noconvert(), "iw"_a.noconvert(), "isa"_a = -1,
          "2^t and 2^-t for t in [-126, 0].");
    bind_attention(m);
    bind_linear(m);
    bind_decoder(m);
}
