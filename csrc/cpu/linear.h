// x W^T for a few rows of x, as in decoding: every weight is read from memory once, whose bandwidth
// is the limit. PyTorch's products stay far below it (docs/log.md).
//
//   y[m, n] = scale[n] sum_k x[m, k] W[n, k] + bias[n]
//
// W is x's type T, or int8 in packed blocks: in 64 numbers of a row, byte 2 i + j is number 32 j +
// i, so that a shift or a mask makes 16-bit numbers of them. To make floats of them would take
// longer than memory does; x is made whole numbers instead (Fixed).
//
// Threads share the rows of W. A thread walks kStreams parts of its share side by side: memory
// answers several streams sooner than one. A sum of floats is kept as two, over every second vector
// of k, since one chain of additions would wait for itself. Its order depends on K alone: a row of
// x has the same bits on any number of threads, and whatever rows stand beside it.
#pragma once

#include <math.h>

#include <type_traits>

#include "parallel.h"

namespace gpt2::GPT2_ISA {

// 64 numbers of x as multiples, below 2^13, of a power of two: x = unit (part[0] + 2^-14 part[1] +
// ...). Eight of their products with int8 on top of 16-bit words make a 32-bit sum. One part keeps
// the 11 bits of a 16-bit type, two the 24 of float32, four the 53 of float64.
template <class V, class T>
struct Fixed {
  using S = typename V::scalar;
  static constexpr int kBlock = 64, kBits = 13, kParts = sizeof(T) / 2;
  static constexpr S kFiner = S(1 << (kBits + 1));

  int16_t part[kParts][kBlock];
  S unit;

  void set(const T* from, int64_t n) {
    S x[kBlock];
    V largest = V::set(0), nothing = V::set(0);
    for (int64_t k = 0; k < kBlock; k += V::W) {
      const V v = V::load(from + k, n - k);
      v.store(x + k);
      largest = max(largest, max(v, V::set(0) - v));
      nothing = fma(v, V::set(0), nothing);  // but NaN where a number is not finite
    }
    int exponent = 0;
    frexp(largest.max(), &exponent);
    constexpr int kLeast = sizeof(S) == 4 ? -112 : -1000;  // from where 1 / unit is finite
    const int of_unit = (exponent > kLeast ? exponent : kLeast) - kBits;
    const S per_unit = S(ldexp(1.0, -of_unit));
    unit = S(ldexp(1.0, of_unit - 8)) + nothing.sum();
    constexpr S kRound = sizeof(S) == 4 ? S(0x1.8p23) : S(0x1.8p52);
    for (int i = 0; i < kBlock; ++i) {
      S rest = x[i] * per_unit;
      for (int p = 0; p < kParts; ++p) {
        const S shifted = rest + kRound;  // its lowest bits are the whole number
        part[p][i] = int16_t(bits_of(shifted));
        rest = (rest - (shifted - kRound)) * kFiner;
      }
    }
  }
};

template <class V, class T, class Weight>
struct FewRows {
  using S = typename V::scalar;
  static constexpr int kStreams = 4, kBlock = Fixed<V, T>::kBlock, kVectors = kBlock / V::W;
  static constexpr bool kPacked = std::is_same_v<Weight, int8_t>;
  static constexpr int kTile = V::W >= 16 ? 2 : 1;  // rows of x whose sums fit into registers
  using X = std::conditional_t<kPacked, Fixed<V, T>, S>;
  static_assert(sizeof(Fixed<V, T>) <= Linear::workspace(kBlock) * sizeof(S));

  const Linear& p;
  const X* x;  // (M, K_padded) S, or a Fixed for each 64
  int64_t ld;  // of a row of W
  const Weight* weight;
  const T* bias;
  T* y;

