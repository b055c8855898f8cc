// What sets the CUDA library apart from the other one, for the operators.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "launch.h"

#define GPT2_KERNELS_NAME gpt2_kernels_cuda
#ifdef GPT2_KERNELS_EMULATED_CUDA  // the tests' stand-in for a GPU works on CPU tensors
#define GPT2_KERNELS_KEY CPU
#else
#define GPT2_KERNELS_KEY CUDA
#endif

namespace gpt2 {

constexpr int64_t kAlignment = 16;  // of a head's rows, in bytes: what cp.async copies
constexpr int64_t kMaxHeadSize = 128, kHeadSizeStep = 8;  // multiples of the step

// The current stream of x's device, which is the current one for as long as this lives.
struct Here : Executor {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
};
Here here(const torch::stable::Tensor& x);

inline void advise_huge_pages(torch::stable::Tensor&) {}
inline void check_writable(const char*, void*, int64_t) {}  // a GPU's memory always is

}  // namespace gpt2
