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
int64_t attention_fwd(const Attention&, void* o, void* lse, void* workspace, const Executor&);
template <class T>
int64_t attention_bwd(const Attention&, View dout, const void* o, const void* lse, OutView dq,
                      OutView dk, OutView dv, void* workspace, const Executor&);
template <class T>
int64_t decode_attention(const DecodeAttention&, void* o, void* workspace, const Executor&);

template <class T>
void gelu_fwd(const void* x, void* y, int64_t n, const Executor&);
template <class T>
void gelu_bwd(const void* dy, const void* x, void* dx, int64_t n, const Executor&);
template <class T>
void bias_gelu_fwd(const void* x, const void* bias, void* y, int64_t N, int64_t C, const Executor&);
template <class T>
void bias_gelu_bwd(const void* dy, const void* x, const void* bias, void* dx, void* dbias,
                   void* partial, int64_t N, int64_t C, const Executor&);

// R is T, or float: the mixed form.
template <class T, class R>
void layer_norm_fwd(const void* x, const void* residual, const void* weight, const void* bias,
                    double eps, void* y, void* s, void* stats, int64_t N, int64_t C,
                    const Executor&);
template <class T, class R>
void layer_norm_bwd(const void* dy, const void* ds, const void* s, const void* weight,
                    const void* stats, void* dx, void* dresidual, void* dparams, void* partial,
                    int64_t N, int64_t C, const Executor&);

template <class T>
void cross_entropy_fwd(const LogitsRows&, const void* logits, void* losses, void* stats,
                       const Executor&);
template <class T>
void cross_entropy_bwd(const LogitsRows&, const void* dlosses, const void* logits,
                       const void* stats, void* dlogits, int64_t dlogits_stride, const Executor&);
template <class T>
void cross_entropy_fwd_bwd(const LogitsRows&, void* logits, int64_t V_padded, void* losses,
                           const Executor&);

}  // namespace cuda
}  // namespace gpt2
