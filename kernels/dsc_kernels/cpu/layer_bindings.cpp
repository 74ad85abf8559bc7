// Packed weights and the layers made of them.
#include "bindings.h"

namespace {

// (is_bfloat16, w, n, d, out)
PyObject* pack(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  int half = static_cast<int>(a.integer());
  const void* w = a.address<const void>();
  int64_t n = a.integer(), d = a.integer();
  void* out = a.address<void>();
  if (!a.ok()) return nullptr;
  auto kernel = kernels(half).pack;
  Py_BEGIN_ALLOW_THREADS;
  kernel(w, n, d, out);
  Py_END_ALLOW_THREADS;
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

struct HeadLayer {
  static constexpr const char* name = "dsc_kernels.head";
  Head call{};
  int half = 0;
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
  auto* layer = new HeadLayer;
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
  return wrap(layer);
}

// (layer, x, out, batch, threads)
PyObject* largest(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  auto* layer = unwrap<HeadLayer>(a);
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
  auto* layer = new FfnLayer;
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
  return wrap(layer);
}

// (layer, x, residual, out, batch, threads, picks, weights, signal, grouped)
PyObject* ffn(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  auto* layer = unwrap<FfnLayer>(a);
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
  auto* layer = new MoeLayer;
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
  return wrap(layer);
}

// (layer, x, residual, out, batch, threads)
PyObject* moe(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  auto* layer = unwrap<MoeLayer>(a);
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

}  // namespace

PyMethodDef layer_methods[] = {
    {"pack", fast(pack), METH_FASTCALL, nullptr},
    {"linear", fast(linear), METH_FASTCALL, nullptr},
    {"head_layer", fast(head_layer), METH_FASTCALL, nullptr},
    {"largest", fast(largest), METH_FASTCALL, nullptr},
    {"ffn_layer", fast(ffn_layer), METH_FASTCALL, nullptr},
    {"ffn", fast(ffn), METH_FASTCALL, nullptr},
    {"moe_layer", fast(moe_layer), METH_FASTCALL, nullptr},
    {"moe", fast(moe), METH_FASTCALL, nullptr},
    {"norm", fast(norm), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
