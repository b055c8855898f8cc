// GPT-2's GELU, the tanh approximation, alone or with the bias of the linear layer before it.
//
//   u = sqrt(2 / pi) (x + 0.044715 x^3)
//   y = 0.5 x (1 + tanh(u)) = x sigmoid(2u) = x / (1 + e),  e = exp(-2u)
//
// The sigmoid does not cancel in the left tail as 1 + tanh(u) does. Memory-bound: x is read once
// and y written once, 16 bytes at a time.
//
//   dx = dy gelu'(x)    dbias = sum over rows of dx
//
//   N rows   C features   L elements that a thread moves at once
#include <algorithm>

#include "partial.cuh"

namespace gpt2::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStripThreads = 128;  // of a block of columns, where there is a bias
constexpr int kRows = 4;            // that a thread of bias_gelu_fwd has

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kSqrt2OverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;

// e = exp(-2u)
__device__ float gelu_exp(float x) {
  return exp2f(x * fmaf(x * x, -2 * kLog2E * kSqrt2OverPi * kCubic, -2 * kLog2E * kSqrt2OverPi));
}

__device__ float gelu(float x) {
  return x / (1 + gelu_exp(x));
}

// g + x g (1 - g) 2u' with g = sigmoid(2u) and 1 - g = e g, a product: the difference would cancel.
// Beyond |x| = 10 the result is 0 or 1 to 35 digits; there e, u' or x itself would overflow.
__device__ float gelu_grad(float x) {
  const float e = gelu_exp(x), g = 1 / (1 + e);
  const float two_du = fmaf(x * x, 6 * kSqrt2OverPi * kCubic, 2 * kSqrt2OverPi);
  const float grad = fmaf(x * two_du, (e * g) * g, g);
  return x < -10 ? 0 : x > 10 ? 1 : grad;
}

// f(i, lanes) for the elements [i, i + lanes) of this thread: L of them, or one by one at the end.
template <int L, class F>
__device__ void for_elements(int64_t n, F f) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * L;
  if (i + L <= n) {
    f(i, Lanes<L>());
  } else {
#pragma unroll 1  // fewer than L
    for (int64_t j = i; j < n; ++j) f(j, Lanes<1>());
  }
}

template <class T, int L>
__global__ void __launch_bounds__(kThreads, 2) gelu_fwd_kernel(const T* x, T* y, int64_t n) {
  for_elements<L>(n, [=](int64_t i, auto lanes) {
    float v[lanes];
    load(x + i, v);
#pragma unroll
    for (float& each : v) each = gelu(each);
    store(v, y + i);
  });
}

template <class T, int L>
__global__ void __launch_bounds__(kThreads, 2)
    gelu_bwd_kernel(const T* dy, const T* x, T* dx, int64_t n) {
  for_elements<L>(n, [=](int64_t i, auto lanes) {
    float d[lanes], v[lanes];
    load(dy + i, d);
    load(x + i, v);
#pragma unroll
    for (int k = 0; k < lanes; ++k) d[k] *= gelu_grad(v[k]);
    store(d, dx + i);
  });
}

// A block has a strip of columns, L for each thread, and some rows of it.
template <int L>
struct Strip {
  static __host__ __device__ int64_t count(int64_t C) {
    return cdiv<int64_t>(C, kStripThreads * L);
  }
  int64_t c, group;  // this thread's first column; which rows

  __device__ explicit Strip(int64_t C)
      : c((blockIdx.x % unsigned(count(C)) * kStripThreads + threadIdx.x) * int64_t(L)),
        group(blockIdx.x / unsigned(count(C))) {}
};

template <class T, int L>
__global__ void __launch_bounds__(kStripThreads)
    bias_gelu_fwd_kernel(const T* x, const float* bias,  // (N, C), (C,)
                         T* y,                           // (N, C)
                         int64_t N, int64_t C) {
  const Strip<L> strip(C);
  if (strip.c >= C) return;
  float b[L];
  load(bias + strip.c, b);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = strip.group * kRows + r;
    if (row >= N) return;
    float v[L];
    load(x + row * C + strip.c, v);
#pragma unroll
    for (int k = 0; k < L; ++k) v[k] = gelu(v[k] + b[k]);
    store(v, y + row * C + strip.c);
  }
}

