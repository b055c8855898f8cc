// Loops over a row, a vector at a time, and over blocks of rows.
//
// f(c, lanes) handles the columns [c, c + W). lanes is All for a whole vector; for the tail it is
// the number of valid lanes. The other lanes load as 0 and are not stored.
#pragma once

#include "parallel.h"
#include "vec_pair.h"

namespace gpt2::GPT2_ISA {

struct All {};

template <class V, class T>
GPT2_INLINE V load(const T* p, All) {
  return V::load(p);
}
template <class V, class T>
GPT2_INLINE V load(const T* p, int64_t n) {
  return V::load(p, n);
}
template <class V, class T>
GPT2_INLINE void store(V v, T* p, All) {
  v.store(p);
}
template <class V, class T>
GPT2_INLINE void store(V v, T* p, int64_t n) {
  v.store(p, n);
}
// Replaces the lanes of v past the end by other.
template <class V>
GPT2_INLINE V inside(V v, V, All) {
  return v;
}
template <class V>
GPT2_INLINE V inside(V v, V other, int64_t n) {
  return first(n, v, other);
}

template <class V, class F>
GPT2_INLINE void for_columns(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + V::W <= C; c += V::W) f(c, All{});
  if (c < C) f(c, C - c);
}

// Prefetches one vector's columns. Past the last row this has no effect.
template <class V, class T>
GPT2_INLINE void prefetch(const T* p) {
  for (int64_t i = 0; i < V::W; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 0);
}
template <class V, class T>
GPT2_INLINE void prefetch_to_write(T* p) {
  for (int64_t i = 0; i < V::W; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 1);
}

// The sum of f(c, lanes) over all columns. A is V, or a type that is added in the same way. Each
// block is summed first, because rounding errors grow with the length of a chain of additions.
template <class V, class A, class F>
GPT2_INLINE A sum_columns(int64_t C, A zero, const F& f) {
  constexpr int64_t kBlock = 32 * V::W;
  A sum = zero;
  for (int64_t start = 0; start < C; start += kBlock) {
    A block = zero;
    for_columns<V>(C - start < kBlock ? C - start : kBlock,
                   [&](int64_t c, auto lanes) { block = block + f(start + c, lanes); });
    sum = sum + block;
  }
  return sum;
}

// Two sums at a time.
template <class V>
struct Pair {
  V a, b;
  friend GPT2_INLINE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
};

// Gradients of parameters that all N rows share. Block i adds up its rows in order, in row i of
// `partial`; sum_partial adds the blocks. The blocks depend only on N, so the bits do not depend on
// the number of threads.
struct RowBlocks {
  int64_t N;
  int64_t rows = N < 32 * kMaxPartial ? 32 : (N + kMaxPartial - 1) / kMaxPartial;
  int64_t count = (N + rows - 1) / rows;
  int64_t end(int64_t block) const { return (block + 1) * rows < N ? (block + 1) * rows : N; }
};

// f(begin, end, partial row) for every block of rows; partial (blocks.count, C) is set to 0 before.
template <class S, class F>
void for_row_blocks(RowBlocks blocks, int64_t C, S* partial, const Threads& threads, const F& f) {
  parallel_ranges(threads, blocks.count, 1, [&](int64_t block, int64_t last) {
    for (; block < last; ++block) {
      memset(partial + block * C, 0, C * sizeof(S));
      f(block * blocks.rows, blocks.end(block), partial + block * C);
    }
  });
}

// Scalar: out[c] = sum_i partial[i][c]
template <class V, class S>
void sum_partial(RowBlocks blocks, int64_t C, const S* partial, S* out, const Threads& threads) {
  constexpr int64_t kStrip = 256;
  parallel_ranges(threads, (C + kStrip - 1) / kStrip, 4, [&](int64_t strip, int64_t last) {
    const int64_t begin = strip * kStrip, end = last * kStrip < C ? last * kStrip : C;
    for_columns<V>(end - begin, [&](int64_t c, auto lanes) {
      V sum = V::set(0);
      for (int64_t i = 0; i < blocks.count; ++i) {
        sum = sum + load<V>(partial + i * C + begin + c, lanes);
      }
      store(sum, out + begin + c, lanes);
    });
  });
}

}  // namespace gpt2::GPT2_ISA
