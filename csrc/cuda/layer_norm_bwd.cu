// LayerNorm, backward. With wdy = dy weight,
//
//   dx = rstd (wdy - mean_C(wdy) - xhat mean_C(wdy xhat)) + ds
//   dweight = sum over rows of dy xhat    dbias = sum over rows of dy
//
// A block sums dweight and dbias over its share of the rows and leaves one row of `partial`. It
// does so in one of three ways, by the length of a row: backward_by_warps, backward_by_block,
// backward_in_memory. Dimensions as in layer_norm.cuh.
#include <algorithm>

#include "layer_norm.cuh"
#include "partial.cuh"

namespace gpt2::cuda {
namespace {

// Blocks of a multiprocessor, for the compiler: so many registers a thread may have. Two blocks fit
// where dweight, dbias, x and dy of 24 columns are held, the latter two packed.
template <class R>
__host__ __device__ constexpr int bwd_blocks(int held, int L) {
  return L > 1 && held <= 24 && sizeof(R) < 4 ? 2 : 1;
}

template <class T, class R>
struct BackwardArgs {
  const T* dy;          // (N, C)
  const R* ds;          // (N, C), or null
  const R* x;           // (N, C): what the norm saw
  const float* weight;  // (C,)
  const float* stats;   // (2, N): mean, rstd
  T* dx;                // (N, C)
  R* dresidual;         // (N, C); in the mixed form alone
  float* partial;       // (blocks, 2, C): dweight, dbias
  int64_t N, C;
};

// dx of row n. `parameters` gains this thread's columns of dweight and dbias: dy xhat and dy.
template <class Plan, int L, class T, class R, class Sums>
__device__ void backward_row(const BackwardArgs<T, R>& args, int64_t n, Sums& parameters) {
  constexpr bool kMixed = !std::is_same_v<T, R>;  // there are ds and dresidual then
  const int64_t C = args.C;
  const float mean = args.stats[n], rstd = args.stats[args.N + n];
  Row<Plan, R, L> x_row;
  Row<Plan, T, L> dy_row;
  x_row.memory = args.x + n * C;
  dy_row.memory = args.dy + n * C;
  if constexpr (Plan::HELD > 0) {
    for_columns<Plan, L>(C, [&](int i, int64_t c) {
      x_row.held[i] = Vec<R, L>::load(x_row.memory + c);
      dy_row.held[i] = Vec<T, L>::load(dy_row.memory + c);
    });
  }
  // mean_C(wdy), mean_C(wdy xhat)
  Pair sums = {0, 0};
  for_columns<Plan, L>(C, [&](int i, int64_t c) {
    float v[L], d[L], w[L];
    x_row.get(i, c, v);
    dy_row.get(i, c, d);
    load(args.weight + c, w);
#pragma unroll
    for (int k = 0; k < L; ++k) {
      const float wdy = d[k] * w[k];
      sums.a += wdy;
      sums.b = fmaf(wdy, (v[k] - mean) * rstd, sums.b);
    }
  });
  sums = team_sum<Plan::TEAM>(sums);
  const float mean_wdy = sums.a / C, mean_wdy_xhat = sums.b / C;
  // dx = rstd (wdy - mean_C(wdy) - xhat mean_C(wdy xhat)) + ds
  for_columns<Plan, L>(C, [&](int i, int64_t c) {
    float v[L], d[L], w[L], g[L] = {};
    x_row.get(i, c, v);
    dy_row.get(i, c, d);
    load(args.weight + c, w);
    if (kMixed || args.ds) load(args.ds + n * C + c, g);
    parameters.begin(c);
#pragma unroll
    for (int k = 0; k < L; ++k) {
      const float xhat = (v[k] - mean) * rstd;
      g[k] = fmaf(rstd, d[k] * w[k] - mean_wdy - xhat * mean_wdy_xhat, g[k]);
      parameters.add(i, k, d[k], xhat);
    }
    store(g, args.dx + n * C + c);
    if constexpr (kMixed) store(g, args.dresidual + n * C + c);
    parameters.end(c);
  });
}

// dweight and dbias of a block's rows, in registers.
template <class Plan, int L>
struct RegisterSums {
  float dw[Plan::vectors(L)][L] = {}, db[Plan::vectors(L)][L] = {};

  __device__ void begin(int64_t) {}
  __device__ void add(int i, int k, float d, float xhat) {
    dw[i][k] = fmaf(d, xhat, dw[i][k]);
    db[i][k] += d;
  }
  __device__ void end(int64_t) {}

  // One team after the other adds its sums to those so far; the last has them all. A thread's
  // columns lie beside its neighbours', so that no two of a warp meet in a bank.
  __device__ void add_teams(int team, int64_t C) {
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
  }

