// The Python module `dsc_kernels._native`: the instruction set in use, and what the bindings offer.
#include "bindings.h"

#include <cstring>

const InstructionSet* active = nullptr;

namespace {

const InstructionSet* const sets[] = {&avx512bf16_set, &avx512_set, &avx2_set, &baseline_set};

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

PyObject* use(PyObject*, PyObject* name) {
  const char* wanted = PyUnicode_AsUTF8(name);
  if (!wanted) return nullptr;
  for (const InstructionSet* set : sets)
    if (!std::strcmp(set->name, wanted) && set->supported()) {
      active = set;
      Py_RETURN_NONE;
    }
  return PyErr_Format(PyExc_ValueError, "instruction set %R is not supported here", name);
}

PyMethodDef methods[] = {
    {"supported", supported, METH_NOARGS, "Names of the instruction sets this machine has, best first."},
    {"use", use, METH_O, "Choose an instruction set by name."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  for (const InstructionSet* set : sets)
    if (!active && set->supported()) active = set;
  PyObject* module = PyModule_Create(&definition);
  for (PyMethodDef* part : {layer_methods, step_methods, token_methods})
    if (module && PyModule_AddFunctions(module, part) < 0) Py_CLEAR(module);
  return module;
}
