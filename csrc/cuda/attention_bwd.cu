// Causal attention, backward: two passes, each of which recomputes the probabilities from lse.
//
//   p = exp(scale q k^T - lse)    delta = rowsum(o do)    dp = do v^T    ds = p (dp - delta)
//   dq = scale ds k               dk = scale ds^T q       dv = p^T do
//
// The dq pass owns queries and walks over the keys that they see; the dk dv pass owns keys and
// walks over the queries that see them, its tiles transposed. Blocks share no sum, so there are no
// atomics and the bits are always the same. The price is seven products instead of five.
#include "attention.cuh"

namespace gpt2::cuda {
namespace {

struct BackwardArgs {
  View dout, q, k, v;
  OutView dq, dk, dv;
  View o;            // (B, Tq, H, D), contiguous
  const float* lse;  // (B, H, Tq)
  float* delta;      // (B, H, Tq): the dq pass leaves it for the other
  Scores scores;
};

template <class T, int D>
using QueriesShape =
    TileShape<(sizeof(T) == 4 || D > 64) ? 1 : 2, (sizeof(T) == 4 && D > 64) ? 2 : 4>;
template <class T, int D>
using KeysShape =
    TileShape<(sizeof(T) == 4 || D > 64) ? 1 : 2, (sizeof(T) == 4 && D <= 64) ? 4 : 2>;

template <class Shape, class T, int D>
constexpr int owned_and_read_bytes() {
  return (2 * Shape::kOwned + 4 * Shape::kRead) * D * int(sizeof(T));
}

// The sum over D of x y for one row, by the four lanes that share it.
template <int D, class T>
__device__ float row_dot(HeadRows<const T> x, HeadRows<const T> y, int row, int columns) {
  using Chunk = Vec<T, kLanes<T>>;
  float sum = 0;
  for_chunks<Tile<T, D>, 1, 4>(threadIdx.x % 4, [&](int, int chunk) {
    const int c = chunk * kLanes<T>;
    if (c >= columns) return;
    const Chunk a = Chunk::load(x.data + row * x.stride + c);
    const Chunk b = Chunk::load(y.data + row * y.stride + c);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) sum = fmaf(widen(a.x[i]), widen(b.x[i]), sum);
  });
  return quad_sum(sum);
}

// A block's queries against the keys that they see.
template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kThreads, 2) attention_bwd_dq_kernel(const BackwardArgs args) {
  using Shape = QueriesShape<T, D>;
  constexpr int MT = Shape::MT, NT = Shape::NT;
  extern __shared__ uint4 smem[];
  const Tile<T, D> Q{reinterpret_cast<T*>(smem)}, dO{Q.data + Shape::kOwned * D};
  const TilePairs<Shape, T, D> KV{dO};

  const Scores& scores = args.scores;
  const auto [Tq, Tk] = scores.mask;
  const auto [bh, b, h, first] = owned_queries<Shape>(scores);
  const KeyRange keys = scores.mask.keys_of(first, Shape::kOwned);
  const auto dout = head_of<const T>(args.dout, b, h), q = head_of<const T>(args.q, b, h),
             k = head_of<const T>(args.k, b, h), v = head_of<const T>(args.v, b, h),
             o = head_of<const T>(args.o, b, h);

  const DropoutOf<DROPOUT> dropout(scores, bh);

  load_rows<Shape::kOwned>(Q, q, first, Tq, scores.D);
  load_rows<Shape::kOwned>(dO, dout, first, Tq, scores.D);
  KV.load(k, v, keys.begin, Tk, scores.D, 0);
  cp_async_commit();

  // delta = rowsum(o do)
  const Lane<MT> lane;
  float dq[MT][D / 8][4] = {}, lse_log2[MT][2], delta[MT][2];
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + lane.row(i, half);
      const bool valid = row < Tq;  // for all four lanes that share a row, or for none
      const int64_t at = int64_t(bh) * Tq + (valid ? row : first);
      lse_log2[i][half] = args.lse[at] * kLog2e;
      delta[i][half] = row_dot<D>(o, dout, valid ? row : first, scores.D);
      if (valid && lane.in_column == 0) args.delta[at] = delta[i][half];
    }
  }

  for (int start = keys.begin, stage = 0; start < keys.end; start += Shape::kRead, stage ^= 1) {
    const Tile<T, D> K = KV.first(stage), V = KV.second(stage);
    cp_async_wait<0>();
    __syncthreads();  // this tile has arrived, and no thread reads the last one
    if (start + Shape::kRead < keys.end) {
      KV.load(k, v, start + Shape::kRead, Tk, scores.D, stage ^ 1);
      cp_async_commit();
    }

    // p = exp(scale q k^T - lse)
    float p[MT][NT][4] = {};
    product_nt(p, SharedRows<T, D>{Q, lane.warp_row}, K);
    const bool masked = keys.is_masked(start, Shape::kRead);
    for_each<MT, NT>([&](int i, int n, int e) {
      p[i][n][e] = scores.probability(p[i][n][e], lse_log2[i][e / 2]);
      const int query = first + lane.row(i, e / 2), key = start + lane.column(n, e);
      if (masked && scores.mask.hides(query, key)) p[i][n][e] = 0;
    });
    // ds = p (do v^T - delta)
    float ds[MT][NT][4] = {};
    product_nt(ds, SharedRows<T, D>{dO, lane.warp_row}, V);
    for_each_tile<MT, NT>([&](int i, int n) {
      uint32_t kept = 15;
      if constexpr (DROPOUT) {
        kept = dropout.keep(first + lane.row(i, 0), start + lane.column(n, 0));
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float dp = DROPOUT ? scores.drop(kept >> e & 1, ds[i][n][e]) : ds[i][n][e];
        ds[i][n][e] = p[i][n][e] * (dp - delta[i][e / 2]);
      }
    });
    // dq += ds k
    product_nn(dq, ds, K);
  }

  store_rows(
      dq, [&](int, int) { return scores.scale; }, Q, head_of<T>(args.dq, b, h), first, Tq,
      scores.D);
}

