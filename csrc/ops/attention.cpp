// Attention's operators: views of any strides in, one packed gradient out for a packed projection.
#include "heads.h"

namespace gpt2 {
namespace {

struct Options {
  double softmax_scale, dropout_p;
  std::optional<Tensor> seed;
};

void check_options(const Options& options, const Tensor& like) {
  STD_TORCH_CHECK(options.dropout_p >= 0 && options.dropout_p <= 1,
                  "dropout_p must lie in [0, 1], got ", options.dropout_p);
  STD_TORCH_CHECK(options.dropout_p == 0 || options.seed, "dropout needs a seed");
  if (options.seed) check_tensor("seed", *options.seed, like, ScalarType::Long, {1});
}

void check_causal(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_heads(q, k, v);
  STD_TORCH_CHECK(q.size(1) <= k.size(1), "q must not be longer than k, got ", q.size(1), " and ",
                  k.size(1));
}

void check_packed(const Tensor& qkv, int64_t n_head) {
  check_dim("qkv", qkv, 3);
  STD_TORCH_CHECK(n_head >= 1 && qkv.size(2) / 3 / n_head * n_head * 3 == qkv.size(2),
                  "n_head must divide qkv's last dimension / 3, got ", n_head, " for ",
                  qkv.size(2));
  check_head_size(qkv.size(2) / 3 / n_head);
}

Attention problem(const Tensor& q, const Tensor& k, const Tensor& v, const Options& options) {
  return {.B = q.size(0),
          .H = q.size(2),
          .Tq = q.size(1),
          .Tk = k.size(1),
          .D = q.size(3),
          .q = view_of(q),
          .k = view_of(k),
          .v = view_of(v),
          .softmax_scale = options.softmax_scale,
          .dropout_p = options.dropout_p,
          .seed = options.seed ? options.seed->const_data_ptr<int64_t>() : nullptr};
}

Attention problem(const Tensor& qkv, int64_t n_head, const Options& options) {
  const int64_t T = qkv.size(1), C = qkv.size(2) / 3, D = C / n_head;
  return {.B = qkv.size(0),
          .H = n_head,
          .Tq = T,
          .Tk = T,
          .D = D,
          .q = view_of(qkv, 0, C, D),
          .k = view_of(qkv, 1, C, D),
          .v = view_of(qkv, 2, C, D),
          .softmax_scale = options.softmax_scale,
          .dropout_p = options.dropout_p,
          .seed = options.seed ? options.seed->const_data_ptr<int64_t>() : nullptr};
}

std::tuple<Tensor, Tensor> forward(const Attention& x, const Tensor& like,
                                   std::vector<int64_t> shape) {
  Tensor o = gpt2::new_empty(like, shape);
  Tensor lse = gpt2::new_empty(like, {x.B, x.H, x.Tq}, accumulator(like));
  if (x.Tq == 0) return {o, lse};  // however many sequences there are
  const AttentionFwd args = {
      .problem = x, .o = o.mutable_data_ptr(), .lse = lse.mutable_data_ptr(), .workspace = nullptr};
  run(ops_for(like).attention_fwd, args, like);
  return {o, lse};
}

std::tuple<Tensor, Tensor> attention_fwd(Tensor q_, Tensor k_, Tensor v_, double softmax_scale,
                                         double dropout_p, std::optional<Tensor> seed) {
  const Options options = {softmax_scale, dropout_p, seed};
  check_causal(q_, k_, v_);
  check_options(options, q_);
  const Tensor q = readable(q_), k = readable(k_), v = readable(v_);
  const Attention x = problem(q, k, v, options);
  return forward(x, q, {x.B, x.Tq, x.H, x.D});
}

std::tuple<Tensor, Tensor> attention_qkv_fwd(Tensor qkv_, int64_t n_head, double softmax_scale,
                                             double dropout_p, std::optional<Tensor> seed) {
  const Options options = {softmax_scale, dropout_p, seed};
  check_packed(qkv_, n_head);
  check_options(options, qkv_);
  const Tensor qkv = readable(qkv_);
  const Attention x = problem(qkv, n_head, options);
  return forward(x, qkv, {x.B, x.Tq, x.H * x.D});
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor do_, Tensor q_, Tensor k_, Tensor v_,
                                                 Tensor o_, Tensor lse_, double softmax_scale,
                                                 double dropout_p, std::optional<Tensor> seed) {
  const Options options = {softmax_scale, dropout_p, seed};
  check_causal(q_, k_, v_);
  check_options(options, q_);
  check_like("do", do_, q_);
  check_like("o", o_, q_);
  check_tensor("lse", lse_, q_, accumulator(q_), {q_.size(0), q_.size(2), q_.size(1)});
  const Tensor o = as_contiguous(o_), lse = as_contiguous(lse_);
  const Tensor q = readable(q_), k = readable(k_), v = readable(v_);
  const Tensor dout = readable(do_);
  const Attention x = problem(q, k, v, options);
  Tensor dq = gpt2::new_empty(q, {x.B, x.Tq, x.H, x.D});
  Tensor dk = gpt2::new_empty(k, {x.B, x.Tk, x.H, x.D});
  Tensor dv = gpt2::new_empty(v, {x.B, x.Tk, x.H, x.D});
  if (x.Tk == 0) return {dq, dk, dv};
  const AttentionBwd args = {.problem = x,
                             .dout = view_of(dout),
                             .o = o.const_data_ptr(),
                             .lse = lse.const_data_ptr(),
                             .dq = out_view_of(dq),
                             .dk = out_view_of(dk),
                             .dv = out_view_of(dv),
                             .workspace = nullptr};
  run(ops_for(q).attention_bwd, args, q);
  return {dq, dk, dv};
}

Tensor attention_qkv_bwd(Tensor do_, Tensor qkv_, Tensor o_, Tensor lse_, int64_t n_head,
                         double softmax_scale, double dropout_p, std::optional<Tensor> seed) {
  const Options options = {softmax_scale, dropout_p, seed};
  check_packed(qkv_, n_head);
  check_options(options, qkv_);
  const int64_t B = qkv_.size(0), T = qkv_.size(1);
  check_tensor("do", do_, qkv_, qkv_.scalar_type(), {B, T, qkv_.size(2) / 3});
  check_like("o", o_, do_);
  check_tensor("lse", lse_, qkv_, accumulator(qkv_), {B, n_head, T});
  const Tensor o = as_contiguous(o_), lse = as_contiguous(lse_);
  const Tensor qkv = readable(qkv_), dout = readable(do_);
  const Attention x = problem(qkv, n_head, options);
  const int64_t C = x.H * x.D;
  Tensor dqkv = gpt2::new_empty(qkv, {x.B, x.Tq, 3 * C});
  if (x.Tq == 0) return dqkv;
  const AttentionBwd args = {.problem = x,
                             .dout = view_of(dout, 0, C, x.D),
                             .o = o.const_data_ptr(),
                             .lse = lse.const_data_ptr(),
                             .dq = out_view_of(dqkv, 0, C, x.D),
                             .dk = out_view_of(dqkv, 1, C, x.D),
                             .dv = out_view_of(dqkv, 2, C, x.D),
                             .workspace = nullptr};
  run(ops_for(qkv).attention_bwd, args, qkv);
  return dqkv;
}

}  // namespace
}  // namespace gpt2

GPT2_KERNELS_LIBRARY_FRAGMENT(m) {
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, float softmax_scale, float dropout_p, "
      "Tensor? seed) -> (Tensor o, Tensor lse)");
  m.def(
      "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
      "float softmax_scale, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_qkv_fwd(Tensor qkv, int n_head, float softmax_scale, float dropout_p, "
      "Tensor? seed) -> (Tensor o, Tensor lse)");
  m.def(
      "attention_qkv_bwd(Tensor do, Tensor qkv, Tensor o, Tensor lse, int n_head, "
      "float softmax_scale, float dropout_p, Tensor? seed) -> Tensor");
}

GPT2_KERNELS_LIBRARY_IMPL(GPT2_KERNELS_KEY, m) {
  m.impl("attention_fwd", TORCH_BOX(&gpt2::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&gpt2::attention_bwd));
  m.impl("attention_qkv_fwd", TORCH_BOX(&gpt2::attention_qkv_fwd));
  m.impl("attention_qkv_bwd", TORCH_BOX(&gpt2::attention_qkv_bwd));
}
