// Attention of one new token per sequence over a cache.
#include "heads.h"

namespace gpt2 {
namespace {

Tensor decode_attention(Tensor q_, Tensor k_, Tensor v_, Tensor lengths_, double softmax_scale) {
  check_heads(q_, k_, v_);
  STD_TORCH_CHECK(q_.size(1) == 1, "q must have one row of time, got ", q_.size(1));
  check_tensor("lengths", lengths_, q_, ScalarType::Long, {q_.size(0)});
  const Tensor q = readable(q_), k = readable(k_), v = readable(v_);
  const Tensor lengths = torch::stable::contiguous(lengths_);
  Tensor o = gpt2::new_empty(q, {q.size(0), 1, q.size(2), q.size(3)});
  const DecodeAttention args = {.B = q.size(0),
                                .H = q.size(2),
                                .T = k.size(1),
                                .D = q.size(3),
                                .q = view_of(q),
                                .k = view_of(k),
                                .v = view_of(v),
                                .lengths = lengths.const_data_ptr<int64_t>(),
                                .softmax_scale = softmax_scale,
                                .o = o.mutable_data_ptr(),
                                .workspace = nullptr};
  run(ops_for(q).decode_attention, args, q);
  return o;
}

}  // namespace
}  // namespace gpt2

GPT2_KERNELS_LIBRARY_FRAGMENT(m) {
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, "
      "float softmax_scale) -> Tensor");
}

GPT2_KERNELS_LIBRARY_IMPL(GPT2_KERNELS_KEY, m) {
  m.impl("decode_attention", TORCH_BOX(&gpt2::decode_attention));
}
