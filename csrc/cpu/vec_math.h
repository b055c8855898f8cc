// Functions of a vector, from the operations of vec.h.
#pragma once

#include "vec.h"

namespace gpt2::GPT2_ISA {

// 2^x, with a relative error below 1.2e-7 for -126 <= x <= 127; 0 below -127, infinity above 127.5,
// NaN for NaN. 2^x = 2^n 2^f with f in [-1/2, 1/2], and 2^f by its minimax polynomial of degree 6
// (2e-9: the rest is rounding). exp2(0) is exactly 1.
template <class V>
GPT2_INLINE V exp2(V x) {
  V scale;
  const V f = split(max(V::set(-127), min(V::set(128), x)), scale);
  V p = V::set(1.53458121613e-4f);
  p = fma(p, f, V::set(1.33999311772e-3f));
  p = fma(p, f, V::set(9.61848895633e-3f));
  p = fma(p, f, V::set(5.55032877711e-2f));
  p = fma(p, f, V::set(2.40226468906e-1f));
  p = fma(p, f, V::set(6.93147205737e-1f));
  p = fma(p, f, V::set(1));
  return p * scale;
}

GPT2_INLINE Vec<double> exp2(Vec<double> x) {
  return {::exp2(x.v)};
}

}  // namespace gpt2::GPT2_ISA
