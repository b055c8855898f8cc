// Replays recorded calls. kernels/recording.py says when calls are recorded, recorder.py how.
#include <ATen/ScalarOps.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include "node.h"

namespace gpt2 {
namespace {

namespace py = pybind11;

// ---- a recorded autograd function

// Applies a function to slots: its forward, and a node for its backward.
struct Apply final : Step {
  std::shared_ptr<Function> function;
  std::vector<int> inputs;

  bool needs_python() const override { return function->forward->needs_python; }
  bool launches() const override { return function->forward->launches; }

  void run(Slots& slots) const override {
    Slots given;
    given.reserve(inputs.size());
    for (int slot : inputs) given.push_back(slots[slot]);
    NodePtr node = make_node<Replayed>(function);
    node->set_next_edges(torch::autograd::collect_next_edges(given));
    variable_list found;
    {
      const BelowAutograd below;
      found = function->forward->run(std::move(given));
    }
    for (size_t i = 0; i < function->outputs; i++) {
      torch::autograd::set_history(found[i], node);
      slots[writes[i]] = found[i];
    }
    static_cast<Replayed*>(node.get())->save(found);
  }
};

py::object wrap(const at::Tensor& x) {
  if (!x.defined()) return py::none();
  return py::reinterpret_steal<py::object>(Object::checked(THPVariable_Wrap(x)).release());
}

py::tuple wrap_all(const variable_list& tensors) {
  py::tuple all(tensors.size());
  for (size_t i = 0; i < tensors.size(); i++) all[i] = wrap(tensors[i]);
  return all;
}

}  // namespace

variable_list Replayed::in_python(const variable_list& grads, const variable_list& saved,
                                  uint64_t needs, const Key* key) {
  auto& backwards = function_->backwards;
  if (key && backwards.size() >= Function::kMost) backwards.clear();
  const bool record = key && backwards[*key].tries++ < Function::kTries;
  const auto function = py::reinterpret_borrow<py::object>(function_->backward_of.get());
  const py::tuple found = function(wrap_all(grads), wrap_all(saved), needs, record);
  const py::tuple gradients = found[0];
  if (record && !found[1].is_none()) {
    backwards[*key].program = found[1].cast<std::shared_ptr<Program>>();
  }
  variable_list all;
  for (const py::handle gradient : gradients) {
    all.push_back(gradient.is_none() ? at::Tensor() : THPVariable_Unpack(gradient.ptr()));
  }
  return all;
}

namespace {

// ---- programs, from what recorder.py has noted

PyTypeObject* slot_type;  // recording.Slot: a tuple of one number

std::optional<int> slot_in(const py::handle value) {
  if (Py_TYPE(value.ptr()) != slot_type) return std::nullopt;
  return value.attr("index").cast<int>();
}

bool is_number(const py::handle value) {
  return PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr());
}

bool holds_slots(const py::handle value) {
  if (!PyList_Check(value.ptr()) && !PyTuple_Check(value.ptr())) return false;
  for (const py::handle element : py::reinterpret_borrow<py::sequence>(value)) {
    if (slot_in(element)) return true;
  }
  return false;
}

std::unique_ptr<Step> make_call(const std::string& name, const std::string& overload,
                                const py::list& args, std::vector<int> writes) {
  auto& dispatcher = c10::Dispatcher::singleton();
  auto step = std::make_unique<Call>(dispatcher.findSchemaOrThrow(name.c_str(), overload.c_str()));
  const auto& parameters = step->op.schema().arguments();
  TORCH_CHECK(args.size() == parameters.size());
  for (size_t i = 0; i < parameters.size(); i++) {
    const py::handle value = args[i];
    step->stack.emplace_back();
    if (const auto slot = slot_in(value)) {
      step->tensors.push_back({i, {*slot}, false});
      step->reads.push_back(*slot);
    } else if (holds_slots(value)) {
      Call::Argument list{i, {}, true};
      for (const py::handle element : py::reinterpret_borrow<py::sequence>(value)) {
        list.slots.push_back(slot_in(element).value());
        step->reads.push_back(list.slots.back());
      }
      step->tensors.push_back(std::move(list));
    } else if (is_number(value) && *parameters[i].type() == *c10::TensorType::get()) {
      at::Tensor number =
          c10::scalar_to_tensor(torch::jit::toIValue(value, c10::NumberType::get()).toScalar());
      number.unsafeGetTensorImpl()->set_wrapped_number(true);  // takes part in no promotion
      step->stack.back() = std::move(number);
    } else if (value.ptr() == Py_Ellipsis) {
      step->stack.back() = parameters[i].default_value().value();
    } else {
      step->stack.back() = torch::jit::toIValue(value, parameters[i].type());
    }
  }
  step->writes = std::move(writes);
  return step;
}

std::unique_ptr<Step> make_python_call(std::unique_ptr<PythonCall> step, const py::object& function,
                                       const py::list& args) {
  step->function = Object::borrowed(function.ptr());
  for (size_t i = 0; i < args.size(); i++) {
    const py::object value = args[i];
    if (const auto slot = slot_in(value)) {
      step->tensors.emplace_back(i, *slot);
      step->reads.push_back(*slot);
    }
    step->constants.push_back(Object::borrowed(value.ptr()));
  }
  return step;
}

std::unique_ptr<Step> make_launch(const py::object& launcher, const py::object& stream_of,
                                  const py::object& device, const py::list& args) {
  auto step = std::make_unique<Launch>();
  step->launcher = Object::borrowed(launcher.ptr());
  step->stream_of = Object::borrowed(stream_of.ptr());
  step->device = Object::borrowed(device.ptr());
  for (size_t i = 0; i < args.size(); i++) {
    const py::object value = args[i];
    Object rest;
    std::optional<int> slot = slot_in(value);
    if (!slot && holds_slots(value)) {
      const auto parts = py::reinterpret_borrow<py::tuple>(value);
      slot = slot_in(parts[0]);
      rest = Object::checked(PyTuple_GetSlice(value.ptr(), 1, PyTuple_GET_SIZE(value.ptr())));
    }
    if (slot) {
      step->reads.push_back(*slot);
      step->pointers.push_back({i, *slot, std::move(rest)});
    }
    step->constants.push_back(Object::borrowed(value.ptr()));
  }
  return step;
}

std::unique_ptr<Step> make_apply(std::shared_ptr<Function> function, std::vector<int> inputs,
                                 std::vector<int> writes) {
  auto step = std::make_unique<Apply>();
  step->function = std::move(function);
  step->reads = inputs;
  step->inputs = std::move(inputs);
  step->writes = std::move(writes);
  return step;
}

std::shared_ptr<Program> make_program(int inputs, int slots, const py::list& steps,
                                      std::vector<int> results) {
  auto program = std::make_shared<Program>();
  program->inputs = inputs;
  program->slots = slots;
  for (const py::handle noted : steps) {
    const auto parts = py::reinterpret_borrow<py::tuple>(noted);
    const auto kind = parts[0].cast<std::string>();
    std::unique_ptr<Step> step;
    if (kind == "call") {
      step = make_call(parts[1].cast<std::string>(), parts[2].cast<std::string>(), parts[3],
                       parts[4].cast<std::vector<int>>());
    } else if (kind == "launch") {
      step = make_launch(parts[1], parts[2], parts[3], parts[4]);
    } else if (kind == "apply") {
      step = make_apply(parts[1].cast<std::shared_ptr<Function>>(),
                        parts[2].cast<std::vector<int>>(), parts[3].cast<std::vector<int>>());
    } else if (kind == "check") {
      auto check = std::make_unique<Check>();
      check->low = parts[1].cast<int64_t>();
      check->size = parts[2].cast<int64_t>();
      step = make_python_call(std::move(check), parts[3], parts[4]);
    } else {
      step = make_python_call(std::make_unique<PythonCall>(), parts[1], parts[2]);
    }
    program->steps.push_back(std::move(step));
  }
  program->results = std::move(results);
  program->finish();
  return program;
}

// ---- a recorded function

// A Python function whose calls are recorded and replayed.
class Recorded {
 public:
  // The first `calls` of a kind are not recorded.
  Recorded(py::object function, py::object record, py::object setting, int64_t calls)
      : function_(std::move(function)),
        record_(std::move(record)),
        setting_(std::move(setting)),
        calls_(calls) {}

