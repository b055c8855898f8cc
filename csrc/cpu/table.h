// The table of kernels.h over one vector type: included last, by kernels_<instruction set>.cpp.
#pragma once

#include "gelu.h"

namespace gpt2::GPT2_ISA {

template <class V, class T>
inline constexpr Ops ops = {
    .attention_fwd = nullptr,
    .attention_bwd = nullptr,
    .gelu_fwd = gelu_fwd<V, T>,
    .gelu_bwd = nullptr,
};

}  // namespace gpt2::GPT2_ISA
