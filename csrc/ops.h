// What the files of operators share: PyTorch's stable ABI, and the kernels of this machine.
//
// The operators of gpt2_kernels_cpu have the signatures that kernels/autograd.py gives a backend's
// launchers. It has checked the arguments; what is left is to make views contiguous where a kernel
// wants them so, to allocate, and to call.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace gpt2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels of the chosen instruction set for x's dtype.
const Ops& ops_for(const Tensor& x);

Threads threads();

// float64 for float64, else float32: of sums, statistics and weights.
inline ScalarType accumulator(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_empty(const Tensor& like, std::vector<int64_t> shape,
                        std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace gpt2
