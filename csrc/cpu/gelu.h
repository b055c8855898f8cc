// GPT-2's GELU, the tanh approximation, alone or with the bias of the linear layer before it.
//
//   u = sqrt(2 / pi) (x + 0.044715 x^3)
//   y = 0.5 x (1 + tanh(u)) = x sigmoid(2u) = x / (1 + e),  e = exp(-2u)
//
// The sigmoid needs no library tanh and does not cancel in the left tail as 1 + tanh(u) does. One
// polynomial exp2 (vec_math.h) and one division; docs/gelu.md
// has the error bounds.
//
//   dx = dy gelu'(x)    dbias = sum over rows of dx
#pragma once

#include "rows.h"
#include "vec_math.h"

namespace gpt2::GPT2_ISA {

constexpr double kExponent = -2 * 0.7978845608028654 * kLog2E;
constexpr double kTwoDu = 2 * 0.7978845608028654;
constexpr double kCubic = 0.044715;

// Scalar: -2u log2(e), so that e = 2^this
template <class V>
GPT2_INLINE V gelu_exponent(V x) {
  return x * fma(x * x, V::set(kExponent * kCubic), V::set(kExponent));
}

template <class V>
GPT2_INLINE V gelu(V x) {
  return x / (V::set(1) + exp2(gelu_exponent(x)));
}

// g + x g (1 - g) 2u' with g = sigmoid(2u) and 1 - g = e g, a product: the difference would cancel.
// Beyond |x| = 10 the result is 0 or 1 to 35 digits; there e, u' or x itself would overflow.
template <class V>
GPT2_INLINE V gelu_grad(V x) {
  const V one = V::set(1), left = V::set(-10), right = V::set(10);
  const V near = min(right, max(left, x));
  const V e = exp2_inside(gelu_exponent(near)), g = one / (one + e);
  const V two_du = fma(near * near, V::set(kTwoDu * 3 * kCubic), V::set(kTwoDu));
  return if_less(x, left, V::set(0), fma(near * two_du, (e * g) * g, g));
}

template <class V, class T>
void gelu_fwd(const GeluFwd& args, const Threads& threads) {
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  parallel_ranges(threads, args.n, 8192, [=](int64_t begin, int64_t end) {
    for_columns<V>(end - begin, [=](int64_t i, auto lanes) {
      store(gelu(load<V>(x + begin + i, lanes)), y + begin + i, lanes);
    });
  });
}

template <class V, class T>
void gelu_bwd(const GeluBwd& args, const Threads& threads) {
  const T *dy = static_cast<const T*>(args.dy), *x = static_cast<const T*>(args.x);
  T* dx = static_cast<T*>(args.dx);
  parallel_ranges(threads, args.n, 8192, [=](int64_t begin, int64_t end) {
    for_columns<V>(end - begin, [=](int64_t i, auto lanes) {
      const V grad = gelu_grad(load<V>(x + begin + i, lanes));
      store(load<V>(dy + begin + i, lanes) * grad, dx + begin + i, lanes);
    });
  });
}

template <class V, class T>
void bias_gelu_fwd(const BiasGeluFwd& args, const Threads& threads) {
  const T* x = static_cast<const T*>(args.x);
  const auto* bias = static_cast<const typename V::scalar*>(args.bias);
  T* y = static_cast<T*>(args.y);
  const int64_t C = args.C;
  parallel_ranges(threads, args.N, 1 + 8192 / C, [=](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      for_columns<V>(C, [=](int64_t c, auto lanes) {
        const int64_t i = row * C + c;
        store(gelu(load<V>(x + i, lanes) + load<V>(bias + c, lanes)), y + i, lanes);
      });
    }
  });
}

template <class V, class T>
void bias_gelu_bwd(const BiasGeluBwd& args, const Threads& threads) {
  using S = typename V::scalar;
  const T *dy = static_cast<const T*>(args.dy), *x = static_cast<const T*>(args.x);
  const S* bias = static_cast<const S*>(args.bias);
  T* dx = static_cast<T*>(args.dx);
  S* partial = static_cast<S*>(args.partial);
  const int64_t C = args.C;
  const RowBlocks blocks{args.N};
  for_row_blocks(blocks, C, partial, threads, [=](int64_t row, int64_t end, S* dbias_partial) {
    for (; row < end; ++row) {
      for_columns<V>(C, [=](int64_t c, auto lanes) {
        const int64_t i = row * C + c;
        const V grad = gelu_grad(load<V>(x + i, lanes) + load<V>(bias + c, lanes));
        const V d = load<V>(dy + i, lanes) * grad;
        store(d, dx + i, lanes);
        store(load<V>(dbias_partial + c, lanes) + d, dbias_partial + c, lanes);
      });
    }
  });
  sum_partial<V>(blocks, C, partial, static_cast<S*>(args.dbias), threads);
}

}  // namespace gpt2::GPT2_ISA
