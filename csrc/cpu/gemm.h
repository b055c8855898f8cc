// The products inside attention: tiles of C = A B, small enough to stay in registers.
//
//   C[m][n] (+)= sum_k A[m][k] B[k][n]      m < kRows, n < kVectors vectors, k in steps of K
//
// One step loads the vectors of B's row, and for each row of A broadcasts one element and does a
// multiply-add per vector: the accumulators of a tile never leave the registers. A's strides are
// free, so that a transpose costs nothing; B's rows are contiguous vectors, so operands are packed
// once:
//
//   rows      [row][ld]                 an operand A whose k runs along the row
//   panels    [row / NR][k][NR]         an operand B = rows^T: NR = kPanel rows side by side
//   pairs     [row / K][ld][K]          an operand B (or A^T) whose k runs over the rows
//
// The products P are Plain<V>, of V's scalars one by one (K = 1: pairs are rows), or DotBf16
// (dot_bf16.h), of pairs of bfloat16 (K = 2: a panel holds whole pairs).
#pragma once

#include <type_traits>

#include "vec.h"

namespace gpt2::GPT2_ISA {

template <class V_>
struct Plain {
  using V = V_;
  using Element = typename V::scalar;
  static constexpr int64_t K = 1;
  static GPT2_INLINE V load(const Element* b) { return V::load(b); }
  static GPT2_INLINE V broadcast(const Element* a) { return V::set(*a); }
  static GPT2_INLINE V mac(V a, V b, V c) { return fma(a, b, c); }
};

// How elements that are stored as T are multiplied.
template <class V, class T>
struct ProductsOf {
  using type = Plain<V>;
};

constexpr int64_t kRows = 6;  // rows of a tile

// Vectors across a tile. 6 x 2 accumulators, 2 of B and 1 of A: 15 of AVX2's 16 registers. 6 x 4,
// 4 and 1: 29 of AVX-512's 32. One lane takes 6 x 4, too, for loops that a compiler can unroll.
template <class V>
constexpr int64_t kVectors = V::W == 8 ? 2 : 4;

template <class V>
constexpr int64_t kPanel = kVectors<V> * V::W;  // NR: rows in a panel, columns of a tile

GPT2_INLINE int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}
GPT2_INLINE int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}
GPT2_INLINE int64_t at_least(int64_t a, int64_t b) {
  return a > b ? a : b;
}

enum class Into { kSet, kAdd, kRescale };  // C = AB, C += AB, C = alpha[m] C + AB

template <class P>
struct Operands {
  using S = typename P::V::scalar;
  const typename P::Element* a = nullptr;
  int64_t a_row, a_step;  // to the next m, to the next K of k
  const typename P::Element* b = nullptr;
  int64_t b_step, b_strip;  // to the next K of k, to the next kPanel columns
  int64_t steps;            // k / K
  S* c = nullptr;
  int64_t c_row;
  const S* alpha = nullptr;  // per row, for kRescale
};

template <class P, Into into, int R, int N>
void tile(const Operands<P>& x) {
  using V = typename P::V;
  V acc[R][N];
#pragma GCC unroll 8
  for (int m = 0; m < R; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      if constexpr (into == Into::kRescale) {
        acc[m][n] = V::load(x.c + m * x.c_row + n * V::W) * V::set(x.alpha[m]);
      } else {
        acc[m][n] = V::set(0);
      }
    }
  }
  const typename P::Element *a = x.a, *b = x.b;
#pragma GCC unroll 4
  for (int64_t k = 0; k < x.steps; ++k, a += x.a_step, b += x.b_step) {
    decltype(P::load(b)) row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) row[n] = P::load(b + n * V::W * P::K);
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) {
      const auto factor = P::broadcast(a + m * x.a_row);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m][n] = P::mac(factor, row[n], acc[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < R; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      typename V::scalar* c = x.c + m * x.c_row + n * V::W;
      if constexpr (into == Into::kAdd) acc[m][n] = V::load(c) + acc[m][n];
      acc[m][n].store(c);
    }
  }
}

template <class P, Into into, int R, int N>
GPT2_INLINE void tile_of(int64_t rows, int64_t vectors, const Operands<P>& x) {
  if constexpr (R > 1) {
    if (rows < R) return tile_of<P, into, R - 1, N>(rows, vectors, x);
  }
  if constexpr (N > 1) {
    if (vectors < N) return tile_of<P, into, R, N - 1>(rows, vectors, x);
  }
  tile<P, into, R, N>(x);
}

// Up to kRows rows of C, `columns` wide rounded up to whole vectors.
template <class P, Into into>
void product(int64_t rows, int64_t columns, Operands<P> x) {
  using V = typename P::V;
  for (; columns > 0; columns -= kPanel<V>) {
    const int64_t vectors = (at_most(columns, kPanel<V>) + V::W - 1) / V::W;
    tile_of<P, into, kRows, kVectors<V>>(rows, vectors, x);
    x.b += x.b_strip;
    x.c += kPanel<V>;
  }
}

// ---- packing

