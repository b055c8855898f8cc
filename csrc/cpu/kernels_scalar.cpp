// One lane, no instruction set: any CPU, and float64.
#define GPT2_ISA scalar
#include "fill_ops.h"
#include "vec.h"

namespace gpt2 {

const Kernels& kernels_scalar() {
  using namespace scalar;
  static constexpr Kernels table = {{&ops<Vec<float>, float>, &ops<Vec<float>, bf16>,
                                     &ops<Vec<float>, f16>, &ops<Vec<double>, double>}};
  return table;
}

}  // namespace gpt2
