// What LayerNorm's two passes share: how threads hold a row.
//
// Memory-bound: a row is read once and held in registers, by a warp up to 1024 columns and by a
// block up to 8192; longer ones are read again, from L2.
//
//   N rows   C features   TEAM threads that share a row   L columns that a thread moves at once
//   T the branch: x, y, their gradients   R the residual, s and their gradients: T, or float where
//   autocast keeps the stream in float32
#pragma once

#include <type_traits>

#include "reduce.cuh"

namespace gpt2::cuda {

constexpr int kThreads = 256;

// The number of threads that share a row, and the number of columns that each holds in registers: 0
// if the row is too long.
template <int TEAM_, int HELD_>
struct Plan {
  static constexpr int TEAM = TEAM_, TEAMS = kThreads / TEAM;  // of a block
  static constexpr int HELD = HELD_;

  // Vectors of L columns that a thread holds; at least 1, so that an array of them is not empty.
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

}  // namespace gpt2::cuda
