// LayerNorm's operators, alone or after the residual addition.
#include "rows.h"

namespace gpt2 {
namespace {

// Of x's dtype, or float32 beside a branch x of 16 bits: the mixed form.
void check_stream(const char* name, const Tensor& stream, const Tensor& x) {
  const ScalarType dtype = stream.scalar_type();
  const bool mixed = dtype == ScalarType::Float && is_half(x.scalar_type());
  check_tensor(name, stream, x, mixed ? dtype : x.scalar_type(), x.sizes());
}

std::tuple<Tensor, Tensor, Tensor> norm(const Tensor& x_, const std::optional<Tensor>& residual_,
                                        const Tensor& weight_, const Tensor& bias_, double eps) {
  check_row("weight", weight_, x_);
  check_row("bias", bias_, x_);
  if (residual_) check_stream("residual", *residual_, x_);
  const Rows x(x_), residual(residual_.value_or(x_));
  const Tensor weight = parameters(weight_, x_), bias = parameters(bias_, x_);
  Tensor y = contiguous_like(x_), s = residual_ ? contiguous_like(*residual_) : y;
  Tensor stats = gpt2::new_empty(weight, {2, leading(x_)});
  if (x.N == 0) return {y, s, stats};
  const LayerNormFwd args = {.N = x.N,
                             .C = x.C,
                             .eps = eps,
                             .x = x.data(),
                             .residual = residual_ ? residual.data() : nullptr,
                             .weight = weight.const_data_ptr(),
                             .bias = bias.const_data_ptr(),
                             .y = y.mutable_data_ptr(),
                             .s = s.mutable_data_ptr(),
                             .stats = stats.mutable_data_ptr()};
  const Ops& ops = ops_for(x_);
  const bool mixed = residual.tensor.scalar_type() != x_.scalar_type();
  (mixed ? ops.mixed_layer_norm_fwd : ops.layer_norm_fwd)(args, here(x_));
  return {y, s, stats};
}

std::tuple<Tensor, Tensor> layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, double eps) {
  const auto [y, s, stats] = norm(x, std::nullopt, weight, bias, eps);
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_fwd(Tensor x, Tensor residual, Tensor weight,
                                                      Tensor bias, double eps) {
  return norm(x, residual, weight, bias, eps);
}

// dx in dy's dtype, dresidual where it is given, and the gradients of weight and bias.
std::tuple<Tensor, Tensor> norm_bwd(const Tensor& dy_, const std::optional<Tensor>& ds_,
                                    const Tensor& s_, const Tensor& weight_, const Tensor& stats_,
                                    Tensor* dresidual) {
  check_row("weight", weight_, s_);
  check_tensor("stats", stats_, s_, accumulator(s_), {2, leading(s_)});
  if (ds_) check_like("ds", *ds_, s_);
  check_tensor("dy", dy_, s_, dresidual ? dy_.scalar_type() : s_.scalar_type(), s_.sizes());
  STD_TORCH_CHECK(
      !dresidual || (is_half(dy_.scalar_type()) && s_.scalar_type() == ScalarType::Float),
      "the mixed form has dy of 16 bits and s of 32");
  const Rows dy(dy_), ds(ds_.value_or(s_)), s(s_);
  const Tensor weight = parameters(weight_, s_), stats = as_contiguous(stats_);
  Tensor dx = contiguous_like(dy_);
  if (s.N == 0) return {dx, torch::stable::new_zeros(weight_, std::vector<int64_t>{2, s.C})};
  Tensor dparams = gpt2::new_empty(weight, {2, s.C}),
         partial = gpt2::new_empty(weight, {partial_rows(s.N), 2, s.C});
  const LayerNormBwd args = {.N = s.N,
                             .C = s.C,
                             .dy = dy.data(),
                             .ds = ds_ ? ds.data() : nullptr,
                             .s = s.data(),
                             .weight = weight.const_data_ptr(),
                             .stats = stats.const_data_ptr(),
                             .dx = dx.mutable_data_ptr(),
                             .dresidual = dresidual ? dresidual->mutable_data_ptr() : nullptr,
                             .dparams = dparams.mutable_data_ptr(),
                             .partial = partial.mutable_data_ptr()};
  const Ops& ops = ops_for(dy_);
  (dresidual ? ops.mixed_layer_norm_bwd : ops.layer_norm_bwd)(args, here(s_));
  return {dx, as_dtype(dparams, weight_.scalar_type())};
}

std::tuple<Tensor, Tensor> layer_norm_bwd(Tensor dy, std::optional<Tensor> ds, Tensor x,
                                          Tensor weight, Tensor stats) {
  return norm_bwd(dy, ds, x, weight, stats, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> mixed_layer_norm_bwd(Tensor dy, Tensor ds, Tensor s,
                                                        Tensor weight, Tensor stats) {
  Tensor dresidual = contiguous_like(s);
  const auto [dx, dparams] = norm_bwd(dy, ds, s, weight, stats, &dresidual);
  return {dx, dresidual, dparams};
}

}  // namespace
}  // namespace gpt2

GPT2_KERNELS_LIBRARY_FRAGMENT(m) {
  m.def(
      "layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor y, Tensor "
      "stats)");
  m.def(
      "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
      " -> (Tensor y, Tensor s, Tensor stats)");
  m.def(
      "layer_norm_bwd(Tensor dy, Tensor? ds, Tensor x, Tensor weight, Tensor stats)"
      " -> (Tensor dx, Tensor dparams)");
  m.def(
      "mixed_layer_norm_bwd(Tensor dy, Tensor ds, Tensor s, Tensor weight, Tensor stats)"
      " -> (Tensor dx, Tensor dresidual, Tensor dparams)");
}

GPT2_KERNELS_LIBRARY_IMPL(GPT2_KERNELS_KEY, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&gpt2::layer_norm_fwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&gpt2::add_layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&gpt2::layer_norm_bwd));
  m.impl("mixed_layer_norm_bwd", TORCH_BOX(&gpt2::mixed_layer_norm_bwd));
}
