// Linear layers with AMX for five and more rows of integers: prompts and batches. Fewer rows, floats and the rest of a
// group go to VNNI and FMA; the sums are the same integers.
//
// Sixteen rows of inputs are 5 bytes for every 2 of the weights they meet in a group, and come from the second-level
// cache: so two tiles of outputs share them, four sums (high and low halves of the inputs) at once, all eight tile
// registers in use. One tile of outputs at a time took 25 ms for 16 rows of the small model's weights on two cores.
#include "cpu/linear_avx512vnni.h"

#if MGF_HAS_AMX
#define MGF_TARGET MGF_TARGET_LINEAR_AMX

namespace mgf {
namespace {

using Simd = SimdVnni;

// 1 KB of the packed weights is a tile register as it lies: 16 times four inputs, each of 16 outputs. Rows that are not
// there are multiplied too (`prepared_bytes` has room for them): a shape of their own would need registers of its own.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, zero[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler's tile instructions do not say that they read memory.
MGF_INLINE void memory_is_read() {
    __asm__ volatile("" ::: "memory");
}

// Two weights of 4 bits in each byte -> one: a whole group.
MGF_TARGET inline void unpack(const unsigned char* from, unsigned char* to) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int i = 0; i < kGroupInputs / 8; ++i, from += 64, to += 128) {
        const __m512i both = _mm512_loadu_si512(from);
        _mm512_store_si512(to, _mm512_and_si512(both, low));
        _mm512_store_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    }
}

// One group of two tiles of outputs: bytes, scales, and the memory to be requested meanwhile.
struct Pair {
    const unsigned char *u[2], *ahead[2];
    const float* scale[2];
};

// Adds up to 16 rows over a group to sums[tile][row]. Requests `lines` of 64 bytes of each tile, spread over the rows:
// all at once they would fill the buffers for lines under way, and the sums would wait.
template <bool FourBits>
MGF_TARGET inline void add_sixteen(const Pair& pair, const unsigned char* x, size_t row_bytes, int rows, int lines,
                                   float (*sums)[kRowsAtOnce][kTileOutputs]) {
    alignas(64) int32_t total[4][16][kTileOutputs];  // of high and low halves, of the two tiles
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < 2; ++i) {
        _tile_loadd(4, x + 64 * i, row_bytes);
        _tile_loadd(5, x + kGroupInputs + 64 * i, row_bytes);
        _tile_loadd(6, pair.u[0] + 1024 * i, 64);
        _tile_loadd(7, pair.u[1] + 1024 * i, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 5, 6);
        _tile_dpbsud(2, 4, 7);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_stored(0, total[0], 64);
    _tile_stored(1, total[1], 64);
    _tile_stored(2, total[2], 64);
    _tile_stored(3, total[3], 64);
    memory_is_read();
    const int each = (lines + rows - 1) / rows;
    for (int r = 0; r < rows; ++r, x += row_bytes) {
        const InputGroup& group = *reinterpret_cast<const InputGroup*>(x);
        for (int tile = 0; tile < 2; ++tile) {
            for (int i = 0; i < each; ++i) MGF_PREFETCH(pair.ahead[tile] + 64 * (r * each + i));
            const __m512i high = _mm512_load_si512(total[2 * tile][r]), low = _mm512_load_si512(total[2 * tile + 1][r]);
            add_scaled_16(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low), offset_of(FourBits) * group.sum,
                          group.scale, pair.scale[tile], sums[tile][r]);
        }
    }
}

// One whole group of two tiles, all rows.
template <bool FourBits>
MGF_TARGET inline void add_pair(const unsigned char* const (&w)[2], const unsigned char* x, size_t row_bytes, int rows,
                                float (*sums)[kRowsAtOnce][kTileOutputs]) {
    alignas(64) unsigned char bytes[2][FourBits ? kGroupInputs * kTileOutputs : 64];
    alignas(64) float scale[2][kTileOutputs];
    Pair pair;
    for (int tile = 0; tile < 2; ++tile) {
        std::memcpy(scale[tile], w[tile], kScaleBytes);
        pair.scale[tile] = scale[tile];
        pair.u[tile] = w[tile] + kScaleBytes;
        pair.ahead[tile] = w[tile] + kPrefetchAhead;
        if (FourBits) {
            unpack(pair.u[tile], bytes[tile]);
            pair.u[tile] = bytes[tile];
        }
    }
    memory_is_read();
    int lines = int(group_bytes(FourBits ? WeightFormat::int4 : WeightFormat::int8, kGroupInputs) / 64);
    for (int r = 0; r < rows; r += 16, lines = 0) {
        float (*const from)[kRowsAtOnce][kTileOutputs] =
            reinterpret_cast<float (*)[kRowsAtOnce][kTileOutputs]>(sums[0][r]);
        add_sixteen<FourBits>(pair, x + size_t(r) * row_bytes, row_bytes, std::min(16, rows - r), lines, from);
    }
}

