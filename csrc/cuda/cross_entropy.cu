// Cross-entropy of logits rows against one target each: forward, backward, and both in place.
//
//   m     = max_v x[v]    l = sum_v exp(x[v] - m)
//   loss  = log(l) + (m - x[target])
//   dx[v] = (exp(x[v] - m) / l - [v = target]) dloss
//
// Label smoothing e puts (1 - e) [v = target] + e / V in place of [v = target], and so in the loss
// (1 - e) x[target] + e mean(x) in place of x[target].
//
// A block owns a row and reads it once with an online maximum and sum; the softmax is never stored.
// m and l stay apart: lse = m + log(l) as one number would round away the digits of log(l) where
// logits are large.
//
// In place, a row is read twice. Where two long rows fit into the shared memory of a block (Hopper
// has 227 KiB, two rows of 50304 in half precision take 196), a block computes with one row there
// while the next arrives, and each logit is read from memory once. Elsewhere the row is read again
// from L2: two blocks of 1024 threads fill a multiprocessor, and their rows of 50257 are half of an
// H100's L2 in all.
//
//   N rows   V vocabulary   L logits that a thread moves at once
#include <float.h>

#include <algorithm>

#include "async.cuh"
#include "reduce.cuh"

namespace gpt2::cuda {
namespace {

constexpr int kMaxThreads = 1024;

// Threads for a row of V: some vectors for each.
int threads_for(int64_t V) {
  return V < 4096 ? 128 : V < 16384 ? 256 : kMaxThreads;
}

// f(v, lanes) for this thread's logits [v, v + lanes) of a row. Rows of an odd V begin anywhere: L
// at a time from the first address that is aligned, the rest one by one. kAligned: the row begins
// on 16 bytes.
template <int L, bool kAligned = false, class T, class F>
__device__ void for_logits(const T* row, int64_t V, F f) {
  const int misaligned = kAligned ? 0 : int(reinterpret_cast<uintptr_t>(row) / sizeof(T) % L);
  const int64_t head = min(int64_t((L - misaligned) % L), V);
  const int64_t tail = head + (V - head) / L * L;
  if (L > 1 && !kAligned && threadIdx.x < head) f(int64_t(threadIdx.x), Lanes<1>());
  for (int64_t v = head + threadIdx.x * L; v < tail; v += blockDim.x * L) f(v, Lanes<L>());
  if (L > 1 && tail + threadIdx.x < V) f(tail + threadIdx.x, Lanes<1>());
}

// m = max x and l = sum exp(x - m) of a row. Where all of it is -inf, l is 0.
struct Softmax {
  float m, l;
};

// For all of its block. m begins at the lowest finite number: exp(-inf - m) is 0, not NaN.
template <bool kAligned = false, class T>
__device__ Softmax softmax_of(const T* row, int64_t V) {
  float m = -FLT_MAX, l = 0;
  for_logits<kLanes<T>, kAligned>(row, V, [&](int64_t v, auto lanes) {
    float x[lanes];
    load(row + v, x);
    float top = m;
#pragma unroll
    for (float each : x) top = fmaxf(top, each);
    float sum = 0;
#pragma unroll
    for (float each : x) sum += exp2_fast(kLog2e * (each - top));
    l = fmaf(l, exp2_fast(kLog2e * (m - top)), sum);
    m = top;
  });
  const float top = block_sum(Max{m}, Max{-FLT_MAX}).x;
  return {top, block_sum(__fmul_rn(l, exp2_fast(kLog2e * (m - top))))};
}

// The mean of a row, for all of its block, which call it together; 0 where nothing is smoothed: of
// logits of -inf, 0 times their mean would be NaN.
template <bool kAligned = false, class T>
__device__ float mean_to_smooth(const LogitsRows& rows, const T* row) {
  if (rows.smoothing == 0) return 0;
  float sum = 0;
  for_logits<kLanes<T>, kAligned>(row, rows.V, [&](int64_t v, auto lanes) {
    float x[lanes];
    load(row + v, x);
#pragma unroll
    for (float each : x) sum += each;
  });
  return block_sum(sum) / rows.V;
}

// The logit of a row's target; NaN, and with it the loss, for a target outside the vocabulary.
template <class T>
__device__ float logit_of(const LogitsRows& rows, const T* row, int64_t target) {
  return rows.has(target) ? widen(row[target]) : NAN;
}

__device__ inline float loss_of(const LogitsRows& rows, float x_target, float mean,
                                Softmax softmax) {
  const float log_l = logf(softmax.l), own = log_l + (softmax.m - x_target);
  if (rows.smoothing == 0) return own;
  const float e = rows.smoothing;
  return (1 - e) * own + e * (log_l + (softmax.m - mean));
}

// dx may take the place of x: a thread reads what it overwrites, and nothing else. It is NaN for a
// target outside the vocabulary.
template <bool kAligned = false, class T>
__device__ void store_gradient(const LogitsRows& rows, const T* row, int64_t target,
                               Softmax softmax, float dloss, T* drow) {
  const int64_t V = rows.V;
  const float e = rows.smoothing, scale = 1 / softmax.l;
  const float everywhere = rows.has(target) ? -e / V : NAN;
  const auto store_lanes = [&](int64_t v, auto lanes) {
    float x[lanes];
    load(row + v, x);
#pragma unroll
    for (float& each : x) {
      each = fmaf(exp2_fast(kLog2e * (each - softmax.m)), scale, everywhere);
    }
    if (target >= v && target < v + lanes) {
#pragma unroll
      for (int k = 0; k < lanes; ++k) x[k] -= k == target - v ? 1 - e : 0;
    }
#pragma unroll
    for (float& each : x) each *= dloss;
    store(x, drow + v);
  };
  if constexpr (kAligned) {
    for_logits<kLanes<T>, true>(row, V, store_lanes);
  } else if ((reinterpret_cast<uintptr_t>(row) - reinterpret_cast<uintptr_t>(drow)) % 16 == 0) {
    for_logits<kLanes<T>>(row, V, store_lanes);
  } else {
    for_logits<1>(row, V, store_lanes);
  }
}

template <bool kAligned = false, class T>
__device__ void store_zeros(T* row, int64_t V) {
  for_logits<kLanes<T>, kAligned>(row, V, [&](int64_t v, auto lanes) {
    const float zeros[lanes] = {};
    store(zeros, row + v);
  });
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_fwd_kernel(LogitsRows rows, const T* logits,
                             float* losses,   // (N,)
                             float* stats) {  // (2, N): m, l
  const int64_t n = blockIdx.x, target = rows.targets[n];
  const T* row = logits + n * rows.stride;
  const Softmax softmax = softmax_of(row, rows.V);
  const float mean = mean_to_smooth(rows, row);
  if (threadIdx.x > 0) return;
  const bool counts = target != rows.ignore_index;
  losses[n] = counts ? loss_of(rows, logit_of(rows, row, target), mean, softmax) : 0;
  stats[n] = softmax.m;
  stats[rows.N + n] = softmax.l;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_bwd_kernel(LogitsRows rows, const float* dlosses, int64_t dlosses_stride,  // (N,)
                             const T* logits,
                             const float* stats,  // (2, N): m, l
                             T* dlogits, int64_t dlogits_stride) {
  const int64_t n = blockIdx.x, target = rows.targets[n];
  T* drow = dlogits + n * dlogits_stride;
  if (target == rows.ignore_index) {
    store_zeros(drow, rows.V);
  } else {
    store_gradient(rows, logits + n * rows.stride, target, {stats[n], stats[rows.N + n]},
                   dlosses[n * dlosses_stride], drow);
  }
}

// For a loss gradient of 1, over the logits; 0 in the columns that pad V.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_fwd_bwd_kernel(LogitsRows rows, T* logits, int64_t V_padded,
                                 float* losses) {  // (N,)
  const int64_t n = blockIdx.x, target = rows.targets[n];
  T* row = logits + n * rows.stride;
  if (target == rows.ignore_index) {
    if (threadIdx.x == 0) losses[n] = 0;
    store_zeros(row, V_padded);
    return;
  }
  __shared__ float x_target;  // thread 0's alone, and no register of it on the way
  if (threadIdx.x == 0) x_target = logit_of(rows, row, target);
  const Softmax softmax = softmax_of(row, rows.V);  // its barriers: row[target] has been read
  const float mean = mean_to_smooth(rows, row);
  if (threadIdx.x == 0) losses[n] = loss_of(rows, x_target, mean, softmax);
  store_gradient(rows, row, target, softmax, 1, row);
  store_zeros(row + rows.V, V_padded - rows.V);
}

// The same, by blocks that walk the rows. The logits of a row lie in shared memory, where the next
// row's arrive meanwhile; only the gradient is written to the row itself. Rows begin on 16 bytes.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    cross_entropy_ring_kernel(LogitsRows rows, T* logits, int64_t V_padded,
                              float* losses) {  // (N,)
  extern __shared__ __align__(16) char ring[];  // (2, V_padded)
  T* const copies = reinterpret_cast<T*>(ring);
  constexpr int L = kLanes<T>;
  // Begins to copy row n, unless it is ignored, and returns its target.
  const auto fetch = [&](int64_t n, int stage) {
    int64_t target = rows.ignore_index;
    if (n < rows.N) target = rows.targets[n];
    if (target != rows.ignore_index) {
      T* const to = copies + stage * V_padded;
      const T* const from = logits + n * rows.stride;
      const int size = int(rows.V);  // what fits into shared memory fits into an int
      for (int v = threadIdx.x * L; v < size; v += kMaxThreads * L) {
        cp_async(to + v, from + v, true);
      }
    }
    cp_async_commit();
    return target;
  };

  int stage = 0;
  int64_t target = fetch(blockIdx.x, stage);
  for (int64_t n = blockIdx.x; n < rows.N; n += gridDim.x) {
    cp_async_wait<0>();
    __syncthreads();  // every thread's part has arrived, and the other stage has been used
    const int64_t next = fetch(n + gridDim.x, stage ^ 1);
    const T* const copy = copies + stage * V_padded;
    T* const row = logits + n * rows.stride;
    if (target == rows.ignore_index) {
      if (threadIdx.x == 0) losses[n] = 0;
      store_zeros<true>(row, V_padded);
    } else {
      const Softmax softmax = softmax_of<true>(copy, rows.V);
      const float mean = mean_to_smooth<true>(rows, copy);
      if (threadIdx.x == 0) {
        losses[n] = loss_of(rows, logit_of(rows, copy, target), mean, softmax);
      }
      store_gradient<true>(rows, copy, target, softmax, 1, row);
      store_zeros(row + rows.V, V_padded - rows.V);
    }
    target = next;
    stage ^= 1;
  }
}

// Whether the ring's rows, which are `bytes` long, are worth it and fit beside what sums need.
bool fits_ring(const CrossEntropyFwdBwd& args, int64_t bytes, int64_t stride_bytes) {
  constexpr int64_t kForSums = 1 << 10;
  return threads_for(args.rows.V) == kMaxThreads && are_aligned(args.logits) &&
         stride_bytes % 16 == 0 && bytes % 16 == 0 &&
         2 * bytes + kForSums <=
             attribute_of_gpu(cudaDevAttrMaxSharedMemoryPerBlockOptin, "cross_entropy_fwd_bwd");
}

}  // namespace

template <class T>
void cross_entropy_fwd(const CrossEntropyFwd& args, const Executor& on) {
  launch("cross_entropy_fwd", cross_entropy_fwd_kernel<T>, args.rows.N, threads_for(args.rows.V), 0,
         on, args.rows, static_cast<const T*>(args.logits), static_cast<float*>(args.losses),
         static_cast<float*>(args.stats));
}

template <class T>
void cross_entropy_bwd(const CrossEntropyBwd& args, const Executor& on) {
  launch("cross_entropy_bwd", cross_entropy_bwd_kernel<T>, args.rows.N, threads_for(args.rows.V), 0,
         on, args.rows, static_cast<const float*>(args.dlosses), args.dlosses_stride,
         static_cast<const T*>(args.logits), static_cast<const float*>(args.stats),
         static_cast<T*>(args.dlogits), args.dlogits_stride);
}

template <class T>
void cross_entropy_fwd_bwd(const CrossEntropyFwdBwd& args, const Executor& on) {
  const char* const name = "cross_entropy_fwd_bwd";
  const LogitsRows& rows = args.rows;
  T* const logits = static_cast<T*>(args.logits);
  float* const losses = static_cast<float*>(args.losses);
  const int64_t bytes = args.V_padded * sizeof(T);
  if (fits_ring(args, bytes, rows.stride * sizeof(T))) {
    const int64_t blocks =
        std::min<int64_t>(rows.N, attribute_of_gpu(cudaDevAttrMultiProcessorCount, name));
    launch(name, cross_entropy_ring_kernel<T>, blocks, kMaxThreads, 2 * bytes, on, rows, logits,
           args.V_padded, losses);
  } else {
    launch(name, cross_entropy_fwd_bwd_kernel<T>, rows.N, threads_for(rows.V), 0, on, rows, logits,
           args.V_padded, losses);
  }
}

#define GPT2_INSTANTIATE(T)                                                    \
  template void cross_entropy_fwd<T>(const CrossEntropyFwd&, const Executor&); \
  template void cross_entropy_bwd<T>(const CrossEntropyBwd&, const Executor&); \
  template void cross_entropy_fwd_bwd<T>(const CrossEntropyFwdBwd&, const Executor&);
GPT2_INSTANTIATE(float)
GPT2_INSTANTIATE(bf16)
GPT2_INSTANTIATE(f16)

}  // namespace gpt2::cuda
