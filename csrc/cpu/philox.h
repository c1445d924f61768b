// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A 128-bit counter and a 64-bit key give four 32-bit words. There is no state, so any word of any request can be drawn
// in any order: that is what makes a request's tokens independent of the batch around it. Knows nothing of tokens.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mgf {

struct Counter {
    uint32_t c0, c1, c2, c3;
};

struct Key {
    uint32_t k0, k1;
};

// 32-bit lanes, two widening multiplies a round, no branch: a loop over counters vectorises.
MGF_INLINE Counter philox4x32_10(Counter c, Key k) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t{0xD2511F53} * c.c0;
        const uint64_t p1 = uint64_t{0xCD9E8D57} * c.c2;
        c = {uint32_t(p1 >> 32) ^ c.c1 ^ k.k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.c3 ^ k.k1, uint32_t(p0)};
        k = {k.k0 + 0x9E3779B9u, k.k1 + 0xBB67AE85u};  // Weyl sequence: golden ratio, sqrt(3) - 1
    }
    return c;
}

}  // namespace mgf
