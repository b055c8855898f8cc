// Sums gradients of parameters that all rows share, without atomics. Each block writes its sum to a
// row of `partial`; this kernel adds those rows. The grid depends only on N and C, so the bits do
// too.
#pragma once

#include "common.cuh"

namespace gpt2::cuda {

// out[c] = sum_i partial[i][c]; a block has 32 columns, and each of its warps every 16th row.
static __global__ void __launch_bounds__(512)
    sum_partial_kernel(const float* partial,  // (rows, columns)
                       float* out,            // (columns,)
                       int rows, int64_t columns) {
  constexpr int WARPS = 16;
  __shared__ float of_warp[WARPS][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t c = int64_t(blockIdx.x) * kWarp + lane;
  float sum = 0;
  if (c < columns) {
#pragma unroll 4
    for (int i = warp; i < rows; i += WARPS) sum += partial[i * columns + c];
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= columns) return;
#pragma unroll
  for (int i = 1; i < WARPS; ++i) sum += of_warp[i][lane];
  out[c] = sum;
}

inline void sum_partial(const float* partial, float* out, int64_t rows, int64_t columns,
                        const Executor& on) {
  launch("sum_partial", sum_partial_kernel, cdiv<int64_t>(columns, kWarp), 512, 0, on, partial, out,
         int(rows), columns);
}

}  // namespace gpt2::cuda
