// Sixteen floats or integers as one value, whatever the width of the registers: what attention and norms compute with.
//
// Compiled once per instruction set, into that set's translation unit, with MGF_PART_BYTES the width of a register.
// Narrow registers are paired (Twice), so that every set does the same sixteen operations in the same order; there are
// no FMAs. Attention waits for memory, where a multiply and an add cost as little as both at once; in return
// every instruction set gives the same bits, the one without FMAs included, and one golden table checks them all.
// Integers wrap around (plus, minus): what NaN turns into is not used, but must be defined. Functions do what their
// operators do in C++: `larger` and `select` with NaN included.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/race.h"

#if defined(__GNUC__)
#define MGF_LAMBDA __attribute__((always_inline))  // a function of its own would pass its registers through memory
#else
#define MGF_LAMBDA
#endif

namespace mgf {
namespace {

constexpr int kLanes16 = 16;

template <class T>
struct Twice {
    T a, b;
};

#if defined(__GNUC__) && MGF_PART_BYTES >= 16
using FloatPart = float __attribute__((vector_size(MGF_PART_BYTES)));
using IntPart = int32_t __attribute__((vector_size(MGF_PART_BYTES)));
using WordPart = uint32_t __attribute__((vector_size(MGF_PART_BYTES)));
#if MGF_PART_BYTES == 64
using F16 = FloatPart;
using I16 = IntPart;
#elif MGF_PART_BYTES == 32
using F16 = Twice<FloatPart>;
using I16 = Twice<IntPart>;
#else
using F16 = Twice<Twice<FloatPart> >;
using I16 = Twice<Twice<IntPart> >;
#endif
// ---- one register ----
MGF_INLINE void fill(FloatPart& x, float v) {
    x = v - FloatPart{};  // a zero subtracted, not added: -0 stays -0
}
MGF_INLINE void fill(IntPart& x, int32_t v) {
    x = v - IntPart{};
}
MGF_INLINE FloatPart larger(FloatPart x, FloatPart y) {
    return x > y ? x : y;
}
MGF_INLINE IntPart larger(IntPart x, IntPart y) {
    return x > y ? x : y;
}
MGF_INLINE IntPart less(FloatPart x, FloatPart y) {
    return x < y;
}
MGF_INLINE IntPart less(IntPart x, IntPart y) {
    return x < y;
}
MGF_INLINE FloatPart select(IntPart mask, FloatPart x, FloatPart y) {
    return mask ? x : y;
}
MGF_INLINE IntPart as_int(FloatPart x) {
    return (IntPart)x;
}
MGF_INLINE FloatPart as_float(IntPart x) {
    return (FloatPart)x;
}
MGF_INLINE FloatPart converted(IntPart x) {
    return __builtin_convertvector(x, FloatPart);
}
MGF_INLINE IntPart shifted_left(IntPart x, int n) {
    return (IntPart)((WordPart)x << n);
}
MGF_INLINE IntPart plus(IntPart x, IntPart y) {
    return (IntPart)((WordPart)x + (WordPart)y);
}
MGF_INLINE IntPart minus(IntPart x, IntPart y) {
    return (IntPart)((WordPart)x - (WordPart)y);
}
#else  // a compiler without vector types: it may find the vectors by itself
using FloatPart = float;
using IntPart = int32_t;
using F16 = Twice<Twice<Twice<Twice<float> > > >;
using I16 = Twice<Twice<Twice<Twice<int32_t> > > >;
MGF_INLINE void fill(float& x, float v) {
    x = v;
}
MGF_INLINE void fill(int32_t& x, int32_t v) {
    x = v;
}
MGF_INLINE float larger(float x, float y) {
    return x > y ? x : y;
}
MGF_INLINE int32_t larger(int32_t x, int32_t y) {
    return x > y ? x : y;
}
MGF_INLINE int32_t less(float x, float y) {
    return x < y ? -1 : 0;
}
MGF_INLINE int32_t less(int32_t x, int32_t y) {
    return x < y ? -1 : 0;
}
MGF_INLINE float select(int32_t mask, float x, float y) {
    return mask ? x : y;
}
MGF_INLINE int32_t as_int(float x) {
    return int32_t(bits(x));
}
MGF_INLINE float as_float(int32_t x) {
    return from_bits(uint32_t(x));
}
MGF_INLINE float converted(int32_t x) {
    return float(x);
}
MGF_INLINE int32_t shifted_left(int32_t x, int n) {
    return int32_t(uint32_t(x) << n);
}
MGF_INLINE int32_t plus(int32_t x, int32_t y) {
    return int32_t(uint32_t(x) + uint32_t(y));
}
MGF_INLINE int32_t minus(int32_t x, int32_t y) {
    return int32_t(uint32_t(x) - uint32_t(y));
}
#endif

MGF_INLINE void load_to(FloatPart& x, const void* from) {
    std::memcpy(&x, from, sizeof x);
}
MGF_INLINE void load_to(IntPart& x, const void* from) {
    std::memcpy(&x, from, sizeof x);
}
MGF_INLINE void store(void* to, FloatPart x) {
    std::memcpy(to, &x, sizeof x);
}
MGF_INLINE void store(void* to, IntPart x) {
    std::memcpy(to, &x, sizeof x);
}

// ---- the same on pairs ----
template <class T, class V>
MGF_INLINE void fill(Twice<T>& x, V v) {
    fill(x.a, v), fill(x.b, v);
}
template <class T>
MGF_INLINE void load_to(Twice<T>& x, const void* from) {
    load_to(x.a, from), load_to(x.b, static_cast<const char*>(from) + sizeof(T));
}
template <class T>
MGF_INLINE void store(void* to, Twice<T> x) {
    store(to, x.a), store(static_cast<char*>(to) + sizeof(T), x.b);
}
template <class T>
MGF_INLINE Twice<T> operator+(Twice<T> x, Twice<T> y) {
    return {x.a + y.a, x.b + y.b};
}
template <class T>
MGF_INLINE Twice<T> operator-(Twice<T> x, Twice<T> y) {
    return {x.a - y.a, x.b - y.b};
}
template <class T>
MGF_INLINE Twice<T> operator*(Twice<T> x, Twice<T> y) {
    return {x.a * y.a, x.b * y.b};
}
template <class T>
MGF_INLINE Twice<T> operator/(Twice<T> x, Twice<T> y) {
    return {x.a / y.a, x.b / y.b};
}
template <class T>
MGF_INLINE Twice<T> operator&(Twice<T> x, Twice<T> y) {
    return {x.a & y.a, x.b & y.b};
}
template <class T>
MGF_INLINE Twice<T> larger(Twice<T> x, Twice<T> y) {
    return {larger(x.a, y.a), larger(x.b, y.b)};
}
template <class T>
MGF_INLINE auto less(Twice<T> x, Twice<T> y) -> Twice<decltype(less(x.a, y.a))> {
    return {less(x.a, y.a), less(x.b, y.b)};
}
template <class M, class T>
MGF_INLINE Twice<T> select(Twice<M> mask, Twice<T> x, Twice<T> y) {
    return {select(mask.a, x.a, y.a), select(mask.b, x.b, y.b)};
}
template <class T>
MGF_INLINE auto as_int(Twice<T> x) -> Twice<decltype(as_int(x.a))> {
    return {as_int(x.a), as_int(x.b)};
}
template <class T>
MGF_INLINE auto as_float(Twice<T> x) -> Twice<decltype(as_float(x.a))> {
    return {as_float(x.a), as_float(x.b)};
}
template <class T>
MGF_INLINE auto converted(Twice<T> x) -> Twice<decltype(converted(x.a))> {
    return {converted(x.a), converted(x.b)};
}
template <class T>
MGF_INLINE Twice<T> shifted_left(Twice<T> x, int n) {
    return {shifted_left(x.a, n), shifted_left(x.b, n)};
}

template <class T>
MGF_INLINE Twice<T> plus(Twice<T> x, Twice<T> y) {
    return {plus(x.a, y.a), plus(x.b, y.b)};
}
template <class T>
MGF_INLINE Twice<T> minus(Twice<T> x, Twice<T> y) {
    return {minus(x.a, y.a), minus(x.b, y.b)};
}

}  // namespace
}  // namespace mgf
