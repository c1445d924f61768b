// bfloat16 <-> binary32: half an ulp is added to the bits, a little less where the result would be even.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
    uint16_t x;
};

inline float __bfloat162float(__nv_bfloat16 h) {
    const uint32_t b = uint32_t(h.x) << 16;
    float x;
    std::memcpy(&x, &b, sizeof x);
    return x;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t b;
    std::memcpy(&b, &x, sizeof b);
    if (x != x) return {0x7FFF};
    return {uint16_t((b + 0x7FFF + (b >> 16 & 1)) >> 16)};
}
