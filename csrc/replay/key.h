// What a recorded call depends on, as a list of words.
#pragma once

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstring>
#include <optional>
#include <unordered_map>

#include "python.h"

namespace gpt2 {

// A function of recording.py, set once.
inline PyObject* precision;

struct Key {
  std::vector<int64_t> words;
  Key() { words.reserve(192); }
  bool operator==(const Key&) const = default;

  void add(int64_t word) { words.push_back(word); }

  // What float32 products on a GPU depend on, if x is such a tensor.
  bool add_precision(const at::Tensor& x) {
    if (!x.is_cuda() || x.scalar_type() != at::kFloat) return true;
    return add_constant(call(precision, {}).get());
  }

  // The state of this thread that operators or our own code depend on. False if a mode, a transform
  // or a tracer is active, which must see every operator; and if another device is current.
  bool add_state(c10::Device device) {
    constexpr c10::DispatchKeySet kUsual = c10::default_included_set;
    const auto state = c10::impl::tls_local_dispatch_key_set();
    if (state.included_ != kUsual || at::impl::torch_function_mode_enabled()) return false;
    // A launch is for the current GPU.
    if (device.is_cuda() && c10::impl::VirtualGuardImpl(device.type()).getDevice() != device) {
      return false;
    }
    add(at::GradMode::is_enabled());
    const bool autocasting = at::autocast::is_autocast_enabled(device.type());
    add(autocasting ? int64_t(at::autocast::get_autocast_dtype(device.type())) : -1);
    add(at::globalContext().userEnabledMkldnn());
    return true;
  }

  // False for a tensor that is more than memory with sizes and strides.
  bool add_tensor(const at::Tensor& x) {
    using c10::DispatchKey;
    static const c10::DispatchKeySet usual(
        {DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA,
         DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
    if ((x.key_set() | usual) != usual || x.is_inference() || !x.has_storage()) return false;
    const auto* autograd = torch::autograd::impl::get_autograd_meta(x);
    if (autograd && autograd->fw_grad_) return false;  // forward-mode differentiation
    constexpr int64_t kAligned = 16;                   // what Triton compiles for
    const auto address = reinterpret_cast<int64_t>(x.const_data_ptr());
    add(int64_t(x.scalar_type()) | int64_t(x.requires_grad()) << 8 | (address % kAligned) << 16 |
        int64_t(x.dim()) << 24 | int64_t(x.device().type()) << 32 |
        int64_t(x.device().index()) << 40);
    for (const int64_t size : x.sizes()) add(size);
    for (const int64_t stride : x.strides()) add(stride);
    return true;
  }

  // Which tensors are the same one. A recording cannot tell such arguments apart.
  void add_repeats(const std::vector<at::Tensor>& tensors) {
    for (size_t i = 0; i < tensors.size(); i++) {
      for (size_t j = 0; j < i; j++) {
        if (tensors[i].defined() && tensors[i].is_same(tensors[j])) add(int64_t(i << 32 | j));
      }
    }
  }

  // False for a value that is neither None nor a number nor a short text.
  bool add_constant(PyObject* value) {
    enum : int64_t { kNone, kBool, kInt, kFloat, kText };
    if (value == Py_None) {
      add(kNone);
    } else if (PyBool_Check(value)) {
      add(kBool);
      add(value == Py_True);
    } else if (PyLong_CheckExact(value)) {
      int overflow = 0;
      const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
      if (overflow) return false;
      add(kInt);
      add(number);
    } else if (PyFloat_CheckExact(value)) {
      const double number = PyFloat_AS_DOUBLE(value);
      int64_t bits;
      std::memcpy(&bits, &number, sizeof bits);
      add(kFloat);
      add(bits);
    } else if (PyUnicode_CheckExact(value)) {
      Py_ssize_t length;
      const char* text = PyUnicode_AsUTF8AndSize(value, &length);
      if (!text) {
        PyErr_Clear();
        return false;
      }
      add(kText | length << 8);
      for (Py_ssize_t i = 0; i < length; i += sizeof(int64_t)) {
        int64_t word = 0;
        std::memcpy(&word, text + i, std::min<size_t>(sizeof word, length - i));
        add(word);
      }
    } else {
      return false;
    }
    return true;
  }
};

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = key.words.size();
    for (const int64_t word : key.words) {
      hash = (hash ^ uint64_t(word)) * 0x9e3779b97f4a7c15ull;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

}  // namespace gpt2
