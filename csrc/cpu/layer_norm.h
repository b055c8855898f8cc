// LayerNorm over the last dimension, one row at a time, alone or after the residual addition.
//
//   mean = sum(x) / C
//   rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)    xhat = (x - mean) rstd
//   y    = xhat weight + bias
//
// Two passes for the moments: the row is in L1 after the first, and the centred sum does not cancel
// the way E[x^2] - mean^2 does when |mean| >> std. Lanes past C add nothing to it. What the centred
// row still sums to is the rounding of the first mean, which is put right by it.
//
// Backward, with wdy = dy weight:
//
//   dx = rstd (wdy - mean_C(wdy) - xhat mean_C(wdy xhat)) + ds
//   dweight = sum over rows of dy xhat    dbias = sum over rows of dy
//
// Passes over L1 leave the rest of the machine idle: they ask for what the next pass will write and
// the next row will read.
//
//   T the branch: x, y, their gradients   R the residual, s and their gradients: T, or S where
//   autocast keeps the stream in float32   S sums, weights, statistics
#pragma once

#include "rows.h"

namespace gpt2::GPT2_ISA {

GPT2_INLINE float rsqrt(float x) {
  return 1 / __builtin_sqrtf(x);
}
GPT2_INLINE double rsqrt(double x) {
  return 1 / __builtin_sqrt(x);
}

// sum x and sum x^2
template <class V>
struct Moments {
  V sum, squares;
  friend GPT2_INLINE Moments operator+(Moments m, V x) { return {m.sum + x, fma(x, x, m.squares)}; }
  friend GPT2_INLINE Moments operator+(Moments a, Moments b) {
    return {a.sum + b.sum, a.squares + b.squares};
  }
};

// One row: y, mean, rstd; ahead(c) prefetches the next.
template <class V, class R, class T, class S, class F>
GPT2_INLINE void layer_norm_row(const R* x, const S* weight, const S* bias, S eps, int64_t C, T* y,
                                S* mean_out, S* rstd_out, const F& ahead) {
  const V zero = V::set(0);
  const V sum =
      sum_columns<V>(C, zero, [=](int64_t c, auto lanes) { return load<V>(x + c, lanes); });
  const S first_mean = sum.sum() / C;
  const V first_shift = V::set(first_mean);
  const Moments<V> moments = sum_columns<V>(C, Moments<V>{zero, zero}, [=](int64_t c, auto lanes) {
    prefetch_to_write<V>(y + c);
    return inside(load<V>(x + c, lanes) - first_shift, zero, lanes);
  });
  const S rest = moments.sum.sum() / C, mean = first_mean + rest;
  const S variance = moments.squares.sum() / C - rest * rest;
  const S rstd = rsqrt((variance < 0 ? 0 : variance) + eps);
  const V shift = V::set(mean);
  const V scale = V::set(rstd);
  for_columns<V>(C, [=](int64_t c, auto lanes) {
    ahead(c);
    const V xhat = (load<V>(x + c, lanes) - shift) * scale;
    store(fma(xhat, load<V>(weight + c, lanes), load<V>(bias + c, lanes)), y + c, lanes);
  });
  *mean_out = mean;
  *rstd_out = rstd;
}

template <class V, class T, class R>
void layer_norm_fwd(const LayerNormFwd& args, const Threads& threads) {
  using S = typename V::scalar;
  const T* x = static_cast<const T*>(args.x);
  const R* residual = static_cast<const R*>(args.residual);
  const S *weight = static_cast<const S*>(args.weight), *bias = static_cast<const S*>(args.bias);
  T* y = static_cast<T*>(args.y);
  R* s = static_cast<R*>(args.s);
  S* stats = static_cast<S*>(args.stats);
  const S eps = S(args.eps);
  const int64_t N = args.N, C = args.C;
  parallel_ranges(threads, N, 1 + 8192 / C, [=](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const int64_t next = (row + 1) * C;
      const auto norm = [=](const auto* normed) {
        layer_norm_row<V>(normed, weight, bias, eps, C, y + row * C, stats + row, stats + N + row,
                          [=](int64_t c) {
                            prefetch<V>(x + next + c);
                            if (residual == nullptr) return;
                            prefetch<V>(residual + next + c);
                            prefetch_to_write<V>(s + next + c);
                          });
      };
      if (residual == nullptr) {
        norm(x + row * C);
        continue;
      }
      // The norm sees s as it is stored, so that the backward recomputes the same xhat.
      for_columns<V>(C, [=](int64_t c, auto lanes) {
        const int64_t i = row * C + c;
        store(load<V>(x + i, lanes) + load<V>(residual + i, lanes), s + i, lanes);
      });
      norm(s + row * C);
    }
  });
}

template <class V, class T, class R>
void layer_norm_bwd(const LayerNormBwd& args, const Threads& threads) {
  using S = typename V::scalar;
  const T* dy = static_cast<const T*>(args.dy);
  const R *x = static_cast<const R*>(args.s), *ds = static_cast<const R*>(args.ds);
  const S *weight = static_cast<const S*>(args.weight), *stats = static_cast<const S*>(args.stats);
  T* dx = static_cast<T*>(args.dx);
  R* dresidual = static_cast<R*>(args.dresidual);
  S* partial = static_cast<S*>(args.partial);
  const int64_t N = args.N, C = args.C;
  const RowBlocks blocks{N};
  for_row_blocks(blocks, 2 * C, partial, threads, [=](int64_t row, int64_t end, S* dw) {
    S* db = dw + C;
    for (; row < end; ++row) {
      const V mean = V::set(stats[row]), rstd = V::set(stats[N + row]);
      const int64_t start = row * C;
      // mean_C(wdy), mean_C(wdy xhat); past the end dy is 0
      const Pair<V> sums =
          sum_columns<V>(C, Pair<V>{V::set(0), V::set(0)}, [=](int64_t c, auto lanes) {
            prefetch_to_write<V>(dx + start + c);
            const V xhat = (load<V>(x + start + c, lanes) - mean) * rstd;
            const V wdy = load<V>(dy + start + c, lanes) * load<V>(weight + c, lanes);
            return Pair<V>{wdy, wdy * xhat};
          });
      const V mean_wdy = V::set(sums.a.sum() / C), mean_wdy_xhat = V::set(sums.b.sum() / C);
      for_columns<V>(C, [=](int64_t c, auto lanes) {
        prefetch<V>(x + start + C + c);
        prefetch<V>(dy + start + C + c);
        const V xhat = (load<V>(x + start + c, lanes) - mean) * rstd;
        const V d = load<V>(dy + start + c, lanes);
        V g = rstd * (d * load<V>(weight + c, lanes) - mean_wdy - xhat * mean_wdy_xhat);
        if (ds != nullptr) g = g + load<V>(ds + start + c, lanes);
        store(g, dx + start + c, lanes);
        if (dresidual != nullptr) store(g, dresidual + start + c, lanes);
        store(fma(d, xhat, load<V>(dw + c, lanes)), dw + c, lanes);
        store(d + load<V>(db + c, lanes), db + c, lanes);
      });
    }
  });
  sum_partial<V>(blocks, 2 * C, partial, static_cast<S*>(args.dparams), threads);
}

}  // namespace gpt2::GPT2_ISA
