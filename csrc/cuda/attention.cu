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

// One pass over the keys. With s the unscaled product and e(x) = exp(scale x), a query row carries
// across key tiles
//
//   m = max_j s[i, j]    l = sum_j e(s[i, j] - m)    acc = sum_j e(s[i, j] - m) v[j]
//
// A tile that raises m scales the old l and acc by alpha = e(m_old - m). A lane's l is the sum over
// its own columns until the end.
template <class T, int D, bool DROPOUT>
__global__ void __launch_bounds__(kThreads, 2) attention_fwd_kernel(const ForwardArgs args) {
  using Shape = ForwardShape<T, D, DROPOUT>;
  constexpr int MT = Shape::MT, NT = Shape::NT;
  extern __shared__ uint4 smem[];
  const Tile<T, D> Q{reinterpret_cast<T*>(smem)};
  const auto K = [&](int stage) {
    return Tile<T, D>{Q.data + (Shape::kOwned + stage * Shape::kRead) * D};
  };
  const auto V = [&](int stage) { return Tile<T, D>{K(2 + stage).data}; };

  const Scores& scores = args.scores;
  const auto [bh, b, h, first, past_end, end] = queries_of<Shape>(scores);
  const auto q = head_of<const T>(args.q, b, h), k = head_of<const T>(args.k, b, h),
             v = head_of<const T>(args.v, b, h);

  const MaskOf<DROPOUT> dropout(scores, bh);

  const auto load = [&](int start, int stage) {
    load_rows<Shape::kRead>(K(stage), k, start, scores.Tk, scores.D);
    load_rows<Shape::kRead>(V(stage), v, start, scores.Tk, scores.D);
    cp_async_commit();
  };
  load_rows<Shape::kOwned>(Q, q, first, scores.Tq, scores.D);
  load(0, 0);

  const Lane<MT> lane;
  float acc[MT][D / 8][4] = {}, m[MT][2], l[MT][2] = {};
#pragma unroll
  for (int i = 0; i < MT; ++i) m[i][0] = m[i][1] = kLowest;

  for (int start = 0, stage = 0; start < end; start += Shape::kRead, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, and nobody reads the one before
    if (start + Shape::kRead < end) load(start + Shape::kRead, stage ^ 1);

    // s = q k^T
    float s[MT][NT][4] = {};
    product_nt(s, SharedRows<T, D>{Q, lane.warp_row}, K(stage));
    if (start + Shape::kRead > past_end) {
      for_each<MT, NT>([&](int i, int n, int e) {
        const int query = first + lane.row(i, e / 2);
        if (start + lane.column(n, e) > scores.last_key(query)) s[i][n][e] = -INFINITY;
      });
    }
    // m = max(m, s)    alpha = exp(m_old - m)
    float alpha[MT][2];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float m_new = m[i][half];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          m_new = fmaxf(m_new, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
        }
        m_new = quad_max(m_new);
        alpha[i][half] = exp2_fast((m[i][half] - m_new) * scores.scale_log2);
        m[i][half] = m_new;
        l[i][half] *= alpha[i][half];
      }
    }
    // p = exp(s - m)    l = alpha l + sum p. Subtracting before scaling is exact at the maximum; a
    // fused s * scale - m is not, and overflows where scores are huge.
    for_each<MT, NT>([&](int i, int n, int e) {
      s[i][n][e] = exp2_fast((s[i][n][e] - m[i][e / 2]) * scores.scale_log2);
      l[i][e / 2] += s[i][n][e];
    });
    if constexpr (DROPOUT) {
      for_each_tile<MT, NT>([&](int i, int n) {
        const uint32_t kept = dropout.keep(first + lane.row(i, 0), start + lane.column(n, 0));
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][n][e] = kept >> e & 1 ? s[i][n][e] : 0.0f;
      });
    }
    // acc = alpha acc + p v
    for_each<MT, D / 8>([&](int i, int d, int e) { acc[i][d][e] *= alpha[i][e / 2]; });
    product_nn(acc, s, V(stage));
  }

  // o = acc / l    lse = scale m + log(l)
  float factor[MT][2];
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(l[i][half]);
      factor[i][half] = (DROPOUT ? scores.dropout_scale : 1.0f) / sum;
      const int row = first + lane.row(i, half);
      if (lane.in_column == 0 && row < scores.Tq) {
        args.lse[int64_t(bh) * scores.Tq + row] =
            (m[i][half] * scores.scale_log2 + log2f(sum)) * kLn2;
      }
    }
  }
  store_rows(
      acc, [&](int i, int half) { return factor[i][half]; }, Q, head_of<T>(args.o, b, h), first,
      scores.Tq, scores.D);
}

}  // namespace

template <class T>
int64_t attention_fwd(const Attention& x, void* o, void* lse, void* workspace,
                      const Executor& executor) {
  if (workspace == nullptr || x.B * x.H * x.Tq == 0) return 0;
  const ForwardArgs args{
      x.q, x.k, x.v, {o, x.Tq * x.H * x.D, x.H * x.D, x.D}, static_cast<float*>(lse), Scores(x)};
  with_head_size(x.D, [&](auto D) {
    with_dropout(x, [&](auto dropout) {
      using Shape = ForwardShape<T, D, dropout>;
      launch("attention_fwd", attention_fwd_kernel<T, D, dropout>,
             x.B * x.H * cdiv(x.Tq, int64_t(Shape::kOwned)), kThreads,
             (Shape::kOwned + 4 * Shape::kRead) * D * int(sizeof(T)), executor, args);
    });
  });
  return 0;
}

template int64_t attention_fwd<float>(const Attention&, void*, void*, void*, const Executor&);
template int64_t attention_fwd<bf16>(const Attention&, void*, void*, void*, const Executor&);
template int64_t attention_fwd<f16>(const Attention&, void*, void*, void*, const Executor&);

}  // namespace gpt2::cuda
