// All of a GPT-2's blocks for one new token of a few sequences, in one call.
//
// A step of decoding is some eighty kernels of a few microseconds each: called one by one from
// Python they cost half as much again as the memory that they read. These are the same kernels in
// the same order, so that the bits are the same too.
//
//   s = s + x    x = proj(attention(qkv(norm_1(s))))    s = s + x    x = proj(gelu(fc(norm_2(s))))
//
//   B sequences   L layers   C features   H heads of D   T positions of the cache
#include "checks.h"

#include <string.h>

namespace gpt2 {
namespace {

// What params holds of a layer, in order. Norms and the bias before the GELU are S, the rest the
// model's type; where there are scales, four to a layer, the linear weights are packed int8.
enum Param {
  kNorm1,
  kNorm1Bias,
  kQkv,
  kQkvBias,
  kProj,
  kProjBias,
  kNorm2,
  kNorm2Bias,
  kFc,
  kFcBias,
  kMlpProj,
  kMlpProjBias,
  kParams,
};
constexpr int kWeights[] = {kQkv, kProj, kFc, kMlpProj};

struct Step {
  const Tensor& x;
  const std::vector<Tensor>&params, &scales;
  Tensor& kv;  // (L, B, T, 2, H, D)
  int64_t n_head;
  double eps;

  int64_t B = x.size(0), C = x.size(1), T = kv.size(2);
  const Ops& ops = ops_for(x);
  Executor executor = here(x);
  Tensor s = like({B, C}), next_s = like({B, C}), h = like({B, C}), qkv = like({B, 3 * C}),
         o = like({B, C}), inner = like({B, 4 * C}), activated = like({B, 4 * C}),
         added = like({B, C});
  Tensor wide = gpt2::new_empty(x, {B, Linear::workspace(4 * C)}, accumulator(x)),
         stats = gpt2::new_empty(x, {2, B}, accumulator(x)),
         seen = gpt2::new_empty(x, {B}, ScalarType::Long);

  Tensor like(std::vector<int64_t> shape) const { return gpt2::new_empty(x, shape); }

  const Tensor& param(int64_t layer, int64_t i) const { return params[layer * kParams + i]; }

  // Of a layer's `linear`-th weight, where the weights are int8; else null.
  const Tensor* scale(int64_t layer, int linear) const {
    return scales.empty() ? nullptr : &scales[layer * 4 + linear];
  }

  // to = from W^T + bias, the layer's `linear`-th of four
  void multiply(int64_t layer, int linear, const Tensor& from, Tensor& to) {
    const int weight = kWeights[linear];
    const Tensor* packed = scale(layer, linear);
    const Linear p = {.M = B,
                      .N = to.size(1),
                      .K = from.size(1),
                      .scale = packed ? packed->const_data_ptr<float>() : nullptr};
    const void* bias = weight == kFc ? nullptr : param(layer, weight + 1).const_data_ptr();
    (packed ? ops.linear_int8 : ops.linear)(
        p, from.const_data_ptr(), param(layer, weight).const_data_ptr(), bias,
        wide.mutable_data_ptr(), to.mutable_data_ptr(), executor);
  }

  // s += from, where there is anything to add it to; h = norm(s)
  void add_norm(const Tensor& from, const Tensor& weight, const Tensor& bias, bool first = false) {
    ops.layer_norm_fwd(from.const_data_ptr(), first ? nullptr : s.const_data_ptr(),
                       weight.const_data_ptr(), bias.const_data_ptr(), eps, h.mutable_data_ptr(),
                       first ? nullptr : next_s.mutable_data_ptr(), stats.mutable_data_ptr(), B, C,
                       executor);
    if (first) {
      memcpy(s.mutable_data_ptr(), from.const_data_ptr(), B * C * x.element_size());
    } else {
      std::swap(s, next_s);
    }
  }

  // o = attention of the new tokens, whose keys and values join the cache
  void attend(int64_t layer, const int64_t* lengths, Tensor& workspace) {
    const int64_t size = x.element_size(), row = 2 * C * size, D = C / n_head;
    char* cache = static_cast<char*>(kv.mutable_data_ptr()) + layer * B * T * row;
    const char* from = static_cast<const char*>(qkv.const_data_ptr());
    for (int64_t b = 0; b < B; ++b) {
      memcpy(cache + (b * T + lengths[b]) * row, from + (3 * b + 1) * C * size, row);
    }
    const DecodeAttention problem = {.B = B,
                                     .H = n_head,
                                     .T = T,
                                     .D = D,
                                     .q = {from, 3 * C, 3 * C, D},
                                     .k = {cache, T * 2 * C, 2 * C, D},
                                     .v = {cache + C * size, T * 2 * C, 2 * C, D},
                                     .lengths = seen.const_data_ptr<int64_t>(),
                                     .softmax_scale = 1 / sqrt(double(D))};
    const int64_t bytes = ops.decode_attention(problem, nullptr, nullptr, executor);
    if (workspace.numel() < bytes) workspace = gpt2::new_empty(x, {bytes}, ScalarType::Byte);
    ops.decode_attention(problem, o.mutable_data_ptr(), workspace.mutable_data_ptr(), executor);
  }

