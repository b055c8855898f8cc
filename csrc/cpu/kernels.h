// What an instruction set's object file gives to ops.cpp: one table of functions per dtype.
//
// Pointers are to contiguous memory unless strides are given; void is the table's dtype T. Weights,
// biases, statistics and their gradients are in the accumulator's type S: float, and double where T
// is double. Sizes are checked by the caller, outputs allocated by it; nothing here throws.
//
//   B batch   T time (Tq queries, Tk keys)   H heads   D head size   N rows   C features   V
//   vocabulary
#pragma once

#include <stdint.h>

namespace gpt2 {

// PyTorch's threads: run(n, grain, f, context) calls f(context, begin, end) over ranges of [0, n).
struct Threads {
  int64_t count;
  void (*run)(int64_t n, int64_t grain, void (*f)(const void*, int64_t, int64_t), const void*);
};

// Element (b, t, h, d) of a (B, T, H, D) view is at data + b * batch + t * time + h * head + d.
struct View {
  const void* data;
  int64_t batch, time, head;
};

struct Attention {
  int64_t B, H, Tq, Tk, D;
  View q, k, v;
  double softmax_scale, dropout_p;
  int64_t seed;
};

struct Ops {
  // o (B, Tq, H, D) and lse (B, H, Tq) S.
  void (*attention_fwd)(const Attention&, void* o, void* lse, const Threads&);
  // dq, dk, dv: written through the strides of their views.
  void (*attention_bwd)(const Attention&, View dout, const void* o, const void* lse, View dq,
                        View dk, View dv, const Threads&);

  void (*gelu_fwd)(const void* x, void* y, int64_t n, const Threads&);
  void (*gelu_bwd)(const void* dy, const void* x, void* dx, int64_t n, const Threads&);
};

enum Dtype { kFloat32, kBFloat16, kFloat16, kFloat64, kDtypes };

// Null where the object file has no kernels for a dtype.
struct Kernels {
  const Ops* of[kDtypes];
};

const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();

}  // namespace gpt2
