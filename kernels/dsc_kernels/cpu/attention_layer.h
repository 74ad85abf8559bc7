// One layer's attention for single tokens in one call: q, k, v; their writing; attention; the output projection.
#pragma once

#include "layers.h"

template <typename T>
struct AttentionSteps {
  Linear qkv{}, output{};
  StoreKv store{};
  Attention attend{};
  int64_t bytes;  // of intermediate results; the steps' own scratch follows

  INLINE AttentionSteps(const AttentionLayer& a, char* scratch) {
    int64_t width = (a.heads + 2 * a.kv_heads) * a.size, attended = a.heads * a.size;
    int64_t first = aligned(a.batch * width * sizeof(T));
    bytes = first + aligned(a.batch * attended * sizeof(T));
    T *rows = (T*)scratch, *heads = (T*)(scratch + first);
    char* own = scratch + bytes;
    qkv.x = a.x, qkv.w = a.qkv, qkv.bias = a.qkv_bias, qkv.out = rows;
    qkv.batch = a.batch, qkv.d = a.d, qkv.n = width, qkv.threads = a.threads, qkv.scratch = own;
    store.qkv = rows, store.angles = a.angles, store.positions = a.positions, store.blocks = a.blocks;
    store.offsets = a.offsets, store.keys = a.keys, store.values = a.values, store.tokens = a.batch;
    store.heads = a.heads, store.kv_heads = a.kv_heads, store.size = a.size, store.block = a.block;
    store.threads = a.threads, store.scratch = own;
    attend.q = rows, attend.keys = a.keys, attend.values = a.values, attend.tables = a.tables;
    attend.contexts = a.contexts, attend.out = heads, attend.batch = a.batch, attend.q_stride = width;
    attend.width = a.width, attend.kv_heads = a.kv_heads, attend.group = a.heads / a.kv_heads, attend.size = a.size;
    attend.block = a.block, attend.longest = a.longest, attend.scale = a.scale, attend.threads = a.threads;
    attend.scratch = own;
    output.x = heads, output.w = a.output, output.bias = a.output_bias, output.residual = a.residual;
    output.out = a.out, output.batch = a.batch, output.d = attended, output.n = a.d, output.threads = a.threads;
    output.scratch = own;
  }
};

template <typename T>
int64_t attention_layer_scratch(const AttentionLayer& a) {
  AttentionSteps<T> steps(a, nullptr);
  int64_t most = linear_scratch<T>(steps.qkv), needs[] = {linear_scratch<T>(steps.output),
                                                          store_kv_scratch<T>(steps.store),
                                                          attention_scratch<T>(steps.attend)};
  for (int64_t bytes : needs) most = bytes > most ? bytes : most;
  return steps.bytes + most;
}

template <typename T>
void attention_layer(const AttentionLayer& a) {
  AttentionSteps<T> steps(a, a.scratch);
  linear<T>(steps.qkv);
  store_kv<T>(steps.store);
  attention<T>(steps.attend);
  linear<T>(steps.output);
}
