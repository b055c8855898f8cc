// The seam between the operators (ops*.cpp) and the kernels of a library: one table of functions
// per dtype. The operators are compiled once for each library, which supplies the rest: its tables,
// what an Executor is, and kMaxPartial.
//
// Pointers are to contiguous memory unless strides are given; void is the table's dtype T. Weights,
// biases, statistics and their gradients are in the accumulator's type S: float, and double where T
// is double. Sizes are checked by the caller, outputs allocated by it.
//
//   B batch   T time (Tq queries, Tk keys)   H heads   D head size   N rows   C features   V
//   vocabulary
#pragma once

#include <stdint.h>

namespace gpt2 {

// What carries a kernel's work out: PyTorch's threads, or a stream of a GPU.
struct Executor;

// Element (b, t, h, d) of a (B, T, H, D) view is at data + b * batch + t * time + h * head + d.
template <class Data>
struct ViewOf {
  Data* data;
  int64_t batch, time, head;
};
using View = ViewOf<const void>;
using OutView = ViewOf<void>;

struct Attention {
  int64_t B, H, Tq, Tk, D;
  View q, k, v;
  double softmax_scale, dropout_p;
  const int64_t* seed;  // where q is; null where dropout_p is 0
};

#ifdef __CUDACC__
#define GPT2_HOST_DEVICE __host__ __device__
#else
#define GPT2_HOST_DEVICE
#endif

// Targets and lengths index memory, and their own memory is the caller's: it may change after they
// were validated. No kernel forms an address of one that lies outside; the result is NaN there.

// Logits (N, V) at data + n * stride + v, and a target for each row; rows whose target is
// ignore_index have no loss. Label smoothing moves `smoothing` of the target's weight to all V
// alike.
struct LogitsRows {
  int64_t N, V, stride, ignore_index;
  const int64_t* targets;
  double smoothing;

  GPT2_HOST_DEVICE bool has(int64_t target) const { return target >= 0 && target < V; }
};

// One query per sequence: q has a single row of time, k and v have T, of which the first
// lengths[b] count.
struct DecodeAttention {
  int64_t B, H, T, D;
  View q, k, v;
  const int64_t* lengths;
  double softmax_scale;

  GPT2_HOST_DEVICE bool has(int64_t length) const { return length >= 0 && length <= T; }
  // How many keys of sequence b are read.
  GPT2_HOST_DEVICE int64_t keys(int64_t b) const {
    const int64_t length = lengths[b];
    return has(length) ? length : 0;
  }
};

// x (M, K) times the transpose of a weight (N, K), for few rows of x; scale (N,) where the weight
// is int8, else null.
struct Linear {
  int64_t M, N, K;
  const float* scale;

  // A packed row of int8 has whole blocks of 64 numbers.
  static constexpr int64_t packed(int64_t K) { return (K + 63) / 64 * 64; }
  // How many S of workspace a row of x takes: 64 and a unit for each 64 of its numbers.
  static constexpr int64_t workspace(int64_t K) { return (K + 63) / 64 * 65; }
};

struct Ops {
  // o (B, Tq, H, D) and lse (B, H, Tq) S. Both return the bytes of workspace that they need, and
  // do nothing else where workspace is null.
  int64_t (*attention_fwd)(const Attention&, void* o, void* lse, void* workspace, const Executor&);
  int64_t (*attention_bwd)(const Attention&, View dout, const void* o, const void* lse, OutView dq,
                           OutView dk, OutView dv, void* workspace, const Executor&);
  // o (B, H, D); workspace as above.
  int64_t (*decode_attention)(const DecodeAttention&, void* o, void* workspace, const Executor&);

  // y (M, N); bias (N,) T, or null; wide (M, Linear::workspace(K)) S. The weight is (N, K) T, or
  // int8 in packed rows of K rounded up to 64 (cpu/linear.h). On a GPU PyTorch's products do
  // it, and these are null.
  void (*linear)(const Linear&, const void* x, const void* weight, const void* bias, void* wide,
                 void* y, const Executor&);
  void (*linear_int8)(const Linear&, const void* x, const void* weight, const void* bias,
                      void* wide, void* y, const Executor&);

  void (*gelu_fwd)(const void* x, void* y, int64_t n, const Executor&);
  void (*gelu_bwd)(const void* dy, const void* x, void* dx, int64_t n, const Executor&);
  void (*bias_gelu_fwd)(const void* x, const void* bias, void* y, int64_t N, int64_t C,
                        const Executor&);
  // dbias (C,) S, partial (min(N, kMaxPartial), C) S.
  void (*bias_gelu_bwd)(const void* dy, const void* x, const void* bias, void* dx, void* dbias,
                        void* partial, int64_t N, int64_t C, const Executor&);

  // s = x + residual where there is a residual; stats (2, N) S: mean, rstd. In the mixed form there
  // is one, and residual and s are S: the stream of autocast, whose branches are T.
  void (*layer_norm_fwd)(const void* x, const void* residual, const void* weight, const void* bias,
                         double eps, void* y, void* s, void* stats, int64_t N, int64_t C,
                         const Executor&);
  void (*mixed_layer_norm_fwd)(const void* x, const void* residual, const void* weight,
                               const void* bias, double eps, void* y, void* s, void* stats,
                               int64_t N, int64_t C, const Executor&);
  // s is what the norm saw. ds may be null; dparams (2, C) S, partial (min(N, kMaxPartial), 2, C)
  // S. dresidual is null, as dx is its gradient too. The mixed form has ds and dresidual, and they
  // and s are S.
  void (*layer_norm_bwd)(const void* dy, const void* ds, const void* s, const void* weight,
                         const void* stats, void* dx, void* dresidual, void* dparams, void* partial,
                         int64_t N, int64_t C, const Executor&);
  void (*mixed_layer_norm_bwd)(const void* dy, const void* ds, const void* s, const void* weight,
                               const void* stats, void* dx, void* dresidual, void* dparams,
                               void* partial, int64_t N, int64_t C, const Executor&);

  // losses (N,) S; stats (2, N) S: m, l.
  void (*cross_entropy_fwd)(const LogitsRows&, const void* logits, void* losses, void* stats,
                            const Executor&);
  // dlosses (N,) S; dlogits (N, V) with its own row stride, or logits itself.
  void (*cross_entropy_bwd)(const LogitsRows&, const void* dlosses, const void* logits,
                            const void* stats, void* dlogits, int64_t dlogits_stride,
                            const Executor&);
  // The gradient for dlosses = 1 over logits, 0 in the columns from V to V_padded.
  void (*cross_entropy_fwd_bwd)(const LogitsRows&, void* logits, int64_t V_padded, void* losses,
                                const Executor&);
};

}  // namespace gpt2