// Starts to copy numbers [start, start + ROWS) of a row to shared memory, zeros beyond `rows`.
template <int ROWS>
__device__ void load_numbers(float* to, const float* from, int start, int rows) {
  const int row = threadIdx.x;
  if (row < ROWS) {
    const bool valid = start + row < rows;
    cp_async_4(to + row, from + (valid ? start + row : 0), valid);
  }
}

// A block's keys against the queries that see them, tiles transposed: (keys, queries).
template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kThreads, 2) attention_bwd_dkdv_kernel(const BackwardArgs args) {
  using Shape = KeysShape<T, D>;
  constexpr int MT = Shape::MT, NT = Shape::NT;
  extern __shared__ uint4 smem[];
  const Tile<T, D> K{reinterpret_cast<T*>(smem)}, V{K.data + Shape::kOwned * D};
  const TilePairs<Shape, T, D> QdO{V};
  const auto lse_of = [&](int stage) {
    return reinterpret_cast<float*>(QdO.past_end()) + stage * Shape::kRead;
  };
  const auto delta_of = [&](int stage) { return lse_of(2 + stage); };

  const Scores& scores = args.scores;
  const auto [Tq, Tk] = scores.mask;
  const int tiles = cdiv(Tk, Shape::kOwned);
  // Early keys, which most queries see, come first.
  const int bh = blockIdx.x / tiles, first = int(blockIdx.x % tiles) * Shape::kOwned;
  const int b = bh / scores.H, h = bh % scores.H;
  const QueryRange queries = scores.mask.queries_of(first, Shape::kOwned, Shape::kRead);
  const auto dout = head_of<const T>(args.dout, b, h), q = head_of<const T>(args.q, b, h),
             k = head_of<const T>(args.k, b, h), v = head_of<const T>(args.v, b, h);
  const float* const lse = args.lse + int64_t(bh) * Tq;
  const float* const delta = args.delta + int64_t(bh) * Tq;

  const DropoutOf<DROPOUT> dropout(scores, bh);

  const auto load = [&](int start, int stage) {
    QdO.load(q, dout, start, Tq, scores.D, stage);
    load_numbers<Shape::kRead>(lse_of(stage), lse, start, Tq);
    load_numbers<Shape::kRead>(delta_of(stage), delta, start, Tq);
    cp_async_commit();
  };
  load_rows<Shape::kOwned>(K, k, first, Tk, scores.D);
  load_rows<Shape::kOwned>(V, v, first, Tk, scores.D);
  load(queries.begin, 0);

  const Lane<MT> lane;
  float dk[MT][D / 8][4] = {}, dv[MT][D / 8][4] = {};
  int start = queries.begin, stage = 0;
  do {
    const Tile<T, D> Q = QdO.first(stage), dO = QdO.second(stage);
    cp_async_wait<0>();
    __syncthreads();  // this tile has arrived, and no thread reads the last one
    if (start + Shape::kRead < Tq) load(start + Shape::kRead, stage ^ 1);

    // p^T = exp(scale k q^T - lse). Rows past the end read q = do = lse = delta = 0: they add 0.
    float p[MT][NT][4] = {};
    product_nt(p, SharedRows<T, D>{K, lane.warp_row}, Q);
    const bool masked = queries.is_masked(start);
    for_each<MT, NT>([&](int i, int n, int e) {
      const int column = lane.column(n, e), key = first + lane.row(i, e / 2);
      p[i][n][e] = scores.probability(p[i][n][e], lse_of(stage)[column] * kLog2e);
      if (masked && scores.mask.hides(start + column, key)) p[i][n][e] = 0;
    });
    // dv += p^T do
    [[maybe_unused]] uint32_t kept[MT][NT];
    if constexpr (DROPOUT) {
      float dropped[MT][NT][4];
      for_each_tile<MT, NT>([&](int i, int n) {
        kept[i][n] = dropout.keep_transposed(first + lane.row(i, 0), start + lane.column(n, 0));
#pragma unroll
        for (int e = 0; e < 4; ++e) dropped[i][n][e] = scores.drop(kept[i][n] >> e & 1, p[i][n][e]);
      });
      product_nn(dv, dropped, dO);
    } else {
      product_nn(dv, p, dO);
    }
    // ds^T = p^T (v do^T - delta)
    float ds[MT][NT][4] = {};
    product_nt(ds, SharedRows<T, D>{V, lane.warp_row}, dO);
    for_each<MT, NT>([&](int i, int n, int e) {
      float dp = ds[i][n][e];
      if constexpr (DROPOUT) dp = scores.drop(kept[i][n] >> e & 1, dp);
      ds[i][n][e] = p[i][n][e] * (dp - delta_of(stage)[lane.column(n, e)]);
    });
    // dk += ds^T q
    product_nn(dk, ds, Q);
    start += Shape::kRead, stage ^= 1;
  } while (start < Tq);

  store_rows(
      dk, [&](int, int) { return scores.scale; }, K, head_of<T>(args.dk, b, h), first, Tk,
      scores.D);
  store_rows(dv, [&](int, int) { return 1.0f; }, V, head_of<T>(args.dv, b, h), first, Tk, scores.D);
}

}  // namespace

