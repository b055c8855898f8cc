// y = x W^T + bias for a few rows of x, as in decoding.
//
//   y[m, n] = scale[n] sum_k x[m, k] W[n, k] + bias[n]
//
// Every weight is read from memory once, and the memory's bandwidth is the limit. Threads share the
// rows of W. Each thread reads kStreams parts of its share concurrently, because memory serves
// several streams faster than one.
//
// W has x's type T, or it is int8. An int8 row is packed in blocks of 64 numbers as 32 words of two
// bytes, and byte j of word i is number 32 j + i: a shift makes 16-bit numbers of the low bytes, a
// mask of the high ones. Converting bytes to floats would take longer than reading them. So x is
// converted to fixed point, once for all rows of W, and one instruction multiplies 16-bit numbers
// and adds pairs of products.
//
// A sum of floats over k is kept as two chains, of even and of odd vectors: in one chain every
// addition would wait for the one before. The order of additions depends on K alone. A row of x
// therefore has the same bits on any number of threads and beside any other rows.
//
//   M rows of x   N rows of W   K features
#pragma once

#include <math.h>

#include <type_traits>

#include "parallel.h"

namespace gpt2::GPT2_ISA {

// 64 numbers of x in fixed point:
//
//   x[i] = 2^8 unit sum_p part[p][i] / kFiner^p      |part| < 2^kBits
//
// unit is a power of two, chosen for the largest of the 64. The factor 2^8 undoes that of the
// weights, which stand in the upper byte of 16 bits. A lane then adds eight products before it
// leaves int32: 8 * 2^13 * 127 * 2^8 < 2^31. One part keeps the 11 bits of a 16-bit type, two parts
// the 24 of float32, four the 53 of float64.
template <class V, class T>
struct FixedPoint {
  using S = typename V::scalar;
  static constexpr int kBlock = 64, kBits = 13, kParts = sizeof(T) / 2;
  static constexpr S kFiner = S(1 << (kBits + 1));

  int16_t part[kParts][kBlock];
  S unit;  // NaN where a number is not finite

  // Of the first n numbers; the rest of the block is 0.
  void set(const T* from, int64_t n) {
    S x[kBlock];
    V largest = V::set(0), nothing = V::set(0);
    for (int64_t k = 0; k < kBlock; k += V::W) {
      const V v = V::load(from + k, n - k);
      v.store(x + k);
      largest = max(largest, max(v, V::set(0) - v));
      nothing = fma(v, V::set(0), nothing);  // 0, but NaN where a number is not finite
    }
    // |x| < 2^exponent = 2^kBits / per_unit
    int exponent = 0;
    frexp(largest.max(), &exponent);
    constexpr int kLeast = sizeof(S) == 4 ? -112 : -1000;  // from where 1 / unit is finite
    const int of_unit = (exponent > kLeast ? exponent : kLeast) - kBits;
    const S per_unit = S(ldexp(1.0, -of_unit));
    unit = S(ldexp(1.0, of_unit - 8)) + nothing.sum();
    // part[p] = round(rest); the rounding error becomes the rest for the next part.
    constexpr S kRound = sizeof(S) == 4 ? S(0x1.8p23) : S(0x1.8p52);
    for (int i = 0; i < kBlock; ++i) {
      S rest = x[i] * per_unit;
      for (int p = 0; p < kParts; ++p) {
        const S shifted = rest + kRound;  // rounds to a whole number, in the lowest bits
        part[p][i] = int16_t(bits_of(shifted));
        rest = (rest - (shifted - kRound)) * kFiner;
      }
    }
  }
};

template <class V, class T, class Weight>
struct FewRows {
  using S = typename V::scalar;
  static constexpr int kStreams = 4, kBlock = FixedPoint<V, T>::kBlock, kVectors = kBlock / V::W;
  static constexpr bool kPacked = std::is_same_v<Weight, int8_t>;
  static constexpr int kTile = V::W >= 16 ? 2 : 1;  // rows of x whose sums fit into registers
  using X = std::conditional_t<kPacked, FixedPoint<V, T>, S>;
  static_assert(sizeof(FixedPoint<V, T>) <= Linear::workspace_size(kBlock) * sizeof(S));

