// What an instruction set's object file gives to library.cpp: the table of ../kernels.h for each
// dtype. Nothing here throws.
#pragma once

#include "../kernels.h"

namespace gpt2 {

// PyTorch's threads: run(n, grain, f, context) calls f(context, begin, end) over ranges of [0, n).
struct Executor {
  int64_t count;
  void (*run)(int64_t n, int64_t grain, void (*f)(const void*, int64_t, int64_t), const void*);
};
using Threads = Executor;

// Gradients of parameters are summed through a workspace `partial`, of so many rows at most.
constexpr int64_t kMaxPartial = 128;

constexpr int64_t kMaxHead = 256;  // D

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
