// Philox for kLanes counters at once, for instruction sets that multiply the even 32-bit lanes to 64 bits.
//
// The compiler's own vectorisation of `uint64_t(a) * b` widens and narrows every product: 25 cycles a block with
// AVX-512. Here even and odd lanes are multiplied where they lie, and the halves blended: 9. MGF_TARGET is the
// including file's instruction set; its `Lanes` holds the vector type and the six operations.
#pragma once

#include "cpu/philox.h"
#include "cpu/sample_race.h"

namespace mgf {
namespace {

template <class Lanes>
MGF_TARGET inline void philox_lanes(const uint32_t* block, Counter rest, Key key, Words& out) {
    using V = typename Lanes::Vector;
    const V m0 = Lanes::set(0xD2511F53), m1 = Lanes::set(0xCD9E8D57);
    for (int i = 0; i < kLanes; i += Lanes::kCount) {
        V c0 = Lanes::load(block + i), c1 = Lanes::set(rest.c1), c2 = Lanes::set(rest.c2), c3 = Lanes::set(rest.c3);
        Key k = key;
        for (int round = 0; round < 10; ++round) {
            const V even0 = Lanes::multiply(c0, m0), odd0 = Lanes::multiply(Lanes::odd(c0), m0);
            const V even1 = Lanes::multiply(c2, m1), odd1 = Lanes::multiply(Lanes::odd(c2), m1);
            c0 = Lanes::exclusive_or(Lanes::high(even1, odd1), c1, Lanes::set(k.k0));
            c2 = Lanes::exclusive_or(Lanes::high(even0, odd0), c3, Lanes::set(k.k1));
            c1 = Lanes::low(even1, odd1);
            c3 = Lanes::low(even0, odd0);
            k = {k.k0 + 0x9E3779B9u, k.k1 + 0xBB67AE85u};
        }
        Lanes::store(out.word[0] + i, c0);
        Lanes::store(out.word[1] + i, c1);
        Lanes::store(out.word[2] + i, c2);
        Lanes::store(out.word[3] + i, c3);
    }
}

}  // namespace
}  // namespace mgf
