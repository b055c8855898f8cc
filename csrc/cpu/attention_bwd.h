// The backward of causal attention: scores are computed again, block by block.
//
//   p  = exp(softmax_scale s - lse)            delta = rowsum(o do)
//   dv = p^T do      dp = do v^T      ds = p (dp - delta)
//   dk = softmax_scale ds^T q         dq = softmax_scale ds k
//
// A block of keys keeps its dk and dv while it meets every block of queries that sees it; each
// meeting is one pair of tiles, p and ds, and five products. dq gathers in memory, one block of
// keys after the other. Where heads are too few for the threads, blocks of keys and blocks of
// queries are each worked on by themselves, for seven products: the sums have the same order, so
// the same bits.
#pragma once

#include "attention_common.h"

namespace gpt2::GPT2_ISA {

template <class P, class T>
struct AttentionBackward {
  using V = typename P::V;
  using S = typename V::scalar;
  using E = typename P::Element;
  static constexpr int64_t kQueries = 48;          // whole tiles and pairs
  static constexpr int64_t kKeys = 6 * kPanel<V>;  // whole panels, tiles, pairs and counters
  static constexpr int64_t kPackRows = 4 * kPanel<V>;

  // A head's operands, packed. Pairs and rows are one where K = 1.
  struct Head {
    E *q_rows, *do_rows, *q_pairs, *do_pairs, *k_pairs, *k_panels, *v_panels;
    S *lse_log2, *delta, *dq;  // (Tq), (Tq), (Tq, ld)
    Head(const AttentionBackward& f, Arena& arena)
        : q_rows(arena.template take<E>(f.packed.rows(f.x.Tq))),
          do_rows(arena.template take<E>(f.packed.rows(f.x.Tq))),
          q_pairs(P::K == 1 ? q_rows : arena.template take<E>(f.packed.rows(f.x.Tq))),
          do_pairs(P::K == 1 ? do_rows : arena.template take<E>(f.packed.rows(f.x.Tq))),
          k_pairs(arena.template take<E>(f.packed.rows(f.x.Tk))),
          k_panels(arena.template take<E>(f.packed.panels(f.x.Tk))),
          v_panels(arena.template take<E>(f.packed.panels(f.x.Tk))),
          lse_log2(arena.template take<S>(f.x.Tq)),
          delta(arena.template take<S>(f.x.Tq)),
          dq(arena.template take<S>(f.x.Tq * f.packed.ld)) {}
  };

  // A worker's own.
  struct Block {
    S *s, *dp, *keep;  // (kRows, kKeys), (kRows, kKeys), (kKeys)
    E *p, *ds;         // (kQueries, kKeys)
    E *p_pairs, *ds_pairs;
    S *dk, *dv;  // (kKeys, ld)
    E* rows;     // (kPackRows, ld)
    Block(const AttentionBackward& f, Arena& arena)
        : s(arena.template take<S>(kRows * kKeys)),
          dp(arena.template take<S>(kRows * kKeys)),
          keep(arena.template take<S>(kKeys)),
          p(arena.template take<E>(kQueries * kKeys)),
          ds(arena.template take<E>(kQueries * kKeys)),
          p_pairs(P::K == 1 ? p : arena.template take<E>(kQueries * kKeys)),
          ds_pairs(P::K == 1 ? ds : arena.template take<E>(kQueries * kKeys)),
          dk(arena.template take<S>(kKeys * f.packed.ld)),
          dv(arena.template take<S>(kKeys * f.packed.ld)),
          rows(arena.template take<E>(f.packed.rows(kPackRows))) {}
  };

  const Attention& x;
  View dout;
  const T* o;
  const S* lse;
  OutView dq_out, dk_out, dv_out;
  const Packed<P> packed{x.D};
  const Dropout dropout{x.dropout_p, x.seed ? *x.seed : 0};
  const S scale_log2 = S(x.softmax_scale * kLog2E);

  // ---- packing, of rows [begin, end) of a head; begin is at a panel

