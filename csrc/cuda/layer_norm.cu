// LayerNorm over the last dimension, alone or after the residual addition.
//
//   mean = sum(x) / C
//   rstd = 1 / sqrt(sum((x - mean)^2) / C + eps)    xhat = (x - mean) rstd
//   y    = xhat weight + bias
//
// Memory-bound: a row is read once and held in registers, by a warp up to 1024 columns and by a
// block up to 8192; longer ones are read again, from L2. Two passes for the moments: the centred
// sum does not cancel the way E[x^2] - mean^2 does when |mean| >> std. What the centred row still
// sums to is the rounding of the first mean, which is put right by it.
//
// Backward, with wdy = dy weight:
//
//   dx = rstd (wdy - mean_C(wdy) - xhat mean_C(wdy xhat)) + ds
//   dweight = sum over rows of dy xhat    dbias = sum over rows of dy
//
// A block sums its share of the rows in registers and leaves one row of `partial`.
//
//   N rows   C features   TEAM threads that share a row   L columns that a thread moves at once
//   T the branch: x, y, their gradients   R the residual, s and their gradients: T, or float where
//   autocast keeps the stream in float32
#include <algorithm>
#include <type_traits>

#include "partial.cuh"
#include "reduce.cuh"

namespace gpt2::cuda {
namespace {

constexpr int kThreads = 256;

// How a row is shared: by how many threads, and how many of its columns each holds; none where a
// row is too long for that.
template <int TEAM_, int HELD_>
struct Plan {
  static constexpr int TEAM = TEAM_, TEAMS = kThreads / TEAM;  // of a block
  static constexpr int HELD = HELD_;

  // Vectors of L that a thread holds; one is a place to work where none are.
  static __host__ __device__ constexpr int vectors(int L) { return HELD > 0 ? HELD / L : 1; }
};

// f(plan) for rows of C columns. GPT-2's are 768 and 1024, 1280 and 1600.
template <class F>
void with_plan(int64_t C, const F& f) {
  if (C <= 24 * kWarp) {
    f(Plan<kWarp, 24>());
  } else if (C <= 32 * kWarp) {
    f(Plan<kWarp, 32>());
  } else if (C <= 8 * kThreads) {
    f(Plan<kThreads, 8>());
  } else if (C <= 32 * kThreads) {
    f(Plan<kThreads, 32>());
  } else {
    f(Plan<kThreads, 0>());
  }
}

// Blocks of a multiprocessor, for the compiler: so many registers a thread may have. Two blocks of
// the backward fit where dweight, dbias, x and dy of 24 columns are held, the latter two packed.
__host__ __device__ constexpr int fwd_blocks(int L) {
  return L > 1 ? 4 : 1;
}
template <class R>
__host__ __device__ constexpr int bwd_blocks(int held, int L) {
  return L > 1 && held <= 24 && sizeof(R) < 4 ? 2 : 1;
}

template <int TEAM, class A>
__device__ A team_sum(A x) {
  if constexpr (TEAM == kWarp) {
    return warp_sum(x);
  } else {
    return block_sum(x);
  }
}

// f(i, c) for this thread's columns [c, c + L), i counting them.
template <class Plan, int L, class F>
__device__ void for_columns(int64_t C, F f) {
  const int first = threadIdx.x % Plan::TEAM * L;
  if constexpr (Plan::HELD > 0) {
#pragma unroll
    for (int i = 0; i < Plan::vectors(L); ++i) {
      const int c = first + i * Plan::TEAM * L;
      if (c < C) f(i, c);
    }
  } else {
#pragma unroll 1
    for (int64_t c = first; c < C; c += Plan::TEAM * L) f(0, c);
  }
}

// This thread's columns of a row in memory, as they are stored there.
template <class Plan, class T, int L>
struct Row {
  const T* memory;
  Vec<T, L> held[Plan::vectors(L)];

