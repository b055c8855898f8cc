// What sets the CPU library apart from the other one, for the operators.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

#define GPT2_KERNELS_NAME gpt2_kernels_cpu
#define GPT2_KERNELS_KEY CPU

namespace gpt2 {

constexpr int64_t kAlignment = 1;  // of a head's rows, in bytes: any
constexpr int64_t kMaxHeadSize = kMaxHead, kHeadSizeStep = 1;

// PyTorch's threads, as many as it has now.
Executor here(const torch::stable::Tensor& x);

// Asks for huge pages under a tensor that is large enough to have mappings of its own, and to go
// back to the system with its last reference: half the time of a pass over fresh memory is page
// faults. No more than a hint.
void advise_huge_pages(torch::stable::Tensor& x);

// Throws where memory is mapped read-only, such as np.memmap(mode="r"): writing to it would end the
// process. Asks for the first and the last page, of Linux from 5.14 on; elsewhere nothing is
// checked.
void check_writable(const char* name, void* begin, int64_t bytes);

}  // namespace gpt2
