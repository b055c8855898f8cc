// Owned references to Python objects, for code that runs with and without the GIL.
#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <utility>
#include <vector>

namespace gpt2 {

// Holds the GIL. pybind11's own looks up the thread's state in a table of its own first.
class Gil {
 public:
  Gil() : state_(PyGILState_Ensure()) {}
  ~Gil() { PyGILState_Release(state_); }
  Gil(const Gil&) = delete;

 private:
  PyGILState_STATE state_;
};

// A reference that may be dropped by any thread.
class Object {
 public:
  Object() = default;
  explicit Object(PyObject* stolen) : object_(stolen) {}
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() {
    if (!object_ || !Py_IsInitialized()) return;
    if (PyGILState_Check()) {
      Py_DECREF(object_);
    } else {
      const Gil gil;
      Py_DECREF(object_);
    }
  }

  static Object borrowed(PyObject* object) {
    Py_INCREF(object);
    return Object(object);
  }
  // The result of a Python call. Throws the error that Python has set.
  static Object checked(PyObject* result) {
    if (!result) throw python_error();
    return Object(result);
  }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_ = nullptr;
};

inline Object call(PyObject* function, const std::vector<PyObject*>& args) {
  return Object::checked(PyObject_Vectorcall(function, args.data(), args.size(), nullptr));
}

}  // namespace gpt2
