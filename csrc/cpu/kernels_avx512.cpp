#define GPT2_ISA avx512
#include "vec_avx512.h"

#include "fill_ops.h"

namespace gpt2 {

const Kernels& kernels_avx512() {
  using namespace avx512;
  static constexpr Kernels table = {
      {&ops<Vec16, float>, &ops<Vec16, bf16>, &ops<Vec16, f16>, nullptr}};
  return table;
}

}  // namespace gpt2
