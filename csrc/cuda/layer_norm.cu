// LayerNorm over the last dimension, alone or after the residual addition.
//
//   mean = sum(x) / C
//   rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)    xhat = (x - mean) rstd
//   y    = xhat weight + bias
//
// Two passes for the moments: the centred sum does not cancel the way E[x^2] - mean^2 does when
// |mean| >> std. What the centred row still sums to is the rounding of the first mean, which it
// corrects. Dimensions as in layer_norm.cuh.
#include "layer_norm.cuh"

namespace gpt2::cuda {
namespace {

// Blocks of a multiprocessor, for the compiler: so many registers a thread may have.
__host__ __device__ constexpr int fwd_blocks(int L) {
  return L > 1 ? 4 : 1;
}

template <class Plan, class T, class R, int L>
__global__ void __launch_bounds__(kThreads, fwd_blocks(L))
    layer_norm_fwd_kernel(const T* x, const R* residual,           // (N, C); residual may be null
                          const float* weight, const float* bias,  // (C,)
                          T* y, R* s,    // (N, C); s = x + residual, where there is one
                          float* stats,  // (2, N): mean, rstd
                          float eps, int64_t N, int64_t C) {
  const int64_t n = int64_t(blockIdx.x) * Plan::TEAMS + threadIdx.x / Plan::TEAM;
  if (n >= N) return;
  constexpr bool kMixed = !std::is_same_v<T, R>;  // there is a residual then
  Row<Plan, R, L> row;
  row.memory = s + n * C;
  if constexpr (!kMixed) {
    if (!residual) row.memory = x + n * C;
  }
  float sum = 0;
  for_columns<Plan, L>(C, [&](int i, int64_t c) {
    const auto branch = Vec<T, L>::load(x + n * C + c);
    Vec<R, L> stored;
    if (kMixed || residual) {
      // The norm sees s as it is stored, so that the backward recomputes the same xhat.
      const auto r = Vec<R, L>::load(residual + n * C + c);
#pragma unroll
      for (int k = 0; k < L; ++k) stored.x[k] = narrow<R>(widen(branch.x[k]) + widen(r.x[k]));
      stored.store(s + n * C + c);
    } else if constexpr (!kMixed) {
      stored = branch;
    }
#pragma unroll
    for (int k = 0; k < L; ++k) sum += widen(stored.x[k]);
    row.held[i] = stored;
  });
  // mean, rstd
  const float first_mean = team_sum<Plan::TEAM>(sum) / C;
  Pair moments = {0, 0};
  for_columns<Plan, L>(C, [&](int i, int64_t c) {
    float v[L];
    row.get(i, c, v);
#pragma unroll
    for (int k = 0; k < L; ++k) {
      const float centred = v[k] - first_mean;
      moments.a += centred;
      moments.b = fmaf(centred, centred, moments.b);
    }
  });
  moments = team_sum<Plan::TEAM>(moments);
  const float rest = moments.a / C, mean = first_mean + rest;
  const float variance = moments.b / C - rest * rest;
  const float rstd = 1 / sqrtf((variance < 0 ? 0 : variance) + eps);  // NaN stays NaN
  // y = xhat weight + bias
  for_columns<Plan, L>(C, [&](int i, int64_t c) {
    float v[L], w[L], b[L];
    row.get(i, c, v);
    load(weight + c, w);
    load(bias + c, b);
#pragma unroll
    for (int k = 0; k < L; ++k) v[k] = fmaf((v[k] - mean) * rstd, w[k], b[k]);
    store(v, y + n * C + c);
  });
  if (threadIdx.x % Plan::TEAM == 0) {
    stats[n] = mean;
    stats[N + n] = rstd;
  }
}

}  // namespace

template <class T, class R>
void layer_norm_fwd(const LayerNormFwd& args, const Executor& on) {
  const auto* x = static_cast<const T*>(args.x);
  const auto* residual = static_cast<const R*>(args.residual);
  const auto* weight = static_cast<const float*>(args.weight);
  const auto* bias = static_cast<const float*>(args.bias);
  auto* y = static_cast<T*>(args.y);
  auto* s = static_cast<R*>(args.s);
  auto* stats = static_cast<float*>(args.stats);
  const int64_t N = args.N, C = args.C;
  const bool aligned = are_aligned(x, residual, weight, bias, y, s) && C % kLanes<R> == 0;
  with_plan(C, [&](auto plan) {
    with_lanes<R>(aligned, [&](auto L) {
      launch("layer_norm_fwd", layer_norm_fwd_kernel<decltype(plan), T, R, L>,
             cdiv<int64_t>(N, plan.TEAMS), kThreads, 0, on, x, residual, weight, bias, y, s, stats,
             float(args.eps), N, C);
    });
  });
}

#define GPT2_INSTANTIATE(T, R) \
  template void layer_norm_fwd<T, R>(const LayerNormFwd&, const Executor&);
GPT2_INSTANTIATE(float, float)
GPT2_INSTANTIATE(bf16, bf16)
GPT2_INSTANTIATE(bf16, float)
GPT2_INSTANTIATE(f16, f16)
GPT2_INSTANTIATE(f16, float)

}  // namespace gpt2::cuda
