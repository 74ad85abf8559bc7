// What the module and the instruction sets' translation units agree on. Pointers to weights and activations are to
// float or bfloat16, as the table says; sizes are in elements.
#pragma once

#include <stdint.h>

#include "scratch.h"

namespace dsc {

enum Activation { NONE = 0, GELU = 1, SILU = 2, GELU_TANH = 3 };

constexpr int64_t MAX_RANK = 96 * 256;  // of what is added to a quantised weight: what a token contracts to has room

// How a packed weight of 4 or 8 bits lies in memory, see quantised.h. Python fills it in as int64 numbers.
struct Format {
  int64_t bits, group;
  int64_t centre;     // taken off each level of 4 bits
  int64_t minimums;   // whether each group has one
  int64_t digits;     // of inputs in int8: 1 or 2 (bytes.h)
  int64_t rank;       // of what is added, left · (right · x), at most MAX_RANK; 0: nothing
  const void* left;   // packed [n, rank] in the layer's dtype
  const void* right;  // packed [rank, d]
};

// Rows of int8 in which groups of inputs have scales, and minimums where there are any; filled in alike.
struct RowFormat {
  int64_t group;
  const uint16_t* scales;    // float16 [rows, ⌈d / group⌉]
  const uint16_t* minimums;  // the same, or null
};

// What an adapter adds to one product, to some of its panels: up (scale ⊙ (core (down x))), all but the scale of the
// product's dtype. Adapters on one basis have the same `down` and `up`, and each its own core; others have none.
struct LowRank {
  const void* down;    // packed [inner, d]
  const void* up;      // packed [16 · (end − first), rank]: rows of these panels, 0 where they are none of the module's
  const float* scale;  // [rank], to whole panels with zeros
  const void* core;    // packed [rank, inner]; null: there is none, and rank is inner
  int64_t rank;        // 0: nothing
  int64_t inner;
  int64_t first, end;  // panels
};

// The products of a layer that can be adapted: attention's projections, and those of the MLP that every token takes.
enum AdaptedModule { Q, K, V, O, GATE, UP, DOWN, ADAPTED_MODULES };

// What a tenant of a bank of atoms has of its own in one layer, instead of the layer's; without a bias it has nothing.
struct Tuning {
  const float* bias;   // of the router [panels · 16], −∞ behind the last atom
  const float* gamma;  // [d]
  const float* slack;  // one number: of a screened router's bounds, by this bias
};

// Neighbouring tokens with the same adapter, or the same sum of `parts` adapters.
struct AdapterRun {
  const LowRank* updates;  // [layers, ADAPTED_MODULES, parts]
  const Tuning* tunings;   // [layers] or null
  int64_t parts, first, count;
};

// The adapters of a step's tokens in one layer; run_count 0: nobody has one.
struct Adapted {
  const AdapterRun* runs;  // in the order of their tokens
  int64_t run_count;
  const int32_t* run_of;  // [tokens]: each token's run; −1: none
  int64_t layer;

  // The first of a run's updates of a module; those of the modules after it follow.
  const LowRank* updates(int64_t run, int module) const {
    return runs[run].updates + (layer * ADAPTED_MODULES + module) * runs[run].parts;
  }

