// What reads and writes the pools of keys and values: attention, and whole steps.
#include <cmath>

#include "bindings.h"
#include "stack.h"

namespace {

bool blocks_fit(const int64_t* table, int64_t context, int64_t block, int64_t pool) {
  return within("a block table", table, (context + block - 1) / block, pool);
}

bool slots_fit(const StoreKv& c, int64_t pool, int64_t positions) {
  return within("positions", c.positions, c.tokens, positions) && within("blocks", c.blocks, c.tokens, pool) &&
         within("offsets", c.offsets, c.tokens, c.block);
}

bool contexts_fit(const Attention& c, int64_t pool, int64_t longest) {
  if (!within("contexts", c.contexts, c.batch, longest + 1)) return false;
  for (int64_t s = 0; s < c.batch; s++)
    if (!blocks_fit(c.tables + s * c.width, c.contexts[s], c.block, pool)) return false;
  return true;
}

// (is_bfloat16, q, keys, values, tables, contexts, out, batch, q_stride, width, kv_heads, group, size, block, pool's
//  blocks, longest, scale, threads)
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
  int64_t pool = a.integer(), longest = a.integer();
  c.scale = a.real();
  c.threads = static_cast<int>(a.integer());
  if (!a.ok() || !contexts_fit(c, pool, longest)) return nullptr;
  return run(c, kernels(half).attention, kernels(half).attention_scratch);
}

// (is_bfloat16, q, keys, values, table, out, count, q_stride, context, kv_heads, group, size, block, pool's blocks,
//  scale, threads)
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
  int64_t pool = a.integer();
  c.scale = a.real();
  c.threads = static_cast<int>(a.integer());
  if (!a.ok() || !blocks_fit(c.table, c.context, c.block, pool)) return nullptr;
  return run(c, kernels(half).chunk_attention, kernels(half).chunk_attention_scratch);
}

// (is_bfloat16, qkv, angles, positions, blocks, offsets, keys, values, tokens, heads, kv_heads, size, block, pool's
//  blocks, positions that there are, threads)
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
  int64_t pool = a.integer(), positions = a.integer();
  c.threads = static_cast<int>(a.integer());
  if (!a.ok() || !slots_fit(c, pool, positions)) return nullptr;
  return run(c, kernels(half).store_kv, kernels(half).store_kv_scratch);
}

// (is_bfloat16, embeddings of tokens, of positions, how many there are of both, then per block: attention's norm: weight,
//  bias, eps; q, k, v: packed, bias; output: packed, bias; angles, d, heads, kv_heads, size; the FFN's norm: weight, bias,
//  eps; 1 for a mixture of experts, the FFN layer)
PyObject* stack_new(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  auto* stack = new Stack;
  stack->half = static_cast<int>(a.integer());
  stack->words = a.address<const void>();
  stack->places = a.address<const void>();
  stack->vocabulary = a.integer();
  stack->positions = a.integer();
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
      if (auto* layer = unwrap<MoeLayer>(a)) b.moe = &layer->call;
    } else if (auto* layer = unwrap<FfnLayer>(a)) {
      b.ffn = &layer->call;
    }
    stack->blocks.push_back(b);
  }
  if (!a.ok()) {
    delete stack;
    return nullptr;
  }
  return wrap(stack);
}

bool chunks_fit(const Step& s) {
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
    if (!blocks_fit(s.tables + c.row * s.width, c.context, s.block, s.pool)) return false;
    next += c.length;
  }
  if (next == s.tokens) return true;
  PyErr_Format(PyExc_ValueError, "single tokens and chunks are %lld tokens, but there are %lld", (long long)next,
               (long long)s.tokens);
  return false;
}

bool step_fits(const Stack& stack, const Step& s) {
  if (s.decodes < 0 || s.decodes > s.sequences) {
    PyErr_Format(PyExc_ValueError, "%lld single tokens of %lld sequences", (long long)s.decodes,
                 (long long)s.sequences);
    return false;
  }
  StoreKv slots{};
  slots.positions = s.positions, slots.blocks = s.blocks, slots.offsets = s.offsets;
  slots.tokens = s.tokens, slots.block = s.block;
  Attention singles{};
  singles.tables = s.tables, singles.contexts = s.contexts, singles.batch = s.decodes, singles.width = s.width;
  singles.block = s.block;
  return within("token ids", s.ids, s.tokens, stack.vocabulary) && slots_fit(slots, s.pool, stack.positions) &&
         contexts_fit(singles, s.pool, s.longest) && chunks_fit(s);
}

// (stack, out, ids, positions, blocks, offsets, tables, contexts, chunks, pools, asked, laps, tokens, sequences, pages,
//  width, block, pool's blocks, decodes, longest, chunk_count, threads)
PyObject* stack_run(PyObject*, PyObject* const* items, Py_ssize_t count) {
  Arguments a{items, count};
  auto* stack = unwrap<Stack>(a);
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
  for (int64_t* size : {&s.tokens, &s.sequences, &s.pages, &s.width, &s.block, &s.pool, &s.decodes, &s.longest,
                        &s.chunk_count})
    *size = a.integer();
  s.threads = static_cast<int>(a.integer());
  if (!a.ok() || !step_fits(*stack, s)) return nullptr;
  const Kernels& k = kernels(stack->half);
  char* own = scratch.at_least(stack->scratch_bytes(k, s) + 64);
  if (!own) return PyErr_NoMemory();
  Py_BEGIN_ALLOW_THREADS;
  stack->run(k, s, own);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

}  // namespace

PyMethodDef step_methods[] = {
    {"attention", fast(attention), METH_FASTCALL, nullptr},
    {"chunk_attention", fast(chunk_attention), METH_FASTCALL, nullptr},
    {"store_kv", fast(store_kv), METH_FASTCALL, nullptr},
    {"stack", fast(stack_new), METH_FASTCALL, nullptr},
    {"run_stack", fast(stack_run), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
