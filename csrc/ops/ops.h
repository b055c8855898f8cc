// What the files of operators share: PyTorch's stable ABI, and the library that they are compiled
// into.
//
// The operators of gpt2_kernels_cpu and gpt2_kernels_cuda are the same code. They have the
// signatures that kernels/raw_ops.py gives a backend's launchers. Each checks its arguments
// (checks.h), makes views contiguous where a kernel wants them so, allocates, and calls the kernel.
// They read no tensor's memory themselves: it may be a GPU's.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../kernels.h"

// GPT2_KERNELS_NAME and _KEY of the dispatcher; kMaxPartial; here(x), what kernels on x's device
// run on; advise_huge_pages(x).
#ifdef GPT2_KERNELS_CUDA
#include "../cuda/library.h"
#else
#include "../cpu/library.h"
#endif

// PyTorch's macros paste their arguments: these replace a macro's name first.
#define GPT2_KERNELS_EXPANDED_FRAGMENT(name, m) STABLE_TORCH_LIBRARY_FRAGMENT(name, m)
#define GPT2_KERNELS_EXPANDED_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
#define GPT2_KERNELS_LIBRARY_FRAGMENT(m) GPT2_KERNELS_EXPANDED_FRAGMENT(GPT2_KERNELS_NAME, m)
#define GPT2_KERNELS_LIBRARY_IMPL(key, m) GPT2_KERNELS_EXPANDED_IMPL(GPT2_KERNELS_NAME, key, m)

namespace gpt2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The library's kernels for x's dtype.
const Ops& ops_for(const Tensor& x);

// float64 for float64, else float32: of sums, statistics and weights.
inline ScalarType accumulator(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// As PyTorch's own, but free where there is nothing to do: a call into it costs a microsecond.
inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline Tensor new_empty(const Tensor& like, std::vector<int64_t> shape,
                        std::optional<ScalarType> dtype = std::nullopt) {
  using torch::stable::detail::from, torch::stable::detail::to;
  int32_t type = to<int32_t>(from(dtype.value_or(like.scalar_type()))), layout, device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle found;
  // torch::stable::new_empty finds the operator by its name, which takes a microsecond.
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(), int64_t(shape.size()),
                                                   &type, &layout, &device, index, nullptr,
                                                   &found));
  return Tensor(found);
}

}  // namespace gpt2
