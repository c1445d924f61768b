// The layout of a KV cache, and which build of the kernels this processor runs.
#include "cpu/attention.h"

#include <stdexcept>

#include "cpu/norm.h"

namespace mgf {
namespace {

constexpr int kMostQueries = 4;  // that any instruction set takes at once in a prefill

int64_t rounded_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

}  // namespace

KvCache kv_layout(KvFormat format, int rows, int heads, int head_dim, int capacity) {
    if (rows < 1 || heads < 1 || head_dim < 1 || capacity < 1) {
        throw std::invalid_argument("a KV cache needs at least one row, head, dim and position");
    }
    if (format == KvFormat::int8 && head_dim > 256) {
        throw std::invalid_argument("int8 keys have at most 256 dims: the sums of more could overflow");
    }
    KvCache cache = {};
    cache.format = format;
    cache.rows = rows, cache.heads = heads, cache.head_dim = head_dim, cache.capacity = capacity;
    cache.dims = int(rounded_up(head_dim, 16)), cache.positions = int(rounded_up(capacity, 16));
    const int64_t size = format == KvFormat::float32 ? 4 : format == KvFormat::bfloat16 ? 2 : 1;
    const int64_t numbers = int64_t(cache.dims) * cache.positions * size;
    const int64_t scales = format == KvFormat::int8 ? int64_t(cache.positions) * 4 : 0;
    cache.values_at = numbers;
    cache.key_scale_at = 2 * numbers;
    cache.value_scale_at = 2 * numbers + scales;
    cache.head_bytes = rounded_up(2 * numbers + 2 * scales, 64);
    return cache;
}

size_t attention_scratch(const KvCache& cache) {
    return size_t(kMostQueries) * (3 * size_t(cache.dims) + size_t(cache.positions));
}

Isa best_attention_isa() {
#if MGF_X86
    static const Isa best =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni")
            ? Isa::avx512
        : __builtin_cpu_supports("avx2") ? Isa::avx2
                                         : Isa::baseline;
    return best;
#else
    return Isa::baseline;
#endif
}

const AttentionKernels& attention_kernels(Isa isa) {
#if MGF_X86
    if (isa == Isa::avx512) return avx512_attention;
    if (isa == Isa::avx2) return avx2_attention;
#endif
    (void)isa;
    return baseline_attention;
}

const NormKernels& norm_kernels(Isa isa) {
#if MGF_X86
    if (isa == Isa::avx512) return avx512_norm;
    if (isa == Isa::avx2) return avx2_norm;
#endif
    (void)isa;
    return baseline_norm;
}

}  // namespace mgf
