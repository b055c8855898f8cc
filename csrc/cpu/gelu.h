// GPT-2's GELU, the tanh approximation, over contiguous elements.
//
//   u = sqrt(2 / pi) (x + 0.044715 x^3)
//   y = 0.5 x (1 + tanh(u)) = x sigmoid(2u) = x / (1 + e),  e = exp(-2u)
//
// The sigmoid needs no library tanh and does not cancel in the left tail as 1 + tanh(u) does. One
// polynomial exp2 (vec_math.h) and one division; the error is below 4 units in the last place.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "vec_math.h"

namespace gpt2::GPT2_ISA {

constexpr double kTwoU =
    -2 * 0.7978845608028654 * 1.4426950408889634;  // e = 2^(kTwoU x (1 + k x^2))
constexpr double kCubic = 0.044715;

template <class V>
GPT2_INLINE V gelu(V x) {
  const V one = V::set(1);
  const V e = exp2(x * fma(x * x, V::set(kTwoU * kCubic), V::set(kTwoU)));
  return x / (one + e);
}

template <class V, class T>
void gelu_fwd(const void* x_, void* y_, int64_t n, const Threads& threads) {
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  parallel_ranges(threads, n, 8192, [=](int64_t i, int64_t end) {
    for (; i + V::W <= end; i += V::W) gelu(V::load(x + i)).store(y + i);
    if (i < end) gelu(V::load(x + i, end - i)).store(y + i, end - i);
  });
}

}  // namespace gpt2::GPT2_ISA
