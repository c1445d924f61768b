// binary16 <-> binary32 by g++'s own type, which rounds to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
    _Float16 x;
};

inline __half __ushort_as_half(uint16_t b) {
    __half h;
    std::memcpy(&h, &b, sizeof h);
    return h;
}
inline float __half2float(__half h) {
    return float(h.x);
}
inline __half __float2half_rn(float x) {
    return {_Float16(x)};
}
