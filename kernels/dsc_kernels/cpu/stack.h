// A step's tokens through the embedding and all layers of a decoder in one call, by an instruction set's kernels.
#pragma once

#include <stdint.h>

#include <chrono>
#include <cstring>
#include <vector>

#include "api.h"

namespace dsc {

// Where a layer's norms stand: each before its branch, each after it and before the sum, each before its branch with
// both branches beside each other, the same with one norm for both, which is attention's, or one before and one after
// each branch.
enum NormPlaces { BEFORE, AFTER, PARALLEL, SHARED, AROUND };

// What a layer's weights are; each call fills in the rest.
struct DecoderLayer {
  Norm attention_norm{}, ffn_norm{};
  Norm attended_norm{}, fed_norm{};      // of what the branches give, where norms stand around them
  int norms = BEFORE;                    // where they stand, a NormPlaces
  Linear qkv{}, out{};                   // projections around attention
  QkNorm qk_norm{};
  const float* cos_sin_cache = nullptr;  // as in StoreKv
  int64_t turned = 0;                    // as in StoreKv
  int64_t heads = 0, kv_heads = 0;
  int64_t size = 0;          // of a query and a key
  int64_t value_size = 0;    // of a value; where it is less, values are the last numbers of keys
  int64_t table = 0;         // which of the step's tables of KV blocks is its own
  int64_t window = 0;        // as in Attention
  float scale = 0;           // of scores
  float cap = 0;             // as in Attention
  const Ffn* ffn = nullptr;  // one of these two
  const Moe* moe = nullptr;
};

// What an FFN layer gives besides its output, as in Ffn and Moe; addresses.
struct LayerOutputs {
  int64_t grouped, picks, weights, signal;
};

// Where a layer's keys and values are; addresses.
struct KvCache {
  int64_t keys, values;
};

enum StackPhase { EMBEDDING, NORMS, PROJECTIONS, KV_WRITES, ATTENDING, FFN, STACK_PHASES = 8 };

struct Step {
  void* out;                    // [tokens, d]
  const int64_t* ids;           // [tokens]
  const int64_t* positions;     // [tokens]
  const int64_t* slot_blocks;   // [table_count, tokens], rows slot_stride apart: each token's KV block
  const int64_t* slot_offsets;  // [tokens]: and its row in there
  const int64_t* tables;        // [table_count, sequences, pages], rows `width` and tables table_stride apart
  const int64_t* contexts;      // [sequences]
  const Chunk* chunks;          // the tokens behind the first `decodes`, which are one per sequence
  const KvCache* kv_caches;     // per layer
  const LayerOutputs* outputs;  // per layer, or null
  const AdapterRun* runs;       // of tokens with adapters, in their order
  int64_t* phase_ns;            // [STACK_PHASES] nanoseconds to add to, then each thread's in FFN layers; or null
  int64_t tokens, sequences, pages, width;
  int64_t table_count, table_stride, slot_stride;
  int64_t block;       // tokens of a KV block
  int64_t num_blocks;  // KV blocks that there are
  int64_t decodes;
  int64_t max_context_len;  // of the single tokens' sequences
  int64_t chunk_count;
  int64_t drafted_count;        // of the first chunks, whose tokens each give what they give alone
  int64_t run_count;
  int int8_kv;  // whether the caches are in int8
  int threads;
};

class Stack {
 public:
  static constexpr const char* name = "dsc_kernels.stack";
  std::vector<DecoderLayer> layers;
  const void* token_embedding = nullptr;     // [vocabulary, d], packed where it has a format
  const Format* token_embedding_format = nullptr;
  const void* position_embedding = nullptr;  // [positions, d], or null where positions are not learned
  int64_t vocabulary = 0, positions = 0;
  float embedding_scale = 1;  // what tokens' embeddings are multiplied by
  int is_bf16 = 0;

