// The Python module `dsc_kernels._native`: the instruction set in use, and what the bindings offer.
#include <cstring>
#include <initializer_list>

#include "../cpu/stack.h"
#include "bindings.h"

namespace dsc {

const InstructionSet* active = nullptr;

namespace {

const InstructionSet* const sets[] = {&amx_set, &avx512bf16_set, &avx512_set, &avx2_set, &baseline_set};

PyObject* supported(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const InstructionSet* set : sets)
    if (names && set->supported()) {
      PyObject* name = PyUnicode_FromString(set->name);
      if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
      Py_XDECREF(name);
    }
  return names;
}

void choose(const InstructionSet* set) {
  active = set;
  if (set->begin) set->begin();
}

PyObject* use(PyObject*, PyObject* name) {
  const char* wanted = PyUnicode_AsUTF8(name);
  if (!wanted) return nullptr;
  for (const InstructionSet* set : sets)
    if (!std::strcmp(set->name, wanted) && set->supported()) {
      choose(set);
      Py_RETURN_NONE;
    }
  return PyErr_Format(PyExc_ValueError, "instruction set %R is not supported here", name);
}

PyObject* signatures(PyObject*, PyObject*) {
  PyObject* all = PyDict_New();
  for (const SignatureBase* signature : SignatureBase::all()) {
    PyObject* arguments = PyDict_New();
    for (auto [name, kind] : signature->arguments()) {
      PyObject* text = PyUnicode_FromString(kind);
      if (!arguments || !text || PyDict_SetItemString(arguments, name, text) < 0) Py_CLEAR(arguments);
      Py_XDECREF(text);
    }
    if (!all || !arguments || PyDict_SetItemString(all, signature->function, arguments) < 0) Py_CLEAR(all);
    Py_XDECREF(arguments);
  }
  return all;
}

PyMethodDef methods[] = {
    {"supported", supported, METH_NOARGS, "Names of the instruction sets this machine has, best first."},
    {"use", use, METH_O, "Choose an instruction set by name."},
    {"signatures", signatures, METH_NOARGS, "By function, its named arguments and their types."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

// A tuple of names, for what Python reads by index.
int add_names(PyObject* module, const char* name, std::initializer_list<const char*> names) {
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(names.size()));
  Py_ssize_t at = 0;
  for (const char* each : names)
    if (tuple) PyTuple_SET_ITEM(tuple, at++, PyUnicode_FromString(each));
  int failed = PyModule_AddObjectRef(module, name, tuple);
  Py_XDECREF(tuple);
  return failed;
}

}  // namespace

}  // namespace dsc

PyMODINIT_FUNC PyInit__native() {
  using namespace dsc;
  for (const InstructionSet* set : sets)
    if (!active && set->supported()) choose(set);
  PyObject* module = PyModule_Create(&definition);
  for (PyMethodDef* part : {layer_methods, step_methods, token_methods})
    if (module && PyModule_AddFunctions(module, part) < 0) Py_CLEAR(module);
  static_assert(sizeof(ScreenCounters) == 5 * sizeof(int64_t) && int{FFN_PHASES} == int{STACK_PHASES});
  if (module &&
      (add_names(module, "SCREEN_COUNTERS", {"rescored", "tokens", "watched_panels", "watched_calls", "paused_calls"}) <
           0 ||
       add_names(module, "STACK_PHASES", {"embed", "norms", "projections", "kv writes", "attention", "ffn"}) < 0 ||
       add_names(module, "FFN_PHASES", {"router", "static", "compose", "waiting"}) < 0 ||
       PyModule_AddIntConstant(module, "PHASE_ROOM", STACK_PHASES) < 0 ||
       PyModule_AddIntConstant(module, "MAX_RANK", MAX_RANK) < 0))
    Py_CLEAR(module);
  return module;
}