  void pack_queries(int64_t bh, int64_t begin, int64_t end, const Head& head) const {
    const int64_t b = bh / x.H, h = bh % x.H, ld = packed.ld, n = end - begin;
    const T* q = head_of<T>(x.q, b, h) + begin * x.q.time;
    const T* g = head_of<T>(dout, b, h) + begin * dout.time;
    E *q_rows = head.q_rows + begin * ld, *do_rows = head.do_rows + begin * ld;
    pack_rows<P>(q, x.q.time, n, x.D, q_rows, ld);
    pack_rows<P>(g, dout.time, n, x.D, do_rows, ld);
    if constexpr (P::K > 1) {
      interleave<P>(q_rows, ld, n, x.D, head.q_pairs + begin * ld, ld);
      interleave<P>(do_rows, ld, n, x.D, head.do_pairs + begin * ld, ld);
    }
    for (int64_t i = begin; i < end; ++i, g += dout.time) {
      head.lse_log2[i] = lse[bh * x.Tq + i] * S(kLog2E);
      head.delta[i] = dot(g, o + ((b * x.Tq + i) * x.H + h) * x.D);
    }
    for (int64_t i = begin * ld; i < end * ld; i += V::W) V::set(0).store(head.dq + i);
  }

  void pack_keys(int64_t bh, int64_t begin, int64_t end, const Head& head,
                 const Block& block) const {
    const T* k = head_of<T>(x.k, bh / x.H, bh % x.H) + begin * x.k.time;
    const T* v = head_of<T>(x.v, bh / x.H, bh % x.H) + begin * x.v.time;
    for (int64_t j = begin; j < end; j += kPackRows) {
      const int64_t n = at_most(kPackRows, end - j), ld = packed.ld;
      const int64_t panel = j * packed.steps * P::K;
      pack_panels_of<P>(k, x.k.time, n, x.D, block.rows, ld, packed.steps, head.k_panels + panel);
      pack_pairs<P>(k, x.k.time, n, x.D, block.rows, head.k_pairs + j * ld, ld);
      pack_panels_of<P>(v, x.v.time, n, x.D, block.rows, ld, packed.steps, head.v_panels + panel);
      k += kPackRows * x.k.time;
      v += kPackRows * x.v.time;
    }
  }

  GPT2_INLINE S dot(const T* a, const T* b) const {
    V sum = V::set(0);
    int64_t d = 0;
    for (; d + V::W <= x.D; d += V::W) sum = fma(V::load(a + d), V::load(b + d), sum);
    if (d < x.D) sum = fma(V::load(a + d, x.D - d), V::load(b + d, x.D - d), sum);
    return sum.sum();
  }

  // ---- a block of queries meets a block of keys

  // The tiles p and ds of queries [i0, i0 + rows) and keys [j0, j0 + kKeys); zero where a query
  // does not see a key.
  void scores(int64_t bh, int64_t i0, int64_t rows, int64_t j0, const Head& head,
              const Block& block) const {
    const int64_t ld = packed.ld, sees = i0 + 1 + x.Tk - x.Tq - j0;  // of the first query
    Operands<P> against = {.a_row = ld,
                           .a_step = P::K,
                           .b_step = kPanel<V> * P::K,
                           .b_strip = kPanel<V> * P::K * packed.steps,
                           .steps = packed.steps,
                           .c_row = kKeys};
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const int64_t n = at_most(kRows, rows - r0), i = i0 + r0;
      const int64_t keys = at_most(kKeys, sees + r0 + n - 1);
      // s = q k^T, dp = do v^T
      against.a = head.q_rows + i * ld;
      against.b = head.k_panels + j0 * packed.steps * P::K;
      against.c = block.s;
      product<P, Into::kSet>(n, keys, against);
      against.a = head.do_rows + i * ld;
      against.b = head.v_panels + j0 * packed.steps * P::K;
      against.c = block.dp;
      product<P, Into::kSet>(n, keys, against);
      for (int64_t r = 0; r < n; ++r) {
        row(bh, i + r, j0, at_most(kKeys, sees + r0 + r), block.s + r * kKeys, block.dp + r * kKeys,
            head, block, (r0 + r) * kKeys);
      }
    }
    if constexpr (P::K > 1) {
      for (int64_t r = rows; r < round_up(rows, P::K); ++r) zero(block, r * kKeys, 0);
      interleave<P>(block.p, kKeys, rows, kKeys, block.p_pairs, kKeys);
      interleave<P>(block.ds, kKeys, rows, kKeys, block.ds_pairs, kKeys);
    }
  }