  const Linear& p;
  const X* x;  // (M, K rounded up to kBlock) S; packed, a FixedPoint for each kBlock
  int64_t ld;  // of a row of W
  const Weight* weight;
  const T* bias;
  T* y;

  // Rows [n, end) of W: one part per stream, then the remaining rows.
  void share(int64_t n, int64_t end) const {
    const int64_t part = (end - n) / kStreams;
    for (int64_t i = 0; i < part; ++i) rows<kStreams>(n + i, part);
    for (n += part * kStreams; n < end; ++n) rows<1>(n, 0);
  }

  // N rows of W, `step` apart; they stay in cache while all of x passes.
  template <int N>
  GPT2_INLINE void rows(int64_t n, int64_t step) const {
    int64_t m = 0;
    for (; m + kTile <= p.M; m += kTile) tile<kTile, N>(m, n, step);
    for (; m < p.M; ++m) tile<1, N>(m, n, step);
  }

  // y[m + i, n + j step] for i < M, j < N
  template <int M, int N>
  GPT2_INLINE void tile(int64_t m, int64_t n, int64_t step) const {
    V sum[M][N];
    dot_products<M, N>(m, weight + n * ld, step * ld, sum);
    for (int i = 0; i < M; ++i) {
      for (int j = 0; j < N; ++j) finish(sum[i][j].sum(), m + i, n + j * step);
    }
  }

  GPT2_INLINE void finish(S sum, int64_t m, int64_t n) const {
    if (p.scale) sum *= S(p.scale[n]);
    if (bias) sum += S(widen(bias[n]));
    narrow(sum, y[m * p.N + n]);
  }

  // int8: sum[i][j] = sum over blocks of unit (whole numbers of x . bytes of W)
  template <int M, int N>
  GPT2_INLINE void dot_products(int64_t m, const Weight* w, int64_t step, V (&sum)[M][N]) const
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

  // Floats: sum[i][j] = even chain + odd chain, each a sum of x[k] w[k] over its vectors of k
  template <int M, int N>
  GPT2_INLINE void dot_products(int64_t m, const Weight* w, int64_t step, V (&sum)[M][N]) const
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
};

// Row m of x as X, padded with zeros to whole blocks.
template <class F, class V, class T>
void convert_row(const Linear& p, int64_t m, typename F::X* to) {
  const T* from = static_cast<const T*>(p.x) + m * p.K;
  const int64_t padded = round_up(p.K, F::kBlock);
  if constexpr (F::kPacked) {
    to += m * (padded / F::kBlock);
    for (int64_t k = 0; k < p.K; k += F::kBlock) to++->set(from + k, p.K - k);
  } else {
    for (int64_t k = 0; k < padded; k += V::W) {
      V::load(from + k, p.K - k).store(to + m * padded + k);
    }
  }
}

template <class V, class T, class Weight>
void linear(const Linear& p, const Threads& threads) {
  using F = FewRows<V, T, Weight>;
  auto* x = static_cast<typename F::X*>(p.workspace);
  const int64_t padded = round_up(p.K, F::kBlock);
  const F f{p,
            x,
            F::kPacked ? padded : p.K,
            static_cast<const Weight*>(p.weight),
            static_cast<const T*>(p.bias),
            static_cast<T*>(p.y)};
  for (int64_t m = 0; m < p.M; ++m) convert_row<F, V, T>(p, m, x);
  constexpr int64_t kGrainBytes = 1 << 16;  // a smaller share ends before another thread wakes up
  const int64_t grain = kGrainBytes / (f.ld * int64_t(sizeof(Weight)) + 1) + 1;
  parallel_ranges(threads, p.N, grain, [&](int64_t n, int64_t end) { f.share(n, end); });
}

}  // namespace gpt2::GPT2_ISA
