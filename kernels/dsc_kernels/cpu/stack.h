// A step's tokens through the embedding and all blocks of a decoder in one call, by an instruction set's kernels.
#pragma once

#include <chrono>
#include <cstring>
#include <vector>

#include "api.h"

// What a block's weights are; each call fills in the rest.
struct Block {
  Norm before_attention{}, before_ffn{};
  Linear qkv{}, output{};
  const float* angles = nullptr;  // as in StoreKv
  int64_t heads = 0, kv_heads = 0, size = 0;
  float scale = 0;
  const Ffn* ffn = nullptr;  // one of these two
  const Moe* moe = nullptr;
};

// Several new tokens of the sequence in a row of the tables.
struct Chunk {
  int64_t row, start, length, context;
};

// What an FFN layer is asked for besides its output, as in Ffn.
struct Asked {
  int64_t grouped, picks, weights, signal;
};

enum StackPhase { EMBEDDING, NORMS, PROJECTIONS, KV_WRITES, ATTENDING, FFN, STACK_PHASES = 8 };

struct Step {
  void* out;  // [tokens, d]
  const int64_t *ids, *positions, *blocks, *offsets;  // [tokens]
  const int64_t* tables;                        // [sequences, pages], rows `width` apart
  const int64_t* contexts;                      // [sequences]
  const Chunk* chunks;                          // the tokens behind the first `decodes`, which are one per sequence
  const int64_t (*pools)[2];                    // per block: addresses of its keys and values
  const Asked* asked;                           // per block, or null
  int64_t* laps;  // [STACK_PHASES] nanoseconds to add to, then each thread's in FFN layers; or null
  int64_t tokens, sequences, pages, width, block, pool, decodes, longest, chunk_count;
  int threads;
};

class Stack {
 public:
  static constexpr const char* name = "dsc_kernels.stack";
  std::vector<Block> blocks;
  const void *words = nullptr, *places = nullptr;  // embeddings of tokens and, where they are learned, of positions
  int64_t vocabulary = 0, positions = 0;           // how many there are
  int half = 0;

  // Bytes of scratch that a step needs.
  int64_t scratch_bytes(const Kernels& k, const Step& s) const {
    int64_t most = 0;
    for (size_t i = 0; i < blocks.size(); i++) {
      const Block& b = blocks[i];
      Calls c(b, s, *this, nullptr);
      auto need = [&most](int64_t bytes) { most = bytes > most ? bytes : most; };
      need(k.norm_scratch(c.norm));
      need(k.linear_scratch(c.qkv));
      need(k.linear_scratch(c.output));
      need(k.store_kv_scratch(c.store));
      need(k.attention_scratch(c.single));
      for (int64_t j = 0; j < s.chunk_count; j++) {
        c.chunk.count = s.chunks[j].length, c.chunk.context = s.chunks[j].context;
        need(k.chunk_attention_scratch(c.chunk));
      }
      if (b.ffn) c.ask(s, i), need(k.ffn_scratch(c.ffn));
      if (b.moe) need(k.moe_scratch(c.moe));
    }
    return Buffers(blocks[0], s, half, nullptr).bytes + most;
  }

  void run(const Kernels& k, const Step& s, char* scratch) const {
    Buffers buffers(blocks[0], s, half, scratch);
    int64_t last = s.laps ? now() : 0;
    auto lap = [&](StackPhase phase) {
      if (!s.laps) return;
      int64_t time = now();
      s.laps[phase] += time - last;
      last = time;
    };
    if (half)
      embed<uint16_t>(s);
    else
      embed<float>(s);
    lap(EMBEDDING);
    for (size_t i = 0; i < blocks.size(); i++) {
      const Block& b = blocks[i];
      Calls c(b, s, *this, scratch);
      c.norm.x = s.out;
      k.norm(c.norm);
      lap(NORMS);
      k.linear(c.qkv);
      lap(PROJECTIONS);
      c.store.keys = (void*)s.pools[i][0], c.store.values = (void*)s.pools[i][1];
      k.store_kv(c.store);
      lap(KV_WRITES);
      c.single.keys = c.chunk.keys = c.store.keys, c.single.values = c.chunk.values = c.store.values;
      if (s.decodes) k.attention(c.single);
      for (int64_t j = 0; j < s.chunk_count; j++) {
        const Chunk& chunk = s.chunks[j];
        c.chunk.q = buffers.rows + chunk.start * buffers.row;
        c.chunk.out = buffers.heads + chunk.start * buffers.head_row;
        c.chunk.table = s.tables + chunk.row * s.width;
        c.chunk.count = chunk.length, c.chunk.context = chunk.context;
        k.chunk_attention(c.chunk);
      }
      lap(ATTENDING);
      c.output.residual = s.out;
      k.linear(c.output);
      lap(PROJECTIONS);
      c.norm.x = buffers.middle, c.norm.weight = b.before_ffn.weight, c.norm.bias = b.before_ffn.bias;
      c.norm.eps = b.before_ffn.eps;
      k.norm(c.norm);
      lap(NORMS);
      if (b.ffn) {
        c.ask(s, i);
        k.ffn(c.ffn);
      } else {
        k.moe(c.moe);
      }
      lap(FFN);
    }
  }

