// The table of kernels.h over one vector type: included last, by kernels_<instruction set>.cpp.
#pragma once

#include "attention.h"
#include "attention_bwd.h"
#include "cross_entropy.h"
#include "decode_attention.h"
#include "gelu.h"
#include "layer_norm.h"
#include "linear.h"

namespace gpt2::GPT2_ISA {

// Four vectors a step for loops over rows: enough independent work to hide the latency of each.
template <class V>
using Rows = VecPair<VecPair<V>>;

template <class V, class T>
inline constexpr Ops ops = {
    .attention_fwd = attention_fwd<typename ProductsOf<V, T>::type, T>,
    .attention_bwd = attention_bwd<typename ProductsOf<V, T>::type, T>,
    .decode_attention = decode_attention<V, T>,
    .linear = linear<V, T, T>,
    .linear_int8 = linear<V, T, int8_t>,
    .gelu_fwd = gelu_fwd<Rows<V>, T>,
    .gelu_bwd = gelu_bwd<Rows<V>, T>,
    .bias_gelu_fwd = bias_gelu_fwd<Rows<V>, T>,
    .bias_gelu_bwd = bias_gelu_bwd<Rows<V>, T>,
    .layer_norm_fwd = layer_norm_fwd<Rows<V>, T, T>,
    .mixed_layer_norm_fwd = layer_norm_fwd<Rows<V>, T, typename V::scalar>,
    .layer_norm_bwd = layer_norm_bwd<Rows<V>, T, T>,
    .mixed_layer_norm_bwd = layer_norm_bwd<Rows<V>, T, typename V::scalar>,
    .cross_entropy_fwd = cross_entropy_fwd<Rows<V>, T>,
    .cross_entropy_bwd = cross_entropy_bwd<Rows<V>, T>,
    .cross_entropy_fwd_bwd = cross_entropy_fwd_bwd<Rows<V>, T>,
};

}  // namespace gpt2::GPT2_ISA
