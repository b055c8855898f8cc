// Replaces the part of libcudart that nvcc's host code calls, and PyTorch's CPU allocator.
//
// A launch calls Python with the kernel's name, its grid and its arguments. Python runs it on the
// emulator and returns the launch's error. Allocations are filled with a canary and recorded until
// they are freed, so the emulator knows all live buffers and detects uninitialized reads.

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace {

enum Error {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719,
};

struct Dim3 {
  unsigned x, y, z;
};

struct Function {
  std::string name;               // of the kernel, in the PTX
  int dynamic_shared = 48 << 10;  // limit for a launch: cudaFuncSetAttribute
};

struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};

// Runs a kernel; returns 0, or an error after calling emulator_fail.
using Launch = int (*)(const char* name, const unsigned* grid, const unsigned* block, void** args,
                       size_t shared);

struct Allocation {
  size_t nbytes;
  void* context = nullptr;  // context of the allocator below
  c10::DeleterFnPtr deleter = nullptr;
};

// Never destroyed: libraries are unregistered, tensors freed, after static destructors have run.
std::mutex& mutex = *new std::mutex;
auto& functions = *new std::map<const void*, Function>;  // host stub's address -> function
auto& allocations = *new std::map<uintptr_t, Allocation>;
auto& failure = *new std::string;
thread_local std::vector<Configuration> configurations;
thread_local int last_error = cudaSuccess;
Launch launch = nullptr;
c10::Allocator* below = nullptr;  // the previous allocator

constexpr int SHARED_OPTIN = 163 << 10, SHARED_SM = 164 << 10, THREADS_SM = 2048, BLOCKS_SM = 32;
constexpr uint16_t CANARY = 0x7FA5;  // as in memory.py

int error(int code) {
  if (code != cudaSuccess) last_error = code;
  return code;
}

// The record of an entry or of a kernel handle, which is the address of the record.
Function* find(const void* entry) {
  if (auto found = functions.find(entry); found != functions.end()) return &found->second;
  for (auto& [stub, function] : functions)
    if (&function == entry) return &function;
  return nullptr;
}

bool allocated(const void* data, size_t nbytes) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto address = reinterpret_cast<uintptr_t>(data);
  auto after = allocations.upper_bound(address);
  if (after == allocations.begin()) return false;
  const auto& [start, allocation] = *std::prev(after);
  return address + nbytes <= start + allocation.nbytes;
}

// Code that keeps bare pointers, such as oneDNN, frees them with the current allocator: a pointer
// may be null, or come from the allocator below.
void free_recorded(void* data) {
  Allocation allocation;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = allocations.find(reinterpret_cast<uintptr_t>(data));
    if (found != allocations.end() && found->second.deleter != nullptr) {
      allocation = found->second;
      allocations.erase(found);
    }
  }
  if (allocation.deleter != nullptr) {
    allocation.deleter(allocation.context);
  } else {
    below->raw_deallocate(data);
  }
}

// Once active it stays PyTorch's allocator, because recorded memory may be freed at any time.
struct Recorder final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    c10::DataPtr inner = below->allocate(nbytes);
    void* data = inner.get();
    if (data == nullptr || launch == nullptr) return inner;
    std::fill_n(static_cast<uint16_t*>(data), nbytes / 2, CANARY);
    const auto deleter = inner.get_deleter();
    const auto device = inner.device();
    {
      std::lock_guard<std::mutex> lock(mutex);
      allocations[reinterpret_cast<uintptr_t>(data)] = {nbytes, inner.release_context(), deleter};
    }
    return {data, data, &free_recorded, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_recorded; }
  void copy_data(void* to, const void* from, size_t n) const override {
    default_copy_data(to, from, n);
  }
};

Recorder& recorder = *new Recorder;

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

// For cuda_device.py

API void emulator_activate(Launch callback) {
  launch = callback;
  c10::Allocator* current = c10::GetCPUAllocator();
  if (current == &recorder) return;
  below = current;
  c10::SetCPUAllocator(&recorder, /*priority=*/255);
}

API void emulator_deactivate() {
  launch = nullptr;
}

API void emulator_fail(const char* text) {
  failure = text;
}

// Adds memory that was allocated earlier, or by numpy.
API void emulator_allow(uintptr_t address, size_t nbytes) {
  std::lock_guard<std::mutex> lock(mutex);
  if (allocations.count(address) == 0) allocations[address] = {nbytes};
}

API void emulator_forbid(uintptr_t address) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = allocations.find(address);
  if (found != allocations.end() && found->second.deleter == nullptr) allocations.erase(found);
}

// Writes up to `room` pairs of address and bytes; returns how many there are.
API size_t emulator_allocations(uint64_t* pairs, size_t room) {
  std::lock_guard<std::mutex> lock(mutex);
  size_t i = 0;
  for (const auto& [address, allocation] : allocations) {
    if (i == room) break;
    pairs[2 * i] = address;
    pairs[2 * i + 1] = allocation.nbytes;
    ++i;
  }
  return allocations.size();
}

// Functions that nvcc's host code calls

API void** __cudaRegisterFatBinary(void*) {
  return new void*[1]();
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) {
  return 1;
}

API void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*,
                                void*, void*, void*, int*) {
  std::lock_guard<std::mutex> lock(mutex);
  functions[stub] = {name};
}

