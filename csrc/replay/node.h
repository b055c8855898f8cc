// A recorded autograd function: the program of its forward, and those of its backward.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <mutex>

#include "key.h"
#include "program.h"

namespace gpt2 {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using NodePtr = decltype(torch::autograd::Edge::function);

// A node's own kind of pointer: PyTorch has counted nodes in two ways.
template <class T, class Pointer = NodePtr, class... Args>
Pointer make_node(Args&&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return Pointer(new T(std::forward<Args>(args)...), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(std::forward<Args>(args)...);
  }
}

template <class T, class Pointer = NodePtr>
Pointer pointer_to(T* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return node->getptr();
  } else {
    return Pointer::reclaim_copy(node);
  }
}

// Operators that a recording names are those that PyTorch reached after autograd and autocast.
struct BelowAutograd {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard below_autocast{c10::autocast_dispatch_keyset};
  at::NoGradGuard no_grad;
};

struct Function {
  std::string name;
  std::shared_ptr<Program> forward;  // its results: the outputs, then what the backward needs
  size_t outputs = 0;
  bool uses_sums = false;  // whether the backward asks for attached sums
  Object backward_of;      // recorder.py: runs the backward in Python, and records it
  struct Backward {
    std::shared_ptr<Program> program;
    int tries = 0;  // to record it
  };
  std::unordered_map<Key, Backward, Hash> backwards;  // guarded by the GIL
  static constexpr size_t kMost = 64;
  static constexpr int kTries = 3;
};

// The sum over rows that a norm's backward has attached to its result (recorder.py), or undefined.
inline at::Tensor attached_sum(const at::Tensor& x) {
  static PyObject* const name = PyUnicode_InternFromString("column_sum");
  const Object wrapped = Object::checked(THPVariable_Wrap(x));
#if PY_VERSION_HEX >= 0x030d0000
  PyObject* found = nullptr;
  PyObject_GetOptionalAttr(wrapped.get(), name, &found);
#else
  PyObject* found = nullptr;
  _PyObject_LookupAttr(wrapped.get(), name, &found);
#endif
  if (!found) {
    PyErr_Clear();
    return {};
  }
  const Object pair(found);
  const int64_t version = PyLong_AsLongLong(PyTuple_GetItem(pair.get(), 0));
  if (version != int64_t(x._version())) return {};
  return THPVariable_Unpack(PyTuple_GetItem(pair.get(), 1));
}

class Replayed final : public Node {
 public:
  explicit Replayed(std::shared_ptr<Function> function) : function_(std::move(function)) {}

  std::string name() const override { return function_->name; }

  // tensors are the results of the forward.
  void save(const std::vector<at::Tensor>& tensors) {
    const size_t outputs = function_->outputs;
    for (size_t i = outputs; i < tensors.size(); i++) {
      bool is_output = false;
      for (size_t j = 0; j < outputs; j++) is_output |= tensors[i].is_same(tensors[j]);
      saved_->emplace_back(tensors[i], is_output);
    }
  }

  void release_variables() override {
    Saved freed;  // after the lock: hooks of saved tensors may run Python code
    const std::lock_guard<std::mutex> lock(mutex_);
    std::swap(freed, saved_);
  }

  variable_list apply(variable_list&& grads) override {
    const Gil gil;
    std::vector<at::Tensor> saved = unpack();
    uint64_t needs = 0;
    for (size_t i = 0; i < num_outputs(); i++) {
      needs |= uint64_t(task_should_compute_output(i)) << i;
    }
    for (size_t i = 0; i < grads.size(); i++) {
      if (!grads[i].defined()) grads[i] = input_metadata(i).zeros_like();
    }
    Slots inputs;
    inputs.reserve(2 * grads.size() + saved.size());
    inputs.insert(inputs.end(), grads.begin(), grads.end());
    inputs.insert(inputs.end(), saved.begin(), saved.end());
    Key key;
    bool known = !at::GradMode::is_enabled() && !grads.empty() &&
                 key.add_state(grads[0].device()) && key.add_precision(grads[0]);
    key.add(int64_t(needs));
    key.add_repeats(inputs);
    for (const at::Tensor& tensor : saved) {  // a hook may have changed their strides
      known = known && (!tensor.defined() || key.add_tensor(tensor));
    }
    for (const at::Tensor& grad : grads) {
      known = known && key.add_tensor(grad);
      at::Tensor sum;
      if (known && function_->uses_sums) sum = attached_sum(grad);
      key.add(sum.defined());
      inputs.push_back(std::move(sum));
    }
    if (known) {
      const auto entry = function_->backwards.find(key);
      const bool found = entry != function_->backwards.end() && entry->second.program;
      if (found && !(entry->second.program->launches && is_hooked())) {
        const std::shared_ptr<Program> program = entry->second.program;
        grads.clear();
        saved.clear();
        const BelowAutograd below;
        return program->run(std::move(inputs));
      }
    }
    return in_python(grads, saved, needs, known ? &key : nullptr);
  }

 private:
  std::vector<at::Tensor> unpack() {
    Saved saved;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      saved = saved_;
    }
    TORCH_CHECK(saved, torch::autograd::ERR_BACKWARD_TWICE);
    std::vector<at::Tensor> found;
    found.reserve(saved->size());
    for (const SavedVariable& each : *saved) found.push_back(each.unpack(pointer_to(this)));
    return found;
  }

  // key is null if this backward cannot be recorded.
  variable_list in_python(const variable_list& grads, const variable_list& saved, uint64_t needs,
                          const Key* key);

  const std::shared_ptr<Function> function_;
  using Saved = std::shared_ptr<std::vector<SavedVariable>>;
  Saved saved_ = std::make_shared<std::vector<SavedVariable>>();  // null: freed by a backward
  std::mutex mutex_;                                              // of saved_
};

}  // namespace gpt2
