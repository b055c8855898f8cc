// Cross-entropy's operators: a loss for each row of logits, and its gradient, in place or apart.
#include "rows.h"

namespace gpt2 {
namespace {

Tensor contiguous_rows(const Tensor& logits) {
  return logits.stride(1) == 1 ? logits : as_contiguous(logits);
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
  const CrossEntropyFwd args = {.rows = rows,
                                .logits = logits.const_data_ptr(),
                                .losses = losses.mutable_data_ptr(),
                                .stats = stats.mutable_data_ptr()};
  ops_for(logits).cross_entropy_fwd(args, here(logits));
  return {losses, stats};
}

void check_cross_entropy_bwd(const Tensor& dlosses, const Tensor& logits, const Tensor& targets,
                             const Tensor& stats) {
  check_logits(logits, targets, logits.dim() > 1 ? logits.size(1) : 0);
  const std::vector<int64_t> shape(dlosses.dim() > 0, logits.size(0));  // (), or (N,)
  check_tensor("dlosses", dlosses, logits, accumulator(logits), shape);
  check_tensor("stats", stats, logits, accumulator(logits), {2, logits.size(0)});
}

void cross_entropy_bwd_into(Tensor& dlogits, const Tensor& dlosses, const Tensor& logits,
                            const Tensor& targets_, const Tensor& stats_, int64_t ignore_index,
                            double smoothing) {
  const Tensor targets = as_contiguous(targets_);
  const Tensor stats = as_contiguous(stats_);
  const CrossEntropyBwd args = {
      .rows = logits_rows(logits, targets, ignore_index, smoothing, logits.size(1)),
      .logits = logits.const_data_ptr(),
      .dlosses = dlosses.const_data_ptr(),
      .dlosses_stride = dlosses.dim() ? dlosses.stride(0) : 0,
      .stats = stats.const_data_ptr(),
      .dlogits = dlogits.mutable_data_ptr(),
      .dlogits_stride = dlogits.stride(0)};
  ops_for(logits).cross_entropy_bwd(args, here(logits));
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
  const CrossEntropyFwdBwd args = {.rows = logits_rows(logits, targets, ignore_index, smoothing, V),
                                   .V_padded = logits.size(1),
                                   .logits = logits.mutable_data_ptr(),
                                   .losses = losses.mutable_data_ptr()};
  ops_for(logits).cross_entropy_fwd_bwd(args, here(logits));
  return losses;
}

}  // namespace
}  // namespace gpt2

GPT2_KERNELS_LIBRARY_FRAGMENT(m) {
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
  m.impl("cross_entropy_fwd", TORCH_BOX(&gpt2::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&gpt2::cross_entropy_bwd));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&gpt2::cross_entropy_bwd_));
  m.impl("cross_entropy_fwd_bwd_", TORCH_BOX(&gpt2::cross_entropy_fwd_bwd_));
}
