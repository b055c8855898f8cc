// Causal attention, backward: two passes, each of which recomputes the probabilities from lse.
//
//   p = exp(scale q k^T - lse)    delta = rowsum(o do)    dp = do v^T    ds = p (dp - delta)
//   dq = scale ds k               dk = scale ds^T q       dv = p^T do
//
// The dq pass owns queries and walks over the keys that they see; the dk dv pass owns keys and
// walks over the queries that see them, its tiles transposed. No sum is shared between blocks: no
// atomics, the same bits every time, for seven products where five would do.
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

// Of what dropout leaves, the sum stays as it was.
__device__ inline float drop(bool kept, float x, const Scores& scores) {
  return kept ? x * scores.dropout_scale : 0.0f;
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

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kThreads, 2) attention_bwd_dq_kernel(const BackwardArgs args) {
  using Shape = QueriesShape<T, D>;
  constexpr int MT = Shape::MT, NT = Shape::NT;
  extern __shared__ uint4 smem[];
  const Tile<T, D> Q{reinterpret_cast<T*>(smem)}, dO{Q.data + Shape::kOwned * D};
  const auto K = [&](int stage) {
    return Tile<T, D>{dO.data + (Shape::kOwned + stage * Shape::kRead) * D};
  };
  const auto V = [&](int stage) { return K(2 + stage); };

  const Scores& scores = args.scores;
  const auto [bh, b, h, first, past_end, end] = queries_of<Shape>(scores);
  const auto dout = head_of<const T>(args.dout, b, h), q = head_of<const T>(args.q, b, h),
             k = head_of<const T>(args.k, b, h), v = head_of<const T>(args.v, b, h),
             o = head_of<const T>(args.o, b, h);

  const MaskOf<DROPOUT> dropout(scores, bh);

  const auto load = [&](int start, int stage) {
    load_rows<Shape::kRead>(K(stage), k, start, scores.Tk, scores.D);
    load_rows<Shape::kRead>(V(stage), v, start, scores.Tk, scores.D);
    cp_async_commit();
  };
  load_rows<Shape::kOwned>(Q, q, first, scores.Tq, scores.D);
  load_rows<Shape::kOwned>(dO, dout, first, scores.Tq, scores.D);
  load(0, 0);

  // delta = rowsum(o do)
  const Lane<MT> lane;
  float dq[MT][D / 8][4] = {}, lse_log2[MT][2], delta[MT][2];
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + lane.row(i, half);
      const bool valid = row < scores.Tq;  // for all four lanes that share a row, or for none
      const int64_t at = int64_t(bh) * scores.Tq + (valid ? row : first);
      lse_log2[i][half] = args.lse[at] * kLog2e;
      delta[i][half] = row_dot<D>(o, dout, valid ? row : first, scores.D);
      if (valid && lane.in_column == 0) args.delta[at] = delta[i][half];
    }
  }

  for (int start = 0, stage = 0; start < end; start += Shape::kRead, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, and nobody reads the one before
    if (start + Shape::kRead < end) load(start + Shape::kRead, stage ^ 1);

    // p = exp(scale q k^T - lse)
    float p[MT][NT][4] = {};
    product_nt(p, SharedRows<T, D>{Q, lane.warp_row}, K(stage));
    const bool diagonal = start + Shape::kRead > past_end;
    for_each<MT, NT>([&](int i, int n, int e) {
      p[i][n][e] = exp2_fast(p[i][n][e] * scores.scale_log2 - lse_log2[i][e / 2]);
      const int query = first + lane.row(i, e / 2);
      if (diagonal && start + lane.column(n, e) > scores.last_key(query)) p[i][n][e] = 0;
    });
    // ds = p (do v^T - delta)
    float ds[MT][NT][4] = {};
    product_nt(ds, SharedRows<T, D>{dO, lane.warp_row}, V(stage));
    for_each_tile<MT, NT>([&](int i, int n) {
      uint32_t kept = 15;
      if constexpr (DROPOUT) {
        kept = dropout.keep(first + lane.row(i, 0), start + lane.column(n, 0));
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float dp = DROPOUT ? drop(kept >> e & 1, ds[i][n][e], scores) : ds[i][n][e];
        ds[i][n][e] = p[i][n][e] * (dp - delta[i][e / 2]);
      }
    });
    // dq += ds k
    product_nn(dq, ds, K(stage));
  }

  store_rows(
      dq, [&](int, int) { return scores.scale; }, Q, head_of<T>(args.dq, b, h), first, scores.Tq,
      scores.D);
}

