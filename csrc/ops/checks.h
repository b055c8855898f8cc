// Checks of the operators' arguments. Every tensor must have the dtype, device and shape that the
// kernel assumes, so that no caller can cause an access outside of it. The public functions have
// already made the same checks, with better messages (kernels/checks.py). A check costs some tens
// of nanoseconds.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <sstream>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "ops.h"

namespace gpt2 {

template <class Sizes>
std::string text(const Sizes& sizes) {
  std::ostringstream out;
  const char* comma = "(";
  for (const int64_t size : sizes) out << comma << size, comma = ", ";
  return out.str() + (sizes.size() == 0 ? "()" : ")");
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

inline bool is_half(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Whether x's storage reaches to its last element: FSDP, for one, leaves a parameter's shape and
// frees its storage.
inline void check_memory(const char* name, const Tensor& x) {
  if (x.numel() == 0) return;
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t end = x.storage_offset() + 1, bytes = 0;
  for (size_t i = 0; i < sizes.size(); ++i) end += (sizes[i] - 1) * strides[i];
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  STD_TORCH_CHECK(end * int64_t(x.element_size()) <= bytes, name, " of shape ", text(sizes),
                  " must lie in its storage, which has ", bytes, " bytes");
}

inline void check_dim(const char* name, const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(x.dim() == dim, name, " must have ", dim, " dimensions, got ", text(x.sizes()));
  check_memory(name, x);
}

// x on the device of `like`, of a dtype and a shape. Without a dtype any floating one will do.
template <class Sizes>
void check_tensor(const char* name, const Tensor& x, const Tensor& like,
                  std::optional<ScalarType> dtype, const Sizes& shape) {
  const ScalarType got = x.scalar_type();
  STD_TORCH_CHECK(dtype ? got == *dtype : is_floating(got), name, " must be ",
                  dtype ? toString(*dtype) : "floating", ", got ", toString(got));
  STD_TORCH_CHECK(x.device() == like.device(), name, " must be on the device of the others");
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), name,
                  " must have shape ", text(shape), ", got ", text(sizes));
  check_memory(name, x);
}

inline void check_tensor(const char* name, const Tensor& x, const Tensor& like,
                         std::optional<ScalarType> dtype, std::initializer_list<int64_t> shape) {
  check_tensor<std::initializer_list<int64_t>>(name, x, like, dtype, shape);
}

// The same of memory that is read as it lies.
inline void check_contiguous(const char* name, const Tensor& x, const Tensor& like,
                             ScalarType dtype, std::initializer_list<int64_t> shape) {
  check_tensor(name, x, like, dtype, shape);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

// x of the dtype, the device and the shape of another tensor.
inline void check_like(const char* name, const Tensor& x, const Tensor& other) {
  check_tensor(name, x, other, other.scalar_type(), other.sizes());
}

// A row of parameters for the last dimension of x.
inline void check_row(const char* name, const Tensor& row, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0, "x must have a last dimension");
  check_memory("x", x);
  check_tensor(name, row, x, std::nullopt, {x.size(x.dim() - 1)});
}

// A weight (N, K) of x's dtype, or with a scale (N,) packed int8.
inline void check_weight(const char* name, const Tensor& weight, const Tensor* scale,
                         const Tensor& x, int64_t N, int64_t K) {
  if (scale) {
    check_tensor(name, weight, x, ScalarType::Char, {N, Linear::packed(K)});
    check_tensor("scale", *scale, x, ScalarType::Float, {N});
  } else {
    check_tensor(name, weight, x, x.scalar_type(), {N, K});
  }
}

// A matrix that is written in place: its rows are contiguous, and apart from each other.
inline void check_rows_in_place(const char* name, const Tensor& x) {
  const int64_t rows = x.size(0), columns = x.size(1);
  STD_TORCH_CHECK((columns <= 1 || x.stride(1) == 1) && (rows <= 1 || x.stride(0) >= columns), name,
                  " must have contiguous rows that do not overlap, got strides ",
                  text(x.strides()));
  if (x.numel() > 0) {
    const int64_t elements = (rows - 1) * x.stride(0) + columns;
    check_writable(name, x.mutable_data_ptr(), elements * int64_t(x.element_size()));
  }
}

}  // namespace gpt2
