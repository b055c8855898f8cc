// A linear layer for few rows, in the CPU's library alone: on a GPU PyTorch multiplies.
#include "checks.h"

namespace gpt2 {
namespace {

Tensor linear(Tensor x_, Tensor weight_, std::optional<Tensor> bias_,
              std::optional<Tensor> scale_) {
  check_dim("x", x_, 2);
  check_dim("weight", weight_, 2);
  const int64_t N = weight_.size(0), K = x_.size(1);
  check_weight("weight", weight_, scale_ ? &*scale_ : nullptr, x_, N, K);
  if (bias_) check_tensor("bias", *bias_, x_, x_.scalar_type(), {N});
  const Tensor x = as_contiguous(x_), weight = as_contiguous(weight_);
  const Tensor bias = bias_ ? as_contiguous(*bias_) : x,
               scale = scale_ ? as_contiguous(*scale_) : x;
  const int64_t M = x.size(0);
  Tensor y = gpt2::new_empty(x, {M, N});
  Tensor workspace = gpt2::new_empty(x, {M, Linear::workspace_size(K)}, accumulator(x));
  const Linear args = {.M = M,
                       .N = N,
                       .K = K,
                       .x = x.const_data_ptr(),
                       .weight = weight.const_data_ptr(),
                       .scale = scale_ ? scale.const_data_ptr<float>() : nullptr,
                       .bias = bias_ ? bias.const_data_ptr() : nullptr,
                       .y = y.mutable_data_ptr(),
                       .workspace = workspace.mutable_data_ptr()};
  const Ops& ops = ops_for(x);
  (scale_ ? ops.linear_int8 : ops.linear)(args, here(x));
  return y;
}

}  // namespace
}  // namespace gpt2

GPT2_KERNELS_LIBRARY_FRAGMENT(m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scale) -> Tensor");
}

GPT2_KERNELS_LIBRARY_IMPL(GPT2_KERNELS_KEY, m) {
  m.impl("linear", TORCH_BOX(&gpt2::linear));
}
