// Functions of a vector, from the operations of vec.h.
#pragma once

#include "vec.h"

namespace gpt2::GPT2_ISA {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

GPT2_INLINE Vec<double> exp2_of_double(Vec<double> x) {
  return {::exp2(x.v)};
}

// 2^x for -127 <= x <= 127.5 alone, and NaN for NaN. The relative error is below 1.2e-7 from -126
// on; 2^-127 is 0. 2^x = 2^n 2^f with f in [-1/2, 1/2], and 2^f by its minimax polynomial of degree
// 6 (2e-9: the rest is rounding). exp2(0) is exactly 1. In double by the C library.
template <class V>
GPT2_INLINE V exp2_inside(V x) {
  if constexpr (sizeof(typename V::scalar) == sizeof(double)) {
    return exp2_of_double(x);
  } else {
    V scale;
    const V f = split(x, scale);
    V p = V::set(1.53458121613e-4f);
    p = fma(p, f, V::set(1.33999311772e-3f));
    p = fma(p, f, V::set(9.61848895633e-3f));
    p = fma(p, f, V::set(5.55032877711e-2f));
    p = fma(p, f, V::set(2.40226468906e-1f));
    p = fma(p, f, V::set(6.93147205737e-1f));
    p = fma(p, f, V::set(1));
    return p * scale;
  }
}

// 2^x for x <= 0, and NaN for NaN: 0 below -126.5.
template <class V>
GPT2_INLINE V exp2_below(V x) {
  constexpr bool is_double = sizeof(typename V::scalar) == sizeof(double);
  return exp2_inside(is_double ? x : max(V::set(-127), x));
}

// 2^x for any x: 0 below -126.5, infinity above 127.5.
template <class V>
GPT2_INLINE V exp2(V x) {
  constexpr bool is_double = sizeof(typename V::scalar) == sizeof(double);
  return exp2_inside(is_double ? x : max(V::set(-127), min(V::set(128), x)));
}

}  // namespace gpt2::GPT2_ISA