  PyObject* operator()(PyObject* const* args, Py_ssize_t n, PyObject* names) {
    Slots tensors;
    Key key;
    if (!describe(args, n, names, tensors, key)) {
      return PyObject_Vectorcall(function_.ptr(), args, n, names);
    }
    if (entries_.size() >= kMost) entries_.clear();
    Entry& entry = entries_[key];
    if (entry.program && !(entry.program->launches && is_hooked())) {
      const Entry found = entry;  // the program may call Python code that clears the entries
      variable_list results = found.program->run(std::move(tensors));
      return (found.is_tuple ? py::object(wrap_all(results)) : wrap(results[0])).release().ptr();
    }
    if (entry.program || ++entry.calls <= calls_ || entry.calls > calls_ + kTries) {
      return PyObject_Vectorcall(function_.ptr(), args, n, names);
    }
    return record(args, n, names, key);
  }

  void forget() { entries_.clear(); }

 private:
  static constexpr size_t kMost = 1024;  // kinds; a program of a block takes 30 kB
  static constexpr int64_t kTries = 2;   // to record a call of one kind
  struct Entry {
    int64_t calls = 0;
    std::shared_ptr<Program> program;
    bool is_tuple = false;
  };

  // Fills in the tensors and the key of a call. False if it must run in Python.
  bool describe(PyObject* const* args, Py_ssize_t n, PyObject* names, Slots& tensors, Key& key) {
    const Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
    tensors.reserve(n + named);
    for (Py_ssize_t i = 0; i < n + named; i++) {
      if (i >= n) {
        key.add(-2);
        if (!key.add_constant(PyTuple_GET_ITEM(names, i - n))) return false;
      }
      PyObject* const value = args[i];
      if (THPVariable_Check(value)) {
        const at::Tensor& x = THPVariable_Unpack(value);
        key.add(-1);
        if (!THPVariable_CheckExact(value) || !key.add_tensor(x)) return false;
        tensors.push_back(x);
      } else if (!key.add_constant(value)) {
        return false;
      }
    }
    if (tensors.empty()) return false;
    key.add_repeats(tensors);
    const Object setting = call(setting_.ptr(), {});
    if (!key.add_constant(setting.get())) return false;
    return key.add_precision(tensors[0]) && key.add_state(tensors[0].device());
  }