// Device variables are in the PTX's module, which host code cannot access here.
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

API unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

API int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void** stream) {
  if (configurations.empty()) return error(cudaErrorInvalidConfiguration);
  const Configuration top = configurations.back();
  configurations.pop_back();
  *grid = top.grid, *block = top.block, *shared = top.shared, *stream = top.stream;
  return cudaSuccess;
}

API int cudaLaunchKernel(const void* entry, Dim3 grid, Dim3 block, void** args, size_t shared,
                         void*) {
  const Function* function = find(entry);
  if (function == nullptr) return error(cudaErrorInvalidDeviceFunction);
  if (launch == nullptr) return error(cudaErrorNoDevice);
  if (shared > static_cast<size_t>(function->dynamic_shared)) return error(cudaErrorInvalidValue);
  const unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  const unsigned most[] = {2147483647, 65535, 65535, 1024, 1024, 64};
  for (int i = 0; i < 6; ++i)
    if (sizes[i] == 0 || sizes[i] > most[i]) return error(cudaErrorInvalidConfiguration);
  return error(launch(function->name.c_str(), sizes, sizes + 3, args, shared));
}

API int __cudaGetKernel(void** handle, const void* entry) {
  *handle = find(entry);
  return error(*handle == nullptr ? cudaErrorInvalidDeviceFunction : cudaSuccess);
}

API int __cudaLaunchKernel(void* handle, Dim3 grid, Dim3 block, void** args, size_t shared,
                           void* stream) {
  return cudaLaunchKernel(handle, grid, block, args, shared, stream);
}

// Functions that launchers call

API int cudaGetLastError() {
  return std::exchange(last_error, cudaSuccess);
}
API int cudaPeekAtLastError() {
  return last_error;
}

API const char* cudaGetErrorName(int code) {
  switch (code) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "cudaErrorUnknown";
}

API const char* cudaGetErrorString(int code) {
  return code == cudaErrorLaunchFailure ? failure.c_str() : cudaGetErrorName(code);
}

API int cudaFuncSetAttribute(const void* entry, int attribute, int value) {
  Function* function = find(entry);
  if (function == nullptr) return error(cudaErrorInvalidDeviceFunction);
  constexpr int MAX_DYNAMIC_SHARED = 8, PREFERRED_CARVEOUT = 9;
  if (attribute == PREFERRED_CARVEOUT) return cudaSuccess;
  if (attribute != MAX_DYNAMIC_SHARED || value < 0 || value > SHARED_OPTIN)
    return error(cudaErrorInvalidValue);
  function->dynamic_shared = value;
  return cudaSuccess;
}

API int cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

API int cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

API int cudaSetDevice(int device) {
  return error(device == 0 ? cudaSuccess : cudaErrorInvalidValue);
}

API int cudaDeviceGetAttribute(int* value, int attribute, int) {
  static const std::map<int, int> a100 = {
      {1, 1024},           // threads of a block
      {2, 1024},           // block, x
      {3, 1024},           // block, y
      {4, 64},             // block, z
      {5, 2147483647},     // grid, x
      {6, 65535},          // grid, y
      {7, 65535},          // grid, z
      {8, 48 << 10},       // shared memory of a block
      {10, 32},            // warp size
      {12, 65536},         // registers of a block
      {16, 108},           // multiprocessors
      {38, 40 << 20},      // L2
      {39, THREADS_SM},    // threads of a multiprocessor
      {75, 8},             // compute capability, major
      {76, 0},             // minor
      {81, SHARED_SM},     // shared memory of a multiprocessor
      {97, SHARED_OPTIN},  // of a block, opt-in
      {106, BLOCKS_SM},    // blocks of a multiprocessor
  };
  const auto found = a100.find(attribute);
  if (found == a100.end()) return error(cudaErrorInvalidValue);
  *value = found->second;
  return cudaSuccess;
}

// Limited by threads and shared memory; ptxas decides registers.
API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* entry,
                                                               int threads, size_t shared,
                                                               unsigned) {
  if (find(entry) == nullptr) return error(cudaErrorInvalidDeviceFunction);
  if (threads < 1 || threads > 1024) return error(cudaErrorInvalidValue);
  const size_t reserved = 1 << 10;  // shared memory of each block that the system uses
  *blocks = static_cast<int>(std::min<size_t>(
      {size_t(BLOCKS_SM), size_t(THREADS_SM / threads), SHARED_SM / (shared + reserved)}));
  return cudaSuccess;
}

API int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* entry, int threads,
                                                      size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, entry, threads, shared, 0);
}

API int cudaMemsetAsync(void* data, int value, size_t nbytes, void*) {
  if (!allocated(data, nbytes)) return error(cudaErrorIllegalAddress);
  std::memset(data, value, nbytes);
  return cudaSuccess;
}

API int cudaMemcpyAsync(void* to, const void* from, size_t nbytes, int kind, void*) {
  const bool to_device = kind == 1 || kind == 3, from_device = kind == 2 || kind == 3;
  if ((to_device && !allocated(to, nbytes)) || (from_device && !allocated(from, nbytes)))
    return error(cudaErrorIllegalAddress);
  std::memmove(to, from, nbytes);
  return cudaSuccess;
}

API int cudaStreamIsCapturing(void*, int* status) {
  return *status = cudaSuccess;
}

API int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  return *stream = nullptr, 0;
}
