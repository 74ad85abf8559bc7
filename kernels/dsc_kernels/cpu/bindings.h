// What the parts of the module `dsc_kernels._native` share. It takes plain addresses, so that it needs no torch to build
// and a call costs little: `dsc_kernels.native` checks the tensors it passes, the module the numbers in them that say
// where to read and write. Nothing else should call it.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <initializer_list>

#include "api.h"

extern const InstructionSet* active;
extern PyMethodDef layer_methods[], step_methods[], token_methods[];

inline const Kernels& kernels(int is_bfloat16) { return is_bfloat16 ? active->bfloat16 : active->float32; }

// Each calling thread's own workspace; grows to the largest call and stays.
struct Scratch {
  char* data = nullptr;
  int64_t size = 0;
  ~Scratch() { std::free(data); }
  char* at_least(int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = (bytes + 4095) / 4096 * 4096;
      data = static_cast<char*>(std::aligned_alloc(4096, size));
      if (!data) size = 0;
    }
    return data;
  }
};
inline thread_local Scratch scratch;

// Arguments of a call, taken in order. An absent address is 0.
struct Arguments {
  PyObject* const* items;
  Py_ssize_t count, next = 0;
  bool failed = false;
  PyObject* take() {
    if (next < count) return items[next++];
    if (!failed) PyErr_SetString(PyExc_TypeError, "too few arguments");
    failed = true;
    return nullptr;
  }
  int64_t integer() {
    PyObject* item = take();
    if (!item) return 0;
    int64_t value = PyLong_AsLongLong(item);
    failed |= value == -1 && PyErr_Occurred();
    return value;
  }
  template <typename T>
  T* address() {
    return reinterpret_cast<T*>(integer());
  }
  float real() {
    PyObject* item = take();
    if (!item) return 0;
    double value = PyFloat_AsDouble(item);
    failed |= value == -1.0 && PyErr_Occurred();
    return static_cast<float>(value);
  }
  bool ok() {
    if (!failed && next != count) {
      PyErr_SetString(PyExc_TypeError, "too many arguments");
      failed = true;
    }
    return !failed;
  }
};

// Whether all values are at least 0 and below the limit; else a ValueError that names one.
template <typename T>
bool within(const char* name, const T* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; i++)
    if (values[i] < 0 || values[i] >= limit) {
      PyErr_Format(PyExc_ValueError, "%s: number %lld is %lld; expected at least 0 and less than %lld", name,
                   static_cast<long long>(i), static_cast<long long>(values[i]), static_cast<long long>(limit));
      return false;
    }
  return true;
}

template <typename Call>
PyObject* run(Call& call, void (*kernel)(const Call&), int64_t (*bytes)(const Call&)) {
  call.scratch = scratch.at_least(bytes(call) + 64);
  if (!call.scratch) return PyErr_NoMemory();
  Py_BEGIN_ALLOW_THREADS;
  kernel(call);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// Something of C++ in a capsule that owns it; T::name is its kind.
template <typename T>
PyObject* wrap(T* made) {
  PyObject* capsule = PyCapsule_New(made, T::name, [](PyObject* c) {
    delete static_cast<T*>(PyCapsule_GetPointer(c, T::name));
  });
  if (!capsule) delete made;
  return capsule;
}

template <typename T>
T* unwrap(Arguments& a) {
  PyObject* capsule = a.take();
  void* made = capsule ? PyCapsule_GetPointer(capsule, T::name) : nullptr;
  a.failed |= !made;
  return static_cast<T*>(made);
}

// What of a layer stays the same from call to call is read once; its calls name it by its capsule.
struct FfnLayer {
  static constexpr const char* name = "dsc_kernels.ffn";
  Ffn call{};
  int half = 0;
};

struct MoeLayer {
  static constexpr const char* name = "dsc_kernels.moe";
  Moe call{};
  int half = 0;
};

template <typename F>
PyCFunction fast(F f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}