// Rows of D elements, `stride` apart, to rows of ld; what is beyond D is zero.
template <class P, class T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t D, typename P::Element* to,
               int64_t ld) {
  using V = typename P::V;
  for (int64_t r = 0; r < rows; ++r, from += stride, to += ld) {
    if constexpr (std::is_same_v<T, typename P::Element>) {  // no conversion to float and back
      memcpy(to, from, D * sizeof(T));
      memset(to + D, 0, (ld - D) * sizeof(T));
      continue;
    }
    int64_t d = 0;
    for (; d + V::W <= D; d += V::W) V::load(from + d).store(to + d);
    for (; d < ld; d += V::W) V::load(from + d, D - d).store(to + d);
  }
}

// to[c][r] = from[r][c], by blocks of 8 x 8 where they fit.
template <class Word>
void transpose(const Word* from, int64_t ld, int64_t rows, int64_t columns, Word* to,
               int64_t to_ld) {
  for (int64_t r = 0; r < rows; r += 8) {
    for (int64_t c = 0; c < columns; c += 8) {
      if (r + 8 <= rows && c + 8 <= columns) {
        transpose8(from + r * ld + c, ld, to + c * to_ld + r, to_ld);
        continue;
      }
      for (int64_t i = r; i < at_most(r + 8, rows); ++i) {
        for (int64_t j = c; j < at_most(c + 8, columns); ++j) {
          to[j * to_ld + i] = from[i * ld + j];
        }
      }
    }
  }
}

// Rows [row][ld] to panels [row / NR][k][NR], in words of K elements, `steps` of them. Rows past
// the last, up to a whole panel, are zero.
template <class P>
void pack_panels(const typename P::Element* from, int64_t ld, int64_t rows, int64_t steps,
                 typename P::Element* to) {
  using S = typename P::V::scalar;  // as wide as a word
  static_assert(sizeof(S) == P::K * sizeof(typename P::Element));
  typedef S __attribute__((may_alias)) Word;
  constexpr int64_t NR = kPanel<typename P::V>;
  const Word* word = reinterpret_cast<const Word*>(from);
  for (int64_t r0 = 0; r0 < rows; r0 += NR, word += NR * (ld / P::K)) {
    Word* panel = reinterpret_cast<Word*>(to) + r0 * steps;
    const int64_t n = at_most(NR, rows - r0);
    transpose(word, ld / P::K, n, steps, panel, NR);
    for (int64_t k = 0; k < steps && n < NR; ++k) {
      for (int64_t r = n; r < NR; ++r) panel[k * NR + r] = 0;
    }
  }
}

// Whether rows of D elements, `stride` apart, are operands A as they lie, and words of K elements.
template <class P, class T>
bool in_place(const T* from, int64_t stride, int64_t D) {
  return std::is_same_v<T, typename P::Element> && D % P::K == 0 && stride % P::K == 0 &&
         reinterpret_cast<uintptr_t>(from) % (P::K * sizeof(T)) == 0;
}

// The same to panels; `rows_of` is room for them as rows.
template <class P, class T>
void pack_panels_of(const T* from, int64_t stride, int64_t rows, int64_t D,
                    typename P::Element* rows_of, int64_t ld, int64_t steps,
                    typename P::Element* to) {
  if constexpr (std::is_same_v<T, typename P::Element>) {
    if (in_place<P>(from, stride, D)) return pack_panels<P>(from, stride, rows, steps, to);
  }
  pack_rows<P>(from, stride, rows, D, rows_of, ld);
  pack_panels<P>(rows_of, ld, rows, steps, to);
}

// Rows of D elements, `stride` apart, to pairs [row / K][ld][K]; what is beyond D is zero, and so
// is the partner of an odd last row.
template <class P>
void interleave(const typename P::Element* from, int64_t stride, int64_t rows, int64_t D,
                typename P::Element* to, int64_t ld) {
  static_assert(P::K == 2);
  using V = typename P::V;
  for (int64_t r = 0; r < rows; r += 2, from += 2 * stride, to += 2 * ld) {
    const auto* partner = r + 1 < rows ? from + stride : nullptr;
    int64_t d = 0;
    for (; d + V::W <= D && partner; d += V::W) {
      P::store_pairs(from + d, partner + d, to + 2 * d);
    }
    for (; d < D; ++d) {
      to[2 * d] = from[d];
      to[2 * d + 1] = partner ? partner[d] : typename P::Element{};
    }
    memset(to + 2 * D, 0, 2 * (ld - D) * sizeof(*to));
  }
}

// Rows of D elements, `stride` apart, to pairs; `rows_of` is room for them as rows.
template <class P, class T>
void pack_pairs(const T* from, int64_t stride, int64_t rows, int64_t D,
                typename P::Element* rows_of, typename P::Element* to, int64_t ld) {
  if constexpr (P::K == 1) {
    pack_rows<P>(from, stride, rows, D, to, ld);
  } else if constexpr (std::is_same_v<T, typename P::Element>) {
    interleave<P>(from, stride, rows, D, to, ld);
  } else {
    pack_rows<P>(from, stride, rows, D, rows_of, ld);
    interleave<P>(rows_of, ld, rows, ld, to, ld);
  }
}

}  // namespace gpt2::GPT2_ISA
