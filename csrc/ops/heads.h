// Tensors as heads (B, T, H, D), for the operators of attention: views that kernels read in place,
// their checks, and a kernel's workspace.
#pragma once

#include "checks.h"

namespace gpt2 {

// Whether every row, along the last dimension, begins at a multiple of kAlignment.
inline bool rows_are_aligned(const Tensor& x) {
  const int64_t size = x.element_size();
  bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment == 0;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    if (x.size(i) > 1) aligned &= x.stride(i) * size % kAlignment == 0;
  }
  return aligned;
}

// A view that the kernels read in place: contiguous in its last dimension, and aligned; else a
// copy.
inline Tensor readable(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.stride(last) != 1 && x.size(last) != 1) return torch::stable::contiguous(x);
  return rows_are_aligned(x) ? x : torch::stable::clone(x);
}

inline View view_of(const Tensor& x) {  // (B, T, H, D)
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline OutView out_view_of(const Tensor& x) {
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// Heads of D in (B, T, n C): the `part`-th C of the last dimension.
inline View view_of(const Tensor& x, int64_t part, int64_t C, int64_t D) {
  const char* data = static_cast<const char*>(x.const_data_ptr());
  return {data + part * C * int64_t(x.element_size()), x.stride(0), x.stride(1), D};
}

inline OutView out_view_of(const Tensor& x, int64_t part, int64_t C, int64_t D) {
  char* data = static_cast<char*>(x.mutable_data_ptr());
  return {data + part * C * int64_t(x.element_size()), x.stride(0), x.stride(1), D};
}

inline void check_head_size(int64_t D) {
  STD_TORCH_CHECK(D >= 1 && D <= kMaxHeadSize && D % kHeadSizeStep == 0,
                  "the head size must be a multiple of ", kHeadSizeStep, " up to ", kMaxHeadSize,
                  ", got ", D);
}

// q (B, Tq, H, D), k and v (B, Tk, H, D)
inline void check_heads(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_dim("q", q, 4);
  check_dim("k", k, 4);
  check_tensor("k", k, q, q.scalar_type(), {q.size(0), k.size(1), q.size(2), q.size(3)});
  check_like("v", v, k);
  check_head_size(q.size(3));
}

// Calls a kernel once for the size of its workspace, and once with it.
template <class Args>
void run(int64_t (*kernel)(const Args&, const Executor&), Args args, const Tensor& like) {
  args.workspace = nullptr;
  const int64_t size = kernel(args, here(like));
  const Tensor workspace = gpt2::new_empty(like, {size > 0 ? size : 1}, ScalarType::Byte);
  args.workspace = workspace.mutable_data_ptr();
  kernel(args, here(like));
}

}  // namespace gpt2