  // p = 2^(scale s - lse), ds = p (dp - delta), for one query
  GPT2_INLINE void row(int64_t bh, int64_t i, int64_t j0, int64_t visible, const S* s, const S* dp,
                       const Head& head, const Block& block, int64_t at) const {
    const V scale = V::set(scale_log2), minus_lse = V::set(-head.lse_log2[i]);
    const V delta = V::set(head.delta[i]), dropout_scale = V::set(S(dropout.scale));
    if (dropout.active() && visible > 0)
      dropout.keep(bh, i, j0, round_up(visible, V::W), block.keep);
    int64_t j = 0;
    for (; j < visible; j += V::W) {
      V p = exp2(fma(V::load(s + j), scale, minus_lse)), grad = V::load(dp + j), dropped = p;
      if (dropout.active()) {
        const V keep = V::load(block.keep + j) * dropout_scale;
        dropped = p * keep;
        grad = grad * keep;
      }
      V ds = p * (grad - delta);
      if (j + V::W > visible) {
        dropped = first(visible - j, dropped, V::set(0));
        ds = first(visible - j, ds, V::set(0));
      }
      dropped.store(block.p + at + j);
      ds.store(block.ds + at + j);
    }
    zero(block, at, j);
  }

  GPT2_INLINE void zero(const Block& block, int64_t at, int64_t from) const {
    for (int64_t j = from; j < kKeys; j += V::W) {
      V::set(0).store(block.p + at + j);
      V::set(0).store(block.ds + at + j);
    }
  }

  // dv += p^T do, dk += ds^T q, over the queries that see the keys
  void gather_keys(int64_t i0, int64_t rows, int64_t j0, const Head& head,
                   const Block& block) const {
    const int64_t ld = packed.ld, keys = at_most(kKeys, x.Tk - j0);
    for (int64_t k0 = 0; k0 < keys; k0 += kRows) {
      const int64_t n = at_most(kRows, keys - k0);
      const int64_t sees = at_least(0, j0 + k0 - (x.Tk - x.Tq) - i0) / P::K * P::K;  // first query
      if (sees >= rows) break;
      Operands<P> over = {.a_row = P::K,
                          .a_step = kKeys * P::K,
                          .b_step = ld * P::K,
                          .b_strip = kPanel<V> * P::K,
                          .steps = (rows - sees + P::K - 1) / P::K,
                          .c_row = ld};
      over.a = block.p_pairs + sees * kKeys + k0 * P::K;
      over.b = head.do_pairs + (i0 + sees) * ld;
      over.c = block.dv + k0 * ld;
      product<P, Into::kAdd>(n, ld, over);
      over.a = block.ds_pairs + sees * kKeys + k0 * P::K;
      over.b = head.q_pairs + (i0 + sees) * ld;
      over.c = block.dk + k0 * ld;
      product<P, Into::kAdd>(n, ld, over);
    }
  }

  // dq += ds k, over the keys that are seen
  void gather_queries(int64_t i0, int64_t rows, int64_t j0, const Head& head,
                      const Block& block) const {
    const int64_t ld = packed.ld, sees = i0 + 1 + x.Tk - x.Tq - j0;
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const int64_t n = at_most(kRows, rows - r0);
      const int64_t keys = at_most(kKeys, sees + r0 + n - 1);
      if (keys <= 0) continue;
      product<P, Into::kAdd>(n, ld,
                             {.a = block.ds + r0 * kKeys,
                              .a_row = kKeys,
                              .a_step = P::K,
                              .b = head.k_pairs + j0 * ld,
                              .b_step = ld * P::K,
                              .b_strip = kPanel<V> * P::K,
                              .steps = (keys + P::K - 1) / P::K,
                              .c = head.dq + (i0 + r0) * ld,
                              .c_row = ld});
    }
  }

  // ---- a block of keys with every query that sees it; a block of queries with every key it sees

  void keys(int64_t bh, int64_t j0, const Head& head, const Block& block, bool and_queries) const {
    const int64_t n = at_most(kKeys, x.Tk - j0);
    for (int64_t i = 0; i < n * packed.ld; i += V::W) {
      V::set(0).store(block.dk + i);
      V::set(0).store(block.dv + i);
    }
    const int64_t first_query = at_least(0, j0 - (x.Tk - x.Tq));
    for (int64_t i0 = first_query / kQueries * kQueries; i0 < x.Tq; i0 += kQueries) {
      const int64_t rows = at_most(kQueries, x.Tq - i0);
      scores(bh, i0, rows, j0, head, block);
      gather_keys(i0, rows, j0, head, block);
      if (and_queries) gather_queries(i0, rows, j0, head, block);
    }
    write(block.dk, S(x.softmax_scale), dk_out, bh, j0, n);
    write(block.dv, 1, dv_out, bh, j0, n);
  }

  void queries(int64_t bh, int64_t i0, const Head& head, const Block& block) const {
    const int64_t rows = at_most(kQueries, x.Tq - i0);
    for (int64_t j0 = 0; j0 < i0 + rows + x.Tk - x.Tq; j0 += kKeys) {
      scores(bh, i0, rows, j0, head, block);
      gather_queries(i0, rows, j0, head, block);
    }
    write_queries(bh, i0, rows, head);
  }

  void write_queries(int64_t bh, int64_t i0, int64_t n, const Head& head) const {
    write(head.dq + i0 * packed.ld, S(x.softmax_scale), dq_out, bh, i0, n);
  }

  void write(const S* from, S factor, const OutView& view, int64_t bh, int64_t t0,
             int64_t n) const {
    T* to = head_of<T>(view, bh / x.H, bh % x.H) + t0 * view.time;
    for (int64_t t = 0; t < n; ++t, from += packed.ld, to += view.time) {
      store_row(from, V::set(factor), to, x.D);
    }
  }
};