  // What the tokens of a run have of their own of a bank; null: nothing.
  const Tuning* tuning(int64_t run) const {
    const Tuning* own = runs[run].tunings ? runs[run].tunings + layer : nullptr;
    return own && own->bias ? own : nullptr;
  }
};

// out = act(x wᵀ + bias) + residual. A weight with a format is packed as that says, here and below; without one it is
// not quantised.
struct Linear {
  const void* x;         // [batch, d], rows contiguous
  const void* w;         // packed [n, d]
  const Format* w_format;
  const float* bias;     // [n] or null
  const void* residual;  // [batch, n] or null
  void* out;             // [batch, n]
  int64_t batch, d, n;
  int activation;  // an Activation
  int float_out;   // whether out, and the residual, are float whatever the weight is
  int threads;
  Adapted adapted;      // adds to x wᵀ
  int module, modules;  // the first of the neighbouring ones that w consists of, and how many
  Scratch* scratch;
};

// What screening has done since its layer was made. Threads add to the first two.
struct ScreenCounters {
  int64_t rescored;        // rows (of a head: panels) that were multiplied again as they are
  int64_t tokens;          // that this was for
  int64_t watched_panels;  // of a head: multiplied again per thread, in the calls that are watched
  int64_t watched_calls;   // of a head: since it was last judged whether screening pays
  int64_t paused_calls;    // of a head: still to be multiplied out before it is tried again
};

// A weight in int8: row j is about steps[j] · (its row of `packed`), with an error of norm errors[j]; see router.h.
// Arrays have panels · 16 elements.
struct Screen {
  const void* rows;       // the weight itself [n, d], row after row, where rows are scored again
  const RowFormat* rows_format;
  const int8_t* packed;   // [n, d]; null: no screening
  const float* steps;     // what 1 in int8 is worth
  const int32_t* shifts;  // 128 · the row's sum, which inputs shifted by 128 add to its products
  const float* errors;    // norms of what int8 leaves out of a row
  const float* norms;     // norms of what it keeps
  float slack;            // of the bias and the last additions
  ScreenCounters* counters;
};

// Where each token's largest output is.
struct Head {
  const void* x;      // [batch, d]
  const void* w;      // packed [n, d]
  const Format* w_format;
  const float* bias;  // [panels · 16], −∞ behind the last output
  Screen screen;
  float max_error;  // of the screen's rows
  float max_norm;
  int64_t* out;  // [batch]
  int64_t batch, d, n;
  int threads;
  Scratch* scratch;
};

// Static MLP plus, where atoms > 0, a routed composition of rank-1 atoms. With rank > 0 the picks are adapters of
// `rank` rows each, weighted by a softmax: a mixture of LoRAs. Without atoms it is a dense FFN.
struct Ffn {
  const void* x;             // [batch, d]
  const void* up;            // packed [hidden, d]
  const void* gate;          // packed [hidden, d] or null
  const void* down;          // packed [d, hidden]
  const Format *up_format, *gate_format, *down_format, *router_format;
  const float* up_bias;      // [hidden] or null
  const float* gate_bias;    // [hidden] or null
  const float* down_bias;    // [d] or null
  const void* router;        // packed [atoms, d], folded with its norm; null where it is screened
  const float* router_bias;  // [panels · 16], −∞ behind the last atom
  Screen screen;
  const void* u;         // [atoms · max(rank, 1), d]
  const void* v;         // [atoms · max(rank, 1), d]
  const RowFormat *u_format, *v_format;
  const float* gamma;    // [d], or one number when scalar
  const void* residual;  // [batch, d] or null
  void* out;             // [batch, d]
  int32_t* picks;        // [batch, k] or null: the atoms picked
  float* weights;        // [batch, k] or null: their coefficients
  float* signal;         // [batch] or null
  int64_t batch, d, hidden, atoms;
  float tau;         // logits are truncated to ±tau
  float eps;         // of the coefficients' denominator
  float norm_eps;    // of the router's norm; < 0: it has none
  int k;             // atoms or adapters picked per token
  int rank;          // rows of an adapter; 0: atoms are picked
  int scalar_gamma;  // whether gamma is one number
  int silent;        // whether gamma is 0: only tokens with a tuning of their own are routed
  int activation;    // an Activation
  int threads;
  int grouped;        // compose each thread's tokens in min-hash order, see grouping.h
  int64_t* phase_ns;  // [threads, FFN_PHASES] nanoseconds to add to, or null
  Adapted adapted;    // of the static MLP
  Scratch* scratch;
};

// What a thread does within an FFN layer: router and norm, static MLP, selection and composition, waiting for others.
enum FfnPhase { ROUTER, STATIC, COMPOSE, WAITING, FFN_PHASES = 8 };

// Experts of which each token picks k, and, where shared_hidden > 0, one that all tokens go through.
struct Moe {
  const void* x;             // [batch, d]
  const void* router;        // packed [experts, d], folded with its norm
  const float* router_bias;  // [experts] or null
  const float* choice_bias;  // [experts] or null: added to scores where experts are picked, and nowhere else
  const void* up;            // packed [hidden, d], one expert after the other
  const void* gate;          // the same, or null
  const void* down;          // packed [d, hidden], one expert after the other
  const Format *router_format, *up_format, *gate_format, *down_format;
  const void* shared_up;     // packed [shared_hidden, d]
  const void* shared_gate;   // the same, or null
  const void* shared_down;   // packed [d, shared_hidden]
  const Format *shared_up_format, *shared_gate_format, *shared_down_format;
  const void* shared_scale;  // [d]: the shared output is multiplied by sigmoid(shared_scale · x); null: it is not
  const void* residual;      // [batch, d] or null
  void* out;                 // [batch, d]
  int32_t* picks;            // [batch, k] or null: gets the experts picked, the best choice first
  float* weights;            // [batch, k] or null: gets their weights
  int64_t batch, d, hidden, experts, shared_hidden;
  float norm_eps;  // of the router's norm; < 0: it has none
  int k;           // experts picked per token
  int normalize;   // whether their weights sum to 1
  int sigmoid;     // whether an expert's score is the sigmoid of its logit, not the softmax over all
  int groups;      // into which experts are divided, 1: not
  int groups_used;  // of these may be picked from, those of the best score
  int group_picks;  // the best experts of a group whose scores, added, are the group's
  float weight_scale;  // what weights are multiplied by
  int activation;  // an Activation
  int threads;
  Adapted adapted;  // of the expert that all tokens go through
  Scratch* scratch;
};

// Several new tokens of a sequence.
struct Chunk {
  int64_t row;      // the sequence's of the tables
  int64_t start;    // its first token of the step
  int64_t length;   // tokens
  int64_t context;  // positions up to the last of them
};

// One new token per sequence, and behind them sequences of a few, each of which gives what it gives alone.
struct Attention {
  const void* q;            // [tokens, kv_heads · group, size], row stride q_stride
  const void* keys;         // KV cache [blocks, kv_heads, block, size]
  const void* values;       // the same
  const int64_t* tables;    // [sequences, width]
  const int64_t* contexts;  // [batch]
  const Chunk* drafted;     // [drafted_count]: the sequences of a few tokens
  void* out;                // [tokens, kv_heads · group, value_size]
  int64_t batch;            // sequences of one token, the first ones
  int64_t drafted_count;
  int64_t q_stride, width, kv_heads;
  int64_t group;       // query heads of a key-value head
  int64_t size;        // of a query and a key
  int64_t value_size;  // of a value; values lie as far apart as keys, and may lie within them
  int64_t block;       // tokens of a block
  int64_t window;      // positions that a token sees, its own the last of them; 0: all
  float scale;
  float cap;    // scores become cap · tanh(score / cap); 0: they stay
  int int8_kv;  // whether the cache is in int8, see kv_int8.h
  int threads;
  Scratch* scratch;
};

// The last `count` tokens of a sequence, each up to itself.
struct ChunkAttention {
  const void* q;         // [count, kv_heads · group, size], row stride q_stride
  const void* keys;      // KV cache [blocks, kv_heads, block, size]
  const void* values;    // the same
  const int64_t* table;  // the sequence's blocks
  void* out;             // [count, kv_heads · group, value_size]
  int64_t count, q_stride, context, kv_heads, group, size, value_size, block, window;  // as in Attention
  float scale, cap;
  int int8_kv;     // whether the cache is in int8
  int64_t others;  // chunks that lie behind this one in memory, which differ in their sequences alone
  int threads;
  Scratch* scratch;
};

// RMSNorm of queries and keys, of each head or of all heads of a token together.
struct QkNorm {
  const void* query;  // [size], together [heads · size]; null: no norm
  const void* key;    // [size], together [kv_heads · size]; null: no norm
  int64_t skipped;    // first numbers of a key that are left out of its norm, which has so many weights fewer
  float eps;
  int together;
};

// New tokens' keys and values go to the KV cache; before, queries and keys are normed, and the first `turned` numbers of
// each head are turned by their position's angle.
struct StoreKv {
  void* qkv;  // [tokens, heads + 2 · kv_heads, size], without values + kv_heads; its queries are changed in place
  QkNorm norm;
  const float* cos_sin_cache;  // [positions, 2, turned / 2]; null: nothing is turned
  int64_t turned;
  const int64_t* positions;    // [tokens]
  const int64_t* blocks;       // [tokens]: each token's KV block
  const int64_t* offsets;      // [tokens]: and its row in there
  void* keys;                  // KV cache [blocks, kv_heads, block, size]
  void* values;                // the same; null: values lie within keys
  int64_t tokens, heads, kv_heads, size, block;
  int int8_kv;  // whether the cache is in int8
  int threads;
};

// RMSNorm, or LayerNorm where there is a bias.
struct Norm {
  const void* x;       // [batch, d]
  const void* weight;  // [d]
  const void* bias;    // [d] or null
  const void* residual;  // [batch, d] or null: added at the end
  void* out;           // [batch, d]
  int64_t batch, d;
  float eps;
  int threads;
};

// A token for each row of logits; see sample.h.
struct Sampling {
  const float* logits;       // [batch, vocabulary]
  const float* temperature;  // [batch]; 0: the most likely token
  const int64_t* top_k;      // [batch]; vocabulary: no limit
  const double* top_p;       // [batch]; 1: no limit
  const float* min_p;        // [batch]; 0: no limit
  const double* u;           // [batch], in [0, 1)
  int64_t* out;              // [batch]
  int64_t batch, vocabulary;
  int threads;
  Scratch* scratch;
};

// The kernels of one dtype.
struct Kernels {
  void (*pack)(const void* w, int64_t n, int64_t d, void* out);
  void (*quantised_row)(const void* packed, const Format& format, int64_t n, int64_t d, void* out);
  void (*linear)(const Linear&);
  void (*argmax)(const Head&);
  void (*ffn)(const Ffn&);
  void (*moe)(const Moe&);
  void (*attention)(const Attention&);
  void (*chunk_attention)(const ChunkAttention&);
  void (*store_kv)(const StoreKv&);
  void (*norm)(const Norm&);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();  // by this machine
  Kernels float32, bfloat16;
  void (*sample)(const Sampling&);
  void (*begin)() = nullptr;  // called when it is chosen
};

extern const InstructionSet amx_set, avx512bf16_set, avx512_set, avx2_set, baseline_set;

}  // namespace dsc
