// Products of tiles, and the tiles of shared memory that they read.
//
//   product_nt   acc (rows, N) += A (rows, D) B (N, D)^T     A and B in shared memory
//   product_nn   acc (rows, D) += P (rows, N) B (N, D)       P in registers, B in shared memory
//
// Attention needs no others, forward or backward: what one product leaves in registers is the left
// operand of the next. A warp owns 16 MT rows; an accumulator is MT rows of 16 x 8 tiles, laid out
// as mma.sync m16n8k16 lays them out. Of each, a lane holds four elements:
//
//   c[0], c[1]   row lane / 4       columns 2 (lane % 4) and the next
//   c[2], c[3]   row lane / 4 + 8   the same columns
//
// bfloat16 and float16 run on the tensor cores and sum in float32. float32 is multiplied in
// float32, by the FMA units, into the same layout: everything around the products is written once.
#pragma once

#include "async.cuh"

namespace gpt2::cuda {

// (rows, D) numbers in shared memory, in chunks of 16 bytes. A row's chunks are permuted by its
// number, so that the same chunk of eight rows in sequence, which is what ldmatrix reads at once,
// lies in all 32 banks.
template <class T, int D>
struct Tile {
  static constexpr int kChunk = 16 / sizeof(T), kChunks = D / kChunk;
  static_assert(kChunks % 4 == 0);

  T* data;

  __device__ T* chunk(int row, int chunk) const {
    const int swizzle = kChunks % 8 == 0 ? row & 7 : row >> 1 & 3;  // two short rows fill the banks
    return data + row * D + (chunk ^ swizzle) * kChunk;
  }
  __device__ T* element(int row, int column) const {
    return chunk(row, column / kChunk) + column % kChunk;
  }
};

// ---- instructions

// Four 8 x 8 matrices: lane i names a row of matrix i / 8, and gets of each the elements 2 (i % 4)
// and the next of row i / 4; with _trans, of column i / 4.
__device__ inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

__device__ inline void ldmatrix_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// c (16, 8) += a (16, 16) b (16, 8)
template <class T>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers, rounded, as one register holds them.
template <class T>
__device__ uint32_t pack(float low, float high);

template <>
__device__ inline uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <>
__device__ inline uint32_t pack<f16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// ---- accumulators

// f(i, n) for each 16 x 8 tile of an accumulator.
template <int MT, int NT, class F>
__device__ void for_each_tile(const F& f) {
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int n = 0; n < NT; ++n) f(i, n);
  }
}

// f(i, n, e) for each of a lane's elements of an accumulator, acc[i][n][e].
template <int MT, int NT, class F>
__device__ void for_each(const F& f) {
  for_each_tile<MT, NT>([&](int i, int n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) f(i, n, e);
  });
}

// Where a lane's elements lie; rows are counted from the block's first.
template <int MT>
struct Lane {
  const int warp_row = threadIdx.x / kWarp * 16 * MT;
  const int in_row = threadIdx.x % kWarp / 4, in_column = threadIdx.x % 4 * 2;

  __device__ int row(int i, int half) const { return warp_row + in_row + 16 * i + 8 * half; }
  __device__ int column(int n, int e) const { return 8 * n + in_column + e % 2; }
};

// Reductions over a row, which four neighbouring lanes share.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// ---- products

// A's rows from `row` on, read again by each product.
template <class T, int D>
struct SharedRows {
  Tile<T, D> tile;
  int row;

  // The 16 x 16 tile of rows 16 m and columns 16 k.
  __device__ void fragment(uint32_t (&a)[4], int m, int k) const {
    const int lane = threadIdx.x % kWarp;
    ldmatrix(a, tile.chunk(row + 16 * m + lane % 16, 2 * k + lane / 16));
  }
};

// The same, read once and kept.
template <class T, int D, int MT>
struct RegisterRows {
  uint32_t kept[MT][D / 16][4];

  __device__ explicit RegisterRows(SharedRows<T, D> rows) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) rows.fragment(kept[m][k], m, k);
    }
  }

  __device__ void fragment(uint32_t (&a)[4], int m, int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = kept[m][k][i];
  }
};

template <class Rows, class T, int D, int MT, int NT>
__device__ void product_nt(float (&acc)[MT][NT][4], const Rows& A, Tile<T, D> B) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) A.fragment(a[m], m, k);
#pragma unroll
    for (int n = 0; n < NT; n += 2) {  // matrices: columns 8 n, k and k + 8; 8 n + 8, k and k + 8
      uint32_t b[4];
      ldmatrix(b, B.chunk(8 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mma<T>(acc[m][n], a[m], b[0], b[1]);
        mma<T>(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <class T, int D, int MT, int NT>
__device__ void product_nn(float (&acc)[MT][D / 8][4], const float (&P)[MT][NT][4], Tile<T, D> B) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < NT / 2; ++k) {  // two neighbouring tiles of P are one left operand
    uint32_t a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &P[m][2 * k + i / 2][i % 2 * 2];
        a[m][i] = pack<T>(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int d = 0; d < D / 8; d += 2) {
      uint32_t b[4];
      ldmatrix_trans(b, B.chunk(16 * k + lane % 16, d + lane / 16));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mma<T>(acc[m][d], a[m], b[0], b[1]);
        mma<T>(acc[m][d + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// float32: a lane multiplies its own elements.

template <int D, int MT, int NT>
__device__ void product_nt(float (&acc)[MT][NT][4], const SharedRows<float, D>& A,
                           Tile<float, D> B) {
  const int lane = threadIdx.x % kWarp, row = A.row + lane / 4, column = lane % 4 * 2;
#pragma unroll 2
  for (int k = 0; k < D / 4; ++k) {
    float4 a[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[m][half] = *reinterpret_cast<float4*>(A.tile.chunk(row + 16 * m + 8 * half, k));
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 b = *reinterpret_cast<float4*>(B.chunk(8 * n + column + i % 2, k));
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          float& c = acc[m][n][i];
          c = fmaf(a[m][i / 2].x, b.x, c);
          c = fmaf(a[m][i / 2].y, b.y, c);
          c = fmaf(a[m][i / 2].z, b.z, c);
          c = fmaf(a[m][i / 2].w, b.w, c);
        }
      }
    }
  }
}

template <int D, int MT, int NT>
__device__ void product_nn(float (&acc)[MT][D / 8][4], const float (&P)[MT][NT][4],
                           Tile<float, D> B) {
  const int lane = threadIdx.x % kWarp, column = lane % 4 * 2;
#pragma unroll
  for (int k = 0; k < 8 * NT; ++k) {
    float p[MT][2];  // column k of P, of this lane's rows: one of four neighbours holds it
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        p[m][half] = __shfl_sync(~0u, P[m][k / 8][2 * half + k % 2], k % 8 / 2, 4);
      }
    }
    // B.element(k, 8 d + column): with k known, a lane changes the last bit of its chunk alone, and
    // two addresses serve all. Otherwise every k and d keep a register with theirs.
    const float* row = B.data + k * D + (column / 4 ^ k & 1) * 4 + column % 4;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      const float2 b = *reinterpret_cast<const float2*>(row + (2 * d ^ k & 6) * 4);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          acc[m][d][2 * half] = fmaf(p[m][half], b.x, acc[m][d][2 * half]);
          acc[m][d][2 * half + 1] = fmaf(p[m][half], b.y, acc[m][d][2 * half + 1]);
        }
      }
    }
  }
}

}  // namespace gpt2::cuda
