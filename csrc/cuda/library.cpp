// The CUDA library's part of ops.h: its table of kernels, and the stream that they run on.
#ifndef GPT2_KERNELS_EMULATED_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

#include "../ops/ops.h"

namespace gpt2 {
namespace {

template <class T>
constexpr Ops ops = {
    .attention_fwd = cuda::attention_fwd<T>,
    .attention_bwd = cuda::attention_bwd<T>,
    .decode_attention = cuda::decode_attention<T>,
    .gelu_fwd = cuda::gelu_fwd<T>,
    .gelu_bwd = cuda::gelu_bwd<T>,
    .bias_gelu_fwd = cuda::bias_gelu_fwd<T>,
    .bias_gelu_bwd = cuda::bias_gelu_bwd<T>,
    .layer_norm_fwd = cuda::layer_norm_fwd<T, T>,
    .mixed_layer_norm_fwd = cuda::layer_norm_fwd<T, float>,
    .layer_norm_bwd = cuda::layer_norm_bwd<T, T>,
    .mixed_layer_norm_bwd = cuda::layer_norm_bwd<T, float>,
    .cross_entropy_fwd = cuda::cross_entropy_fwd<T>,
    .cross_entropy_bwd = cuda::cross_entropy_bwd<T>,
    .cross_entropy_fwd_bwd = cuda::cross_entropy_fwd_bwd<T>,
};

}  // namespace

const Ops& ops_for(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return ops<float>;
    case ScalarType::BFloat16: return ops<__nv_bfloat16>;
    case ScalarType::Half: return ops<__half>;
    default: break;
  }
  STD_TORCH_CHECK(false, "no CUDA kernel for this dtype");
}

#ifdef GPT2_KERNELS_EMULATED_CUDA
Here here(const Tensor&) {
  return {};
}
#else
Here here(const Tensor& x) {
  const int32_t device = x.get_device_index();
  Here here;
  here.guard.emplace(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  here.stream = static_cast<CUstream_st*>(stream);
  return here;
}
#endif

}  // namespace gpt2
