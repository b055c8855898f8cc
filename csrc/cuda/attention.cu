// Causal attention with an online softmax, forward.
//
//   s[i, j] = scale q[i] . k[j]  for j <= i + Tk - Tq      o[i] = sum_j softmax(s[i])[j] v[j]
//
// A block owns 64 or 128 queries of one head and reads the keys that they see once, tile by tile;
// while it computes with one tile, cp.async brings the next. Scores never leave the registers:
// what q k^T leaves there is the left operand of p v. docs/attention.md derives it.
#include "attention.cuh"

namespace gpt2::cuda {
namespace {

struct ForwardArgs {
  View q, k, v;
  OutView o;   // (B, Tq, H, D)
  float* lse;  // (B, H, Tq), natural log
  Scores scores;
};

template <class T, int D, bool DROPOUT>  // whose mask takes registers
using ForwardShape =
    TileShape<(sizeof(T) == 4 || D > 64) ? 1 : 2, (sizeof(T) == 4 || DROPOUT) ? 4 : 8>;

// One pass over the keys. A query row carries the online softmax, and with it
//
//   acc = sum_j e(s[i, j] - m) v[j]
template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kThreads, 2) attention_fwd_kernel(const ForwardArgs args) {
  using Shape = ForwardShape<T, D, DROPOUT>;
  constexpr int MT = Shape::MT, NT = Shape::NT;
  extern __shared__ uint4 smem[];
  const Tile<T, D> Q{reinterpret_cast<T*>(smem)};
  const TilePairs<Shape, T, D> KV{Q};

  const Scores& scores = args.scores;
  const auto [Tq, Tk] = scores.mask;
  const auto [bh, b, h, first] = owned_queries<Shape>(scores);
  const KeyRange keys = scores.mask.keys_of(first, Shape::kOwned);
  const auto q = head_of<const T>(args.q, b, h), k = head_of<const T>(args.k, b, h),
             v = head_of<const T>(args.v, b, h);

  const DropoutOf<DROPOUT> dropout(scores, bh);

  load_rows<Shape::kOwned>(Q, q, first, Tq, scores.D);
  KV.load(k, v, keys.begin, Tk, scores.D, 0);
  cp_async_commit();

  const Lane<MT> lane;
  OnlineSoftmaxRows<MT> softmax;
  float acc[MT][D / 8][4] = {};

  for (int start = keys.begin, stage = 0; start < keys.end; start += Shape::kRead, stage ^= 1) {
    const Tile<T, D> K = KV.first(stage), V = KV.second(stage);
    cp_async_wait<0>();
    __syncthreads();  // this tile has arrived, and no thread reads the last one
    if (start + Shape::kRead < keys.end) {
      KV.load(k, v, start + Shape::kRead, Tk, scores.D, stage ^ 1);
      cp_async_commit();
    }

    // s = q k^T
    float s[MT][NT][4] = {};
    product_nt(s, SharedRows<T, D>{Q, lane.warp_row}, K);
    if (keys.is_masked(start, Shape::kRead)) {
      for_each<MT, NT>([&](int i, int n, int e) {
        const int query = first + lane.row(i, e / 2), key = start + lane.column(n, e);
        if (scores.mask.hides(query, key)) s[i][n][e] = -INFINITY;
      });
    }
    // m = max(m, s)    alpha = e(m_old - m)    p = e(s - m)    l = alpha l + sum p
    float alpha[MT][2];
    softmax.raise(s, scores.scale_log2, alpha);
    softmax.exponentiate(s, scores.scale_log2);
    if constexpr (DROPOUT) {
      for_each_tile<MT, NT>([&](int i, int n) {
        const uint32_t kept = dropout.keep(first + lane.row(i, 0), start + lane.column(n, 0));
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][n][e] = kept >> e & 1 ? s[i][n][e] : 0.0f;
      });
    }
    // acc = alpha acc + p v
    for_each<MT, D / 8>([&](int i, int d, int e) { acc[i][d][e] *= alpha[i][e / 2]; });
    product_nn(acc, s, V);
  }

  // o = acc / l    lse = scale m + log(l)
  float factor[MT][2];
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      OnlineSoftmax& of_row = softmax.row[i][half];
      of_row.l = quad_sum(of_row.l);
      factor[i][half] = (DROPOUT ? scores.dropout_scale : 1.0f) / of_row.l;
      const int row = first + lane.row(i, half);
      if (lane.in_column == 0 && row < Tq) {
        args.lse[int64_t(bh) * Tq + row] = of_row.lse(scores.scale_log2);
      }
    }
  }
  store_rows(
      acc, [&](int i, int half) { return factor[i][half]; }, Q, head_of<T>(args.o, b, h), first, Tq,
      scores.D);
}

}  // namespace

template <class T>
int64_t attention_fwd(const AttentionFwd& args, const Executor& executor) {
  const Attention& x = args.problem;
  if (args.workspace == nullptr || x.B * x.H * x.Tq == 0) return 0;
  const ForwardArgs kernel_args{
      x.q,      x.k, x.v, {args.o, x.Tq * x.H * x.D, x.H * x.D, x.D}, static_cast<float*>(args.lse),
      Scores(x)};
  with_head_size(x.D, [&](auto D) {
    with_dropout(x, [&](auto dropout) {
      using Shape = ForwardShape<T, D, dropout>;
      launch("attention_fwd", attention_fwd_kernel<T, D, dropout>,
             x.B * x.H * cdiv(x.Tq, int64_t(Shape::kOwned)), kThreads,
             (Shape::kOwned + 4 * Shape::kRead) * D * int(sizeof(T)), executor, kernel_args);
    });
  });
  return 0;
}

template int64_t attention_fwd<float>(const AttentionFwd&, const Executor&);
template int64_t attention_fwd<bf16>(const AttentionFwd&, const Executor&);
template int64_t attention_fwd<f16>(const AttentionFwd&, const Executor&);

}  // namespace gpt2::cuda