template <class T>
int64_t attention_bwd(const AttentionBwd& args, const Executor& executor) {
  const Attention& x = args.problem;
  const int64_t heads = x.B * x.H;
  if (args.workspace == nullptr) return heads * x.Tq * int64_t(sizeof(float));
  if (heads * x.Tk == 0) return 0;
  if (x.Tq == 0) {
    // dk and dv are zero. Only the op over separate q, k, v allows Tq < Tk, and it allocates their
    // gradients contiguous.
    for (const OutView& gradient : {args.dk, args.dv}) {
      const size_t bytes = heads * x.Tk * x.D * sizeof(T);
      check(cudaMemsetAsync(gradient.data, 0, bytes, executor.stream), "attention_bwd");
    }
    return 0;
  }
  const BackwardArgs kernel_args{args.dout,
                                 x.q,
                                 x.k,
                                 x.v,
                                 args.dq,
                                 args.dk,
                                 args.dv,
                                 {args.o, x.Tq * x.H * x.D, x.H * x.D, x.D},
                                 static_cast<const float*>(args.lse),
                                 static_cast<float*>(args.workspace),
                                 Scores(x)};
  with_head_size(x.D, [&](auto D) {
    with_dropout(x, [&](auto dropout) {
      using OfQueries = QueriesShape<T, D>;
      using OfKeys = KeysShape<T, D>;
      launch("attention_bwd_dq", attention_bwd_dq_kernel<T, D, dropout>,
             heads * cdiv(x.Tq, int64_t(OfQueries::kOwned)), kThreads,
             owned_and_read_bytes<OfQueries, T, D>(), executor, kernel_args);
      const int rows_bytes = 4 * OfKeys::kRead * int(sizeof(float));
      launch("attention_bwd_dkdv", attention_bwd_dkdv_kernel<T, D, dropout>,
             heads * cdiv(x.Tk, int64_t(OfKeys::kOwned)), kThreads,
             owned_and_read_bytes<OfKeys, T, D>() + rows_bytes, executor, kernel_args);
    });
  });
  return 0;
}

template int64_t attention_bwd<float>(const AttentionBwd&, const Executor&);
template int64_t attention_bwd<bf16>(const AttentionBwd&, const Executor&);
template int64_t attention_bwd<f16>(const AttentionBwd&, const Executor&);

}  // namespace gpt2::cuda
