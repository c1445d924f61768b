// Linear layers of the CPU decoder: y[R, N] = x[R, K] * W[N, K]^T with W packed once and then streamed.
//
// Plain C++ without allocation: a caller packs at load, prepares its rows of activations, and lets every thread compute
// a range of tiles. Knows nothing of threads, biases or activation functions. The result of a row depends on that row
// and on W alone: not on R, on the range of tiles or on the thread. From int8 and int4 every instruction set gives the
// same bits; from float32 and bfloat16 all those with FMA do, and the baseline rounds differently.
//
// Packed layout, the same for every instruction set and little-endian, so that a file can be mapped. Outputs come in
// tiles of 16 (the last one padded with zeros), inputs in groups of 128 (the last one shorter). A tile is its groups
// one after the other, each of whole 64-byte lines: whoever computes a range of tiles reads one contiguous stream. With
// L the length of a group and L2, L8 that length rounded up to a multiple of 2 or 8 (w = 0 in between):
//   float32   float    w[L2][16]              input, output
//   bfloat16  uint16_t w[L2 / 2][16][2]       input / 2, output, input % 2; rounded to nearest even
//   int8      float    scale[16]              w = scale[output] * (u - 128), 1 <= u <= 255
//             uint8_t  u[L8 / 4][16][4]       input / 4, output, input % 4
//   int4      float    scale[16]              w = scale[output] * (u - 8), 0 <= u <= 15; a scale may be negative
//             uint8_t  u[L8 / 8][16][4]       input / 8, output; byte j: inputs j (low half) and j + 4 (high half)
// int4 takes groups of 128 although groups of 32 would lose a third less: unpacking and scaling those takes as long as
// reading int8, which is far more exact.
//
// int8 and int4: a row's inputs are scaled to 16 bits per group of 128, as exact as fp32 in practice, where 8 bits
// would lose 1 to 4 %. The sums of a group are integers: |x| <= 32512, |u| <= 255, so 128 * 32512 * 255 < 2^31 and none
// overflows. Each is converted to fp32, scaled, and added in the order of the groups, rounded at every operation.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mgf {

enum class WeightFormat { float32 = 0, bfloat16 = 1, int8 = 2, int4 = 3 };

// Each one implies those before it, except avxvnni: the one of desktop processors without AVX-512. amx is avx512vnni
// with a matrix unit for five and more rows of int8 or int4.
enum class LinearIsa { baseline = 0, avx2 = 1, avxvnni = 2, avx512 = 3, avx512vnni = 4, amx = 5 };

constexpr int kLinearIsas = 6;
constexpr int kTileOutputs = 16;
constexpr int kGroupInputs = 128;

inline int tile_count(int n) {
    return (n + kTileOutputs - 1) / kTileOutputs;
}

// A multiple of 64. Tile t of a packed matrix begins at byte t * tile_bytes.
size_t tile_bytes(WeightFormat format, int k);
size_t packed_bytes(WeightFormat format, int n, int k);

// w [n, k] -> out of packed_bytes(format, n, k). False if a weight is infinite or NaN (after rounding, for bfloat16):
// what it takes part in is then NaN or infinite.
bool pack(WeightFormat format, const float* w, int n, int k, void* out);

// The weights as the kernels see them, w [n, k].
void unpack(WeightFormat format, const void* packed, int n, int k, float* w);

struct PackedMatrix {
    WeightFormat format;
    int n, k;                   // outputs, inputs
    const unsigned char* data;  // packed_bytes(format, n, k), best on a 64-byte boundary
};

// Scratch for prepared rows, best on a 64-byte boundary. Row r begins at byte r * prepared_bytes(format, 1, k), so
// threads may share the work. Five rows of integers and more take room for a multiple of 16: a matrix unit multiplies
// whatever lies there.
size_t prepared_bytes(WeightFormat format, int rows, int k);

// One build for one instruction set. What its `prepare` wrote only its own `apply` reads.
struct LinearKernels {
    // x [rows, k], rows `stride` floats apart -> prepared. int8 and int4 turn a group with an infinite or NaN input
    // into NaN outputs, and inputs below 1e-30 / 65024 into zeros.
    void (*prepare)(WeightFormat format, const float* x, ptrdiff_t stride, int rows, int k, void* prepared);
    // By format; `linear` calls them.
    void (*apply[4])(const PackedMatrix& matrix, const void* prepared, int rows, int first, int last, float* y,
                     ptrdiff_t stride);
};

// The outputs of tiles first <= t < last, for any number of rows: y[r * stride + output]; no other output is touched.
// Reads the weights from memory once per 64 rows.
inline void linear(const LinearKernels& kernels, const PackedMatrix& matrix, const void* prepared, int rows, int first,
                   int last, float* y, ptrdiff_t stride) {
    kernels.apply[int(matrix.format)](matrix, prepared, rows, first, last, y, stride);
}

// What this processor and its operating system support; the best is the last of them.
bool linear_isa_supported(LinearIsa isa);
LinearIsa best_linear_isa();
const char* linear_isa_name(LinearIsa isa);
const LinearKernels& linear_kernels(LinearIsa isa);  // of a supported one

}  // namespace mgf