  __device__ void get(int i, int64_t c, float (&x)[L]) const {
    const Vec<T, L> stored = Plan::HELD > 0 ? held[i] : Vec<T, L>::load(memory + c);
#pragma unroll
    for (int k = 0; k < L; ++k) x[k] = widen(stored.x[k]);
  }
};

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

template <class Plan, class T, class R, int L>
__global__ void __launch_bounds__(kThreads, bwd_blocks<R>(Plan::HELD, L))
    layer_norm_bwd_kernel(const T* dy, const R* ds,  // (N, C); ds may be null
                          const R* x,                // (N, C): what the norm saw
                          const float* weight,       // (C,)
                          const float* stats,        // (2, N): mean, rstd
                          T* dx, R* dresidual,       // (N, C); dresidual in the mixed form alone
                          float* partial,            // (blocks, 2, C)
                          int64_t N, int64_t C) {
  float dw[Plan::vectors(L)][L] = {}, db[Plan::vectors(L)][L] = {};
  partial += blockIdx.x * 2 * C;
  const int team = threadIdx.x / Plan::TEAM;
  const int64_t first = int64_t(blockIdx.x) * Plan::TEAMS + team;
  if constexpr (Plan::TEAMS == 1)
    __builtin_assume(first < N);  // there are no more blocks than rows
  for (int64_t n = first; n < N; n += int64_t(gridDim.x) * Plan::TEAMS) {
    const float mean = stats[n], rstd = stats[N + n];
    Row<Plan, R, L> x_row;
    Row<Plan, T, L> dy_row;
    x_row.memory = x + n * C;
    dy_row.memory = dy + n * C;
    if constexpr (Plan::HELD > 0) {
      for_columns<Plan, L>(C, [&](int i, int64_t c) {
        x_row.held[i] = Vec<R, L>::load(x_row.memory + c);
        dy_row.held[i] = Vec<T, L>::load(dy_row.memory + c);
      });
    }
    // sum_C(wdy), sum_C(wdy xhat)
    Pair sums = {0, 0};
    for_columns<Plan, L>(C, [&](int i, int64_t c) {
      float v[L], d[L], w[L];
      x_row.get(i, c, v);
      dy_row.get(i, c, d);
      load(weight + c, w);
#pragma unroll
      for (int k = 0; k < L; ++k) {
        const float wdy = d[k] * w[k];
        sums.a += wdy;
        sums.b = fmaf(wdy, (v[k] - mean) * rstd, sums.b);
      }
    });
    sums = team_sum<Plan::TEAM>(sums);
    const float mean_wdy = sums.a / C, mean_wdy_xhat = sums.b / C;
    // dx, dweight, dbias
    for_columns<Plan, L>(C, [&](int i, int64_t c) {
      float v[L], d[L], w[L], g[L] = {};
      x_row.get(i, c, v);
      dy_row.get(i, c, d);
      load(weight + c, w);
      if (!std::is_same_v<T, R> || ds) load(ds + n * C + c, g);  // the mixed form has one
      if constexpr (Plan::HELD == 0) {
        if (n > first) {
          load(partial + c, dw[0]);
          load(partial + C + c, db[0]);
        } else {
#pragma unroll
          for (int k = 0; k < L; ++k) dw[0][k] = db[0][k] = 0;
        }
      }
#pragma unroll
      for (int k = 0; k < L; ++k) {
        const float xhat = (v[k] - mean) * rstd;
        g[k] = fmaf(rstd, d[k] * w[k] - mean_wdy - xhat * mean_wdy_xhat, g[k]);
        dw[i][k] = fmaf(d[k], xhat, dw[i][k]);
        db[i][k] += d[k];
      }
      store(g, dx + n * C + c);
      if constexpr (!std::is_same_v<T, R>) store(g, dresidual + n * C + c);
      if constexpr (Plan::HELD == 0) {
        store(dw[0], partial + c);
        store(db[0], partial + C + c);
      }
    });
  }
  if constexpr (Plan::TEAMS > 1) {
    // One team after the other adds its sums to those so far: a thread's columns beside its
    // neighbours', so that no two of a warp meet in a bank.
    __shared__ float sum[2][Plan::HELD][Plan::TEAM];
    const int lane = threadIdx.x % Plan::TEAM;
    for (int turn = 0; turn < Plan::TEAMS; ++turn) {
      if (turn == team) {
        for_columns<Plan, L>(C, [&](int i, int64_t) {
#pragma unroll
          for (int k = 0; k < L; ++k) {
            if (turn > 0) {
              dw[i][k] += sum[0][i * L + k][lane];
              db[i][k] += sum[1][i * L + k][lane];
            }
            sum[0][i * L + k][lane] = dw[i][k];
            sum[1][i * L + k][lane] = db[i][k];
          }
        });
      }
      __syncthreads();
    }
    if (team < Plan::TEAMS - 1) return;
  }
  if constexpr (Plan::HELD > 0) {
    for_columns<Plan, L>(C, [&](int i, int64_t c) {
      store(dw[i], partial + c);
      store(db[i], partial + C + c);
    });
  }
}

}  // namespace

template <class T, class R>
void layer_norm_fwd(const void* x_, const void* residual_, const void* weight_, const void* bias_,
                    double eps, void* y_, void* s_, void* stats_, int64_t N, int64_t C,
                    const Executor& on) {
  const auto* x = static_cast<const T*>(x_);
  const auto* residual = static_cast<const R*>(residual_);
  const auto *weight = static_cast<const float*>(weight_), *bias = static_cast<const float*>(bias_);
  auto* y = static_cast<T*>(y_);
  auto* s = static_cast<R*>(s_);
  auto* stats = static_cast<float*>(stats_);
  const bool aligned = are_aligned(x, residual, weight, bias, y, s) && C % kLanes<R> == 0;
  with_plan(C, [&](auto plan) {
    with_lanes<R>(aligned, [&](auto L) {
      launch("layer_norm_fwd", layer_norm_fwd_kernel<decltype(plan), T, R, L>,
             cdiv<int64_t>(N, plan.TEAMS), kThreads, 0, on, x, residual, weight, bias, y, s, stats,
             float(eps), N, C);
    });
  });
}

template <class T, class R>
void layer_norm_bwd(const void* dy_, const void* ds_, const void* s_, const void* weight_,
                    const void* stats_, void* dx_, void* dresidual_, void* dparams, void* partial_,
                    int64_t N, int64_t C, const Executor& on) {
  const auto* dy = static_cast<const T*>(dy_);
  const auto *ds = static_cast<const R*>(ds_), *x = static_cast<const R*>(s_);
  const auto *weight = static_cast<const float*>(weight_),
             *stats = static_cast<const float*>(stats_);
  auto* dx = static_cast<T*>(dx_);
  auto* dresidual = static_cast<R*>(dresidual_);
  auto* partial = static_cast<float*>(partial_);
  const bool aligned = are_aligned(dy, ds, x, weight, dx, dresidual, partial) && C % kLanes<R> == 0;
  with_plan(C, [&](auto plan) {
    const int64_t blocks = std::min(kMaxPartial, cdiv<int64_t>(N, plan.TEAMS));
    with_lanes<R>(aligned, [&](auto L) {
      launch("layer_norm_bwd", layer_norm_bwd_kernel<decltype(plan), T, R, L>, blocks, kThreads, 0,
             on, dy, ds, x, weight, stats, dx, dresidual, partial, N, C);
    });
    sum_partial(partial, static_cast<float*>(dparams), blocks, 2 * C, on);
  });
}

#define GPT2_INSTANTIATE(T, R)                                                                   \
  template void layer_norm_fwd<T, R>(const void*, const void*, const void*, const void*, double, \
                                     void*, void*, void*, int64_t, int64_t, const Executor&);    \
  template void layer_norm_bwd<T, R>(const void*, const void*, const void*, const void*,         \
                                     const void*, void*, void*, void*, void*, int64_t, int64_t,  \
                                     const Executor&);
GPT2_INSTANTIATE(float, float)
GPT2_INSTANTIATE(bf16, bf16)
GPT2_INSTANTIATE(bf16, float)
GPT2_INSTANTIATE(f16, f16)
GPT2_INSTANTIATE(f16, float)

}  // namespace gpt2::cuda