  PyObject* record(PyObject* const* args, Py_ssize_t n, PyObject* names, const Key& key) {
    py::tuple given(n);
    for (Py_ssize_t i = 0; i < n; i++) given[i] = py::reinterpret_borrow<py::object>(args[i]);
    py::dict named;
    for (Py_ssize_t i = 0; names && i < PyTuple_GET_SIZE(names); i++) {
      named[py::handle(PyTuple_GET_ITEM(names, i))] = py::handle(args[n + i]);
    }
    const py::tuple found = record_(function_, given, named);
    Slots tensors;
    Key after;  // another thread may have changed a setting meanwhile
    if (!found[1].is_none() && describe(args, n, names, tensors, after) && after == key) {
      Entry& entry = entries_[key];
      entry.program = found[1].cast<std::shared_ptr<Program>>();
      entry.is_tuple = PyTuple_Check(py::object(found[0]).ptr());
    }
    return py::object(found[0]).release().ptr();
  }

  const py::object function_, record_, setting_;
  const int64_t calls_;
  std::unordered_map<Key, Entry, Hash> entries_;
};

PyObject* call_recorded(PyObject* self, PyObject* const* args, Py_ssize_t n, PyObject* names) {
  HANDLE_TH_ERRORS
  auto* recorded = static_cast<Recorded*>(PyCapsule_GetPointer(self, nullptr));
  return (*recorded)(args, n, names);
  END_HANDLE_TH_ERRORS
}

PyMethodDef call_method = {"recorded", _PyCFunction_CAST(call_recorded),
                           METH_FASTCALL | METH_KEYWORDS, nullptr};

}  // namespace
}  // namespace gpt2

// The module, for recording.py, which gives (Slot, _precision). It is not imported, because a
// library of the cache has no place on Python's path.
extern "C" __attribute__((visibility("default"))) PyObject* gpt2_kernels_replay(PyObject* given) {
  using namespace gpt2;
  HANDLE_TH_ERRORS
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "gpt2_kernels_replay",
                                   nullptr,
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  const Object created = Object::checked(PyModule_Create(&definition));
  auto module = py::reinterpret_borrow<py::module_>(created.get());
  slot_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(PyTuple_GetItem(given, 0)));
  precision = Py_NewRef(PyTuple_GetItem(given, 1));
  py::class_<Program, std::shared_ptr<Program>>(module, "Program").def(py::init(&make_program));
  py::class_<Function, std::shared_ptr<Function>>(module, "Function")
      .def(py::init([](std::string name, const std::shared_ptr<Program>& forward, size_t outputs,
                       bool uses_sums, const py::object& backward) {
        auto function = std::make_shared<Function>();
        function->name = std::move(name);
        function->forward = forward;
        function->outputs = outputs;
        function->uses_sums = uses_sums;
        function->backward_of = Object::borrowed(backward.ptr());
        return function;
      }));
  module.def("ask", [](const py::object& function) { hooked = Py_NewRef(function.ptr()); });
  py::class_<Recorded>(module, "Recorded")
      .def(py::init<py::object, py::object, py::object, int64_t>())
      .def("forget", &Recorded::forget)
      // The function itself, which is called without pybind11's conversion of arguments. It lives
      // as long as the process.
      .def("function", [](Recorded& recorded) {
        const Object capsule = Object::checked(PyCapsule_New(&recorded, nullptr, nullptr));
        return py::reinterpret_steal<py::object>(
            Object::checked(PyCFunction_NewEx(&call_method, capsule.get(), nullptr)).release());
      });
  return module.release().ptr();
  END_HANDLE_TH_ERRORS
}
