// Linear layers with AMX for many rows of integers: prompts, and batches of five rows and more. Fewer rows and the rest
// of a group go to VNNI, which is as fast as the memory there; the sums are the same integers.
#include "cpu/linear_avx512vnni.h"

#if MGF_HAS_AMX
#define MGF_TARGET MGF_TARGET_LINEAR_AMX

namespace mgf {
namespace {

constexpr int kBlockRows = 16;
constexpr int kLeastRows = 5;  // of a block: below, VNNI is faster

// 1 KB of the packed weights is a tile as it lies: 16 times four inputs, each of 16 outputs.
// Tiles: 0, 1 sums of the high and low halves, 2 inputs, 3 weights; 4, 5, 6 like 0, 1, 2 for a last, lower block.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, zero[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16};
};

// The compiler's tile instructions do not say that they read memory.
MGF_INLINE void memory_is_read() {
    __asm__ volatile("" ::: "memory");
}

struct Simd : SimdVnni {
    static constexpr bool kMatrix = true;

    static MGF_INLINE int last_block(int rows) { return rows % kBlockRows >= kLeastRows ? rows % kBlockRows : 0; }
    static MGF_INLINE int rows_in_blocks(int rows) { return rows / kBlockRows * kBlockRows + last_block(rows); }

    MGF_TARGET static inline void begin(int rows) {
        if (rows_in_blocks(rows) == 0) return;
        TileShapes shapes;
        for (int tile = 4; tile <= 6; ++tile) shapes.rows[tile] = uint8_t(std::max(1, last_block(rows)));
        memory_is_read();
        _tile_loadconfig(&shapes);
    }

    MGF_TARGET static inline void end(int rows) {
        if (rows_in_blocks(rows) != 0) _tile_release();
    }

    // Sums over a whole group for up to 16 rows.
    template <bool FourBits, bool Last>
    MGF_TARGET static inline void add_block(const unsigned char* u, const unsigned char* x, size_t row_bytes, int rows,
                                            const float* scale, float (*sums)[kTileOutputs]) {
        alignas(64) int32_t high[kBlockRows][kTileOutputs], low[kBlockRows][kTileOutputs];
        if (Last) {
            _tile_zero(4);
            _tile_zero(5);
        } else {
            _tile_zero(0);
            _tile_zero(1);
        }
        for (int i = 0; i < 2; ++i, u += 1024, x += 64) {
            _tile_loadd(3, u, 64);
            if (Last) {
                _tile_loadd(6, x, row_bytes);
                _tile_dpbsud(4, 6, 3);
                _tile_loadd(6, x + kGroupInputs, row_bytes);
                _tile_dpbsud(5, 6, 3);
            } else {
                _tile_loadd(2, x, row_bytes);
                _tile_dpbsud(0, 2, 3);
                _tile_loadd(2, x + kGroupInputs, row_bytes);
                _tile_dpbsud(1, 2, 3);
            }
        }
        if (Last) {
            _tile_stored(4, high, 64);
            _tile_stored(5, low, 64);
        } else {
            _tile_stored(0, high, 64);
            _tile_stored(1, low, 64);
        }
        memory_is_read();
        x -= 128;
        for (int r = 0; r < rows; ++r, x += row_bytes) {
            const InputGroup& group = *reinterpret_cast<const InputGroup*>(x);
            const __m512i sum =
                _mm512_add_epi32(_mm512_slli_epi32(_mm512_load_si512(high[r]), 8), _mm512_load_si512(low[r]));
            add_scaled_16(sum, offset_of(FourBits) * group.sum, group.scale, scale, sums[r]);
        }
    }

    // Two weights of 4 bits in each byte -> one: a whole group.
    MGF_TARGET static inline void unpack(const unsigned char* from, unsigned char* to) {
        const __m512i low = _mm512_set1_epi8(15);
        for (int i = 0; i < kGroupInputs / 8; ++i, from += 64, to += 128) {
            const __m512i both = _mm512_loadu_si512(from);
            _mm512_store_si512(to, _mm512_and_si512(both, low));
            _mm512_store_si512(to + 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
        }
    }

    // Returns for how many rows it has added.
    template <bool FourBits>
    MGF_TARGET static inline int add_blocks(const unsigned char* u, int count, const unsigned char* x, size_t row_bytes,
                                            int rows, const float* scale, float (*sums)[kTileOutputs]) {
        const int all = rows_in_blocks(rows);
        if (count < kGroupInputs || all == 0) return 0;
        constexpr int kBytes = kGroupInputs * kTileOutputs / (FourBits ? 2 : 1);
        for (int i = 0; i < kBytes; i += 64) MGF_PREFETCH(u + kPrefetchAhead + i);
        alignas(64) unsigned char bytes[FourBits ? kGroupInputs * kTileOutputs : 64];
        if (FourBits) {
            unpack(u, bytes);
            u = bytes;
        }
        memory_is_read();
        int r = 0;
        for (; r + kBlockRows <= all; r += kBlockRows) {
            add_block<FourBits, false>(u, x + size_t(r) * row_bytes, row_bytes, kBlockRows, scale, sums + r);
        }
        if (r < all) add_block<FourBits, true>(u, x + size_t(r) * row_bytes, row_bytes, all - r, scale, sums + r);
        return all;
    }
};

}  // namespace

MGF_LINEAR_KERNELS(linear_amx, MGF_TARGET)

}  // namespace mgf
#endif
