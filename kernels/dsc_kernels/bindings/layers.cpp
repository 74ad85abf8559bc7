// Packed weights and the layers made of them.
#include "bindings.h"

namespace dsc {

namespace {

struct Packing {
  int is_bf16;
  const void* w;  // [n, d]
  int64_t n, d;
  void* out;  // its panels
};

#define F(field) ARGUMENT(Packing, field)
Signature pack_signature("pack", {F(is_bf16), F(w), F(n), F(d), F(out)});
#undef F

PyObject* pack(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  Packing c{};
  if (!unnamed("pack", given, 0) || !pack_signature.read(values, names, c)) return nullptr;
  return unlocked([&] { kernels(c.is_bf16).pack(c.w, c.n, c.d, c.out); });
}

#define F(field) ARGUMENT(Typed<Linear>, field)
Signature linear_signature("linear", {F(is_bf16), F(x), F(w), F(w_format), F(bias), F(residual), F(out), F(batch),
                                      F(d), F(n), F(activation), F(float_out), F(threads)});
#undef F

PyObject* linear(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  Typed<Linear> c{};
  if (!unnamed("linear", given, 0) || !linear_signature.read(values, names, c)) return nullptr;
  return run(c, kernels(c.is_bf16).linear);
}

// The arguments that are a Screen's, whichever call has it.
#define SCREEN(Call)                                                                                      \
  ARGUMENT_AS(Call, "screen_rows", screen.rows), ARGUMENT_AS(Call, "screen_packed", screen.packed),       \
      ARGUMENT_AS(Call, "screen_rows_format", screen.rows_format),                                        \
      ARGUMENT_AS(Call, "screen_steps", screen.steps), ARGUMENT_AS(Call, "screen_shifts", screen.shifts), \
      ARGUMENT_AS(Call, "screen_errors", screen.errors), ARGUMENT_AS(Call, "screen_norms", screen.norms), \
      ARGUMENT_AS(Call, "screen_slack", screen.slack), ARGUMENT_AS(Call, "screen_counters", screen.counters)

// A layer of which a call says only what changes: made of its named arguments, and wrapped.
template <typename Layer, size_t N>
PyObject* make(Signature<Layer, N>& signature, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  Layer layer{};
  if (!unnamed(signature.function, given, 0) || !signature.read(values, names, layer)) return nullptr;
  return wrap(layer);
}

// The call of a layer, which comes first, with the named arguments of this time.
template <typename Layer, typename Call, size_t N>
bool fill(Signature<Call, N>& signature, PyObject* const* values, Py_ssize_t given, PyObject* names, Call& call,
          int& is_bf16) {
  if (!unnamed(signature.function, given, 1)) return false;
  const Layer* layer = unwrap<Layer>(values[0]);
  if (!layer) return false;
  call = *layer;
  is_bf16 = layer->is_bf16;
  return signature.read(values + 1, names, call);
}

#define F(field) ARGUMENT(HeadLayer, field)
Signature head_layer_signature("head_layer",
                               {F(is_bf16), F(w), F(w_format), F(bias), F(d), F(n), SCREEN(HeadLayer), F(max_error),
                                F(max_norm)});
#undef F

PyObject* head_layer(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  return make(head_layer_signature, values, given, names);
}

#define F(field) ARGUMENT(Head, field)
Signature argmax_signature("argmax", {F(x), F(out), F(batch), F(threads)});
#undef F

PyObject* argmax(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  Head c;
  int is_bf16;
  if (!fill<HeadLayer>(argmax_signature, values, given, names, c, is_bf16)) return nullptr;
  return run(c, kernels(is_bf16).argmax);
}

#define F(field) ARGUMENT(FfnLayer, field)
Signature ffn_layer_signature("ffn_layer",
                              {F(is_bf16), F(up), F(gate), F(down), F(up_bias), F(gate_bias), F(down_bias), F(router),
                               F(up_format), F(gate_format), F(down_format), F(router_format), F(u_format), F(v_format),
                               F(router_bias), F(u), F(v), F(gamma), F(d), F(hidden), F(atoms), F(tau), F(eps),
                               F(norm_eps), F(k), F(rank), F(scalar_gamma), F(silent), F(activation),
                               SCREEN(FfnLayer)});
#undef F

PyObject* ffn_layer(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  return make(ffn_layer_signature, values, given, names);
}

// The arguments that are a layer's Adapted, whichever call has it.
#define ADAPTED(Call)                                                                             \
  ARGUMENT_AS(Call, "runs", adapted.runs), ARGUMENT_AS(Call, "run_count", adapted.run_count),     \
      ARGUMENT_AS(Call, "run_of", adapted.run_of), ARGUMENT_AS(Call, "layer_index", adapted.layer)

#define F(field) ARGUMENT(Ffn, field)
Signature ffn_signature("ffn", {F(x), F(residual), F(out), F(batch), F(threads), F(picks), F(weights), F(signal),
                                F(grouped), ADAPTED(Ffn)});
#undef F

PyObject* ffn(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  Ffn c;
  int is_bf16;
  if (!fill<FfnLayer>(ffn_signature, values, given, names, c, is_bf16)) return nullptr;
  return run(c, kernels(is_bf16).ffn);
}

#define F(field) ARGUMENT(MoeLayer, field)
Signature moe_layer_signature("moe_layer", {F(is_bf16), F(router), F(router_bias), F(up), F(gate), F(down), F(d),
                                            F(hidden), F(experts), F(norm_eps), F(k), F(normalize), F(activation),
                                            F(choice_bias), F(sigmoid), F(groups), F(groups_used), F(group_picks), F(weight_scale),
                                            F(shared_up), F(shared_gate), F(shared_down), F(shared_scale),
                                            F(shared_hidden), F(router_format), F(up_format), F(gate_format),
                                            F(down_format), F(shared_up_format), F(shared_gate_format),
                                            F(shared_down_format)});
#undef F

PyObject* moe_layer(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  return make(moe_layer_signature, values, given, names);
}

#define F(field) ARGUMENT(Moe, field)
Signature moe_signature("moe", {F(x), F(residual), F(out), F(batch), F(threads), F(picks), F(weights), ADAPTED(Moe)});
#undef F

PyObject* moe(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  Moe c;
  int is_bf16;
  if (!fill<MoeLayer>(moe_signature, values, given, names, c, is_bf16)) return nullptr;
  return run(c, kernels(is_bf16).moe);
}

#define F(field) ARGUMENT(Typed<Norm>, field)
Signature norm_signature("norm", {F(is_bf16), F(x), F(weight), F(bias), F(residual), F(out), F(batch), F(d), F(eps),
                                  F(threads)});
#undef F

PyObject* norm(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  Typed<Norm> c{};
  if (!unnamed("norm", given, 0) || !norm_signature.read(values, names, c)) return nullptr;
  return run(c, kernels(c.is_bf16).norm);
}

}  // namespace

PyMethodDef layer_methods[] = {
    DSC_FUNCTION("pack", pack),
    DSC_FUNCTION("linear", linear),
    DSC_FUNCTION("head_layer", head_layer),
    DSC_FUNCTION("argmax", argmax),

    DSC_FUNCTION("ffn_layer", ffn_layer),
    DSC_FUNCTION("ffn", ffn),
    DSC_FUNCTION("moe_layer", moe_layer),
    DSC_FUNCTION("moe", moe),

    DSC_FUNCTION("norm", norm),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace dsc
