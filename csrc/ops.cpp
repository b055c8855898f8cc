// The operators over rows and elements.
#include "ops.h"

#include <algorithm>

#include "checks.h"

namespace gpt2 {
namespace {

Tensor as_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

std::vector<int64_t> sizes(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

// How many rows x (..., C) has, elements or not.
int64_t leading(const Tensor& x) {
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

Tensor contiguous_like(const Tensor& x) {
  return gpt2::new_empty(x, sizes(x));
}

int64_t partial_rows(int64_t N) {
  return std::min(N, kMaxPartial);
}

// A row of parameters, in the type that the kernels for x sum in.
Tensor parameters(const Tensor& row, const Tensor& x) {
  return as_contiguous(as_dtype(row, accumulator(x)));
}

Tensor contiguous_rows(const Tensor& logits) {
  return logits.stride(1) == 1 ? logits : as_contiguous(logits);
}

Tensor gelu_fwd(Tensor x_) {
  check_memory("x", x_);
  const Tensor x = as_contiguous(x_);
  Tensor y = contiguous_like(x);
  ops_for(x).gelu_fwd(x.const_data_ptr(), y.mutable_data_ptr(), x.numel(), here(x));
  return y;
}

Tensor gelu_bwd(Tensor dy_, Tensor x_) {
  check_memory("x", x_);
  check_like("dy", dy_, x_);
  const Tensor dy = as_contiguous(dy_), x = as_contiguous(x_);
  Tensor dx = contiguous_like(x);
  ops_for(x).gelu_bwd(dy.const_data_ptr(), x.const_data_ptr(), dx.mutable_data_ptr(), x.numel(),
                      here(x));
  return dx;
}

Tensor bias_gelu_fwd(Tensor x_, Tensor bias_) {
  check_row("bias", bias_, x_);
  const Rows x(x_);
  const Tensor bias = parameters(bias_, x_);
  Tensor y = contiguous_like(x_);
  if (x.N > 0) {
    ops_for(x_).bias_gelu_fwd(x.data(), bias.const_data_ptr(), y.mutable_data_ptr(), x.N, x.C,
                              here(x_));
  }
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
  ops_for(x_).bias_gelu_bwd(dy.data(), x.data(), bias.const_data_ptr(), dx.mutable_data_ptr(),
                            dbias.mutable_data_ptr(), partial.mutable_data_ptr(), x.N, x.C,
                            here(x_));
  return {dx, as_dtype(dbias, bias_.scalar_type())};
}

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
  if (x.N > 0) {
    const Ops& ops = ops_for(x_);
    const bool mixed = residual.tensor.scalar_type() != x_.scalar_type();
    (mixed ? ops.mixed_layer_norm_fwd : ops.layer_norm_fwd)(
        x.data(), residual_ ? residual.data() : nullptr, weight.const_data_ptr(),
        bias.const_data_ptr(), eps, y.mutable_data_ptr(), s.mutable_data_ptr(),
        stats.mutable_data_ptr(), x.N, x.C, here(x_));
  }
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
  const Ops& ops = ops_for(dy_);
  (dresidual ? ops.mixed_layer_norm_bwd : ops.layer_norm_bwd)(
      dy.data(), ds_ ? ds.data() : nullptr, s.data(), weight.const_data_ptr(),
      stats.const_data_ptr(), dx.mutable_data_ptr(),
      dresidual ? dresidual->mutable_data_ptr() : nullptr, dparams.mutable_data_ptr(),
      partial.mutable_data_ptr(), s.N, s.C, here(s_));
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

// Logits (N, V_padded) of a vocabulary of V, and targets (N,).
void check_logits(const Tensor& logits, const Tensor& targets, int64_t V) {
  check_dim("logits", logits, 2);
  STD_TORCH_CHECK(V >= 1 && V <= logits.size(1), "the vocabulary must lie in [1, ", logits.size(1),
                  "], got ", V);
  check_tensor("targets", targets, logits, ScalarType::Long, {logits.size(0)});
}

// A loss for each row of logits, whose last dimension is contiguous.
LogitsRows logits_rows(const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                       double smoothing, int64_t V) {
  return {logits.size(0), V, logits.stride(0), ignore_index, targets.const_data_ptr<int64_t>(),
          smoothing};
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(Tensor logits_, Tensor targets_, int64_t ignore_index,
                                             double smoothing) {
  check_logits(logits_, targets_, logits_.dim() > 1 ? logits_.size(1) : 0);
  const Tensor logits = contiguous_rows(logits_), targets = as_contiguous(targets_);
  const LogitsRows rows = logits_rows(logits, targets, ignore_index, smoothing, logits.size(1));
  Tensor losses = gpt2::new_empty(logits, {rows.N}, accumulator(logits));
  Tensor stats = gpt2::new_empty(logits, {2, rows.N}, accumulator(logits));
  ops_for(logits).cross_entropy_fwd(rows, logits.const_data_ptr(), losses.mutable_data_ptr(),
                                    stats.mutable_data_ptr(), here(logits));
  return {losses, stats};
}

void check_cross_entropy_bwd(const Tensor& dlosses, const Tensor& logits, const Tensor& targets,
                             const Tensor& stats) {
  check_logits(logits, targets, logits.dim() > 1 ? logits.size(1) : 0);
  check_tensor("dlosses", dlosses, logits, accumulator(logits), {logits.size(0)});
  check_tensor("stats", stats, logits, accumulator(logits), {2, logits.size(0)});
}

void cross_entropy_bwd_into(Tensor& dlogits, const Tensor& dlosses_, const Tensor& logits,
                            const Tensor& targets_, const Tensor& stats_, int64_t ignore_index,
                            double smoothing) {
  const Tensor dlosses = as_contiguous(dlosses_);
  const Tensor targets = as_contiguous(targets_);
  const Tensor stats = as_contiguous(stats_);
  const LogitsRows rows = logits_rows(logits, targets, ignore_index, smoothing, logits.size(1));
  ops_for(logits).cross_entropy_bwd(rows, dlosses.const_data_ptr(), logits.const_data_ptr(),
                                    stats.const_data_ptr(), dlogits.mutable_data_ptr(),
                                    dlogits.stride(0), here(logits));
}

Tensor cross_entropy_bwd(Tensor dlosses, Tensor logits, Tensor targets, Tensor stats,
                         int64_t ignore_index, double smoothing) {
  check_cross_entropy_bwd(dlosses, logits, targets, stats);
  Tensor dlogits = contiguous_like(logits);
  advise_huge_pages(dlogits);
  cross_entropy_bwd_into(dlogits, dlosses, contiguous_rows(logits), targets, stats, ignore_index,
                         smoothing);
  return dlogits;
}

void cross_entropy_bwd_(Tensor dlosses, Tensor logits, Tensor targets, Tensor stats,
                        int64_t ignore_index, double smoothing) {
  check_cross_entropy_bwd(dlosses, logits, targets, stats);
  check_rows_in_place("logits", logits);
  cross_entropy_bwd_into(logits, dlosses, logits, targets, stats, ignore_index, smoothing);
}

Tensor cross_entropy_fwd_bwd_(Tensor logits, Tensor targets_, int64_t ignore_index,
                              double smoothing, int64_t V) {
  check_logits(logits, targets_, V);
  check_rows_in_place("logits", logits);
  const Tensor targets = as_contiguous(targets_);
  Tensor losses = gpt2::new_empty(logits, {logits.size(0)}, accumulator(logits));
  ops_for(logits).cross_entropy_fwd_bwd(logits_rows(logits, targets, ignore_index, smoothing, V),
                                        logits.mutable_data_ptr(), logits.size(1),
                                        losses.mutable_data_ptr(), here(logits));
  return losses;
}

}  // namespace
}  // namespace gpt2

GPT2_KERNELS_LIBRARY_FRAGMENT(m) {
  m.def("gelu_fwd(Tensor x) -> Tensor");
  m.def("gelu_bwd(Tensor dy, Tensor x) -> Tensor");
  m.def("bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor");
  m.def("bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)");
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
  m.def(
      "cross_entropy_fwd(Tensor logits, Tensor targets, int ignore_index, float smoothing)"
      " -> (Tensor losses, Tensor stats)");
  m.def(
      "cross_entropy_bwd(Tensor dlosses, Tensor logits, Tensor targets, Tensor stats,"
      " int ignore_index, float smoothing) -> Tensor");
  m.def(
      "cross_entropy_bwd_(Tensor dlosses, Tensor(a!) logits, Tensor targets, Tensor stats,"
      " int ignore_index, float smoothing) -> ()");
  m.def(
      "cross_entropy_fwd_bwd_(Tensor(a!) logits, Tensor targets, int ignore_index, float smoothing,"
      " int V) -> Tensor");
}

GPT2_KERNELS_LIBRARY_IMPL(GPT2_KERNELS_KEY, m) {
  m.impl("gelu_fwd", TORCH_BOX(&gpt2::gelu_fwd));
  m.impl("gelu_bwd", TORCH_BOX(&gpt2::gelu_bwd));
  m.impl("bias_gelu_fwd", TORCH_BOX(&gpt2::bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&gpt2::bias_gelu_bwd));
  m.impl("layer_norm_fwd", TORCH_BOX(&gpt2::layer_norm_fwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&gpt2::add_layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&gpt2::layer_norm_bwd));
  m.impl("mixed_layer_norm_bwd", TORCH_BOX(&gpt2::mixed_layer_norm_bwd));
  m.impl("cross_entropy_fwd", TORCH_BOX(&gpt2::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&gpt2::cross_entropy_bwd));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&gpt2::cross_entropy_bwd_));
  m.impl("cross_entropy_fwd_bwd_", TORCH_BOX(&gpt2::cross_entropy_fwd_bwd_));
}