  __device__ void store_to(float* partial, int64_t C) const {
    for_columns<Plan, L>(C, [&](int i, int64_t c) {
      store(dw[i], partial + c);
      store(db[i], partial + C + c);
    });
  }
};

// The same in memory, a vector at a time.
template <int L>
struct MemorySums {
  float* partial;  // (2, C)
  int64_t C;
  bool is_empty;
  float dw[L], db[L];

  __device__ void begin(int64_t c) {
    if (is_empty) {
#pragma unroll
      for (int k = 0; k < L; ++k) dw[k] = db[k] = 0;
    } else {
      load(partial + c, dw);
      load(partial + C + c, db);
    }
  }
  __device__ void add(int, int k, float d, float xhat) {
    dw[k] = fmaf(d, xhat, dw[k]);
    db[k] += d;
  }
  __device__ void end(int64_t c) {
    store(dw, partial + c);
    store(db, partial + C + c);
  }
};

// Rows that a warp holds in registers: eight teams of a block take every eighth of its rows.
template <class Plan, int L, class T, class R>
__device__ void backward_by_warps(const BackwardArgs<T, R>& args, float* partial) {
  RegisterSums<Plan, L> sums;
  const int team = threadIdx.x / Plan::TEAM;
  const int64_t first = int64_t(blockIdx.x) * Plan::TEAMS + team;
  for (int64_t n = first; n < args.N; n += int64_t(gridDim.x) * Plan::TEAMS) {
    backward_row<Plan, L>(args, n, sums);
  }
  sums.add_teams(team, args.C);
  if (team == Plan::TEAMS - 1) sums.store_to(partial, args.C);
}

// Rows that a block holds in registers.
template <class Plan, int L, class T, class R>
__device__ void backward_by_block(const BackwardArgs<T, R>& args, float* partial) {
  RegisterSums<Plan, L> sums;
  int64_t n = blockIdx.x;
  do {  // at least once: there are no more blocks than rows
    backward_row<Plan, L>(args, n, sums);
    n += gridDim.x;
  } while (n < args.N);
  sums.store_to(partial, args.C);
}

// Rows that are too long for registers, and so are their sums: these grow in `partial`.
template <class Plan, int L, class T, class R>
__device__ void backward_in_memory(const BackwardArgs<T, R>& args, float* partial) {
  const int64_t first = blockIdx.x;
  __builtin_assume(first < args.N);  // there are no more blocks than rows
  for (int64_t n = first; n < args.N; n += gridDim.x) {
    MemorySums<L> sums{partial, args.C, n == first};
    backward_row<Plan, L>(args, n, sums);
  }
}

template <class Plan, class T, class R, int L>
__global__ void __launch_bounds__(kThreads, bwd_blocks<R>(Plan::HELD, L))
    layer_norm_bwd_kernel(const BackwardArgs<T, R> args) {
  float* const partial = args.partial + blockIdx.x * 2 * args.C;
  if constexpr (Plan::TEAMS > 1) {
    backward_by_warps<Plan, L>(args, partial);
  } else if constexpr (Plan::HELD > 0) {
    backward_by_block<Plan, L>(args, partial);
  } else {
    backward_in_memory<Plan, L>(args, partial);
  }
}

}  // namespace

template <class T, class R>
void layer_norm_bwd(const LayerNormBwd& args, const Executor& on) {
  const BackwardArgs<T, R> a{static_cast<const T*>(args.dy),
                             static_cast<const R*>(args.ds),
                             static_cast<const R*>(args.s),
                             static_cast<const float*>(args.weight),
                             static_cast<const float*>(args.stats),
                             static_cast<T*>(args.dx),
                             static_cast<R*>(args.dresidual),
                             static_cast<float*>(args.partial),
                             args.N,
                             args.C};
  const bool aligned =
      are_aligned(a.dy, a.ds, a.x, a.weight, a.dx, a.dresidual, a.partial) && a.C % kLanes<R> == 0;
  with_plan(a.C, [&](auto plan) {
    const int64_t blocks = std::min(kMaxPartial, cdiv<int64_t>(a.N, plan.TEAMS));
    with_lanes<R>(aligned, [&](auto L) {
      launch("layer_norm_bwd", layer_norm_bwd_kernel<decltype(plan), T, R, L>, blocks, kThreads, 0,
             on, a);
    });
    sum_partial(a.partial, static_cast<float*>(args.dparams), blocks, 2 * a.C, on);
  });
}

#define GPT2_INSTANTIATE(T, R) \
  template void layer_norm_bwd<T, R>(const LayerNormBwd&, const Executor&);
GPT2_INSTANTIATE(float, float)
GPT2_INSTANTIATE(bf16, bf16)
GPT2_INSTANTIATE(bf16, float)
GPT2_INSTANTIATE(f16, f16)
GPT2_INSTANTIATE(f16, float)

}  // namespace gpt2::cuda
