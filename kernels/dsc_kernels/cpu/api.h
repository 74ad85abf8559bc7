// What the module and the instruction sets' translation units agree on. Pointers to weights and activations are to
// float or bfloat16, as the table says; sizes are in elements.
#pragma once

#include <stdint.h>

struct Linear {
  const void* x;  // [batch, d], rows contiguous
  const void* w;  // packed [n, d]
  const float* bias;
  const void* residual;  // [batch, n] or null
  void* out;             // [batch, n]
  int64_t batch, d, n;
  int activation, float_out, threads;
  char* scratch;
};

// A weight in int8: row j is about steps[j] · (its row of `packed`), with an error of norm errors[j]; see router.h.
// Arrays have panels · 16 elements.
struct Screen {
  const void* rows;       // the weight itself [n, d], row after row, where rows are scored again
  const int8_t* packed;   // [n, d]; null: no screening
  const float* steps;
  const int32_t* shifts;  // 128 · the row's sum, which inputs shifted by 128 add to its products
  const float *errors, *norms;
  float slack;            // of the bias and the last additions
  int64_t* counts;        // rows (of a head: panels) scored again, and the tokens they were of; two more of a head's
};

// Where each token's largest output is.
struct Head {
  const void* x;      // [batch, d]
  const void* w;      // packed [n, d]
  const float* bias;  // [panels · 16], −∞ behind the last output
  Screen screen;
  float largest_error, largest_norm;  // of the screen's rows
  int64_t* out;                       // [batch]
  int64_t batch, d, n;
  int threads;
  char* scratch;
};

// Static MLP plus, where atoms > 0, a routed composition of rank-1 atoms. With rank > 0 the picks are adapters of
// `rank` rows each, weighted by a softmax: a mixture of LoRAs. Without atoms it is a dense FFN.
struct Ffn {
  const void* x;                      // [batch, d]
  const void *up, *gate, *down;       // packed [hidden, d], [hidden, d] or null, [d, hidden]
  const void* router;                 // packed [atoms, d], folded with its norm; null where it is screened
  const float* router_bias;           // [panels · 16], −∞ behind the last atom
  Screen screen;
  const void *u, *v;                  // [atoms · max(rank, 1), d]
  const float* gamma;                 // [d], or one number when scalar
  const void* residual;               // [batch, d] or null
  void* out;                          // [batch, d]
  int32_t* picks;                     // [batch, k] or null: the atoms picked
  float* weights;                     // [batch, k] or null: their coefficients
  float* signal;                      // [batch] or null
  int64_t batch, d, hidden, atoms;
  float tau, eps, norm_eps;           // norm_eps < 0: the router has no norm
  int k, rank, scalar_gamma, activation, threads;
  int grouped;                        // compose each thread's tokens in min-hash order, see grouping.h
  int64_t* laps;                      // [threads, FFN_PHASES] nanoseconds to add to, or null
  char* scratch;
};

// What a thread does within an FFN layer: router and norm, static MLP, selection and composition, waiting for others.
enum FfnPhase { ROUTER, STATIC, COMPOSE, WAITING, FFN_PHASES = 8 };

struct Moe {
  const void* x;             // [batch, d]
  const void* router;        // packed [experts, d], folded with its norm
  const float* router_bias;  // [experts] or null
  const void *up, *gate, *down;  // packed, one expert after the other
  const void* residual;
  void* out;
  int64_t batch, d, hidden, experts;
  float norm_eps;
  int k, normalize, activation, threads;
  char* scratch;
};

// One new token per sequence.
struct Attention {
  const void* q;             // [batch, kv_heads · group, size], row stride q_stride
  const void *keys, *values; // pools [blocks, kv_heads, block, size]
  const int64_t* tables;     // [batch, width]
  const int64_t* contexts;   // [batch]
  void* out;                 // [batch, kv_heads · group, size]
  int64_t batch, q_stride, width, kv_heads, group, size, block;
  float scale;
  int threads;
  char* scratch;
};

// The last `count` tokens of a sequence, each up to itself.
struct ChunkAttention {
  const void* q;              // [count, kv_heads · group, size], row stride q_stride
  const void *keys, *values;  // pools [blocks, kv_heads, block, size]
  const int64_t* table;       // the sequence's blocks
  void* out;                  // [count, kv_heads · group, size]
  int64_t count, q_stride, context, kv_heads, group, size, block;
  float scale;
  int threads;
  char* scratch;
};

// New tokens' keys and values go to the pools, queries and keys turned by their position's angles first.
struct StoreKv {
  void* qkv;                  // [tokens, heads + 2 · kv_heads, size]; its queries are turned in place
  const float* angles;        // [positions, 2, size / 2]: cosines and sines; null: nothing is turned
  const int64_t* positions;   // [tokens]
  const int64_t* blocks;      // [tokens]: each token's block and its row in there
  const int64_t* offsets;
  void *keys, *values;        // pools [blocks, kv_heads, block, size]
  int64_t tokens, heads, kv_heads, size, block;
  int threads;
  char* scratch;
};

// RMSNorm, or LayerNorm where there is a bias.
struct Norm {
  const void* x;       // [batch, d]
  const void* weight;  // [d]
  const void* bias;    // [d] or null
  void* out;           // [batch, d]
  int64_t batch, d;
  float eps;
  int threads;
  char* scratch;
};

// A token for each row of logits [batch, vocabulary]; see sample.h.
struct Sampling {
  const float* logits;
  const float* temperature;
  const int64_t* top_k;
  const double* top_p;
  const float* min_p;
  const double* u;
  int64_t* out;
  int64_t batch, vocabulary;
  int threads;
  char* scratch;
};

struct Kernels {
  void (*pack)(const void* w, int64_t n, int64_t d, void* out);
  void (*linear)(const Linear&);
  void (*largest)(const Head&);
  void (*ffn)(const Ffn&);
  void (*moe)(const Moe&);
  void (*attention)(const Attention&);
  void (*chunk_attention)(const ChunkAttention&);
  void (*store_kv)(const StoreKv&);
  void (*norm)(const Norm&);
  // bytes of scratch that a call needs
  int64_t (*linear_scratch)(const Linear&);
  int64_t (*largest_scratch)(const Head&);
  int64_t (*ffn_scratch)(const Ffn&);
  int64_t (*moe_scratch)(const Moe&);
  int64_t (*attention_scratch)(const Attention&);
  int64_t (*chunk_attention_scratch)(const ChunkAttention&);
  int64_t (*store_kv_scratch)(const StoreKv&);
  int64_t (*norm_scratch)(const Norm&);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  Kernels float32, bfloat16;
  void (*sample)(const Sampling&);
  int64_t (*sample_scratch)(const Sampling&);
};

extern const InstructionSet avx512bf16_set, avx512_set, avx2_set, baseline_set;
