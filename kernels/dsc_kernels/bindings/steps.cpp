// What reads and writes the KV cache: attention, and whole steps.
#include <cmath>

#include "../cpu/stack.h"
#include "bindings.h"

namespace dsc {

namespace {

bool blocks_fit(const int64_t* table, int64_t context, int64_t block, int64_t num_blocks) {
  return within("a block table", table, (context + block - 1) / block, num_blocks);
}

bool slots_fit(const StoreKv& c, int64_t num_blocks, int64_t num_positions) {
  return within("positions", c.positions, c.tokens, num_positions) &&
         within("blocks", c.blocks, c.tokens, num_blocks) && within("offsets", c.offsets, c.tokens, c.block);
}

bool contexts_fit(const Attention& c, int64_t num_blocks, int64_t max_context_len) {
  if (!within("contexts", c.contexts, c.batch, max_context_len + 1)) return false;
  for (int64_t s = 0; s < c.batch; s++)
    if (!blocks_fit(c.tables + s * c.width, c.contexts[s], c.block, num_blocks)) return false;
  return true;
}

struct CheckedAttention : Typed<Attention> {
  int64_t num_blocks;       // KV blocks that there are
  int64_t max_context_len;  // what no context may exceed
};

#define F(field) ARGUMENT(CheckedAttention, field)
Signature attention_signature("attention", {F(is_bf16), F(q), F(keys), F(values), F(tables), F(contexts), F(out),
                                            F(batch), F(q_stride), F(width), F(kv_heads), F(group), F(size),
                                            F(value_size), F(block), F(window), F(num_blocks), F(max_context_len),
                                            F(scale), F(cap), F(int8_kv), F(threads)});
#undef F

PyObject* attention(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  CheckedAttention c{};
  if (!unnamed("attention", given, 0) || !attention_signature.read(values, names, c)) return nullptr;
  if (!contexts_fit(c, c.num_blocks, c.max_context_len)) return nullptr;
  return run(c, kernels(c.is_bf16).attention);
}

struct CheckedChunk : Typed<ChunkAttention> {
  int64_t num_blocks;  // KV blocks that there are
};

#define F(field) ARGUMENT(CheckedChunk, field)
Signature chunk_signature("chunk_attention",
                          {F(is_bf16), F(q), F(keys), F(values), F(table), F(out), F(count), F(q_stride), F(context),
                           F(kv_heads), F(group), F(size), F(value_size), F(block), F(window), F(num_blocks), F(scale),
                           F(cap), F(int8_kv), F(threads)});
#undef F

PyObject* chunk_attention(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  CheckedChunk c{};
  if (!unnamed("chunk_attention", given, 0) || !chunk_signature.read(values, names, c)) return nullptr;
  if (!blocks_fit(c.table, c.context, c.block, c.num_blocks)) return nullptr;
  return run(c, kernels(c.is_bf16).chunk_attention);
}

struct CheckedStore : Typed<StoreKv> {
  int64_t num_blocks;     // KV blocks that there are
  int64_t num_positions;  // positions that may be looked up
};

#define F(field) ARGUMENT(CheckedStore, field)
#define AS(name, field) ARGUMENT_AS(CheckedStore, name, field)
Signature store_signature("store_kv",
                          {F(is_bf16), F(qkv), AS("query_norm", norm.query), AS("key_norm", norm.key),
                           AS("key_norm_skipped", norm.skipped), AS("qk_norm_eps", norm.eps),
                           AS("qk_norm_together", norm.together), F(cos_sin_cache), F(turned), F(positions),
                           F(blocks), F(offsets), F(keys), F(values), F(tokens), F(heads),
                           F(kv_heads), F(size), F(block), F(num_blocks), F(num_positions), F(int8_kv), F(threads)});
#undef AS
#undef F

PyObject* store_kv(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  CheckedStore c{};
  if (!unnamed("store_kv", given, 0) || !store_signature.read(values, names, c)) return nullptr;
  if (!slots_fit(c, c.num_blocks, c.num_positions)) return nullptr;
  return run(c, kernels(c.is_bf16).store_kv);
}

struct NamedLayer : DecoderLayer {
  static constexpr const char* name = "dsc_kernels.decoder_layer";
  int64_t d = 0;
};

#define F(field) ARGUMENT(NamedLayer, field)
#define AS(name, field) ARGUMENT_AS(NamedLayer, name, field)
Signature layer_signature("decoder_layer",
                          {AS("attention_norm_weight", attention_norm.weight),
                           AS("attention_norm_bias", attention_norm.bias), F(norms),
                           AS("attended_norm_weight", attended_norm.weight),
                           AS("attended_norm_bias", attended_norm.bias), AS("attended_norm_eps", attended_norm.eps),
                           AS("fed_norm_weight", fed_norm.weight), AS("fed_norm_bias", fed_norm.bias),
                           AS("fed_norm_eps", fed_norm.eps), F(value_size), F(table), F(window), F(cap),
                           AS("query_norm", qk_norm.query), AS("key_norm", qk_norm.key),
                           AS("key_norm_skipped", qk_norm.skipped),
                           AS("qk_norm_eps", qk_norm.eps), AS("qk_norm_together", qk_norm.together), F(turned),
                           AS("attention_norm_eps", attention_norm.eps),
                           AS("qkv_weight", qkv.w), AS("qkv_format", qkv.w_format),
                           AS("out_format", out.w_format), AS("qkv_bias", qkv.bias), AS("out_weight", out.w),
                           AS("out_bias", out.bias), F(cos_sin_cache), F(d), F(heads), F(kv_heads), F(size),
                           AS("ffn_norm_weight", ffn_norm.weight), AS("ffn_norm_bias", ffn_norm.bias),
                           AS("ffn_norm_eps", ffn_norm.eps)});
#undef AS
#undef F

// The FFN layer comes first; whoever keeps a decoder layer keeps it too.
PyObject* decoder_layer(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  NamedLayer layer;
  if (!unnamed("decoder_layer", given, 1) || !layer_signature.read(values + 1, names, layer)) return nullptr;
  if (PyCapsule_IsValid(values[0], MoeLayer::name)) layer.moe = unwrap<MoeLayer>(values[0]);
  else if (const FfnLayer* ffn = unwrap<FfnLayer>(values[0])) layer.ffn = ffn;
  else return nullptr;
  layer.qkv.d = layer.out.n = layer.d;
  layer.out.d = layer.heads * layer.value_size;
  layer.qkv.n = (layer.heads + (layer.value_size < layer.size ? 1 : 2) * layer.kv_heads) * layer.size;
  layer.scale = 1.0f / std::sqrt(static_cast<float>(layer.size));
  return wrap(layer);
}

#define F(field) ARGUMENT(Stack, field)
Signature stack_signature("stack",
                          {F(is_bf16), F(token_embedding), F(token_embedding_format), F(position_embedding),
                           F(vocabulary), F(positions), F(embedding_scale)});
#undef F

// A list of decoder layers comes first.
PyObject* new_stack(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  Stack stack;
  if (!unnamed("stack", given, 1) || !stack_signature.read(values + 1, names, stack)) return nullptr;
  Py_ssize_t count = PyList_Size(values[0]);
  for (Py_ssize_t i = 0; i < count; i++) {
    const NamedLayer* layer = unwrap<NamedLayer>(PyList_GET_ITEM(values[0], i));
    if (!layer) return nullptr;
    stack.layers.push_back(*layer);
  }
  if (count > 0) return wrap(stack);
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a stack needs at least one layer");
  return nullptr;
}

bool chunks_fit(const Step& s) {
  if (s.drafted_count < 0 || s.drafted_count > s.chunk_count) {
    PyErr_Format(PyExc_ValueError, "%lld chunks with drafts among %lld", (long long)s.drafted_count,
                 (long long)s.chunk_count);
    return false;
  }
  int64_t next = s.decodes;
  for (int64_t j = 0; j < s.chunk_count; j++) {
    const Chunk& c = s.chunks[j];
    bool fits = c.row >= 0 && c.row < s.sequences && c.start == next && c.length > 0 && c.length <= c.context &&
                c.context <= s.pages * s.block;
    if (!fits) {
      PyErr_Format(PyExc_ValueError,
                   "chunk %lld (row %lld, first token %lld, tokens %lld, context %lld) does not fit: it must begin at "
                   "token %lld, in one of %lld rows that hold contexts of %lld",
                   (long long)j, (long long)c.row, (long long)c.start, (long long)c.length, (long long)c.context,
                   (long long)next, (long long)s.sequences, (long long)(s.pages * s.block));
      return false;
    }
    for (int64_t g = 0; g < s.table_count; g++)
      if (!blocks_fit(s.tables + g * s.table_stride + c.row * s.width, c.context, s.block, s.num_blocks)) return false;
    next += c.length;
  }
  if (next == s.tokens) return true;
  PyErr_Format(PyExc_ValueError, "single tokens and chunks are %lld tokens, but there are %lld", (long long)next,
               (long long)s.tokens);
  return false;
}

bool runs_fit(const Step& s) {
  int64_t next = 0;
  for (int64_t j = 0; j < s.run_count; j++) {
    const AdapterRun& run = s.runs[j];
    if (!run.updates || run.parts < 1 || run.first < next || run.count < 1 || run.count > s.tokens - run.first) {
      PyErr_Format(PyExc_ValueError,
                   "run %lld of an adapter (parts %lld, first token %lld, tokens %lld) does not fit: runs follow each "
                   "other within %lld tokens, and the next may begin at token %lld",
                   (long long)j, (long long)run.parts, (long long)run.first, (long long)run.count, (long long)s.tokens,
                   (long long)next);
      return false;
    }
    next = run.first + run.count;
  }
  return true;
}

bool step_fits(const Stack& stack, const Step& s) {
  if (s.decodes < 0 || s.decodes > s.sequences) {
    PyErr_Format(PyExc_ValueError, "%lld single tokens of %lld sequences", (long long)s.decodes,
                 (long long)s.sequences);
    return false;
  }
  for (const DecoderLayer& layer : stack.layers)
    if (!within("a layer's table", &layer.table, 1, s.table_count)) return false;
  for (int64_t g = 0; g < s.table_count; g++) {
    StoreKv slots{};
    slots.positions = s.positions, slots.blocks = s.slot_blocks + g * s.slot_stride, slots.offsets = s.slot_offsets;
    slots.tokens = s.tokens, slots.block = s.block;
    Attention singles{};
    singles.tables = s.tables + g * s.table_stride, singles.contexts = s.contexts, singles.batch = s.decodes;
    singles.width = s.width, singles.block = s.block;
    if (!slots_fit(slots, s.num_blocks, stack.positions) || !contexts_fit(singles, s.num_blocks, s.max_context_len))
      return false;
  }
  return within("token ids", s.ids, s.tokens, stack.vocabulary) && chunks_fit(s) && runs_fit(s);
}

#define F(field) ARGUMENT(Step, field)
Signature step_signature("run_stack", {F(out),      F(ids),        F(positions), F(slot_blocks),     F(slot_offsets),
                                       F(tables),   F(contexts),   F(chunks),    F(kv_caches),       F(outputs),
                                       F(phase_ns), F(tokens),     F(sequences), F(pages),           F(width),
                                       F(table_count), F(table_stride), F(slot_stride),
                                       F(block),    F(num_blocks), F(decodes),   F(max_context_len), F(chunk_count),
                                       F(drafted_count),
                                       F(runs),     F(run_count),  F(int8_kv),  F(threads)});
#undef F

PyObject* run_stack(PyObject*, PyObject* const* values, Py_ssize_t given, PyObject* names) {
  if (!unnamed("run_stack", given, 1)) return nullptr;
  const Stack* stack = unwrap<Stack>(values[0]);
  Step s{};
  if (!stack || !step_signature.read(values + 1, names, s) || !step_fits(*stack, s)) return nullptr;
  return unlocked([&] { stack->run(kernels(stack->is_bf16), s, step_scratch.reset(), scratch); });
}

}  // namespace

PyMethodDef step_methods[] = {
    DSC_FUNCTION("attention", attention), DSC_FUNCTION("chunk_attention", chunk_attention),
    DSC_FUNCTION("store_kv", store_kv),   DSC_FUNCTION("decoder_layer", decoder_layer),
    DSC_FUNCTION("stack", new_stack),     DSC_FUNCTION("run_stack", run_stack),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace dsc
