// Tokens drawn, ordered and counted.
#include "../cpu/grouping.h"
#include "../cpu/sketch.h"
#include "bindings.h"

namespace dsc {

namespace {

using namespace DSC_INSTRUCTION_SET;

#define F(field) ARGUMENT(Sampling, field)
Signature sample_signature("sample", {F(logits), F(temperature), F(top_k), F(top_p), F(min_p), F(u), F(out), F(batch),
                                      F(vocabulary), F(threads)});
#undef F

PyObject* sample(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  Sampling c{};
  if (!unnamed("sample", given, 0) || !sample_signature.read(values, names, c)) return nullptr;
  return run(c, active->sample);
}

struct Ordering {
  const int32_t* picks;  // [batch, k]
  int64_t batch;
  int k;
  int32_t* order;  // [batch]
};

#define F(field) ARGUMENT(Ordering, field)
Signature order_signature("min_hash_order", {F(picks), F(batch), F(k), F(order)});
#undef F

PyObject* order_tokens(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  Ordering c{};
  if (!unnamed("min_hash_order", given, 0) || !order_signature.read(values, names, c)) return nullptr;
  return unlocked([&] { min_hash_order(c.picks, c.batch, c.k, scratch.reset().take<uint64_t>(2 * c.batch), c.order); });
}

struct Tiling {
  const int32_t* picks;  // [batch, k]
  const int32_t* order;  // [batch] or null
  int64_t batch;
  int k;
  int64_t tile;      // tokens
  int32_t* atoms;    // [batch · k]
  int64_t* offsets;  // [tiles + 1]
};

#define F(field) ARGUMENT(Tiling, field)
Signature tiles_signature("tile_unions", {F(picks), F(order), F(batch), F(k), F(tile), F(atoms), F(offsets)});
#undef F

PyObject* unite_tiles(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  Tiling c{};
  if (!unnamed("tile_unions", given, 0) || !tiles_signature.read(values, names, c)) return nullptr;
  if (c.order && !within("order", c.order, c.batch, c.batch)) return nullptr;
  return unlocked([&] {
    uint64_t* keys = scratch.reset().take<uint64_t>(2 * c.tile * c.k);
    tile_unions(c.picks, c.order, c.batch, c.k, c.tile, keys, c.atoms, c.offsets);
  });
}

struct Sketching : Sketch {
  int64_t requests;  // how many signatures there are
};

#define F(field) ARGUMENT(Sketching, field)
Signature sketch_signature("sketch", {F(picks), F(token_ids), F(owners), F(signatures), F(vocabulary), F(counts),
                                      F(last), F(distinct), F(layers), F(tokens), F(k), F(atoms), F(layer_stride),
                                      F(rows), F(divisor), F(step), F(requests)});
#undef F

PyObject* sketch_step(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  Sketching s{};
  if (!unnamed("sketch", given, 0) || !sketch_signature.read(values, names, s)) return nullptr;
  if (!within("owners", s.owners, s.tokens, s.requests)) return nullptr;
  if (!within("token ids", s.token_ids, s.tokens, INT64_MAX)) return nullptr;
  sketch(s);
  Py_RETURN_NONE;
}

}  // namespace

PyMethodDef token_methods[] = {
    DSC_FUNCTION("sample", sample),           DSC_FUNCTION("min_hash_order", order_tokens),
    DSC_FUNCTION("tile_unions", unite_tiles), DSC_FUNCTION("sketch", sketch_step),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace dsc