template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kThreads, 2) attention_bwd_dkdv_kernel(const BackwardArgs args) {
  using Shape = KeysShape<T, D>;
  constexpr int MT = Shape::MT, NT = Shape::NT;
  extern __shared__ uint4 smem[];
  const Tile<T, D> K{reinterpret_cast<T*>(smem)}, V{K.data + Shape::kOwned * D};
  const auto Q = [&](int stage) {
    return Tile<T, D>{V.data + (Shape::kOwned + stage * Shape::kRead) * D};
  };
  const auto dO = [&](int stage) { return Q(2 + stage); };
  const auto lse_of = [&](int stage) {
    return reinterpret_cast<float*>(Q(4).data) + stage * Shape::kRead;
  };
  const auto delta_of = [&](int stage) { return lse_of(2 + stage); };

  const Scores& scores = args.scores;
  const int tiles = cdiv(scores.Tk, Shape::kOwned);
  // Early keys, which most queries see, come first.
  const int bh = blockIdx.x / tiles, first = int(blockIdx.x % tiles) * Shape::kOwned;
  const int b = bh / scores.H, h = bh % scores.H;
  const auto dout = head_of<const T>(args.dout, b, h), q = head_of<const T>(args.q, b, h),
             k = head_of<const T>(args.k, b, h), v = head_of<const T>(args.v, b, h);
  const float* const lse = args.lse + int64_t(bh) * scores.Tq;
  const float* const delta = args.delta + int64_t(bh) * scores.Tq;
  // The first query that sees any key of ours, down to a whole tile, and the first that sees all.
  const int offset = scores.Tk - scores.Tq;
  const int begin = max(first - offset, 0) / Shape::kRead * Shape::kRead;
  const int past_begin = first + Shape::kOwned - 1 - offset;

  const MaskOf<DROPOUT> dropout(scores, bh);

  const auto load = [&](int start, int stage) {
    load_rows<Shape::kRead>(Q(stage), q, start, scores.Tq, scores.D);
    load_rows<Shape::kRead>(dO(stage), dout, start, scores.Tq, scores.D);
    const int row = threadIdx.x;
    if (row < Shape::kRead) {
      const bool valid = start + row < scores.Tq;
      const int at = valid ? start + row : 0;
      cp_async_4(lse_of(stage) + row, lse + at, valid);
      cp_async_4(delta_of(stage) + row, delta + at, valid);
    }
    cp_async_commit();
  };
  load_rows<Shape::kOwned>(K, k, first, scores.Tk, scores.D);
  load_rows<Shape::kOwned>(V, v, first, scores.Tk, scores.D);
  load(begin, 0);

  const Lane<MT> lane;
  float dk[MT][D / 8][4] = {}, dv[MT][D / 8][4] = {};
  int start = begin, stage = 0;
  do {
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, and nobody reads the one before
    if (start + Shape::kRead < scores.Tq) load(start + Shape::kRead, stage ^ 1);

    // p^T = exp(scale k q^T - lse). Rows past the end read q = do = lse = delta = 0: they add 0.
    float p[MT][NT][4] = {};
    product_nt(p, SharedRows<T, D>{K, lane.warp_row}, Q(stage));
    const bool diagonal = start < past_begin;
    for_each<MT, NT>([&](int i, int n, int e) {
      const int column = lane.column(n, e), key = first + lane.row(i, e / 2);
      p[i][n][e] = exp2_fast(p[i][n][e] * scores.scale_log2 - lse_of(stage)[column] * kLog2e);
      if (diagonal && key > scores.last_key(start + column)) p[i][n][e] = 0;
    });
    // dv += p^T do
    [[maybe_unused]] uint32_t kept[MT][NT];
    if constexpr (DROPOUT) {
      float dropped[MT][NT][4];
      for_each_tile<MT, NT>([&](int i, int n) {
        kept[i][n] = dropout.keep_transposed(first + lane.row(i, 0), start + lane.column(n, 0));
#pragma unroll
        for (int e = 0; e < 4; ++e)
          dropped[i][n][e] = drop(kept[i][n] >> e & 1, p[i][n][e], scores);
      });
      product_nn(dv, dropped, dO(stage));
    } else {
      product_nn(dv, p, dO(stage));
    }
    // ds^T = p^T (v do^T - delta)
    float ds[MT][NT][4] = {};
    product_nt(ds, SharedRows<T, D>{V, lane.warp_row}, dO(stage));
    for_each<MT, NT>([&](int i, int n, int e) {
      float dp = ds[i][n][e];
      if constexpr (DROPOUT) dp = drop(kept[i][n] >> e & 1, dp, scores);
      ds[i][n][e] = p[i][n][e] * (dp - delta_of(stage)[lane.column(n, e)]);
    });
    // dk += ds^T q
    product_nn(dk, ds, Q(stage));
    start += Shape::kRead, stage ^= 1;
  } while (start < scores.Tq);

  store_rows(
      dk, [&](int, int) { return scores.scale; }, K, head_of<T>(args.dk, b, h), first, scores.Tk,
      scores.D);
  store_rows(
      dv, [&](int, int) { return 1.0f; }, V, head_of<T>(args.dv, b, h), first, scores.Tk, scores.D);
}

}  // namespace

