// The seam between the operators (ops/) and the kernels of a library: an argument struct for each
// kernel, and one table of functions per dtype. The operators are compiled once for each library,
// which supplies the rest: its tables, what an Executor is, and kMaxPartial.
//
// Pointers are to contiguous memory unless strides are given; void is the table's dtype T. Weights,
// biases, statistics and their gradients are in the accumulator's type S: float, and double where T
// is double. Sizes are checked by the caller, outputs allocated by it. A struct lists sizes, then
// inputs, then outputs, then memory to work in.
//
//   B batch   T time (Tq queries, Tk keys)   H heads   D head size   N rows   C features   V
//   vocabulary
#pragma once

#include <stdint.h>

namespace gpt2 {

// What carries a kernel's work out: PyTorch's threads, or a stream of a GPU.
struct Executor;

#ifdef __CUDACC__
#define GPT2_HOST_DEVICE __host__ __device__
#else
#define GPT2_HOST_DEVICE
#endif

// ---- attention

// Element (b, t, h, d) of a (B, T, H, D) view is at data + b * batch + t * time + h * head + d.
template <class Data>
struct ViewOf {
  Data* data;
  int64_t batch, time, head;
};
using View = ViewOf<const void>;
using OutView = ViewOf<void>;

// What the forward and the backward of attention have in common.
struct Attention {
  int64_t B, H, Tq, Tk, D;
  View q, k, v;
  double softmax_scale, dropout_p;
  const int64_t* seed;  // on q's device; null where dropout_p is 0
};

struct AttentionFwd {
  Attention problem;
  void* o;          // (B, Tq, H, D)
  void* lse;        // (B, H, Tq) S
  void* workspace;  // see Ops
};

struct AttentionBwd {
  Attention problem;
  View dout;
  const void* o;    // (B, Tq, H, D)
  const void* lse;  // (B, H, Tq) S
  OutView dq, dk, dv;
  void* workspace;
};

// Targets and lengths index memory, and their own memory is the caller's: it may change after they
// were validated. No kernel forms an address from one that lies outside; the result is NaN there.

// One query per sequence: q has a single row of time, k and v have T, of which the first
// lengths[b] count.
struct DecodeAttention {
  int64_t B, H, T, D;
  View q, k, v;
  const int64_t* lengths;
  double softmax_scale;
  void* o;  // (B, H, D)
  void* workspace;

  GPT2_HOST_DEVICE bool has(int64_t length) const { return length >= 0 && length <= T; }
  // How many keys of sequence b are read.
  GPT2_HOST_DEVICE int64_t keys(int64_t b) const {
    const int64_t length = lengths[b];
    return has(length) ? length : 0;
  }
};

// ---- linear

// y = x W^T + bias for few rows of x. W is (N, K) T, or int8 in packed rows (cpu/linear.h).
struct Linear {
  int64_t M, N, K;
  const void* x;       // (M, K)
  const void* weight;  // (N, K), or (N, packed(K)) int8
  const float* scale;  // (N,) where the weight is int8, else null
  const void* bias;    // (N,) T, or null
  void* y;             // (M, N)
  void* workspace;     // (M, workspace_size(K)) S

