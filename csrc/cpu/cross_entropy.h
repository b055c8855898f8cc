// Cross-entropy of logits rows against one target each: forward, backward, and both in place.
//
//   m     = max_v x[v]    l = sum_v exp(x[v] - m)
//   loss  = log(l) + (m - x[target])
//   dx[v] = (exp(x[v] - m) / l - [v = target]) dloss
//
// Label smoothing e puts (1 - e) [v = target] + e / V in place of [v = target], and so in the loss
// (1 - e) x[target] + e mean(x) in place of x[target].
//
// A row is read from memory once: blocks of it, small enough for L1, are searched for their maximum
// and then summed relative to the largest so far. m and l stay apart: lse = m + log(l) as one
// number would round away the digits of log(l) where logits are large. docs/cross_entropy.md.
#pragma once

#include "rows.h"
#include "vec_math.h"

namespace gpt2::GPT2_ISA {

GPT2_INLINE float log_of(float x) {
  return logf(x);
}
GPT2_INLINE double log_of(double x) {
  return log(x);
}

// Scalar: exp(x - m), x <= m
template <class V>
GPT2_INLINE V exp_minus(V x, V m) {
  return exp2_below((x - m) * V::set(kLog2E));
}

// m and l of one row. l carries its lanes from block to block.
template <class V, class T, class S>
GPT2_INLINE void softmax_row(const T* x, int64_t V_, S* m_out, S* l_out) {
  constexpr int64_t kBlock = 1024;
  const V lowest = V::set(-INFINITY);
  S m = -INFINITY;
  V l = V::set(0);
  for (int64_t start = 0; start < V_; start += kBlock) {
    const T* block = x + start;
    const int64_t n = V_ - start < kBlock ? V_ - start : kBlock;
    V top = lowest;
    for_columns<V>(n, [&](int64_t c, auto lanes) {
      top = max(top, inside(load<V>(block + c, lanes), lowest, lanes));
    });
    if (top.max() > m) {
      // A first block of -inf leaves m as it is: l is 0 then, and stays so.
      l = l * exp_minus(V::set(m), V::set(top.max()));
      m = top.max();
    }
    const V shift = V::set(m == -INFINITY ? 0 : m);
    l = l + sum_columns<V>(n, V::set(0), [=](int64_t c, auto lanes) {
          return inside(exp_minus(load<V>(block + c, lanes), shift), V::set(0), lanes);
        });
  }
  *m_out = m;
  *l_out = l.sum();
}

// The loss of one row; NaN for a target outside the vocabulary.
template <class V, class T, class S>
GPT2_INLINE S loss_of(const LogitsRows& rows, const T* x, int64_t target, S m, S l) {
  if (!rows.has(target)) return S(NAN);
  const S own = log_of(l) + (m - S(widen(x[target])));
  if (rows.smoothing == 0) return own;  // of logits of -inf, 0 times the rest would be NaN
  const V sum = sum_columns<V>(rows.V, V::set(0),
                               [=](int64_t v, auto lanes) { return load<V>(x + v, lanes); });
  const S all = log_of(l) + (m - sum.sum() / rows.V), e = S(rows.smoothing);
  return (1 - e) * own + e * all;
}

// dx of one row, which may take the place of x; NaN for a target outside the vocabulary.
template <class V, class T, class S>
GPT2_INLINE void softmax_grad_row(const LogitsRows& rows, const T* x, int64_t target, S m, S l,
                                  S dloss, T* dx) {
  if (!rows.has(target)) {
    for_columns<V>(rows.V, [=](int64_t v, auto lanes) { store(V::set(S(NAN)), dx + v, lanes); });
    return;
  }
  const S e = S(rows.smoothing), each = e / rows.V;
  const V shift = V::set(m), scale = V::set(dloss / l), off = V::set(-each * dloss);
  const Vec<S> x_target = Vec<S>::load(x + target);
  for_columns<V>(rows.V, [=](int64_t v, auto lanes) {
    store(fma(exp_minus(load<V>(x + v, lanes), shift), scale, off), dx + v, lanes);
  });
  const S p = exp_minus(x_target, Vec<S>::set(m)).v / l;
  narrow((p - (1 - e) - each) * dloss, dx[target]);
}

template <class T>
GPT2_INLINE void zero_row(T* p, int64_t n) {
  if (n > 0) memset(p, 0, n * sizeof(T));
}

template <class V, class T>
void cross_entropy_fwd(const CrossEntropyFwd& args, const Threads& threads) {
  using S = typename V::scalar;
  const LogitsRows& rows = args.rows;
  const T* logits = static_cast<const T*>(args.logits);
  S *losses = static_cast<S*>(args.losses), *stats = static_cast<S*>(args.stats);
  parallel_ranges(threads, rows.N, 1 + 16384 / rows.V, [=, &rows](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const T* x = logits + row * rows.stride;
      const int64_t target = rows.targets[row];
      S m, l;
      softmax_row<V>(x, rows.V, &m, &l);
      losses[row] = target == rows.ignore_index ? 0 : loss_of<V>(rows, x, target, m, l);
      stats[row] = m;
      stats[rows.N + row] = l;
    }
  });
}

template <class V, class T>
void cross_entropy_bwd(const CrossEntropyBwd& args, const Threads& threads) {
  using S = typename V::scalar;
  const LogitsRows& rows = args.rows;
  const T* logits = static_cast<const T*>(args.logits);
  const S* dlosses = static_cast<const S*>(args.dlosses);
  const S* stats = static_cast<const S*>(args.stats);
  T* dlogits = static_cast<T*>(args.dlogits);
  const int64_t dlosses_stride = args.dlosses_stride, dlogits_stride = args.dlogits_stride;
  parallel_ranges(threads, rows.N, 1 + 16384 / rows.V, [=, &rows](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      T* dx = dlogits + row * dlogits_stride;
      const int64_t target = rows.targets[row];
      if (target == rows.ignore_index) {
        zero_row(dx, rows.V);
      } else {
        softmax_grad_row<V>(rows, logits + row * rows.stride, target, stats[row],
                            stats[rows.N + row], dlosses[row * dlosses_stride], dx);
      }
    }
  });
}

// For a loss gradient of 1, while the row is still in cache; 0 in the columns that pad V.
template <class V, class T>
void cross_entropy_fwd_bwd(const CrossEntropyFwdBwd& args, const Threads& threads) {
  using S = typename V::scalar;
  const LogitsRows& rows = args.rows;
  T* logits = static_cast<T*>(args.logits);
  S* losses = static_cast<S*>(args.losses);
  const int64_t V_padded = args.V_padded;
  parallel_ranges(threads, rows.N, 1 + 16384 / rows.V, [=, &rows](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      T* x = logits + row * rows.stride;
      const int64_t target = rows.targets[row];
      if (target == rows.ignore_index) {
        losses[row] = 0;
        zero_row(x, V_padded);
      } else {
        S m, l;
        softmax_row<V>(x, rows.V, &m, &l);
        losses[row] = loss_of<V>(rows, x, target, m, l);
        softmax_grad_row<V>(rows, x, target, m, l, S(1), x);
        zero_row(x + rows.V, V_padded - rows.V);
      }
    }
  });
}

}  // namespace gpt2::GPT2_ISA