  // own: for what lies between the kernels; scratch: theirs.
  void run(const Kernels& k, const Step& s, Scratch& own, Scratch& scratch) const {
    Buffers buffers(layers[0], s, is_bf16, own);
    Adapted adapted = {s.runs, s.run_count, s.run_count ? runs_of_tokens(s, own) : nullptr, 0};
    int64_t last = s.phase_ns ? now() : 0;
    auto end_phase = [&](StackPhase phase) {
      if (!s.phase_ns) return;
      int64_t time = now();
      s.phase_ns[phase] += time - last;
      last = time;
    };
    auto launch = [&scratch](auto kernel, const auto& call) {
      scratch.reset();
      kernel(call);
    };
    if (is_bf16) embed<uint16_t>(k, s);
    else embed<float>(k, s);
    end_phase(EMBEDDING);
    for (size_t i = 0; i < layers.size(); i++) {
      const DecoderLayer& layer = layers[i];
      Calls c(layer, s, buffers, scratch);
      adapted.layer = (int64_t)i;
      if (s.run_count) c.adapt(adapted);
      if (c.entry.x) k.norm(c.entry);
      end_phase(NORMS);
      launch(k.linear, c.qkv);
      end_phase(PROJECTIONS);
      const KvCache& cache = s.kv_caches[i];
      c.store.keys = (void*)cache.keys, c.store.values = layer.value_size < layer.size ? nullptr : (void*)cache.values;
      k.store_kv(c.store);
      end_phase(KV_WRITES);
      c.single.keys = c.chunk.keys = (void*)cache.keys, c.single.values = c.chunk.values = (void*)cache.values;
      if (s.decodes + s.drafted_count) launch(k.attention, c.single);
      if (s.chunk_count > s.drafted_count) launch(k.chunk_attention, *c.chunks_of(s, buffers));
      end_phase(ATTENDING);
      launch(k.linear, c.out);
      end_phase(PROJECTIONS);
      if (c.attended.x) k.norm(c.attended);
      if (c.between.x) k.norm(c.between);
      end_phase(NORMS);
      if (s.outputs) c.bind_outputs(s.outputs[i]);
      if (layer.ffn) launch(k.ffn, c.ffn);
      else launch(k.moe, c.moe);
      end_phase(FFN);
      if (!c.exit.x) continue;
      k.norm(c.exit);
      end_phase(NORMS);
    }
  }

 private:
  static float to_float(float x) { return x; }
  static float to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static void put(float x, float* out) { *out = x; }
  static void put(float x, uint16_t* out) {  // to nearest even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    *out = (uint16_t)(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }

  template <typename T>
  void embed(const Kernels& k, const Step& s) const {
    int64_t d = layers[0].qkv.d;
    for (int64_t t = 0; t < s.tokens; t++) {
      const T* token = (const T*)token_embedding + s.ids[t] * d;
      T* out = (T*)s.out + t * d;
      if (token_embedding_format) {
        k.quantised_row(token_embedding, *token_embedding_format, s.ids[t], d, out);
        token = out;
      }
      if (!position_embedding) {
        if (embedding_scale != 1)
          for (int64_t i = 0; i < d; i++) put(to_float(token[i]) * embedding_scale, out + i);
        else if (token != out) std::memcpy(out, token, d * sizeof(T));
        continue;
      }
      const T* position = (const T*)position_embedding + s.positions[t] * d;
      for (int64_t i = 0; i < d; i++) put(to_float(token[i]) * embedding_scale + to_float(position[i]), out + i);
    }
  }

  static const int32_t* runs_of_tokens(const Step& s, Scratch& own) {
    int32_t* run_of = own.take<int32_t>(s.tokens);
    for (int64_t t = 0; t < s.tokens; t++) run_of[t] = -1;
    for (int64_t run = 0; run < s.run_count; run++)
      for (int64_t i = 0; i < s.runs[run].count; i++) run_of[s.runs[run].first + i] = (int32_t)run;
    return run_of;
  }

  static int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }

  // What lies between the kernels, a row for each token.
  struct Buffers {
    int64_t qkv_bytes;    // of a row of queries, keys and values
    int64_t heads_bytes;  // of a row of attended heads
    char* normed;         // what attention or the FFN takes
    char* qkv;            // queries, keys and values
    char* heads;          // attended heads
    char* middle;         // between attention and the FFN
    ChunkAttention* chunks;
    Buffers(const DecoderLayer& layer, const Step& s, int is_bf16, Scratch& own) {
      int64_t element = is_bf16 ? 2 : 4;
      qkv_bytes = layer.qkv.n * element, heads_bytes = layer.out.d * element;
      normed = own.take<char>(s.tokens * layer.qkv.d * element);
      qkv = own.take<char>(s.tokens * qkv_bytes);
      heads = own.take<char>(s.tokens * heads_bytes);
      middle = own.take<char>(s.tokens * layer.out.n * element);
      chunks = own.take<ChunkAttention>(s.chunk_count);
    }
  };

  // One layer's calls, but for what they read of the cache.
  struct Calls {
    Norm entry{};            // before attention; as all norms here: without x there is none
    Norm attended{};         // behind attention
    Norm between{};          // before the FFN
    Norm exit{};             // behind the FFN
    Linear qkv;              // to queries, keys and values
    Linear out;              // from the attended heads
    StoreKv store{};         // keys and values into their blocks
    Attention single{};      // of sequences of one token and of a few
    ChunkAttention chunk{};  // of several tokens of one, but for what it is
    Ffn ffn{};               // the layer's, where it is no mixture
    Moe moe{};               // the layer's, where it is one

    // All of a step's that are not of a few tokens, one behind the other.
    const ChunkAttention* chunks_of(const Step& s, const Buffers& to) const {
      for (int64_t j = s.drafted_count; j < s.chunk_count; j++) {
        const Chunk& own = s.chunks[j];
        ChunkAttention& call = to.chunks[j] = chunk;
        call.q = to.qkv + own.start * to.qkv_bytes, call.out = to.heads + own.start * to.heads_bytes;
        call.table = single.tables + own.row * s.width;
        call.count = own.length, call.context = own.context, call.others = s.chunk_count - 1 - j;
      }
      return to.chunks + s.drafted_count;
    }

