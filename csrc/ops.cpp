// The operators over rows and elements, and the choice of the instruction set.
#include "ops.h"

#include <atomic>
#include <cstdlib>
#include <string>

namespace gpt2 {
namespace {

struct Isa {
  const char* name;
  const Kernels& (*kernels)();
  bool (*runs_here)();
};

#ifdef GPT2_KERNELS_PORTABLE
const Isa kIsas[] = {{"scalar", kernels_scalar, [] { return true; }}};
#else
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const Isa kIsas[] = {
    // fastest first
    {"avx512_bf16", kernels_avx512_bf16,
     [] { return has_avx512() && __builtin_cpu_supports("avx512bf16") != 0; }},
    {"avx512", kernels_avx512, has_avx512},
    {"avx2", kernels_avx2, has_avx2},
    {"scalar", kernels_scalar, [] { return true; }},
};
#endif

const Isa* fastest() {
  for (const Isa& isa : kIsas) {
    if (isa.runs_here()) return &isa;
  }
  return nullptr;
}

std::atomic<const Isa*> chosen{fastest()};

// The instruction set in use.
std::string isa() {
  return chosen.load()->name;
}

// All of this build that run on this machine, fastest first, separated by spaces.
std::string isas() {
  std::string names;
  for (const Isa& isa : kIsas) {
    if (isa.runs_here()) names += (names.empty() ? "" : " ") + std::string(isa.name);
  }
  return names;
}

void use_isa(std::string name) {
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.runs_here()) {
      chosen = &isa;
      return;
    }
  }
  STD_TORCH_CHECK(false, "the instruction set must be one of ", isas(), ", got ", name);
}

Tensor gelu_fwd(Tensor x_) {
  const Tensor x = torch::stable::contiguous(x_);
  Tensor y = torch::stable::empty_like(x);
  ops_for(x).gelu_fwd(x.const_data_ptr(), y.mutable_data_ptr(), x.numel(), threads());
  return y;
}

}  // namespace

const Ops& ops_for(const Tensor& x) {
  const Kernels& kernels = chosen.load()->kernels();
  const Ops* ops = nullptr;
  switch (x.scalar_type()) {
    case ScalarType::Float: ops = kernels.of[kFloat32]; break;
    case ScalarType::BFloat16: ops = kernels.of[kBFloat16]; break;
    case ScalarType::Half: ops = kernels.of[kFloat16]; break;
    case ScalarType::Double: ops = kernels.of[kFloat64]; break;
    default: break;
  }
  STD_TORCH_CHECK(ops != nullptr, "no ", isa(), " kernel for this dtype");
  return *ops;
}

Threads threads() {
  return {
      int64_t(torch::stable::get_num_threads()),
      [](int64_t n, int64_t grain, void (*f)(const void*, int64_t, int64_t), const void* context) {
        torch::stable::parallel_for(0, n, grain,
                                    [=](int64_t begin, int64_t end) { f(context, begin, end); });
      }};
}

}  // namespace gpt2

STABLE_TORCH_LIBRARY(gpt2_kernels_cpu, m) {
  m.def("isa() -> str");
  m.def("isas() -> str");
  m.def("use_isa(str name) -> ()");
  m.def("gelu_fwd(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gpt2_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&gpt2::isa));
  m.impl("isas", TORCH_BOX(&gpt2::isas));
  m.impl("use_isa", TORCH_BOX(&gpt2::use_isa));
}

STABLE_TORCH_LIBRARY_IMPL(gpt2_kernels_cpu, CPU, m) {
  m.impl("gelu_fwd", TORCH_BOX(&gpt2::gelu_fwd));
}