template <class T, int L>
__global__ void __launch_bounds__(kStripThreads)
    bias_gelu_bwd_kernel(const T* dy, const T* x,  // (N, C)
                         const float* bias,        // (C,)
                         T* dx,                    // (N, C)
                         float* partial,           // (groups, C): dbias of every groups-th row
                         int64_t groups, int64_t N, int64_t C) {
  const Strip<L> strip(C);
  if (strip.c >= C) return;
  float b[L], dbias[L] = {};
  load(bias + strip.c, b);
#pragma unroll 2
  for (int64_t row = strip.group; row < N; row += groups) {
    float d[L], v[L];
    load(dy + row * C + strip.c, d);
    load(x + row * C + strip.c, v);
#pragma unroll
    for (int k = 0; k < L; ++k) {
      d[k] *= gelu_grad(v[k] + b[k]);
      dbias[k] += d[k];
    }
    store(d, dx + row * C + strip.c);
  }
  store(dbias, partial + strip.group * C + strip.c);
}

}  // namespace

template <class T>
void gelu_fwd(const GeluFwd& args, const Executor& on) {
  const auto* x = static_cast<const T*>(args.x);
  auto* y = static_cast<T*>(args.y);
  with_lanes<T>(are_aligned(x, y), [&](auto L) {
    const int64_t blocks = cdiv<int64_t>(args.n, kThreads * L);
    launch("gelu_fwd", gelu_fwd_kernel<T, L>, blocks, kThreads, 0, on, x, y, args.n);
  });
}

template <class T>
void gelu_bwd(const GeluBwd& args, const Executor& on) {
  const auto *dy = static_cast<const T*>(args.dy), *x = static_cast<const T*>(args.x);
  auto* dx = static_cast<T*>(args.dx);
  with_lanes<T>(are_aligned(dy, x, dx), [&](auto L) {
    const int64_t blocks = cdiv<int64_t>(args.n, kThreads * L);
    launch("gelu_bwd", gelu_bwd_kernel<T, L>, blocks, kThreads, 0, on, dy, x, dx, args.n);
  });
}

template <class T>
void bias_gelu_fwd(const BiasGeluFwd& args, const Executor& on) {
  const auto* x = static_cast<const T*>(args.x);
  const auto* bias = static_cast<const float*>(args.bias);
  auto* y = static_cast<T*>(args.y);
  const int64_t N = args.N, C = args.C;
  with_lanes<T>(are_aligned(x, bias, y) && C % kLanes<T> == 0, [&](auto L) {
    const int64_t blocks = Strip<L>::count(C) * cdiv<int64_t>(N, kRows);
    launch("bias_gelu_fwd", bias_gelu_fwd_kernel<T, L>, blocks, kStripThreads, 0, on, x, bias, y, N,
           C);
  });
}

template <class T>
void bias_gelu_bwd(const BiasGeluBwd& args, const Executor& on) {
  const auto *dy = static_cast<const T*>(args.dy), *x = static_cast<const T*>(args.x);
  const auto* bias = static_cast<const float*>(args.bias);
  auto* dx = static_cast<T*>(args.dx);
  auto* partial = static_cast<float*>(args.partial);
  const int64_t N = args.N, C = args.C, groups = std::min(N, kMaxPartial);
  with_lanes<T>(are_aligned(dy, x, bias, dx, partial) && C % kLanes<T> == 0, [&](auto L) {
    launch("bias_gelu_bwd", bias_gelu_bwd_kernel<T, L>, Strip<L>::count(C) * groups, kStripThreads,
           0, on, dy, x, bias, dx, partial, groups, N, C);
  });
  sum_partial(partial, static_cast<float*>(args.dbias), groups, C, on);
}

#define GPT2_INSTANTIATE(T)                                            \
  template void gelu_fwd<T>(const GeluFwd&, const Executor&);          \
  template void gelu_bwd<T>(const GeluBwd&, const Executor&);          \
  template void bias_gelu_fwd<T>(const BiasGeluFwd&, const Executor&); \
  template void bias_gelu_bwd<T>(const BiasGeluBwd&, const Executor&);
GPT2_INSTANTIATE(float)
GPT2_INSTANTIATE(bf16)
GPT2_INSTANTIATE(f16)

}  // namespace gpt2::cuda