    void bind_outputs(const LayerOutputs& outputs) {
      ffn.grouped = (int)outputs.grouped, ffn.picks = (int32_t*)outputs.picks;
      ffn.weights = (float*)outputs.weights, ffn.signal = (float*)outputs.signal;
      moe.picks = (int32_t*)outputs.picks, moe.weights = (float*)outputs.weights;
    }

    void adapt(const Adapted& adapted) {
      qkv.adapted = out.adapted = ffn.adapted = moe.adapted = adapted;
      qkv.module = Q, qkv.modules = O - Q, out.module = O, out.modules = 1;
    }

    Calls(const DecoderLayer& layer, const Step& s, const Buffers& to, Scratch& scratch)
        : qkv(layer.qkv), out(layer.out) {
      const void *taken = to.normed, *fed = to.normed;  // what attention and the FFN take
      const void *around_attention = s.out, *around_ffn = to.middle;
      void *after_attention = to.middle, *after_ffn = s.out;
      auto norm = [&](const Norm& weights, const void* x, const void* residual, void* to) {
        Norm own = weights;
        own.x = x, own.residual = residual, own.out = to, own.batch = s.tokens, own.d = layer.qkv.d;
        own.threads = s.threads;
        return own;
      };
      if (layer.norms == AFTER) {
        taken = s.out, fed = to.middle;
        around_attention = around_ffn = nullptr, after_attention = after_ffn = to.normed;
        between = norm(layer.attention_norm, to.normed, s.out, to.middle);
        exit = norm(layer.ffn_norm, to.normed, to.middle, s.out);
      } else if (layer.norms == AROUND) {
        around_attention = around_ffn = nullptr, after_attention = to.normed;
        entry = norm(layer.attention_norm, s.out, nullptr, to.normed);
        attended = norm(layer.attended_norm, to.normed, s.out, to.middle);
        between = norm(layer.ffn_norm, to.middle, nullptr, to.normed);
        exit = norm(layer.fed_norm, s.out, to.middle, s.out);
      } else {
        entry = norm(layer.attention_norm, s.out, nullptr, to.normed);
        if (layer.norms == BEFORE) between = norm(layer.ffn_norm, to.middle, nullptr, to.normed);
        if (layer.norms == PARALLEL) between = norm(layer.ffn_norm, s.out, nullptr, to.normed);
      }
      qkv.x = taken, qkv.out = to.qkv, out.x = to.heads, out.out = after_attention, out.residual = around_attention;
      for (Linear* linear : {&qkv, &out})
        linear->batch = s.tokens, linear->threads = s.threads, linear->scratch = &scratch;
      store.qkv = to.qkv, store.cos_sin_cache = layer.cos_sin_cache, store.positions = s.positions;
      store.norm = layer.qk_norm, store.turned = layer.turned;
      store.blocks = s.slot_blocks + layer.table * s.slot_stride, store.offsets = s.slot_offsets;
      store.tokens = s.tokens;
      store.heads = layer.heads, store.kv_heads = layer.kv_heads, store.size = layer.size, store.block = s.block;
      single.q = to.qkv, single.tables = s.tables + layer.table * s.table_stride;
      single.contexts = s.contexts, single.out = to.heads;
      single.drafted = s.chunks, single.drafted_count = s.drafted_count;
      single.batch = s.decodes, single.q_stride = qkv.n, single.width = s.width, single.kv_heads = layer.kv_heads;
      single.group = layer.heads / layer.kv_heads, single.size = layer.size, single.block = s.block;
      single.scale = layer.scale;
      chunk.q_stride = qkv.n, chunk.kv_heads = layer.kv_heads, chunk.group = single.group, chunk.size = layer.size;
      chunk.block = s.block, chunk.scale = layer.scale;
      single.value_size = chunk.value_size = layer.value_size, single.window = chunk.window = layer.window;
      single.cap = chunk.cap = layer.cap;
      store.int8_kv = single.int8_kv = chunk.int8_kv = s.int8_kv;
      store.threads = single.threads = chunk.threads = s.threads;
      single.scratch = chunk.scratch = &scratch;
      if (layer.ffn) {
        ffn = *layer.ffn;
        ffn.x = fed, ffn.residual = around_ffn, ffn.out = after_ffn, ffn.batch = s.tokens, ffn.threads = s.threads;
        ffn.phase_ns = s.phase_ns ? s.phase_ns + STACK_PHASES : nullptr;
        ffn.scratch = &scratch;
      } else {
        moe = *layer.moe;
        moe.x = fed, moe.residual = around_ffn, moe.out = after_ffn, moe.batch = s.tokens, moe.threads = s.threads;
        moe.scratch = &scratch;
      }
    }
  };
};

}  // namespace dsc
