// The Python module `dsc_kernels._native`: plain addresses in, so that it needs no torch to build and a call costs
// little. `dsc_kernels.native` checks what it passes; nothing else should call this.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "api.h"
#include "stack.h"

namespace {

#include "sketch.h"

const InstructionSet* const sets[] = {&avx512bf16_set, &avx512_set, &avx2_set, &baseline_set};
const InstructionSet* active = nullptr;

const Kernels& kernels(int is_bfloat16) { return is_bfloat16 ? active->bfloat16 : active->float32; }

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
thread_local Scratch scratch;

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

template <typename Call>
PyObject* run(Call& call, void (*kernel)(const Call&), int64_t (*bytes)(const Call&)) {
  call.scratch = scratch.at_least(bytes(call) + 64);
  if (!call.scratch) return PyErr_NoMemory();
  Py_BEGIN_ALLOW_THREADS;
  kernel(call);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

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

// (is_bfloat16, w, n, d, out)
PyObject* pack(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  int half = static_cast<int>(a.integer());
  const void* w = a.address<const void>();
  int64_t n = a.integer(), d = a.integer();
  void* out = a.address<void>();
  if (!a.ok()) return nullptr;
  kernels(half).pack(w, n, d, out);
  Py_RETURN_NONE;
}

// (is_bfloat16, x, w, bias, residual, out, batch, d, n, activation, float_out, threads)
PyObject* linear(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  int half = static_cast<int>(a.integer());
  Linear c{};
  c.x = a.address<const void>();
  c.w = a.address<const void>();
  c.bias = a.address<const float>();
  c.residual = a.address<const void>();
  c.out = a.address<void>();
  c.batch = a.integer();
  c.d = a.integer();
  c.n = a.integer();
  c.activation = static_cast<int>(a.integer());
  c.float_out = static_cast<int>(a.integer());
  c.threads = static_cast<int>(a.integer());
  if (!a.ok()) return nullptr;
  return run(c, kernels(half).linear, kernels(half).linear_scratch);
}

constexpr const char* stack_name = "dsc_kernels.stack";

// What stays the same from call to call is read once; a layer's calls name it by its capsule.
template <typename Call>
struct Layer {
  static constexpr const char* name = "dsc_kernels.layer";
  Call call{};
  int half = 0;
  static PyObject* wrap(Layer* layer) {
    PyObject* capsule = PyCapsule_New(layer, name, [](PyObject* c) {
      delete static_cast<Layer*>(PyCapsule_GetPointer(c, name));
    });
    if (!capsule) delete layer;
    return capsule;
  }
  static Layer* unwrap(Arguments& a) {
    PyObject* capsule = a.take();
    void* layer = capsule ? PyCapsule_GetPointer(capsule, name) : nullptr;
    a.failed |= !layer;
    return static_cast<Layer*>(layer);
  }
};

void take_screen(Arguments& a, Screen& s) {
  s.rows = a.address<const void>();
  s.packed = a.address<const int8_t>();
  s.steps = a.address<const float>();
  s.shifts = a.address<const int32_t>();
  s.errors = a.address<const float>();
  s.norms = a.address<const float>();
  s.slack = a.real();
  s.counts = a.address<int64_t>();
}

// (is_bfloat16, w, bias, d, n, screen's rows, packed, steps, shifts, errors, norms, slack, counts,
//  largest error, largest norm)
PyObject* head_layer(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  auto* layer = new Layer<Head>;
  layer->half = static_cast<int>(a.integer());
  Head& c = layer->call;
  c.w = a.address<const void>();
  c.bias = a.address<const float>();
  c.d = a.integer();
  c.n = a.integer();
  take_screen(a, c.screen);
  c.largest_error = a.real();
  c.largest_norm = a.real();
  if (!a.ok()) {
    delete layer;
    return nullptr;
  }
  return Layer<Head>::wrap(layer);
}

// (layer, x, out, batch, threads)
PyObject* largest(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  auto* layer = Layer<Head>::unwrap(a);
  if (!layer) return nullptr;
  Head c = layer->call;
  c.x = a.address<const void>();
  c.out = a.address<int64_t>();
  c.batch = a.integer();
  c.threads = static_cast<int>(a.integer());
  if (!a.ok()) return nullptr;
  return run(c, kernels(layer->half).largest, kernels(layer->half).largest_scratch);
}

// (is_bfloat16, up, gate, down, router, router_bias, u, v, gamma, d, hidden, atoms, tau, eps, norm_eps, k, rank,
//  scalar_gamma, activation, screen's rows, packed, steps, shifts, errors, norms, slack, counts)
PyObject* ffn_layer(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  auto* layer = new Layer<Ffn>;
  layer->half = static_cast<int>(a.integer());
  Ffn& c = layer->call;
  c.up = a.address<const void>();
  c.gate = a.address<const void>();
  c.down = a.address<const void>();
  c.router = a.address<const void>();
  c.router_bias = a.address<const float>();
  c.u = a.address<const void>();
  c.v = a.address<const void>();
  c.gamma = a.address<const float>();
  c.d = a.integer();
  c.hidden = a.integer();
  c.atoms = a.integer();
  c.tau = a.real();
  c.eps = a.real();
  c.norm_eps = a.real();
  c.k = static_cast<int>(a.integer());
  c.rank = static_cast<int>(a.integer());
  c.scalar_gamma = static_cast<int>(a.integer());
  c.activation = static_cast<int>(a.integer());
  take_screen(a, c.screen);
  if (!a.ok()) {
    delete layer;
    return nullptr;
  }
  return Layer<Ffn>::wrap(layer);
}

// (layer, x, residual, out, batch, threads, picks, weights, signal, grouped)
PyObject* ffn(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  auto* layer = Layer<Ffn>::unwrap(a);
  if (!layer) return nullptr;
  Ffn c = layer->call;
  c.x = a.address<const void>();
  c.residual = a.address<const void>();
  c.out = a.address<void>();
  c.batch = a.integer();
  c.threads = static_cast<int>(a.integer());
  c.picks = a.address<int32_t>();
  c.weights = a.address<float>();
  c.signal = a.address<float>();
  c.grouped = static_cast<int>(a.integer());
  if (!a.ok()) return nullptr;
  return run(c, kernels(layer->half).ffn, kernels(layer->half).ffn_scratch);
}

// (is_bfloat16, router, router_bias, up, gate, down, d, hidden, experts, norm_eps, k, normalize, activation)
PyObject* moe_layer(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  auto* layer = new Layer<Moe>;
  layer->half = static_cast<int>(a.integer());
  Moe& c = layer->call;
  c.router = a.address<const void>();
  c.router_bias = a.address<const float>();
  c.up = a.address<const void>();
  c.gate = a.address<const void>();
  c.down = a.address<const void>();
  c.d = a.integer();
  c.hidden = a.integer();
  c.experts = a.integer();
  c.norm_eps = a.real();
  c.k = static_cast<int>(a.integer());
  c.normalize = static_cast<int>(a.integer());
  c.activation = static_cast<int>(a.integer());
  if (!a.ok()) {
    delete layer;
    return nullptr;
  }
  return Layer<Moe>::wrap(layer);
}

// (layer, x, residual, out, batch, threads)
PyObject* moe(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  auto* layer = Layer<Moe>::unwrap(a);
  if (!layer) return nullptr;
  Moe c = layer->call;
  c.x = a.address<const void>();
  c.residual = a.address<const void>();
  c.out = a.address<void>();
  c.batch = a.integer();
  c.threads = static_cast<int>(a.integer());
  if (!a.ok()) return nullptr;
  return run(c, kernels(layer->half).moe, kernels(layer->half).moe_scratch);
}

// (is_bfloat16, q, keys, values, tables, contexts, out, batch, q_stride, width, kv_heads, group, size, block, longest,
//  scale, threads)
PyObject* attention(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  int half = static_cast<int>(a.integer());
  Attention c{};
  c.q = a.address<const void>();
  c.keys = a.address<const void>();
  c.values = a.address<const void>();
  c.tables = a.address<const int64_t>();
  c.contexts = a.address<const int64_t>();
  c.out = a.address<void>();
  c.batch = a.integer();
  c.q_stride = a.integer();
  c.width = a.integer();
  c.kv_heads = a.integer();
  c.group = a.integer();
  c.size = a.integer();
  c.block = a.integer();
  c.longest = a.integer();
  c.scale = a.real();
  c.threads = static_cast<int>(a.integer());
  if (!a.ok()) return nullptr;
  return run(c, kernels(half).attention, kernels(half).attention_scratch);
}

// (is_bfloat16, q, keys, values, table, out, count, q_stride, context, kv_heads, group, size, block, scale, threads)
PyObject* chunk_attention(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  int half = static_cast<int>(a.integer());
  ChunkAttention c{};
  c.q = a.address<const void>();
  c.keys = a.address<const void>();
  c.values = a.address<const void>();
  c.table = a.address<const int64_t>();
  c.out = a.address<void>();
  for (int64_t* size : {&c.count, &c.q_stride, &c.context, &c.kv_heads, &c.group, &c.size, &c.block})
    *size = a.integer();
  c.scale = a.real();
  c.threads = static_cast<int>(a.integer());
  if (!a.ok()) return nullptr;
  return run(c, kernels(half).chunk_attention, kernels(half).chunk_attention_scratch);
}

// (is_bfloat16, qkv, angles, positions, blocks, offsets, keys, values, tokens, heads, kv_heads, size, block, threads)
PyObject* store_kv(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  int half = static_cast<int>(a.integer());
  StoreKv c{};
  c.qkv = a.address<void>();
  c.angles = a.address<const float>();
  c.positions = a.address<const int64_t>();
  c.blocks = a.address<const int64_t>();
  c.offsets = a.address<const int64_t>();
  c.keys = a.address<void>();
  c.values = a.address<void>();
  c.tokens = a.integer();
  c.heads = a.integer();
  c.kv_heads = a.integer();
  c.size = a.integer();
  c.block = a.integer();
  c.threads = static_cast<int>(a.integer());
  if (!a.ok()) return nullptr;
  return run(c, kernels(half).store_kv, kernels(half).store_kv_scratch);
}

// (is_bfloat16, embeddings of tokens, of positions, then per block: attention's norm: weight, bias, eps; q, k, v: packed,
//  bias; output: packed, bias; angles, d, heads, kv_heads, size; the FFN's norm: weight, bias, eps; 1 for a mixture of
//  experts, the FFN layer)
PyObject* stack_new(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  auto* stack = new Stack;
  stack->half = static_cast<int>(a.integer());
  stack->words = a.address<const void>();
  stack->places = a.address<const void>();
  auto norm = [&a](Norm& n) {
    n.weight = a.address<const void>();
    n.bias = a.address<const void>();
    n.eps = a.real();
  };
  while (!a.failed && a.next < count) {
    Block b;
    norm(b.before_attention);
    for (Linear* linear : {&b.qkv, &b.output}) {
      linear->w = a.address<const void>();
      linear->bias = a.address<const float>();
    }
    b.angles = a.address<const float>();
    b.qkv.d = b.output.n = a.integer();
    b.heads = a.integer();
    b.kv_heads = a.integer();
    b.size = a.integer();
    b.output.d = b.heads * b.size;
    b.qkv.n = b.output.d + 2 * b.kv_heads * b.size;
    b.scale = 1.0f / std::sqrt(static_cast<float>(b.size));
    norm(b.before_ffn);
    if (a.integer()) {
      if (auto* layer = Layer<Moe>::unwrap(a)) b.moe = &layer->call;
    } else if (auto* layer = Layer<Ffn>::unwrap(a)) {
      b.ffn = &layer->call;
    }
    stack->blocks.push_back(b);
  }
  PyObject* capsule = a.ok() && !stack->blocks.empty() ? PyCapsule_New(stack, stack_name, [](PyObject* c) {
    delete static_cast<Stack*>(PyCapsule_GetPointer(c, stack_name));
  }) : nullptr;
  if (!capsule) delete stack;
  return capsule;
}

// (stack, out, ids, positions, blocks, offsets, tables, contexts, chunks, pools, asked, laps, tokens, width, block,
//  decodes, longest, chunk_count, threads)
PyObject* stack_run(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  PyObject* capsule = a.take();
  auto* stack = capsule ? static_cast<Stack*>(PyCapsule_GetPointer(capsule, stack_name)) : nullptr;
  if (!stack) return nullptr;
  Step s{};
  s.out = a.address<void>();
  s.ids = a.address<const int64_t>();
  s.positions = a.address<const int64_t>();
  s.blocks = a.address<const int64_t>();
  s.offsets = a.address<const int64_t>();
  s.tables = a.address<const int64_t>();
  s.contexts = a.address<const int64_t>();
  s.chunks = a.address<const Chunk>();
  s.pools = a.address<const int64_t[2]>();
  s.asked = a.address<const Asked>();
  s.laps = a.address<int64_t>();
  for (int64_t* size : {&s.tokens, &s.width, &s.block, &s.decodes, &s.longest, &s.chunk_count}) *size = a.integer();
  s.threads = static_cast<int>(a.integer());
  if (!a.ok()) return nullptr;
  const Kernels& k = kernels(stack->half);
  char* own = scratch.at_least(stack->scratch_bytes(k, s) + 64);
  if (!own) return PyErr_NoMemory();
  Py_BEGIN_ALLOW_THREADS;
  stack->run(k, s, own);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

// (is_bfloat16, x, weight, bias, out, batch, d, eps, threads)
PyObject* norm(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  int half = static_cast<int>(a.integer());
  Norm c{};
  c.x = a.address<const void>();
  c.weight = a.address<const void>();
  c.bias = a.address<const void>();
  c.out = a.address<void>();
  c.batch = a.integer();
  c.d = a.integer();
  c.eps = a.real();
  c.threads = static_cast<int>(a.integer());
  if (!a.ok()) return nullptr;
  return run(c, kernels(half).norm, kernels(half).norm_scratch);
}

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
  if (!a.ok()) return nullptr;
  char* keys = scratch.at_least(2 * tile * k * sizeof(uint64_t) + 64);
  if (!keys) return PyErr_NoMemory();
  tile_unions(picks, order, batch, k, tile, reinterpret_cast<uint64_t*>(keys), atoms, offsets);
  Py_RETURN_NONE;
}

// (picks, token_ids, owners, signatures, vocabulary, counts, last, distinct, layers, tokens, k, atoms, layer_stride,
//  rows, divisor, step)
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
  if (!a.ok()) return nullptr;
  sketch(s);
  Py_RETURN_NONE;
}

template <typename F>
PyCFunction fast(F f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {
    {"supported", supported, METH_NOARGS, "Names of the instruction sets this machine has, best first."},
    {"use", use, METH_O, "Choose an instruction set by name."},
    {"pack", fast(pack), METH_FASTCALL, nullptr},
    {"linear", fast(linear), METH_FASTCALL, nullptr},
    {"head_layer", fast(head_layer), METH_FASTCALL, nullptr},
    {"largest", fast(largest), METH_FASTCALL, nullptr},
    {"ffn_layer", fast(ffn_layer), METH_FASTCALL, nullptr},
    {"ffn", fast(ffn), METH_FASTCALL, nullptr},
    {"moe_layer", fast(moe_layer), METH_FASTCALL, nullptr},
    {"moe", fast(moe), METH_FASTCALL, nullptr},
    {"attention", fast(attention), METH_FASTCALL, nullptr},
    {"chunk_attention", fast(chunk_attention), METH_FASTCALL, nullptr},
    {"store_kv", fast(store_kv), METH_FASTCALL, nullptr},
    {"norm", fast(norm), METH_FASTCALL, nullptr},
    {"stack", fast(stack_new), METH_FASTCALL, nullptr},
    {"run_stack", fast(stack_run), METH_FASTCALL, nullptr},
    {"sample", fast(sample), METH_FASTCALL, nullptr},
    {"min_hash_order", fast(order_tokens), METH_FASTCALL, nullptr},
    {"tile_unions", fast(unite_tiles), METH_FASTCALL, nullptr},
    {"sketch", fast(sketch_step), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  for (const InstructionSet* set : sets)
    if (!active && set->supported()) active = set;
  return PyModule_Create(&definition);
}
