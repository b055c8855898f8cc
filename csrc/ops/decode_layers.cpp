// All of GPT-2's blocks for the next token of a few sequences, in one call; in the CPU's library
// alone.
//
// A step of decoding is some eighty kernels of a few microseconds each: called one by one from
// Python they cost half as much again as the memory that they read. These are the same kernels in
// the same order, so that the bits are the same too. For each layer
//
//   s = s + x    h = norm_1(s)    x = proj(attention(qkv(h), cache))
//   s = s + x    h = norm_2(s)    x = mlp_proj(gelu(fc(h)))
//
// and at last norm(s + x). s is the residual stream, x what the last branch left to be added to it.
// The first norm adds nothing: s = x, the embedded tokens.
//
//   B sequences   L layers   C features   H heads of D   T positions of the cache
#include "checks.h"

#include <string.h>

namespace gpt2 {
namespace {

struct Norm {
  const Tensor &weight, &bias;  // (C,) S
};

struct LinearLayer {
  const Tensor &weight, &bias;  // (N, K), (N,); fc's bias is S, as the GELU adds it
  const Tensor* scale;          // (N,) where the weight is packed int8, else null
};

struct Layer {
  Norm norm_1;
  LinearLayer qkv, proj;
  Norm norm_2;
  LinearLayer fc, mlp_proj;
};

// The tensors of all layers, in the order of Layer.
struct Parameters {
  static constexpr int64_t kPerLayer = 12, kScalesPerLayer = 4;
  const std::vector<Tensor>&tensors, &scales;  // scales are empty unless the weights are int8

  Layer layer(int64_t i) const {
    const Tensor* p = &tensors[i * kPerLayer];
    const Tensor* scale = scales.empty() ? nullptr : &scales[i * kScalesPerLayer];
    const auto scale_of = [&](int linear) { return scale ? scale + linear : nullptr; };
    return {.norm_1 = {p[0], p[1]},
            .qkv = {p[2], p[3], scale_of(0)},
            .proj = {p[4], p[5], scale_of(1)},
            .norm_2 = {p[6], p[7]},
            .fc = {p[8], p[9], scale_of(2)},
            .mlp_proj = {p[10], p[11], scale_of(3)}};
  }
};

struct Step {
  const Tensor& x;
  Parameters parameters;
  Norm last_norm;
  Tensor& kv;  // (L, B, T, 2, H, D)
  int64_t n_head;
  double eps;

  int64_t layers = kv.size(0), B = x.size(0), C = x.size(1), T = kv.size(2);
  const Ops& ops = ops_for(x);
  Executor executor = here(x);
  Tensor s = like({B, C}), next_s = like({B, C}), h = like({B, C}), qkv = like({B, 3 * C}),
         o = like({B, C}), inner = like({B, 4 * C}), activated = like({B, 4 * C}),
         branch = like({B, C});
  Tensor linear_workspace = gpt2::new_empty(x, {B, Linear::workspace_size(4 * C)}, accumulator(x)),
         attention_workspace = gpt2::new_empty(x, {1}, ScalarType::Byte),
         stats = gpt2::new_empty(x, {2, B}, accumulator(x)),
         lengths_now = gpt2::new_empty(x, {B}, ScalarType::Long);  // with the new token

  Tensor like(std::vector<int64_t> shape) const { return gpt2::new_empty(x, shape); }

  Tensor run(const int64_t* lengths) {
    for (int64_t b = 0; b < B; ++b) lengths_now.mutable_data_ptr<int64_t>()[b] = lengths[b] + 1;
    for (int64_t i = 0; i < layers; ++i) {
      const Layer layer = parameters.layer(i);
      i == 0 ? norm_tokens(layer.norm_1) : add_norm(branch, layer.norm_1);
      multiply(layer.qkv, h, qkv);
      append_to_cache(i, lengths);
      attend(i);
      multiply(layer.proj, o, branch);
      add_norm(branch, layer.norm_2);
      multiply(layer.fc, h, inner, false);
      bias_gelu(inner, layer.fc.bias, activated);
      multiply(layer.mlp_proj, activated, branch);
    }
    layers == 0 ? norm_tokens(last_norm) : add_norm(branch, last_norm);
    return h;
  }

  // s = x    h = norm(s)
  void norm_tokens(const Norm& norm) {
    memcpy(s.mutable_data_ptr(), x.const_data_ptr(), B * C * x.element_size());
    layer_norm(x, nullptr, norm, nullptr);
  }

  // s = s + from    h = norm(s)
  void add_norm(const Tensor& from, const Norm& norm) {
    layer_norm(from, s.const_data_ptr(), norm, next_s.mutable_data_ptr());
    std::swap(s, next_s);
  }

  void layer_norm(const Tensor& from, const void* residual, const Norm& norm, void* sum) {
    const LayerNormFwd args = {.N = B,
                               .C = C,
                               .eps = eps,
                               .x = from.const_data_ptr(),
                               .residual = residual,
                               .weight = norm.weight.const_data_ptr(),
                               .bias = norm.bias.const_data_ptr(),
                               .y = h.mutable_data_ptr(),
                               .s = sum,
                               .stats = stats.mutable_data_ptr()};
    ops.layer_norm_fwd(args, executor);
  }

  // to = from W^T + bias
  void multiply(const LinearLayer& layer, const Tensor& from, Tensor& to, bool with_bias = true) {
    const Linear args = {.M = B,
                         .N = to.size(1),
                         .K = from.size(1),
                         .x = from.const_data_ptr(),
                         .weight = layer.weight.const_data_ptr(),
                         .scale = layer.scale ? layer.scale->const_data_ptr<float>() : nullptr,
                         .bias = with_bias ? layer.bias.const_data_ptr() : nullptr,
                         .y = to.mutable_data_ptr(),
                         .workspace = linear_workspace.mutable_data_ptr()};
    (layer.scale ? ops.linear_int8 : ops.linear)(args, executor);
  }

