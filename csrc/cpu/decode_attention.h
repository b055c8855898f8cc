// Attention of one new token per sequence: q (B, 1, H, D) over the first lengths[b] rows of a
// cache.
//
//   s[j] = q . k[j]      p = softmax(softmax_scale s)      o = p v
//
// The cache is read once, in splits of kSplit keys that the threads share; a split leaves its
// maximum m, l = sum p and acc = p v, and the splits of a head are then added in their order:
//
//   o = sum_i a_i acc_i / sum_i a_i l_i,    a_i = exp(softmax_scale (m_i - m)),    m = max m_i
#pragma once

#include "attention_common.h"

namespace gpt2::GPT2_ISA {

template <class V, class T>
struct DecodePass {
  using S = typename V::scalar;
  static constexpr int64_t kSplit = 256;

  const DecodeAttention& x;
  const int64_t splits = (x.T + kSplit - 1) / kSplit;
  const int64_t ld = round_up(x.D, V::W), part = ld + round_up(2, V::W);  // acc, m, l
  S* parts;                                                               // (B H, splits, part)

  GPT2_INLINE S dot(const S* q, const T* k) const {
    V even = V::set(0), odd = V::set(0);
    int64_t d = 0;
    for (; d + 2 * V::W <= x.D; d += 2 * V::W) {
      even = fma(V::load(q + d), V::load(k + d), even);
      odd = fma(V::load(q + d + V::W), V::load(k + d + V::W), odd);
    }
    for (; d < x.D; d += V::W) even = fma(V::load(q + d), V::load(k + d, x.D - d), even);
    return (even + odd).sum();
  }

  // acc += p[j] v[j] over n keys, `N` vectors of D at a time in registers
  template <int N>
  GPT2_INLINE void gather(const S* p, const T* v, int64_t n, int64_t d, S* acc) const {
    V sum[N];
    for (int i = 0; i < N; ++i) sum[i] = V::set(0);
    for (int64_t j = 0; j < n; ++j, v += x.v.time) {
      for (int i = 0; i < N; ++i) {
        const int64_t at = d + i * V::W;
        const V row = at + V::W <= x.D ? V::load(v + at) : V::load(v + at, x.D - at);
        sum[i] = fma(V::set(p[j]), row, sum[i]);
      }
    }
    for (int i = 0; i < N; ++i) sum[i].store(acc + d + i * V::W);
  }

  // Of n keys from j0 on.
  void split(int64_t bh, int64_t j0, int64_t n, S* to) const {
    const int64_t b = bh / x.H, h = bh % x.H;
    const T* k = head_of<T>(x.k, b, h) + j0 * x.k.time;
    const T* v = head_of<T>(x.v, b, h) + j0 * x.v.time;
    alignas(64) S q[kMaxHead], s[kSplit];
    const T* from = head_of<T>(x.q, b, h);
    for (int64_t d = 0; d < ld; d += V::W) V::load(from + d, x.D - d).store(q + d);

    for (int64_t j = 0; j < n; ++j) s[j] = dot(q, k + j * x.k.time);
    for (int64_t j = n; j < round_up(n, V::W); ++j) s[j] = -S(INFINITY);
    V top = V::set(kLowest<S>), sum = V::set(0);
    for (int64_t j = 0; j < n; j += V::W) top = max(top, V::load(s + j));
    const S scale = S(x.softmax_scale * kLog2E), m = top.max();
    for (int64_t j = 0; j < n; j += V::W) {
      const V p = exp2_below((V::load(s + j) - V::set(m)) * V::set(scale));
      sum = sum + p;
      p.store(s + j);
    }
    int64_t d = 0;
    for (; d + 4 * V::W <= ld; d += 4 * V::W) gather<4>(s, v, n, d, to);
    for (; d < ld; d += V::W) gather<1>(s, v, n, d, to);
    to[ld] = m;
    to[ld + 1] = sum.sum();
  }

  void combine(int64_t bh, T* o) const {
    const int64_t b = bh / x.H, used = (x.keys(b) + kSplit - 1) / kSplit;
    S* first = parts + bh * splits * part;
    S m = kLowest<S>, l = 0;
    for (int64_t i = 0; i < used; ++i) {
      const S m_i = first[i * part + ld];
      m = m_i > m ? m_i : m;
    }
    for (int64_t i = 0; i < used; ++i) {
      S* acc = first + i * part;
      const S factor = exp2_below(Vec<S>{(acc[ld] - m) * S(x.softmax_scale * kLog2E)}).v;
      l += factor * acc[ld + 1];
      for (int64_t d = 0; d < ld; d += V::W) {
        const V gathered = i == 0 ? V::set(0) : V::load(first + d);
        fma(V::load(acc + d), V::set(factor), gathered).store(first + d);
      }
    }
    // A sequence without keys gives zeros.
    for (int64_t d = 0; d < ld && used == 0; d += V::W) V::set(0).store(first + d);
    const S scale = !x.has(x.lengths[b]) ? S(NAN) : used == 0 ? S(0) : 1 / l;
    store_row(first, V::set(scale), o + bh * x.D, x.D);
  }
};

// Returns the bytes of workspace that it needs, and does nothing else where workspace is null.
template <class V, class T>
int64_t decode_attention(const DecodeAttention& x, const Threads& threads) {
  using F = DecodePass<V, T>;
  using S = typename F::S;
  const F f{.x = x, .parts = static_cast<S*>(x.workspace)};
  const int64_t heads = x.B * x.H;
  if (!x.workspace) return heads * at_least(f.splits, 1) * f.part * int64_t(sizeof(S));
  parallel_workers(threads, heads * f.splits, [&](int64_t, Queue& splits) {
    for (int64_t n; (n = splits.next()) >= 0;) {
      const int64_t bh = n / f.splits, j0 = n % f.splits * F::kSplit;
      const int64_t keys = x.keys(bh / x.H);  // read once: another thread may change it
      if (j0 < keys) f.split(bh, j0, at_most(F::kSplit, keys - j0), f.parts + n * f.part);
    }
  });
  parallel_ranges(threads, heads, 64, [&](int64_t bh, int64_t end) {
    for (; bh < end; ++bh) f.combine(bh, static_cast<T*>(x.o));
  });
  return 0;
}

}  // namespace gpt2::GPT2_ISA
