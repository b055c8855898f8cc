// The CPU library's part of ops.h: which instruction set runs here, on whose threads.
#include "../ops/ops.h"

#ifdef __linux__
#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <atomic>
#include <string>

namespace gpt2 {
namespace {

struct Isa {
  const char* name;
  const Kernels& (*kernels)();
  bool (*runs_here)();
  bool (*is_fast)() = [] { return true; };  // else it is used only if it is asked for
};

#ifdef GPT2_KERNELS_PORTABLE
const Isa kIsas[] = {{"scalar", kernels_scalar, [] { return true; }}};
#else
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

#ifdef GPT2_KERNELS_EMULATED  // the tests' stand-in for the instructions: tests/tools/avx512
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

bool has_avx512() {
  if (kEmulated) return has_avx2();
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const Isa kIsas[] = {
    // fastest first
    // A product of bfloat16 pairs takes as long as one of floats on AMD's Zen 4, and so long on an
    // Intel Xeon with AMX that attention is 1.5 times as fast without (docs/log.md).
    {"avx512_bf16", kernels_avx512_bf16,
     [] { return has_avx512() && (kEmulated || __builtin_cpu_supports("avx512bf16")); },
     [] { return kEmulated || !__builtin_cpu_is("intel"); }},
    {"avx512", kernels_avx512, has_avx512},
    {"avx2", kernels_avx2, has_avx2},
    {"scalar", kernels_scalar, [] { return true; }},
};
#endif

const Isa* fastest() {
  for (const Isa& isa : kIsas) {
    if (isa.runs_here() && isa.is_fast()) return &isa;
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

// A forked child has no OpenMP threads, and OpenMP would wait for them forever. So if this process
// used threads before the fork, the child uses only its own thread.
std::atomic<bool> used_threads{false}, lost_threads{false};
#ifdef __linux__
[[maybe_unused]] const int at_fork =
    pthread_atfork(nullptr, nullptr, [] { lost_threads = used_threads.load(); });
#endif

Executor here(const Tensor&) {
  if (lost_threads) {
    return {1,
            [](int64_t n, int64_t, void (*f)(const void*, int64_t, int64_t), const void* context) {
              if (n > 0) f(context, 0, n);
            }};
  }
  const int64_t count = torch::stable::get_num_threads();
  if (count > 1) used_threads = true;
  return {count, [](int64_t n, int64_t grain, void (*f)(const void*, int64_t, int64_t),
                    const void* context) {
            torch::stable::parallel_for(
                0, n, grain, [=](int64_t begin, int64_t end) { f(context, begin, end); });
          }};
}

void advise_huge_pages(Tensor& x) {
#ifdef __linux__
  constexpr uint64_t kHuge = 2 << 20, kOwnMapping = 32 << 20;  // glibc's largest mmap threshold
  const uint64_t bytes = x.numel() * x.element_size();
  if (bytes < kOwnMapping) return;
  const uint64_t begin = reinterpret_cast<uint64_t>(x.mutable_data_ptr());
  const uint64_t first = (begin + kHuge - 1) / kHuge * kHuge,
                 last = (begin + bytes) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

#ifdef __linux__
namespace {

// Whether the page of a byte can be made writable, as the first write to it would. Nothing changes.
bool is_writable(const char* byte) {
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack
  const uint64_t page = sysconf(_SC_PAGESIZE);
  const uint64_t start = reinterpret_cast<uint64_t>(byte) / page * page;
  const int result = madvise(reinterpret_cast<void*>(start), page, kPopulateWrite);
  return result == 0 || (errno != EINVAL && errno != EFAULT);
}

}  // namespace
#endif

void check_writable(const char* name, void* begin, int64_t bytes) {
#ifdef __linux__
  static const bool known = [] {
    const char own = 0;
    return is_writable(&own);
  }();
  const char* first = static_cast<const char*>(begin);
  STD_TORCH_CHECK(!known || (is_writable(first) && is_writable(first + bytes - 1)), name,
                  " must be writable, got memory that is mapped read-only");
#endif
}

}  // namespace gpt2

GPT2_KERNELS_LIBRARY_FRAGMENT(m) {
  m.def("isa() -> str");
  m.def("isas() -> str");
  m.def("use_isa(str name) -> ()");
}

GPT2_KERNELS_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&gpt2::isa));
  m.impl("isas", TORCH_BOX(&gpt2::isas));
  m.impl("use_isa", TORCH_BOX(&gpt2::use_isa));
}
