// A program: the work of one call, as a list of steps on numbered tensors, the slots.
//
// The first slots are the inputs. A step reads slots and fills new ones. A slot is emptied after
// the last step that reads it, so a program holds no tensor longer than the code that it was
// recorded from.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <memory>

#include "python.h"

namespace gpt2 {

using Slots = std::vector<at::Tensor>;
constexpr int kNone = -1;  // in place of a slot: None

struct Step {
  std::vector<int> reads, writes;  // slots; writes may hold kNone
  std::vector<int> ends;           // slots that nothing needs after this step
  virtual ~Step() = default;
  // Runs with the GIL if needs_python.
  virtual void run(Slots& slots) const = 0;
  virtual bool needs_python() const { return true; }
  virtual bool launches() const { return false; }  // kernels by Triton
};

struct Program {
  int inputs = 0, slots = 0;
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<int> results;  // slots or kNone
  bool needs_python = false, launches = false;

  // Fills in what follows from the steps.
  void finish() {
    std::vector<bool> read_later(slots, false);
    for (int slot : results) {
      if (slot != kNone) read_later[slot] = true;
    }
    for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
      for (const auto* used : {&(*step)->writes, &(*step)->reads}) {
        for (int slot : *used) {
          if (slot == kNone || read_later[slot]) continue;
          (*step)->ends.push_back(slot);
          read_later[slot] = used == &(*step)->reads;
        }
      }
      needs_python |= (*step)->needs_python();
      launches |= (*step)->launches();
    }
  }

  // The results, for the inputs. Holds the GIL only if a step needs it.
  std::vector<at::Tensor> run(Slots given) const {
    given.resize(slots);
    if (!needs_python && PyGILState_Check()) {
      pybind11::gil_scoped_release no_gil;
      run_steps(given);
    } else {
      run_steps(given);
    }
    std::vector<at::Tensor> found(results.size());
    // A tensor that is a result twice is copied first and moved last: autograd adds to a gradient
    // in place only if nothing else refers to it.
    for (size_t i = results.size(); i-- > 0;) {
      const int slot = results[i];
      if (slot == kNone) continue;
      bool again = false;
      for (size_t j = 0; j < i; j++) again |= results[j] == slot;
      found[i] = again ? given[slot] : std::move(given[slot]);
    }
    return found;
  }

 private:
  void run_steps(Slots& given) const {
    for (const auto& step : steps) {
      step->run(given);
      for (int slot : step->ends) given[slot].reset();
    }
  }
};

// An operator of the dispatcher.
struct Call final : Step {
  struct Argument {
    size_t position;
    std::vector<int> slots;  // one, or those of a list
    bool is_list;
  };
  c10::OperatorHandle op;
  std::vector<c10::IValue> stack;  // the arguments, with gaps for the tensors
  std::vector<Argument> tensors;   // writes are the results', those of a list in its place

  explicit Call(c10::OperatorHandle op) : op(std::move(op)) {}
  bool needs_python() const override { return false; }

  void run(Slots& slots) const override {
    std::vector<c10::IValue> arguments = stack;
    for (const Argument& argument : tensors) {
      if (!argument.is_list) {
        arguments[argument.position] = slots[argument.slots[0]];
        continue;
      }
      c10::List<at::Tensor> list;
      list.reserve(argument.slots.size());
      for (int slot : argument.slots) list.push_back(slots[slot]);
      arguments[argument.position] = std::move(list);
    }
    op.callBoxed(arguments);
    size_t next = 0;
    const auto keep = [&](at::Tensor tensor) {
      const int slot = writes.at(next++);
      if (slot != kNone) slots[slot] = std::move(tensor);
    };
    for (c10::IValue& result : arguments) {
      if (result.isTensor()) {
        keep(std::move(result).toTensor());
      } else if (result.isTensorList()) {
        for (const at::Tensor& tensor : result.toTensorVector()) keep(tensor);
      }
    }
  }
};

// A Python function that returns nothing.
struct PythonCall : Step {
  Object function;
  std::vector<Object> constants;                // the arguments, with gaps for the tensors
  std::vector<std::pair<size_t, int>> tensors;  // (position, slot)

  void run(Slots& slots) const override {
    std::vector<PyObject*> arguments;
    for (const Object& constant : constants) arguments.push_back(constant.get());
    std::vector<Object> wrapped;
    for (const auto& [position, slot] : tensors) {
      wrapped.push_back(Object::checked(THPVariable_Wrap(slots[slot])));
      arguments[position] = wrapped.back().get();
    }
    call(function.get(), arguments);
  }
};

// A check of token ids: Python is called if an id on a CPU lies outside [low, size), or on a GPU,
// where the host cannot read it.
struct Check final : PythonCall {
  int64_t low = 0, size = 0;

  void run(Slots& slots) const override {
    const at::Tensor& ids = slots[tensors.at(0).second];
    if (!ids.is_cpu() || !ids.is_contiguous()) return PythonCall::run(slots);
    const int64_t* data = ids.const_data_ptr<int64_t>();
    bool inside = true;
    for (int64_t i = 0; i < ids.numel(); i++) inside &= low <= data[i] && data[i] < size;
    if (!inside) PythonCall::run(slots);
  }
};

inline PyObject* hooked;  // launch.py: whether something wants to be called at each launch

// The Python code calls such a hook, and a replay would not.
inline bool is_hooked() {
  const Object found = hooked ? call(hooked, {}) : Object();
  return found.get() == Py_True;
}

// A compiled Triton kernel. Its launcher takes addresses in place of tensors.
struct Launch final : Step {
  struct Pointer {
    size_t position;
    int slot;
    Object rest;  // of a tuple that starts with the pointer, else empty
  };
  static constexpr size_t kStream = 3;  // after the grid
  Object launcher, stream_of, device;
  std::vector<Object> constants;  // the arguments, with gaps for the pointers and the stream
  std::vector<Pointer> pointers;

  bool launches() const override { return true; }

  void run(Slots& slots) const override {
    std::vector<PyObject*> arguments;
    for (const Object& constant : constants) arguments.push_back(constant.get());
    const Object stream = call(stream_of.get(), {device.get()});
    arguments[kStream] = stream.get();
    std::vector<Object> built;
    for (const Pointer& pointer : pointers) {
      Object address = Object::checked(PyLong_FromVoidPtr(slots[pointer.slot].data_ptr()));
      if (PyObject* rest = pointer.rest.get()) {
        const Py_ssize_t n = PyTuple_GET_SIZE(rest);
        Object tuple = Object::checked(PyTuple_New(n + 1));
        PyTuple_SET_ITEM(tuple.get(), 0, address.release());
        for (Py_ssize_t i = 0; i < n; i++) {
          PyTuple_SET_ITEM(tuple.get(), i + 1, Py_NewRef(PyTuple_GET_ITEM(rest, i)));
        }
        address = std::move(tuple);
      }
      built.push_back(std::move(address));
      arguments[pointer.position] = built.back().get();
    }
    call(launcher.get(), arguments);
  }
};

}  // namespace gpt2
