#define GPT2_ISA avx2
#include "vec_avx2.h"

#include "fill_ops.h"

namespace gpt2 {

const Kernels& kernels_avx2() {
  using namespace avx2;
  static constexpr Kernels table = {
      {&ops<Vec8, float>, &ops<Vec8, bf16>, &ops<Vec8, f16>, nullptr}};
  return table;
}

}  // namespace gpt2