  void bias_gelu(const Tensor& from, const Tensor& bias, Tensor& to) {
    const BiasGeluFwd args = {.N = B,
                              .C = from.size(1),
                              .x = from.const_data_ptr(),
                              .bias = bias.const_data_ptr(),
                              .y = to.mutable_data_ptr()};
    ops.bias_gelu_fwd(args, executor);
  }

  int64_t row_bytes() const { return 2 * C * int64_t(x.element_size()); }  // k and v of a position
  char* cache_of(int64_t layer) const {                                    // (B, T, 2, H, D)
    return static_cast<char*>(kv.mutable_data_ptr()) + layer * B * T * row_bytes();
  }

  // The new tokens' k and v, the last two thirds of qkv, at position lengths[b] of the cache.
  void append_to_cache(int64_t layer, const int64_t* lengths) {
    const int64_t size = x.element_size(), row = row_bytes();
    const char* from = static_cast<const char*>(qkv.const_data_ptr());
    for (int64_t b = 0; b < B; ++b) {
      memcpy(cache_of(layer) + (b * T + lengths[b]) * row, from + (3 * b + 1) * C * size, row);
    }
  }

  // o = attention of the new tokens over the cache
  void attend(int64_t layer) {
    const int64_t D = C / n_head;
    const char* cache = cache_of(layer);
    DecodeAttention args = {.B = B,
                            .H = n_head,
                            .T = T,
                            .D = D,
                            .q = {qkv.const_data_ptr(), 3 * C, 3 * C, D},
                            .k = {cache, T * 2 * C, 2 * C, D},
                            .v = {cache + C * x.element_size(), T * 2 * C, 2 * C, D},
                            .lengths = lengths_now.const_data_ptr<int64_t>(),
                            .softmax_scale = 1 / sqrt(double(D)),
                            .o = o.mutable_data_ptr(),
                            .workspace = nullptr};
    const int64_t bytes = ops.decode_attention(args, executor);
    if (attention_workspace.numel() < bytes) {
      attention_workspace = gpt2::new_empty(x, {bytes}, ScalarType::Byte);
    }
    args.workspace = attention_workspace.mutable_data_ptr();
    ops.decode_attention(args, executor);
  }
};

void check_norm(const Step& step, const char* weight, const char* bias, const Norm& norm) {
  check_contiguous(weight, norm.weight, step.x, accumulator(step.x), {step.C});
  check_contiguous(bias, norm.bias, step.x, accumulator(step.x), {step.C});
}

void check_linear(const Step& step, const LinearLayer& layer, int64_t N, int64_t K,
                  ScalarType bias) {
  check_weight("a weight", layer.weight, layer.scale, step.x, N, K);
  STD_TORCH_CHECK(layer.weight.is_contiguous() && (!layer.scale || layer.scale->is_contiguous()),
                  "a weight and its scale must be contiguous");
  check_contiguous("a bias", layer.bias, step.x, bias, {N});
}

void check_arguments(const Step& step) {
  const Tensor& x = step.x;
  const auto& [tensors, scales] = step.parameters;
  const int64_t C = step.C, layers = step.layers, per_layer = Parameters::kPerLayer;
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(step.n_head >= 1 && C % step.n_head == 0 && C / step.n_head <= kMaxHeadSize,
                  "n_head must divide the ", C, " features into heads of at most ", kMaxHeadSize,
                  ", got ", step.n_head);
  check_tensor("kv", step.kv, x, dtype, {layers, step.B, step.T, 2, step.n_head, C / step.n_head});
  STD_TORCH_CHECK(step.kv.is_contiguous(), "kv must be contiguous");
  STD_TORCH_CHECK(int64_t(tensors.size()) == layers * per_layer, "params must hold ", per_layer,
                  " tensors for each of the ", layers, " layers of kv, got ", tensors.size());
  STD_TORCH_CHECK(scales.empty() || int64_t(scales.size()) == layers * Parameters::kScalesPerLayer,
                  "scales must hold none or 4 for each layer, got ", scales.size());
  for (int64_t i = 0; i < layers; ++i) {
    const Layer layer = step.parameters.layer(i);
    check_norm(step, "a norm", "a norm", layer.norm_1);
    check_norm(step, "a norm", "a norm", layer.norm_2);
    check_linear(step, layer.qkv, 3 * C, C, dtype);
    check_linear(step, layer.proj, C, C, dtype);
    check_linear(step, layer.fc, 4 * C, C, accumulator(x));
    check_linear(step, layer.mlp_proj, C, 4 * C, dtype);
  }
  check_norm(step, "norm", "norm_bias", step.last_norm);
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
  const int64_t row = step.row_bytes();
  for (int64_t layer = 0; layer < step.layers; ++layer) {
    for (int64_t b = 0; b < step.B; ++b) {
      check_writable("kv", step.cache_of(layer) + (b * step.T + copies[b]) * row, row);
    }
  }
  return copies;
}

Tensor decode_layers(Tensor x_, std::vector<Tensor> params, std::vector<Tensor> scales, Tensor norm,
                     Tensor norm_bias, Tensor kv, Tensor lengths, int64_t n_head, double eps) {
  check_dim("x", x_, 2);
  check_dim("kv", kv, 6);
  const Tensor x = as_contiguous(x_);
  Step step{.x = x,
            .parameters = {params, scales},
            .last_norm = {norm, norm_bias},
            .kv = kv,
            .n_head = n_head,
            .eps = eps};
  check_arguments(step);
  return step.run(checked_lengths(step, lengths).data());
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
