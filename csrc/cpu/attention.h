// Causal attention, one (batch, head) at a time, in blocks that stay in cache.
//
//   s[i, j] = q[i] . k[j]                     j <= i + Tk - Tq
//   p = softmax(softmax_scale s)    o = p v    lse = log sum exp(softmax_scale s)
//
// The softmax is online: when a block of keys raises a row's maximum, the row's sums l = sum p and
// acc = p v are multiplied by exp(m_old - m_new). Only kRows x kKeys scores exist at a time.
// Exponentials are powers of two, with log2(e) folded into the scale. m is subtracted before
// scaling: for huge scores a fused s * scale - m would miss the maximum by more than an exponent
// can hold.
//
// A tile of kRows queries is clipped at the diagonal: it multiplies up to its last query's last
// key, rounded up to whole vectors. Blocks do not depend on the number of threads, so neither do
// the bits.
#pragma once

#include "attention_common.h"

namespace gpt2::GPT2_ISA {

constexpr int64_t kKeys = 256;    // keys per block of the forward: whole panels, pairs and counters
constexpr int64_t kQueries = 96;  // queries per block: whole tiles

template <class P, class T>
struct AttentionForward {
  using V = typename P::V;
  using S = typename V::scalar;
  using E = typename P::Element;

  // A head's keys and values, packed.
  struct Head {
    E *k_panels, *v_pairs;
    Head(const AttentionForward& f, Arena& arena)
        : k_panels(arena.template take<E>(f.packed.panels(f.x.Tk))),
          v_pairs(arena.template take<E>(f.packed.rows(f.x.Tk))) {}
  };

  // One worker's buffers: a block of queries, and scratch space for packing.
  struct Block {
    E* q;                 // (kQueries, ld)
    S *acc, *m, *l;       // (kQueries, ld), (kQueries), (kQueries)
    S *s, *keep, *alpha;  // (kRows, kKeys), (kKeys), (kRows rounded up to a vector)
    E* p;                 // (kRows, kKeys)
    E* rows;              // (kPackRows, ld): k or v on the way
    Block(const AttentionForward& f, Arena& arena)
        : q(arena.template take<E>(kQueries * f.packed.ld)),
          acc(arena.template take<S>(kQueries * f.packed.ld)),
          m(arena.template take<S>(kQueries)),
          l(arena.template take<S>(kQueries)),
          s(arena.template take<S>(kRows * kKeys)),
          keep(arena.template take<S>(kKeys)),
          alpha(arena.template take<S>(round_up(kRows, V::W))),
          p(arena.template take<E>(kRows * kKeys)),
          rows(arena.template take<E>(f.packed.rows(kPackRows))) {}
  };

  static constexpr int64_t kPackRows = 4 * kPanel<V>;

  const Attention& x;
  T* o;
  S* lse;
  const Packed<P> packed{x.D};
  const Dropout dropout{x.dropout_p, x.seed ? *x.seed : 0};
  const S scale_log2 = S(x.softmax_scale * kLog2E);

  // Keys and values [begin, end) of a head; begin is at a panel.
  void pack(int64_t bh, int64_t begin, int64_t end, const Head& head, const Block& block) const {
    const T* k = head_of<T>(x.k, bh / x.H, bh % x.H) + begin * x.k.time;
    const T* v = head_of<T>(x.v, bh / x.H, bh % x.H) + begin * x.v.time;
    for (int64_t j = begin; j < end; j += kPackRows) {
      const int64_t n = at_most(kPackRows, end - j);
      pack_panels_of<P>(k, x.k.time, n, x.D, block.rows, packed.ld, packed.steps,
                        head.k_panels + j * packed.steps * P::K);
      pack_pairs<P>(v, x.v.time, n, x.D, block.rows, head.v_pairs + j * packed.ld, packed.ld);
      k += kPackRows * x.k.time;
      v += kPackRows * x.v.time;
    }
  }