// Two tiles of outputs, up to kRowsAtOnce rows. A last tile alone takes both places.
template <WeightFormat F>
MGF_TARGET inline void apply_pair(const PackedMatrix& matrix, const unsigned char* x, size_t row_bytes, int rows,
                                  int tile, bool alone, float* y, ptrdiff_t stride) {
    alignas(64) float sums[2][kRowsAtOnce][kTileOutputs];
    for (auto& of_tile : sums) std::memset(of_tile, 0, size_t(rows) * sizeof of_tile[0]);
    const unsigned char* const first = matrix.data + size_t(tile) * tile_bytes(F, matrix.k);
    const unsigned char* w[2] = {first, alone ? first : first + tile_bytes(F, matrix.k)};
    for (int i = 0; i < matrix.k; i += kGroupInputs, x += sizeof(InputGroup)) {
        const int count = std::min(kGroupInputs, matrix.k - i);
        if (count == kGroupInputs) {
            add_pair<F == WeightFormat::int4>(w, x, row_bytes, rows, sums);
        } else {
            for (int j = 0; j < 2; ++j) add_group<Simd, F>(w[j], count, x, row_bytes, rows, sums[j]);
        }
        for (auto& at : w) at += group_bytes(F, count);
    }
    for (int j = 0; j < (alone ? 1 : 2); ++j) {
        const int output = (tile + j) * kTileOutputs, outputs = std::min(kTileOutputs, matrix.n - output);
        for (int r = 0; r < rows; ++r) {
            std::memcpy(y + r * stride + output, sums[j][r], size_t(outputs) * sizeof(float));
        }
    }
}

template <WeightFormat F>
MGF_TARGET inline void apply_amx(const PackedMatrix& matrix, const void* prepared, int rows, int first, int last,
                                 float* y, ptrdiff_t stride) {
    if (rows < kMatrixRows) {
        apply<Simd, F>(matrix, prepared, rows, first, last, y, stride);
        return;
    }
    const size_t row_bytes = prepared_row_bytes(F, matrix.k);
    TileShapes shapes;
    memory_is_read();
    _tile_loadconfig(&shapes);
    for (int r = 0; r < rows; r += kRowsAtOnce) {
        const unsigned char* const x = static_cast<const unsigned char*>(prepared) + size_t(r) * row_bytes;
        const int some = std::min(kRowsAtOnce, rows - r);
        for (int tile = first; tile < last; tile += 2) {
            apply_pair<F>(matrix, x, row_bytes, some, tile, tile + 1 == last, y + r * stride, stride);
        }
    }
    _tile_release();
}

MGF_LINEAR_PREPARE(MGF_TARGET)
MGF_LINEAR_APPLY(apply_float32, MGF_TARGET, float32)
MGF_LINEAR_APPLY(apply_bfloat16, MGF_TARGET, bfloat16)

MGF_TARGET void apply_int8(const PackedMatrix& matrix, const void* prepared, int rows, int first, int last, float* y,
                           ptrdiff_t stride) {
    apply_amx<WeightFormat::int8>(matrix, prepared, rows, first, last, y, stride);
}

MGF_TARGET void apply_int4(const PackedMatrix& matrix, const void* prepared, int rows, int first, int last, float* y,
                           ptrdiff_t stride) {
    apply_amx<WeightFormat::int4>(matrix, prepared, rows, first, last, y, stride);
}

}  // namespace

const LinearKernels linear_amx = {prepare_, {apply_float32, apply_bfloat16, apply_int8, apply_int4}};

}  // namespace mgf
#endif