 private:
  static float wide(float x) { return x; }
  static float wide(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static void narrow(float x, float* out) { *out = x; }
  static void narrow(float x, uint16_t* out) {  // to nearest even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    *out = (uint16_t)(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }

  template <typename T>
  void embed(const Step& s) const {
    int64_t d = blocks[0].qkv.d;
    for (int64_t t = 0; t < s.tokens; t++) {
      const T* word = (const T*)words + s.ids[t] * d;
      T* out = (T*)s.out + t * d;
      if (!places) {
        std::memcpy(out, word, d * sizeof(T));
        continue;
      }
      const T* place = (const T*)places + s.positions[t] * d;
      for (int64_t i = 0; i < d; i++) narrow(wide(word[i]) + wide(place[i]), out + i);
    }
  }

  static int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }

  // Intermediate results; what is left of the scratch is the kernels'.
  struct Buffers {
    int64_t row, head_row, bytes = 0;  // bytes of a token's queries, keys and values, and of its attended heads
    char *normed, *rows, *heads, *middle;
    Buffers(const Block& b, const Step& s, int half, char* scratch) {
      int64_t element = half ? 2 : 4;
      row = b.qkv.n * element, head_row = b.output.d * element;
      auto take = [&](int64_t width) {
        char* start = scratch + bytes;
        bytes += (s.tokens * width + 63) / 64 * 64;
        return start;
      };
      normed = take(b.qkv.d * element), rows = take(row), heads = take(head_row), middle = take(b.output.n * element);
    }
  };

  struct Calls {
    Norm norm;
    Linear qkv, output;
    StoreKv store{};
    Attention single{};
    ChunkAttention chunk{};
    Ffn ffn{};
    Moe moe{};
    void ask(const Step& s, size_t block) {
      if (!s.asked) return;
      const Asked& asked = s.asked[block];
      ffn.grouped = (int)asked.grouped, ffn.picks = (int32_t*)asked.picks;
      ffn.weights = (float*)asked.weights, ffn.signal = (float*)asked.signal;
    }
    Calls(const Block& b, const Step& s, const Stack& stack, char* scratch)
        : norm(b.before_attention), qkv(b.qkv), output(b.output) {
      Buffers to(b, s, stack.half, scratch);
      char* own = scratch + to.bytes;
      norm.out = to.normed, norm.batch = s.tokens, norm.d = qkv.d;
      qkv.x = to.normed, qkv.out = to.rows, output.x = to.heads, output.out = to.middle;
      for (Linear* linear : {&qkv, &output}) linear->batch = s.tokens, linear->threads = s.threads, linear->scratch = own;
      store.qkv = to.rows, store.angles = b.angles, store.positions = s.positions, store.blocks = s.blocks;
      store.offsets = s.offsets, store.tokens = s.tokens, store.heads = b.heads, store.kv_heads = b.kv_heads;
      store.size = b.size, store.block = s.block;
      single.q = to.rows, single.tables = s.tables, single.contexts = s.contexts, single.out = to.heads;
      single.batch = s.decodes, single.q_stride = qkv.n, single.width = s.width, single.kv_heads = b.kv_heads;
      single.group = b.heads / b.kv_heads, single.size = b.size, single.block = s.block;
      single.scale = b.scale;
      chunk.q_stride = qkv.n, chunk.kv_heads = b.kv_heads, chunk.group = single.group, chunk.size = b.size;
      chunk.block = s.block, chunk.scale = b.scale;
      norm.threads = store.threads = single.threads = chunk.threads = s.threads;
      norm.scratch = store.scratch = single.scratch = chunk.scratch = own;
      if (b.ffn) {
        ffn = *b.ffn;
        ffn.x = to.normed, ffn.residual = to.middle, ffn.out = s.out, ffn.batch = s.tokens, ffn.threads = s.threads;
        ffn.laps = s.laps ? s.laps + STACK_PHASES : nullptr;
        ffn.scratch = own;
      } else {
        moe = *b.moe;
        moe.x = to.normed, moe.residual = to.middle, moe.out = s.out, moe.batch = s.tokens, moe.threads = s.threads;
        moe.scratch = own;
      }
    }
  };
};
