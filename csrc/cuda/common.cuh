// What every kernel's file starts from: storage types as float, accesses of 16 bytes, launches.
//
// T is a storage type, float, bf16 or f16; sums and everything between load and store are float.
// Offsets into tensors are int64_t, grids have an x alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace gpt2::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarp = 32;

template <class I>
__host__ __device__ constexpr I cdiv(I a, I b) {
  return (a + b - 1) / b;
}

constexpr float kLog2e = 1.44269504f;

// 2^x, to two units in the last place; results below the normal numbers are 0. exp(x) is
// exp2_fast(kLog2e * x) where x is 0 or a difference below it: the product's rounding is relative
// to |x|, and weighs little where exp(x) is small.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- storage types

__device__ inline float widen(float x) {
  return x;
}
__device__ inline float widen(bf16 x) {
  return __bfloat162float(x);
}
__device__ inline float widen(f16 x) {
  return __half2float(x);
}

// Rounded to nearest even; NaN stays NaN.
template <class T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 narrow<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline f16 narrow<f16>(float x) {
  return __float2half_rn(x);
}

// N neighbouring elements, moved at once: N * sizeof(T) is a power of two up to 16, and so aligned.
template <class T, int N>
struct alignas(N * sizeof(T)) Vec {
  T x[N];

  static __device__ Vec load(const T* p) { return *reinterpret_cast<const Vec*>(p); }
  __device__ void store(T* p) const { *reinterpret_cast<Vec*>(p) = *this; }
};

// What a thread moves at once: 16 bytes, where every address that it meets allows that; else L = 1.
template <class T>
constexpr int kLanes = 16 / sizeof(T);

// L neighbours as float: L is kLanes of some type, or 1.
template <int L, class T>
__device__ void load(const T* p, float (&x)[L]) {
  constexpr int W = L < kLanes<T> ? L : kLanes<T>;
#pragma unroll
  for (int i = 0; i < L; i += W) {
    const auto part = Vec<T, W>::load(p + i);
#pragma unroll
    for (int j = 0; j < W; ++j) x[i + j] = widen(part.x[j]);
  }
}

template <int L, class T>
__device__ void store(const float (&x)[L], T* p) {
  constexpr int W = L < kLanes<T> ? L : kLanes<T>;
#pragma unroll
  for (int i = 0; i < L; i += W) {
    Vec<T, W> part;
#pragma unroll
    for (int j = 0; j < W; ++j) part.x[j] = narrow<T>(x[i + j]);
    part.store(p + i);
  }
}

template <class... Pointers>
bool are_aligned(Pointers... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

// A number of lanes as a type, for functions that are handed one.
template <int L>
struct Lanes {
  __host__ __device__ constexpr operator int() const { return L; }
};

// f(kLanes<T>), or f(1).
template <class T, class F>
void with_lanes(bool aligned, const F& f) {
  aligned ? f(Lanes<kLanes<T>>()) : f(Lanes<1>());
}

// ---- launches

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
  }
}

// A number of the current GPU.
inline int attribute_of_gpu(cudaDeviceAttr attribute, const char* kernel) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), kernel);
  check(cudaDeviceGetAttribute(&value, attribute, device), kernel);
  return value;
}

// kernel<<<blocks, threads, shared>>>(args...) on the executor's stream; `name` is for messages.
// More than 48 KiB of shared memory must be asked for.
template <class... Parameters, class... Args>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            int64_t shared, const Executor& on, Args... args) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(name) + ": too many blocks");
  if (shared > 48 << 10) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
          name);
  }
  kernel<<<unsigned(blocks), threads, size_t(shared), on.stream>>>(args...);
  check(cudaGetLastError(), name);
}

}  // namespace gpt2::cuda
