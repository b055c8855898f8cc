// x W^T for a few rows of x, as in decoding: every weight is read from memory once, whose bandwidth
// is the limit. PyTorch's products stay far below it (docs/log.md).
//
//   y[m, n] = scale[n] sum_k x[m, k] W[n, k] + bias[n]
//
// W is x's type T, or int8 in packed blocks: in 64 numbers of a row, byte 4 i + j is number 16 j +
// i, so that a shift makes a vector of them out of words, where widening bytes would take longer
// than memory.
//
// Threads share the rows of W. A thread walks kStreams parts of its share side by side: memory
// answers several streams sooner than one. A sum is kept as two, over every second vector of k,
// since one chain of additions would wait for itself. Its order depends on K alone: a row of x has
// the same bits on any number of threads, and whatever rows stand beside it.
#pragma once

#include <type_traits>
#include <utility>

#include "parallel.h"

namespace gpt2::GPT2_ISA {

template <class V, class T, class Weight>
struct FewRows {
  using S = typename V::scalar;
  static constexpr int kStreams = 4, kBlock = 64, kVectors = kBlock / V::W;
  static constexpr bool kPacked = std::is_same_v<Weight, int8_t>;
  static constexpr int kTile = V::W >= 16 ? 2 : 1;  // rows of x whose sums fit into registers

  const Gemv& p;
  const S* x;  // (M, K_padded)
  int64_t ld;  // of a row of W
  const Weight* weight;
  const T* bias;
  T* y;

  int64_t padded() const { return round_up(p.K, kBlock); }

  // The J-th vector of a block of W.
  template <int J>
  static GPT2_INLINE V vector(const Weight* block) {
    if constexpr (kPacked) {
      return V::template packed<J>(block);
    } else {
      return V::load(block + J * V::W);
    }
  }

  // y[m + i, n + j step] for i < M, j < N
  template <int M, int N>
  GPT2_INLINE void tile(int64_t m, int64_t n, int64_t step) const {
    V sum[M][N][2];
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < N; ++j) sum[i][j][0] = sum[i][j][1] = V::set(0);
    }
    const S* x_m = x + m * padded();
    const Weight* w_n = weight + n * ld;
    int64_t k = 0;
    for (; k + kBlock <= ld; k += kBlock) {
      [&]<int... J>(std::integer_sequence<int, J...>) {
        (multiply<M, N, J>(x_m + k, w_n + k, step * ld, sum), ...);
      }(std::make_integer_sequence<int, kVectors>{});
    }
    if constexpr (!kPacked) {  // what is left of a row
      for (int chain = 0; k < ld; k += V::W, chain ^= 1) {
        for (int j = 0; j < N; ++j) {
          const V w = V::load(w_n + j * step * ld + k, ld - k);
          for (int i = 0; i < M; ++i) {
            sum[i][j][chain] = fma(V::load(x_m + i * padded() + k), w, sum[i][j][chain]);
          }
        }
      }
    }
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < N; ++j) {
        finish((sum[i][j][0] + sum[i][j][1]).sum(), m + i, n + j * step);
      }
    }
  }

  template <int M, int N, int J>
  GPT2_INLINE void multiply(const S* x_k, const Weight* w_k, int64_t step,
                            V (&sum)[M][N][2]) const {
    for (int j = 0; j < N; ++j) {
      const V w = vector<J>(w_k + j * step);
      for (int i = 0; i < M; ++i) {
        V& to = sum[i][j][J % 2];
        to = fma(V::load(x_k + i * padded() + J * V::W), w, to);
      }
    }
  }

  GPT2_INLINE void finish(S sum, int64_t m, int64_t n) const {
    if (p.scale) sum *= S(p.scale[n]);
    if (bias) sum += S(widen(bias[n]));
    narrow(sum, y[m * p.N + n]);
  }

  // N rows of W, which stay in cache while all of x passes.
  template <int N>
  GPT2_INLINE void rows(int64_t n, int64_t step) const {
    int64_t m = 0;
    for (; m + kTile <= p.M; m += kTile) tile<kTile, N>(m, n, step);
    for (; m < p.M; ++m) tile<1, N>(m, n, step);
  }

  void share(int64_t n, int64_t end) const {
    const int64_t part = (end - n) / kStreams;
    for (int64_t i = 0; i < part; ++i) rows<kStreams>(n + i, part);
    for (n += part * kStreams; n < end; ++n) rows<1>(n, 0);
  }
};

// wide (M, K rounded up to 64) S, x in the units of W; y (M, N).
template <class V, class T, class Weight>
void gemv(const Gemv& p, const void* x, const void* weight, const void* bias, void* wide, void* y,
          const Threads& threads) {
  using F = FewRows<V, T, Weight>;
  using S = typename F::S;
  S* to = static_cast<S*>(wide);
  const int64_t padded = round_up(p.K, F::kBlock);
  const F f{p,
            to,
            F::kPacked ? padded : p.K,
            static_cast<const Weight*>(weight),
            static_cast<const T*>(bias),
            static_cast<T*>(y)};
  const V unit = V::set(F::kPacked ? 1 / V::kPackedUnit : 1);
  for (int64_t m = 0; m < p.M; ++m) {
    const T* from = static_cast<const T*>(x) + m * p.K;
    for (int64_t k = 0; k < padded; k += V::W)
      (V::load(from + k, p.K - k) * unit).store(to + m * padded + k);
  }
  constexpr int64_t kGrainBytes = 1 << 16;  // less is done before another thread has woken up
  const int64_t grain = kGrainBytes / (f.ld * int64_t(sizeof(Weight)) + 1) + 1;
  parallel_ranges(threads, p.N, grain, [&](int64_t n, int64_t end) { f.share(n, end); });
}

}  // namespace gpt2::GPT2_ISA
