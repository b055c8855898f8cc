// GELU's operators, alone or with the bias of the linear layer before it.
#include "rows.h"

namespace gpt2 {
namespace {

Tensor gelu_fwd(Tensor x_) {
  check_memory("x", x_);
  const Tensor x = as_contiguous(x_);
  Tensor y = contiguous_like(x);
  const GeluFwd args = {.n = x.numel(), .x = x.const_data_ptr(), .y = y.mutable_data_ptr()};
  ops_for(x).gelu_fwd(args, here(x));
  return y;
}

Tensor gelu_bwd(Tensor dy_, Tensor x_) {
  check_memory("x", x_);
  check_like("dy", dy_, x_);
  const Tensor dy = as_contiguous(dy_), x = as_contiguous(x_);
  Tensor dx = contiguous_like(x);
  const GeluBwd args = {.n = x.numel(),
                        .dy = dy.const_data_ptr(),
                        .x = x.const_data_ptr(),
                        .dx = dx.mutable_data_ptr()};
  ops_for(x).gelu_bwd(args, here(x));
  return dx;
}

Tensor bias_gelu_fwd(Tensor x_, Tensor bias_) {
  check_row("bias", bias_, x_);
  const Rows x(x_);
  const Tensor bias = parameters(bias_, x_);
  Tensor y = contiguous_like(x_);
  if (x.N == 0) return y;
  const BiasGeluFwd args = {
      .N = x.N, .C = x.C, .x = x.data(), .bias = bias.const_data_ptr(), .y = y.mutable_data_ptr()};
  ops_for(x_).bias_gelu_fwd(args, here(x_));
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(Tensor dy_, Tensor x_, Tensor bias_) {
  check_like("dy", dy_, x_);
  check_row("bias", bias_, x_);
  const Rows dy(dy_), x(x_);
  const Tensor bias = parameters(bias_, x_);
  Tensor dx = contiguous_like(x_);
  if (x.N == 0) return {dx, torch::stable::new_zeros(bias_, sizes(bias_))};
  Tensor dbias = gpt2::new_empty(bias, {x.C}),
         partial = gpt2::new_empty(bias, {partial_rows(x.N), x.C});
  const BiasGeluBwd args = {.N = x.N,
                            .C = x.C,
                            .dy = dy.data(),
                            .x = x.data(),
                            .bias = bias.const_data_ptr(),
                            .dx = dx.mutable_data_ptr(),
                            .dbias = dbias.mutable_data_ptr(),
                            .partial = partial.mutable_data_ptr()};
  ops_for(x_).bias_gelu_bwd(args, here(x_));
  return {dx, as_dtype(dbias, bias_.scalar_type())};
}

}  // namespace
}  // namespace gpt2

GPT2_KERNELS_LIBRARY_FRAGMENT(m) {
  m.def("gelu_fwd(Tensor x) -> Tensor");
  m.def("gelu_bwd(Tensor dy, Tensor x) -> Tensor");
  m.def("bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor");
  m.def("bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)");
}

GPT2_KERNELS_LIBRARY_IMPL(GPT2_KERNELS_KEY, m) {
  m.impl("gelu_fwd", TORCH_BOX(&gpt2::gelu_fwd));
  m.impl("gelu_bwd", TORCH_BOX(&gpt2::gelu_bwd));
  m.impl("bias_gelu_fwd", TORCH_BOX(&gpt2::bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&gpt2::bias_gelu_bwd));
}
