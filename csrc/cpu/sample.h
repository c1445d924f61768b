// The sampler on a CPU: one column of logits -> one token per request and codebook, written into the sequence.
#pragma once

#include "cpu/isa.h"
#include "cpu/philox.h"
#include "sample_args.h"

namespace mgf {

// Rows (request, codebook) are independent; they are spread over at most `threads` threads where that pays.
void sample(const SampleArgs& args, Isa isa, int threads);

// One build of the rows for one instruction set; all of them choose the same tokens. The last three are what a row is
// made of, for tests that compare every bit.
struct Instance {
    void (*sample_rows)(const SampleArgs& args, int first, int last);  // of the B * K rows, in order
    void (*noise)(Key seed, Counter counter, int V, float* E);         // E of a row; counter.c0 does not matter
    void (*exponential)(const uint32_t* x, int64_t n, float* E);
    void (*exp2_pair)(const float* t, int64_t n, float* w, float* inverse);
};

extern const Instance baseline_instance;
#if MGF_X86
extern const Instance avx2_instance;
extern const Instance avx512_instance;
#endif

const Instance& instance_for(Isa isa);

}  // namespace mgf
