// The launchers of csrc/cuda: kernels.h's functions for T = float, __nv_bfloat16 and __half, each
// defined and instantiated in the .cu file of its op. No CUDA header is needed to call them.
//
// They start work on the executor's stream and return; where that fails they throw
// std::runtime_error. Nothing reads a tensor's memory on the host, and no result depends on the
// GPU: grids that sum into `partial` have a size of their own.
#pragma once

#include "../kernels.h"

struct CUstream_st;  // cudaStream_t points to it
struct __nv_bfloat16;
struct __half;

namespace gpt2 {

struct Executor {
  CUstream_st* stream;
};

// Rows of `partial`, one for each block that sums gradients: two blocks for each of an H100's 132
// multiprocessors.
constexpr int64_t kMaxPartial = 264;

namespace cuda {

template <class T>
int64_t attention_fwd(const AttentionFwd&, const Executor&);
template <class T>
int64_t attention_bwd(const AttentionBwd&, const Executor&);
template <class T>
int64_t decode_attention(const DecodeAttention&, const Executor&);

template <class T>
void gelu_fwd(const GeluFwd&, const Executor&);
template <class T>
void gelu_bwd(const GeluBwd&, const Executor&);
template <class T>
void bias_gelu_fwd(const BiasGeluFwd&, const Executor&);
template <class T>
void bias_gelu_bwd(const BiasGeluBwd&, const Executor&);

// R is T, or float: the mixed form.
template <class T, class R>
void layer_norm_fwd(const LayerNormFwd&, const Executor&);
template <class T, class R>
void layer_norm_bwd(const LayerNormBwd&, const Executor&);

template <class T>
void cross_entropy_fwd(const CrossEntropyFwd&, const Executor&);
template <class T>
void cross_entropy_bwd(const CrossEntropyBwd&, const Executor&);
template <class T>
void cross_entropy_fwd_bwd(const CrossEntropyFwdBwd&, const Executor&);

}  // namespace cuda
}  // namespace gpt2