  // y[m + i, n + j step] for i < M, j < N
  template <int M, int N>
  GPT2_INLINE void tile(int64_t m, int64_t n, int64_t step) const {
    V sum[M][N];
    add_up<M, N>(m, weight + n * ld, step * ld, sum);
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < N; ++j) finish(sum[i][j].sum(), m + i, n + j * step);
    }
  }

  // Of rows of W that begin `step` apart.
  template <int M, int N>
  GPT2_INLINE void add_up(int64_t m, const Weight* w, int64_t step, V (&sum)[M][N]) const
    requires kPacked
  {
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < N; ++j) sum[i][j] = V::set(0);
    }
    const int64_t blocks = ld / kBlock;
    const X* x_m = x + m * blocks;
    for (int64_t block = 0; block < blocks; ++block, w += kBlock) {
      for (int j = 0; j < N; ++j) {
        const typename V::Bytes bytes(w + j * step);
        for (int i = 0; i < M; ++i) {
          const X& numbers = x_m[i * blocks + block];
          S unit = numbers.unit;
          for (int p = 0; p < X::kParts; ++p, unit /= X::kFiner) {
            sum[i][j] = fma(bytes.dot(numbers.part[p]), V::set(unit), sum[i][j]);
          }
        }
      }
    }
  }

  template <int M, int N>
  GPT2_INLINE void add_up(int64_t m, const Weight* w, int64_t step, V (&sum)[M][N]) const
    requires(!kPacked)
  {
    V chains[M][N][2];
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < N; ++j) chains[i][j][0] = chains[i][j][1] = V::set(0);
    }
    const int64_t padded = round_up(p.K, kBlock);
    const S* x_m = x + m * padded;
    int64_t k = 0;
    for (; k + kBlock <= ld; k += kBlock) {
#pragma GCC unroll 8
      for (int vector = 0; vector < kVectors; ++vector) {
        const int64_t at = k + vector * V::W;
        for (int j = 0; j < N; ++j) {
          const V w_k = V::load(w + j * step + at);
          for (int i = 0; i < M; ++i) {
            V& to = chains[i][j][vector % 2];
            to = fma(V::load(x_m + i * padded + at), w_k, to);
          }
        }
      }
    }
    for (int chain = 0; k < ld; k += V::W, chain ^= 1) {  // what is left of a row
      for (int j = 0; j < N; ++j) {
        const V w_k = V::load(w + j * step + k, ld - k);
        for (int i = 0; i < M; ++i) {
          chains[i][j][chain] = fma(V::load(x_m + i * padded + k), w_k, chains[i][j][chain]);
        }
      }
    }
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < N; ++j) sum[i][j] = chains[i][j][0] + chains[i][j][1];
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

// wide (M, Linear::workspace(K)) S; y (M, N).
template <class V, class T, class Weight>
void linear(const Linear& p, const void* x, const void* weight, const void* bias, void* wide,
            void* y, const Threads& threads) {
  using F = FewRows<V, T, Weight>;
  auto* to = static_cast<typename F::X*>(wide);
  const int64_t padded = round_up(p.K, F::kBlock);
  const F f{p,
            to,
            F::kPacked ? padded : p.K,
            static_cast<const Weight*>(weight),
            static_cast<const T*>(bias),
            static_cast<T*>(y)};
  for (int64_t m = 0; m < p.M; ++m) {
    const T* from = static_cast<const T*>(x) + m * p.K;
    if constexpr (F::kPacked) {
      for (int64_t k = 0; k < p.K; k += F::kBlock) to++->set(from + k, p.K - k);
    } else {
      for (int64_t k = 0; k < padded; k += V::W) {
        V::load(from + k, p.K - k).store(to + m * padded + k);
      }
    }
  }
  constexpr int64_t kGrainBytes = 1 << 16;  // less is done before another thread has woken up
  const int64_t grain = kGrainBytes / (f.ld * int64_t(sizeof(Weight)) + 1) + 1;
  parallel_ranges(threads, p.N, grain, [&](int64_t n, int64_t end) { f.share(n, end); });
}

}  // namespace gpt2::GPT2_ISA