  // A packed row of int8 has whole blocks of 64 numbers.
  static constexpr int64_t packed(int64_t K) { return (K + 63) / 64 * 64; }
  // How many S of workspace a row of x takes: for each 64 of its numbers, these and their unit.
  static constexpr int64_t workspace_size(int64_t K) { return (K + 63) / 64 * 65; }
};

// ---- GELU

struct GeluFwd {
  int64_t n;
  const void* x;
  void* y;
};

struct GeluBwd {
  int64_t n;
  const void *dy, *x;
  void* dx;
};

struct BiasGeluFwd {
  int64_t N, C;
  const void* x;     // (N, C)
  const void* bias;  // (C,) S
  void* y;           // (N, C)
};

struct BiasGeluBwd {
  int64_t N, C;
  const void *dy, *x;  // (N, C)
  const void* bias;    // (C,) S
  void* dx;            // (N, C)
  void* dbias;         // (C,) S
  void* partial;       // (min(N, kMaxPartial), C) S
};

// ---- LayerNorm
//
// R is T, or S in the mixed form: the stream of autocast, whose branches are T.

struct LayerNormFwd {
  int64_t N, C;
  double eps;
  const void* x;              // (N, C)
  const void* residual;       // (N, C) R, or null; the mixed form has one
  const void *weight, *bias;  // (C,) S
  void* y;                    // (N, C)
  void* s;                    // (N, C) R: x + residual, where there is a residual
  void* stats;                // (2, N) S: mean, rstd
};

struct LayerNormBwd {
  int64_t N, C;
  const void* dy;      // (N, C)
  const void* ds;      // (N, C) R, or null; the mixed form has one
  const void* s;       // (N, C) R: what the norm saw
  const void* weight;  // (C,) S
  const void* stats;   // (2, N) S
  void* dx;            // (N, C)
  void* dresidual;     // (N, C) R in the mixed form; else null, as dx is this gradient too
  void* dparams;       // (2, C) S: of weight and bias
  void* partial;       // (min(N, kMaxPartial), 2, C) S
};

// ---- cross-entropy

// Logits (N, V) at data + n * stride + v, and a target for each row; rows whose target is
// ignore_index have no loss. Label smoothing moves `smoothing` of the target's weight to all V
// alike.
struct LogitsRows {
  int64_t N, V, stride, ignore_index;
  const int64_t* targets;
  double smoothing;

  GPT2_HOST_DEVICE bool has(int64_t target) const { return target >= 0 && target < V; }
};

struct CrossEntropyFwd {
  LogitsRows rows;
  const void* logits;
  void* losses;  // (N,) S
  void* stats;   // (2, N) S: m, l
};

struct CrossEntropyBwd {
  LogitsRows rows;
  const void* logits;
  const void* dlosses;  // (N,) S, with this stride; 0 for a single one
  int64_t dlosses_stride;
  const void* stats;  // (2, N) S
  void* dlogits;      // (N, V) with its own row stride, or logits itself
  int64_t dlogits_stride;
};

// The gradient for dlosses = 1 over logits, 0 in the columns from V to V_padded.
struct CrossEntropyFwdBwd {
  LogitsRows rows;
  int64_t V_padded;
  void* logits;
  void* losses;  // (N,) S
};

// ---- the table

struct Ops {
  // These three return the bytes of workspace that they need, and do nothing else where workspace
  // is null.
  int64_t (*attention_fwd)(const AttentionFwd&, const Executor&);
  int64_t (*attention_bwd)(const AttentionBwd&, const Executor&);
  int64_t (*decode_attention)(const DecodeAttention&, const Executor&);

  // Null on a GPU, where PyTorch multiplies.
  void (*linear)(const Linear&, const Executor&);
  void (*linear_int8)(const Linear&, const Executor&);

  void (*gelu_fwd)(const GeluFwd&, const Executor&);
  void (*gelu_bwd)(const GeluBwd&, const Executor&);
  void (*bias_gelu_fwd)(const BiasGeluFwd&, const Executor&);
  void (*bias_gelu_bwd)(const BiasGeluBwd&, const Executor&);

  void (*layer_norm_fwd)(const LayerNormFwd&, const Executor&);
  void (*mixed_layer_norm_fwd)(const LayerNormFwd&, const Executor&);
  void (*layer_norm_bwd)(const LayerNormBwd&, const Executor&);
  void (*mixed_layer_norm_bwd)(const LayerNormBwd&, const Executor&);

  void (*cross_entropy_fwd)(const CrossEntropyFwd&, const Executor&);
  void (*cross_entropy_bwd)(const CrossEntropyBwd&, const Executor&);
  void (*cross_entropy_fwd_bwd)(const CrossEntropyFwdBwd&, const Executor&);
};

}  // namespace gpt2