// Returns the bytes of workspace that it needs, and does nothing else where workspace is null.
template <class P, class T>
int64_t attention_bwd(const AttentionBwd& args, const Threads& threads) {
  using F = AttentionBackward<P, T>;
  using S = typename F::S;
  const Attention& x = args.problem;
  const F f{
      x,       args.dout, static_cast<const T*>(args.o), static_cast<const S*>(args.lse), args.dq,
      args.dk, args.dv};
  const bool shared = share_heads(x, threads, 5, 7);  // 5 products of a head, or 7
  const int64_t n_heads = x.B * x.H;
  const Layout<typename F::Head, typename F::Block, F> memory(
      f, args.workspace, shared ? n_heads : at_most(n_heads, threads.count));
  if (!args.workspace) return memory.size(threads.count);

  if (!shared) {
    parallel_workers(threads, n_heads, [&](int64_t worker, Queue& heads) {
      const auto head = memory.head(worker);
      const auto block = memory.block(worker);
      for (int64_t bh; (bh = heads.next()) >= 0;) {
        f.pack_queries(bh, 0, x.Tq, head);
        f.pack_keys(bh, 0, x.Tk, head, block);
        for (int64_t j0 = 0; j0 < x.Tk; j0 += F::kKeys) f.keys(bh, j0, head, block, true);
        f.write_queries(bh, 0, x.Tq, head);
      }
    });
    return 0;
  }
  const int64_t parts = (x.Tk + F::kPackRows - 1) / F::kPackRows;  // Tq <= Tk
  parallel_workers(threads, n_heads * parts, [&](int64_t worker, Queue& packs) {
    const auto block = memory.block(worker);
    for (int64_t n; (n = packs.next()) >= 0;) {
      const auto head = memory.head(n / parts);
      const int64_t begin = n % parts * F::kPackRows, end = begin + F::kPackRows;
      f.pack_keys(n / parts, begin, at_most(end, x.Tk), head, block);
      if (begin < x.Tq) f.pack_queries(n / parts, begin, at_most(end, x.Tq), head);
    }
  });
  // Blocks of keys meet most queries when they are early, blocks of queries most keys when late.
  const int64_t key_blocks = (x.Tk + F::kKeys - 1) / F::kKeys * n_heads;
  const int64_t query_blocks = (x.Tq + F::kQueries - 1) / F::kQueries * n_heads;
  parallel_workers(threads, key_blocks + query_blocks, [&](int64_t worker, Queue& blocks) {
    const auto block = memory.block(worker);
    for (int64_t n; (n = blocks.next()) >= 0;) {
      if (n < key_blocks) {
        f.keys(n % n_heads, n / n_heads * F::kKeys, memory.head(n % n_heads), block, false);
      } else {
        const int64_t late = query_blocks - 1 - (n - key_blocks);
        f.queries(late % n_heads, late / n_heads * F::kQueries, memory.head(late % n_heads), block);
      }
    }
  });
  return 0;
}

}  // namespace gpt2::GPT2_ISA
