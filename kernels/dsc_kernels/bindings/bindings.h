// What the parts of the module `dsc_kernels._native` share. It takes plain addresses, so that it needs no torch to build
// and a call costs little: `dsc_kernels.native` checks the tensors it passes, the module the numbers in them that say
// where to read and write. Nothing else should call it.
#pragma once

#include "arguments.h"

#include <new>

#include "../cpu/api.h"

namespace dsc {

extern const InstructionSet* active;
extern PyMethodDef layer_methods[], step_methods[], token_methods[];

inline const Kernels& kernels(int is_bf16) { return is_bf16 ? active->bfloat16 : active->float32; }

// Each calling thread's own working memory: of kernels, and of a step between them.
inline thread_local Scratch scratch, step_scratch;

// A call, and the dtype it is for.
template <typename Call>
struct Typed : Call {
  int is_bf16 = 0;
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

// Compute without holding the interpreter: None, or a MemoryError.
template <typename Work>
PyObject* unlocked(Work work) {
  bool done = true;
  Py_BEGIN_ALLOW_THREADS;
  try {
    work();
  } catch (const std::bad_alloc&) {
    done = false;
  }
  Py_END_ALLOW_THREADS;
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

template <typename Call, typename Base>
PyObject* run(Call& call, void (*kernel)(const Base&)) {
  return unlocked([&] {
    if constexpr (requires { call.scratch; }) call.scratch = &scratch.reset();
    kernel(call);
  });
}

// Something of C++ in a capsule that owns it; T::name is its kind.
template <typename T>
PyObject* wrap(const T& value) {
  T* made = new (std::nothrow) T(value);
  if (!made) return PyErr_NoMemory();
  PyObject* capsule =
      PyCapsule_New(made, T::name, [](PyObject* c) { delete static_cast<T*>(PyCapsule_GetPointer(c, T::name)); });
  if (!capsule) delete made;
  return capsule;
}

template <typename T>
T* unwrap(PyObject* capsule) {
  return static_cast<T*>(PyCapsule_GetPointer(capsule, T::name));
}

// What of a layer stays the same from call to call is read once; its calls name it by its capsule.
struct FfnLayer : Typed<Ffn> {
  static constexpr const char* name = "dsc_kernels.ffn";
};

struct MoeLayer : Typed<Moe> {
  static constexpr const char* name = "dsc_kernels.moe";
};

struct HeadLayer : Typed<Head> {
  static constexpr const char* name = "dsc_kernels.head";
};

}  // namespace dsc
