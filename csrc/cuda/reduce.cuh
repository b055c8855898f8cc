// Reductions over a warp and over a block. The order is fixed, and every thread gets the same bits.
// No FMA contraction: lanes would round differently and disagree.
#pragma once

#include "common.cuh"

namespace gpt2::cuda {

struct Pair {
  float a, b;
};

// m = max x and l = sum exp(x - m) of what has been seen; of nothing, or of -inf alone, l is 0.
struct Softmax {
  float m = -INFINITY, l = 0;

  // exp(x - shift) is 0, and not exp(-inf + inf), where all there is is -inf.
  __device__ float shift() const { return m == -INFINITY ? 0 : m; }
};

__device__ inline float plus(float x, float y) {
  return __fadd_rn(x, y);
}
__device__ inline Pair plus(Pair x, Pair y) {
  return {plus(x.a, y.a), plus(x.b, y.b)};
}
__device__ inline Softmax plus(Softmax x, Softmax y) {
  Softmax both;
  both.m = fmaxf(x.m, y.m);
  const float shift = both.shift();
  both.l = plus(__fmul_rn(x.l, exp2_fast(kLog2e * (x.m - shift))),
                __fmul_rn(y.l, exp2_fast(kLog2e * (y.m - shift))));
  return both;
}

__device__ inline float shuffle_xor(float x, int lanes) {
  return __shfl_xor_sync(~0u, x, lanes);
}
__device__ inline Pair shuffle_xor(Pair x, int lanes) {
  return {shuffle_xor(x.a, lanes), shuffle_xor(x.b, lanes)};
}
__device__ inline Softmax shuffle_xor(Softmax x, int lanes) {
  return {shuffle_xor(x.m, lanes), shuffle_xor(x.l, lanes)};
}

// The sum of x, by plus, over a whole warp.
template <class A>
__device__ A warp_sum(A x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x = plus(x, shuffle_xor(x, lanes));
  return x;
}

// Over a block of whole warps; all of its threads call it. A() adds nothing.
template <class A>
__device__ A block_sum(A x) {
  __shared__ float memory[kWarp * sizeof(A) / sizeof(float)];
  A* const of_warp = reinterpret_cast<A*>(memory);
  x = warp_sum(x);
  __syncthreads();  // the last call's results have been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  // Every warp adds what the warps have left, in the same order.
  const int lane = threadIdx.x % kWarp;
  return warp_sum(lane < int(blockDim.x) / kWarp ? of_warp[lane] : A());
}

}  // namespace gpt2::cuda