template <class T>
int64_t attention_bwd(const Attention& x, View dout, const void* o, const void* lse, OutView dq,
                      OutView dk, OutView dv, void* workspace, const Executor& executor) {
  const int64_t heads = x.B * x.H;
  if (workspace == nullptr) return heads * x.Tq * int64_t(sizeof(float));
  if (heads * x.Tk == 0) return 0;
  if (x.Tq == 0) {  // only k and v of their own are longer than q, and their gradients contiguous
    for (const OutView& gradient : {dk, dv}) {
      const size_t bytes = heads * x.Tk * x.D * sizeof(T);
      check(cudaMemsetAsync(gradient.data, 0, bytes, executor.stream), "attention_bwd");
    }
    return 0;
  }
  const BackwardArgs args{dout,
                          x.q,
                          x.k,
                          x.v,
                          dq,
                          dk,
                          dv,
                          {o, x.Tq * x.H * x.D, x.H * x.D, x.D},
                          static_cast<const float*>(lse),
                          static_cast<float*>(workspace),
                          Scores(x)};
  with_head_size(x.D, [&](auto D) {
    with_dropout(x, [&](auto dropout) {
      using OfQueries = QueriesShape<T, D>;
      using OfKeys = KeysShape<T, D>;
      launch("attention_bwd_dq", attention_bwd_dq_kernel<T, D, dropout>,
             heads * cdiv(x.Tq, int64_t(OfQueries::kOwned)), kThreads,
             owned_and_read_bytes<OfQueries, T, D>(), executor, args);
      const int rows_bytes = 4 * OfKeys::kRead * int(sizeof(float));
      launch("attention_bwd_dkdv", attention_bwd_dkdv_kernel<T, D, dropout>,
             heads * cdiv(x.Tk, int64_t(OfKeys::kOwned)), kThreads,
             owned_and_read_bytes<OfKeys, T, D>() + rows_bytes, executor, args);
    });
  });
  return 0;
}

template int64_t attention_bwd<float>(const Attention&, View, const void*, const void*, OutView,
                                      OutView, OutView, void*, const Executor&);
template int64_t attention_bwd<bf16>(const Attention&, View, const void*, const void*, OutView,
                                     OutView, OutView, void*, const Executor&);
template int64_t attention_bwd<f16>(const Attention&, View, const void*, const void*, OutView,
                                    OutView, OutView, void*, const Executor&);

}  // namespace gpt2::cuda