  // Queries [i0, i0 + kQueries) of a head.
  void queries(int64_t bh, int64_t i0, const Head& head, const Block& block) const {
    const int64_t b = bh / x.H, h = bh % x.H, rows = at_most(kQueries, x.Tq - i0);
    const int64_t ld = packed.ld, sees = i0 + 1 + x.Tk - x.Tq;  // keys that the first query sees
    const T* from = head_of<T>(x.q, b, h) + i0 * x.q.time;
    const E* q = block.q;
    int64_t q_row = ld;
    if (in_place<P>(from, x.q.time, x.D)) {
      q = reinterpret_cast<const E*>(from);
      q_row = x.q.time;
    } else {
      pack_rows<P>(from, x.q.time, rows, x.D, block.q, ld);
    }
    for (int64_t r = 0; r < rows; ++r) {
      block.m[r] = kLowest<S>;
      block.l[r] = 0;
    }

    for (int64_t j0 = 0; j0 < sees + rows - 1; j0 += kKeys) {
      for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
        const int64_t n = at_most(kRows, rows - r0);
        const int64_t keys = at_most(kKeys, sees + r0 + n - 1 - j0);
        if (keys <= 0) continue;  // the whole tile is above the diagonal
        // s = q k^T
        product<P, Into::kSet>(n, keys,
                               {.a = q + r0 * q_row,
                                .a_row = q_row,
                                .a_step = P::K,
                                .b = head.k_panels + j0 * packed.steps * P::K,
                                .b_step = kPanel<V> * P::K,
                                .b_strip = kPanel<V> * P::K * packed.steps,
                                .steps = packed.steps,
                                .c = block.s,
                                .c_row = kKeys});
        softmax(bh, i0 + r0, n, j0, sees + r0 - j0, keys, r0, block);
        // acc = alpha acc + p v
        const Operands<P> values = {.a = block.p,
                                    .a_row = kKeys,
                                    .a_step = P::K,
                                    .b = head.v_pairs + j0 * ld,
                                    .b_step = ld * P::K,
                                    .b_strip = kPanel<V> * P::K,
                                    .steps = (keys + P::K - 1) / P::K,
                                    .c = block.acc + r0 * ld,
                                    .c_row = ld,
                                    .alpha = block.alpha};
        if (j0 == 0) {
          product<P, Into::kSet>(n, ld, values);
        } else {
          product<P, Into::kRescale>(n, ld, values);
        }
      }
    }

    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = i0 + r;
      const V factor = V::set(S(dropout.scale) / block.l[r]);
      store_row(block.acc + r * ld, factor, o + ((b * x.Tq + i) * x.H + h) * x.D, x.D);
      // The same rounded scale as in p: the backward recomputes p from lse.
      lse[bh * x.Tq + i] = block.m[r] * scale_log2 * S(kLn2) + S(__builtin_log(block.l[r]));
    }
  }

  // Turns a tile of scores into p = exp(scale (s - m)), and updates m, l and alpha. Query i + r
  // sees the first visible + r keys of the block; p of the tile's other keys becomes zero.
  GPT2_INLINE void softmax(int64_t bh, int64_t i, int64_t n, int64_t j0, int64_t visible,
                           int64_t keys, int64_t row, const Block& block) const {
    S *m = block.m + row, *l = block.l + row;
    const V lowest = V::set(kLowest<S>), scale = V::set(scale_log2);
    for (int64_t r = 0; r < n; ++r) {
      const S* s = block.s + r * kKeys;
      const int64_t sees = at_most(kKeys, visible + r);
      V top = lowest;
      int64_t j = 0;
      for (; j + V::W <= sees; j += V::W) top = max(top, V::load(s + j));
      if (j < sees) top = max(top, first(sees - j, V::load(s + j), lowest));
      const S m_old = m[r], highest = top.max();
      m[r] = highest > m_old ? highest : m_old;
      block.alpha[r] = (m_old - m[r]) * scale_log2;
    }
    for (int64_t r = 0; r < n; r += V::W) {
      exp2_below(V::load(block.alpha + r)).store(block.alpha + r);
    }
    for (int64_t r = 0; r < n; ++r) {
      const S* s = block.s + r * kKeys;
      E* p = block.p + r * kKeys;
      const int64_t sees = at_most(kKeys, visible + r);
      if (dropout.active() && sees > 0) {
        dropout.keep(bh, i + r, j0, round_up(sees, V::W), block.keep);
      }
      V sum = V::set(0);
      const V m_r = V::set(m[r]);
      int64_t j = 0;
      const auto power_of = [&](V power) {
        sum = sum + power;
        if (dropout.active()) power = power * V::load(block.keep + j);
        power.store(p + j);
      };
      for (; j + V::W <= sees; j += V::W) {
        power_of(exp2_below((V::load(s + j) - m_r) * scale));
      }
      if (j < sees) {
        power_of(first(sees - j, exp2_below((V::load(s + j) - m_r) * scale), V::set(0)));
        j += V::W;
      }
      for (; j < round_up(keys, V::W); j += V::W) V::set(0).store(p + j);
      l[r] = l[r] * block.alpha[r] + sum.sum();
    }
  }
};

// Returns the bytes of workspace that it needs, and does nothing else where workspace is null.
template <class P, class T>
int64_t attention_fwd(const AttentionFwd& args, const Threads& threads) {
  using F = AttentionForward<P, T>;
  const Attention& x = args.problem;
  const F f{x, static_cast<T*>(args.o), static_cast<typename F::S*>(args.lse)};
  const bool shared = share_heads(x, threads, 10, 11);  // shared, packing is a step of its own
  const int64_t n_heads = x.B * x.H,
                packed_heads = shared ? n_heads : at_most(n_heads, threads.count);
  const Layout<typename F::Head, typename F::Block, F> memory(f, args.workspace, packed_heads);
  if (!args.workspace) return memory.size(threads.count);

  if (!shared) {
    parallel_workers(threads, n_heads, [&](int64_t worker, Queue& heads) {
      const auto head = memory.head(worker);
      const auto block = memory.block(worker);
      for (int64_t bh; (bh = heads.next()) >= 0;) {
        f.pack(bh, 0, x.Tk, head, block);
        for (int64_t i = 0; i < x.Tq; i += kQueries) f.queries(bh, i, head, block);
      }
    });
    return 0;
  }
  const int64_t parts = (x.Tk + F::kPackRows - 1) / F::kPackRows;
  parallel_workers(threads, n_heads * parts, [&](int64_t worker, Queue& packs) {
    const auto block = memory.block(worker);
    for (int64_t n; (n = packs.next()) >= 0;) {
      const int64_t begin = n % parts * F::kPackRows;
      f.pack(n / parts, begin, at_most(begin + F::kPackRows, x.Tk), memory.head(n / parts), block);
    }
  });
  const int64_t blocks = (x.Tq + kQueries - 1) / kQueries;
  parallel_workers(threads, n_heads * blocks, [&](int64_t worker, Queue& queries) {
    const auto block = memory.block(worker);
    for (int64_t n; (n = queries.next()) >= 0;) {  // late queries see most keys: they go first
      const int64_t bh = n % n_heads, i = (blocks - 1 - n / n_heads) * kQueries;
      f.queries(bh, i, memory.head(bh), block);
    }
  });
  return 0;
}

}  // namespace gpt2::GPT2_ISA
