// Tensors as rows of their last dimension, for the operators over rows.
#pragma once

#include <algorithm>

#include "checks.h"

namespace gpt2 {

inline Tensor as_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

inline std::vector<int64_t> sizes(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

// How many rows x (..., C) has, elements or not.
inline int64_t leading(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// x (..., C) as contiguous memory, and how many rows it has; none where there are no elements.
struct Rows {
  explicit Rows(const Tensor& x)
      : tensor(as_contiguous(x)),
        C(x.dim() > 0 ? x.size(x.dim() - 1) : 1),
        N(x.numel() > 0 ? x.numel() / C : 0) {}
  const void* data() const { return tensor.const_data_ptr(); }
  Tensor tensor;
  int64_t C, N;
};

inline Tensor contiguous_like(const Tensor& x) {
  return gpt2::new_empty(x, sizes(x));
}

inline int64_t partial_rows(int64_t N) {
  return std::min(N, kMaxPartial);
}

// A row of parameters, in the type that the kernels for x sum in.
inline Tensor parameters(const Tensor& row, const Tensor& x) {
  return as_contiguous(as_dtype(row, accumulator(x)));
}

}  // namespace gpt2
