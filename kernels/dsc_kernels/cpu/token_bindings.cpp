// Tokens drawn, ordered and counted.
#include <cstring>

#include "bindings.h"

namespace {

#include "sketch.h"

// (logits, temperature, top_k, top_p, min_p, u, out, batch, vocabulary, threads)
PyObject* sample(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  Sampling c{};
  c.logits = a.address<const float>();
  c.temperature = a.address<const float>();
  c.top_k = a.address<const int64_t>();
  c.top_p = a.address<const double>();
  c.min_p = a.address<const float>();
  c.u = a.address<const double>();
  c.out = a.address<int64_t>();
  c.batch = a.integer();
  c.vocabulary = a.integer();
  c.threads = static_cast<int>(a.integer());
  if (!a.ok()) return nullptr;
  return run(c, active->sample, active->sample_scratch);
}

// (picks, batch, k, order)
PyObject* order_tokens(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  const int32_t* picks = a.address<const int32_t>();
  int64_t batch = a.integer();
  int k = static_cast<int>(a.integer());
  int32_t* order = a.address<int32_t>();
  if (!a.ok()) return nullptr;
  char* keys = scratch.at_least(2 * batch * sizeof(uint64_t) + 64);
  if (!keys) return PyErr_NoMemory();
  min_hash_order(picks, batch, k, reinterpret_cast<uint64_t*>(keys), order);
  Py_RETURN_NONE;
}

// (picks, order, batch, k, tile, atoms, offsets)
PyObject* unite_tiles(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  const int32_t* picks = a.address<const int32_t>();
  const int32_t* order = a.address<const int32_t>();
  int64_t batch = a.integer();
  int k = static_cast<int>(a.integer());
  int64_t tile = a.integer();
  int32_t* atoms = a.address<int32_t>();
  int64_t* offsets = a.address<int64_t>();
  if (!a.ok() || (order && !within("order", order, batch, batch))) return nullptr;
  char* keys = scratch.at_least(2 * tile * k * sizeof(uint64_t) + 64);
  if (!keys) return PyErr_NoMemory();
  tile_unions(picks, order, batch, k, tile, reinterpret_cast<uint64_t*>(keys), atoms, offsets);
  Py_RETURN_NONE;
}

// (picks, token_ids, owners, signatures, vocabulary, counts, last, distinct, layers, tokens, k, atoms, layer_stride,
//  rows, divisor, step, how many signatures there are)
PyObject* sketch_step(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  Sketch s{};
  s.picks = a.address<const int32_t>();
  s.token_ids = a.address<const int64_t>();
  s.owners = a.address<const int64_t>();
  s.signatures = a.address<const uint64_t>();
  s.vocabulary = a.address<uint64_t>();
  s.counts = a.address<int64_t>();
  s.last = a.address<int32_t>();
  s.distinct = a.address<int64_t>();
  for (int64_t* size : {&s.layers, &s.tokens, &s.k, &s.atoms, &s.layer_stride, &s.rows, &s.divisor}) *size = a.integer();
  s.step = static_cast<int32_t>(a.integer());
  int64_t requests = a.integer();
  if (!a.ok() || !within("owners", s.owners, s.tokens, requests)) return nullptr;
  if (!within("token ids", s.token_ids, s.tokens, INT64_MAX)) return nullptr;
  sketch(s);
  Py_RETURN_NONE;
}

}  // namespace

PyMethodDef token_methods[] = {
    {"sample", fast(sample), METH_FASTCALL, nullptr},
    {"min_hash_order", fast(order_tokens), METH_FASTCALL, nullptr},
    {"tile_unions", fast(unite_tiles), METH_FASTCALL, nullptr},
    {"sketch", fast(sketch_step), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
