// Reductions over a warp and over a block. The order is fixed, and every thread gets the same bits.
// No FMA contraction: lanes would round differently and disagree.
#pragma once

#include "common.cuh"

namespace gpt2::cuda {

struct Pair {
  float a, b;
};

// A number whose sum is the maximum.
struct Max {
  float x;
};

__device__ inline float plus(float x, float y) {
  return __fadd_rn(x, y);
}
__device__ inline Pair plus(Pair x, Pair y) {
  return {plus(x.a, y.a), plus(x.b, y.b)};
}
__device__ inline Max plus(Max x, Max y) {
  return {fmaxf(x.x, y.x)};
}

__device__ inline float shuffle_xor(float x, int lanes) {
  return __shfl_xor_sync(~0u, x, lanes);
}
__device__ inline Pair shuffle_xor(Pair x, int lanes) {
  return {shuffle_xor(x.a, lanes), shuffle_xor(x.b, lanes)};
}
__device__ inline Max shuffle_xor(Max x, int lanes) {
  return {shuffle_xor(x.x, lanes)};
}

// The sum of x, by plus, over a whole warp.
template <class A>
__device__ A warp_sum(A x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = plus(x, shuffle_xor(x, lanes));
  return x;
}

// Over a block of whole warps; all of its threads call it. `nothing` adds nothing.
template <class A>
__device__ A block_sum(A x, A nothing = A()) {
  __shared__ float memory[kWarp * sizeof(A) / sizeof(float)];
  A* const of_warp = reinterpret_cast<A*>(memory);
  x = warp_sum(x);
  __syncthreads();  // the last call's results have been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  // Every warp adds what the warps have left, in the same order.
  const int lane = threadIdx.x % kWarp;
  return warp_sum(lane < int(blockDim.x) / kWarp ? of_warp[lane] : nothing);
}

}  // namespace gpt2::cuda
