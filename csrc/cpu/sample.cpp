// Rows over threads. A row takes 2 to 6 us, starting and joining a thread about 100 (two shared cores): 64 rows at
// top-k 250 take 144 us with one thread and 189 with two, 128 rows 298 and 265, 512 rows 1356 and 844.
#include "cpu/sample.h"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace mgf {
namespace {

constexpr int kRowsPerThread = 64;

}  // namespace

const Instance& instance_for(Isa isa) {
#if MGF_X86
    if (isa == Isa::avx512) return avx512_instance;
    if (isa == Isa::avx2) return avx2_instance;
#endif
    (void)isa;
    return baseline_instance;
}

// Threads live for one call: nothing to shut down, and nothing that a fork could leave half alive.
void sample(const SampleArgs& args, Isa isa, int threads) {
    const auto sample_rows = instance_for(isa).sample_rows;
    const int rows = args.B * args.K;
    const int parts = std::max(1, std::min(threads, rows / kRowsPerThread));
    std::vector<std::thread> others;
    others.reserve(size_t(parts));
    int first = 0;
    for (int part = 1; part < parts; ++part) {
        const int last = int(int64_t(rows) * part / parts);
        try {
            others.emplace_back(sample_rows, std::cref(args), first, last);
        } catch (const std::system_error&) {
            break;  // no more threads to be had: this one does the rest
        }
        first = last;
    }
    sample_rows(args, first, rows);
    for (std::thread& other : others) other.join();
}

}  // namespace mgf