  Tensor run(const int64_t* lengths, const Tensor& norm, const Tensor& norm_bias) {
    for (int64_t b = 0; b < B; ++b) seen.mutable_data_ptr<int64_t>()[b] = lengths[b] + 1;
    Tensor workspace = gpt2::new_empty(x, {1}, ScalarType::Byte);
    const int64_t layers = kv.size(0);
    for (int64_t layer = 0; layer < layers; ++layer) {
      add_norm(layer == 0 ? x : added, param(layer, kNorm1), param(layer, kNorm1Bias), layer == 0);
      multiply(layer, 0, h, qkv);
      attend(layer, lengths, workspace);
      multiply(layer, 1, o, added);
      add_norm(added, param(layer, kNorm2), param(layer, kNorm2Bias));
      multiply(layer, 2, h, inner);
      ops.bias_gelu_fwd(inner.const_data_ptr(), param(layer, kFcBias).const_data_ptr(),
                        activated.mutable_data_ptr(), B, 4 * C, executor);
      multiply(layer, 3, activated, added);
    }
    add_norm(layers == 0 ? x : added, norm, norm_bias, layers == 0);
    return h;
  }
};

void check_arguments(const Step& step, const Tensor& norm, const Tensor& norm_bias) {
  const Tensor& x = step.x;
  const int64_t B = step.B, C = step.C, layers = step.kv.size(0);
  const ScalarType dtype = x.scalar_type(), sums = accumulator(x);
  STD_TORCH_CHECK(step.n_head >= 1 && C % step.n_head == 0 && C / step.n_head <= kMaxHeadSize,
                  "n_head must divide the ", C, " features into heads of at most ", kMaxHeadSize,
                  ", got ", step.n_head);
  check_tensor("kv", step.kv, x, dtype, {layers, B, step.T, 2, step.n_head, C / step.n_head});
  STD_TORCH_CHECK(step.kv.is_contiguous(), "kv must be contiguous");
  STD_TORCH_CHECK(int64_t(step.params.size()) == layers * kParams, "params must hold ", kParams,
                  " tensors for each of the ", layers, " layers of kv, got ", step.params.size());
  STD_TORCH_CHECK(step.scales.empty() || int64_t(step.scales.size()) == layers * 4,
                  "scales must hold none or 4 for each layer, got ", step.scales.size());
  const int64_t N[] = {3 * C, C, 4 * C, C}, K[] = {C, C, C, 4 * C};
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (const int norm : {kNorm1, kNorm1Bias, kNorm2, kNorm2Bias}) {
      check_contiguous("a norm", step.param(layer, norm), x, sums, {C});
    }
    for (int i = 0; i < 4; ++i) {
      const Tensor& weight = step.param(layer, kWeights[i]);
      const Tensor* scale = step.scale(layer, i);
      check_weight("a weight", weight, scale, x, N[i], K[i]);
      STD_TORCH_CHECK(weight.is_contiguous() && (!scale || scale->is_contiguous()),
                      "a weight and its scale must be contiguous");
      check_contiguous("a bias", step.param(layer, kWeights[i] + 1), x,
                       kWeights[i] == kFc ? sums : dtype, {N[i]});
    }
  }
  check_contiguous("norm", norm, x, sums, {C});
  check_contiguous("norm_bias", norm_bias, x, sums, {C});
}

// Copies: lengths may lie in the cache, which is written to, or change meanwhile.
std::vector<int64_t> checked_lengths(const Step& step, const Tensor& lengths) {
  check_contiguous("lengths", lengths, step.x, ScalarType::Long, {step.B});
  const int64_t* from = lengths.const_data_ptr<int64_t>();
  std::vector<int64_t> copies(from, from + step.B);
  for (const int64_t length : copies) {
    STD_TORCH_CHECK(length >= 0 && length < step.T, "lengths must lie in [0, ", step.T, "), got ",
                    length);
  }
  const int64_t row = 2 * step.C * step.x.element_size();
  char* cache = static_cast<char*>(step.kv.mutable_data_ptr());
  for (int64_t i = 0; i < step.kv.size(0) * step.B; ++i) {
    check_writable("kv", cache + (i * step.T + copies[i % step.B]) * row, row);
  }
  return copies;
}

Tensor decode_layers(Tensor x_, std::vector<Tensor> params, std::vector<Tensor> scales, Tensor norm,
                     Tensor norm_bias, Tensor kv, Tensor lengths, int64_t n_head, double eps) {
  check_dim("x", x_, 2);
  check_dim("kv", kv, 6);
  const Tensor x = as_contiguous(x_);
  Step step{.x = x, .params = params, .scales = scales, .kv = kv, .n_head = n_head, .eps = eps};
  check_arguments(step, norm, norm_bias);
  return step.run(checked_lengths(step, lengths).data(), norm, norm_bias);
}

}  // namespace
}  // namespace gpt2

GPT2_KERNELS_LIBRARY_FRAGMENT(m) {
  m.def(
      "decode_layers(Tensor x, Tensor[] params, Tensor[] scales, Tensor norm, Tensor norm_bias, "
      "Tensor(a!) kv, Tensor lengths, int n_head, float eps) -> Tensor");
}

GPT2_KERNELS_LIBRARY_IMPL(GPT2_KERNELS_KEY, m) {
  m.impl("decode_layers", TORCH_BOX(&gpt2::decode_layers));
}
