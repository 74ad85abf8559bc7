// Functions that Python calls with named arguments only: one table per function names each argument and the field of the
// C++ call that it fills, so neither side has an order that the other could get wrong.
//
// A call costs one comparison more than positional arguments would: the names of a call site are one tuple, and where
// they go is looked up when it changes. Of more than fifteen names Python makes a new tuple at every call, of the same
// strings: then it is one comparison for each.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace dsc {

// How a Python number becomes a field. A pointer is an address, 0 where there is nothing.
inline bool read_field(PyObject* number, int64_t& field) {
  field = PyLong_AsLongLong(number);
  return field != -1 || !PyErr_Occurred();
}

inline bool read_field(PyObject* number, int& field) {
  int64_t value = 0;
  if (!read_field(number, value)) return false;
  field = static_cast<int>(value);
  if (field == value) return true;
  PyErr_SetString(PyExc_OverflowError, "an argument does not fit into 32 bits");
  return false;
}

inline bool read_field(PyObject* number, float& field) {
  double value = PyFloat_AsDouble(number);
  field = static_cast<float>(value);
  return value != -1.0 || !PyErr_Occurred();
}

template <typename T>
bool read_field(PyObject* number, T*& field) {
  int64_t address = 0;
  if (!read_field(number, address)) return false;
  field = reinterpret_cast<T*>(address);
  return true;
}

inline const char* kind_of(const float&) { return "float"; }
template <typename T>
const char* kind_of(const T&) {
  return "int";
}

template <typename Call>
struct Argument {
  const char* name;
  bool (*read)(PyObject*, Call&);
  const char* kind;  // its type in Python
};

// The argument that fills a field: ARGUMENT_AS where it lies within another, and needs a name of its own.
#define ARGUMENT_AS(Call, name, field)                                                                                 \
  dsc::Argument<Call> {                                                                                                \
    name, [](PyObject* number, Call& call) { return dsc::read_field(number, call.field); }, dsc::kind_of(Call{}.field) \
  }
#define ARGUMENT(Call, field) ARGUMENT_AS(Call, #field, field)

// What a function is called with, for `signatures` to tell.
struct SignatureBase {
  const char* function;
  explicit SignatureBase(const char* name) : function(name) { all().push_back(this); }
  virtual std::vector<std::pair<const char*, const char*>> arguments() const = 0;
  static std::vector<SignatureBase*>& all() {
    static std::vector<SignatureBase*> made;
    return made;
  }
};

template <typename Call, size_t N>
class Signature : public SignatureBase {
 public:
  Signature(const char* name, const Argument<Call> (&arguments)[N]) : SignatureBase(name) {
    std::memcpy(static_cast<void*>(arguments_), arguments, sizeof arguments_);
  }

  // Fill a call from its arguments, all of which must be there; else a TypeError that names one.
  bool read(PyObject* const* values, PyObject* names, Call& call) {
    if (!known(names) && !learn(names)) return false;
    for (size_t i = 0; i < N; i++)
      if (!arguments_[order_[i]].read(values[i], call)) return false;
    return true;
  }

  std::vector<std::pair<const char*, const char*>> arguments() const override {
    std::vector<std::pair<const char*, const char*>> found;
    for (const Argument<Call>& a : arguments_) found.emplace_back(a.name, a.kind);
    return found;
  }

 private:
  // Whether these are the names of the last call.
  bool known(PyObject* names) const {
    if (!names || !names_ || names == names_) return names && names == names_;
    Py_ssize_t count = PyTuple_GET_SIZE(names_);
    if (PyTuple_GET_SIZE(names) != count) return false;
    for (Py_ssize_t i = 0; i < count; i++)
      if (PyTuple_GET_ITEM(names, i) != PyTuple_GET_ITEM(names_, i)) return false;
    return true;
  }

  bool learn(PyObject* names) {
    bool given[N] = {};
    Py_ssize_t count = names ? PyTuple_GET_SIZE(names) : 0;
    for (Py_ssize_t i = 0; i < count; i++) {
      const char* name = PyUnicode_AsUTF8(PyTuple_GET_ITEM(names, i));
      if (!name) return forget();
      size_t at = 0;
      while (at < N && std::strcmp(arguments_[at].name, name)) at++;
      if (at == N || given[at]) {
        PyErr_Format(PyExc_TypeError, "%s() takes no argument '%s'%s", function, name, at < N ? " a second time" : "");
        return forget();
      }
      given[at] = true;
      order_[i] = static_cast<uint8_t>(at);
    }
    for (size_t at = 0; at < N; at++)
      if (!given[at]) {
        PyErr_Format(PyExc_TypeError, "%s() lacks the argument '%s'", function, arguments_[at].name);
        return forget();
      }
    Py_XINCREF(names);
    Py_XSETREF(names_, names);
    return true;
  }

  bool forget() {
    Py_CLEAR(names_);
    return false;
  }

  static_assert(N < 256);
  Argument<Call> arguments_[N];
  PyObject* names_ = nullptr;  // of the last call, kept so that nothing else can have its or its strings' addresses
  uint8_t order_[N] = {};      // the argument that each of them is
};

// A function of the module that takes named arguments.
#define DSC_FUNCTION(name, function) \
  {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL | METH_KEYWORDS, nullptr}

// Whether a function got as many arguments without a name as it takes; else a TypeError.
inline bool unnamed(const char* function, Py_ssize_t given, Py_ssize_t taken) {
  if (given == taken) return true;
  PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments without a name, but %zd were given", function, taken, given);
  return false;
}

}  // namespace dsc
