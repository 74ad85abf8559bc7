// Whole layers in one call: one parallel region, and a barrier only where threads need each other's results.
//
// Up to SMALL tokens the threads share each product by its outputs, so that every weight is streamed once. Beyond, they
// share the tokens: each takes chunks through all phases by itself, with intermediate results that stay in its cache.
#pragma once

#include "attention.h"
#include "compose.h"
#include "gemm.h"
#include "grouping.h"
#include "select.h"

constexpr int64_t SMALL = 24, CHUNK = 192;

INLINE int64_t even(int64_t d) { return (d + 1) / 2 * 2; }

INLINE int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

INLINE int64_t part(int64_t size, int64_t i, int64_t n) { return size * i / n; }

// Tokens that one thread takes at a time beyond SMALL: as even as the threads allow.
INLINE int64_t chunk_of(int64_t batch, int threads) {
  int64_t share = (batch + threads - 1) / threads;
  int64_t rounds = (share + CHUNK - 1) / CHUNK;
  return (share + rounds - 1) / rounds;
}

template <typename T>
constexpr bool converts() {
  return sizeof(typename Input<T>::type) != sizeof(T);
}

// x as the tiles want it: itself, or a copy in `scratch` where the type or an odd width asks for one.
template <typename T>
INLINE const typename Input<T>::type* prepared(const void* x, int64_t first, int64_t count, int64_t d, char* scratch) {
  typedef typename Input<T>::type I;
  const T* rows = (const T*)x + first * d;
  if (!converts<T>() && (sizeof(T) == 4 || d % 2 == 0)) return (const I*)(const void*)rows;
  I* out = (I*)scratch;
  int64_t width = even(d);
  for (int64_t t = 0; t < count; t++) {
    for (int64_t i = 0; i < d; i++) {
      if (converts<T>())
        put(&out[t * width + i], to_float(rows[t * d + i]));
      else
        memcpy(&out[t * width + i], &rows[t * d + i], sizeof(T));
    }
    if (width > d) out[t * width + d] = 0;
  }
  return out;
}

template <typename T>
INLINE int64_t row_stride(int64_t d) {
  return sizeof(T) == 4 ? d : (converts<T>() || d % 2 ? even(d) : d);
}

template <typename T>
int64_t linear_scratch(const Linear& a) {
  return aligned(a.batch * even(a.d) * 4);
}

template <typename T, typename O>
INLINE void linear_as(const Linear& a) {
  const auto* x = prepared<T>(a.x, 0, a.batch, a.d, a.scratch);
  int64_t stride = row_stride<T>(a.d), panels = panel_count(a.n);
  bool by_tokens = a.batch > SMALL;
  int64_t chunk = by_tokens ? chunk_of(a.batch, a.threads) : a.batch;
#pragma omp parallel num_threads(a.threads)
  {
    int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
    Epilogue e = {a.bias, a.activation, nullptr, nullptr, a.residual, a.n};
    if (!by_tokens) {
      gemm<T, O>((const T*)a.w, x, stride, nullptr, a.batch, a.d, a.n, e, (O*)a.out, part(panels, id, n),
                 part(panels, id + 1, n));
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < a.batch; t += chunk) {
        int64_t count = a.batch - t < chunk ? a.batch - t : chunk;
        e.residual = a.residual ? (const O*)a.residual + t * a.n : nullptr;
        gemm<T, O>((const T*)a.w, x + t * stride, stride, nullptr, count, a.d, a.n, e, (O*)a.out + t * a.n, 0, panels);
      }
    }
  }
}

template <typename T>
void linear(const Linear& a) {
  if (a.float_out)
    linear_as<T, float>(a);
  else
    linear_as<T, T>(a);
}

// Intermediate results of an FFN for `tokens` tokens, laid out in one piece of scratch.
template <typename T>
struct FfnBuffers {
  typedef typename Input<T>::type I;
  char* x;
  float *logits, *dynamic, *weights;
  I* hidden;
  uint64_t* keys;  // with weights, picks and order: only where the composition is grouped
  int32_t *picks, *order;
  int64_t logit_stride, hidden_stride;

  static INLINE int64_t bytes(const Ffn& a, int64_t tokens) {
    return aligned(tokens * even(a.d) * 4) + aligned(tokens * panel_count(a.atoms) * LANES * 4) +
           aligned(tokens * a.d * 4) + aligned(tokens * even(a.hidden) * 4) +
           (a.grouped ? aligned(tokens * (2 * 8 + 4 + 8 * a.k)) : 0);
  }
  INLINE FfnBuffers(const Ffn& a, int64_t tokens, char* scratch) {
    logit_stride = a.atoms;
    hidden_stride = even(a.hidden);
    x = scratch;
    logits = (float*)(x + aligned(tokens * even(a.d) * 4));
    dynamic = (float*)((char*)logits + aligned(tokens * panel_count(a.atoms) * LANES * 4));
    hidden = (I*)((char*)dynamic + aligned(tokens * a.d * 4));
    keys = (uint64_t*)((char*)hidden + aligned(tokens * even(a.hidden) * 4));
    order = (int32_t*)(keys + 2 * tokens);
    picks = order + tokens;
    weights = (float*)(picks + tokens * a.k);
  }
};

// Router logits and the static MLP's hidden layer: share `id` of `n` of all their panels together.
template <typename T>
INLINE void ffn_first(const Ffn& a, const FfnBuffers<T>& b, const typename Input<T>::type* x, int64_t count, int64_t id,
                      int64_t n) {
  typedef typename Input<T>::type I;
  int64_t stride = row_stride<T>(a.d), routed = panel_count(a.atoms), width = panel_count(a.hidden);
  // a gated unit costs two panels
  int64_t cost = a.gate ? 2 : 1, total = routed + cost * width;
  int64_t first = part(total, id, n), last = part(total, id + 1, n);
  if (first < routed) {
    Epilogue e = {nullptr, NONE, nullptr, nullptr, nullptr, b.logit_stride};
    gemm<T, float>((const T*)a.router, x, stride, nullptr, count, a.d, a.atoms, e, b.logits, first,
                   last < routed ? last : routed);
  }
  int64_t from = first > routed ? (first - routed) / cost : 0, to = last > routed ? (last - routed) / cost : 0;
  if (id == n - 1) to = width;
  if (from >= to) return;
  Epilogue e = {nullptr, a.activation, nullptr, nullptr, nullptr, b.hidden_stride};
  if (a.gate) {
    gemm<T, I>((const T*)a.gate, x, stride, nullptr, count, a.d, a.hidden, e, b.hidden, from, to);
    e.activation = NONE;
    e.times = b.hidden;
  }
  gemm<T, I>((const T*)a.up, x, stride, nullptr, count, a.d, a.hidden, e, b.hidden, from, to);
}

// Atoms (or adapters) and coefficients [k] of token t, reported where the caller asks for them.
template <typename T>
INLINE void pick(const Ffn& a, const float* logits, int64_t t, float* z, int32_t* picks) {
  float scale = a.norm_eps >= 0 ? reciprocal_std((const T*)a.x + t * a.d, a.d, a.norm_eps) : 1.0f;
  select(logits, scale, a.router_bias, a.atoms, a.k, a.tau, z, picks);
  float signal = 0;
  if (a.rank > 0)
    softmax(z, a.k);
  else
    signal = coefficients(z, a.k, a.eps);
  if (a.picks) memcpy(a.picks + t * a.k, picks, a.k * sizeof *picks);
  if (a.weights) memcpy(a.weights + t * a.k, z, a.k * sizeof *z);
  if (a.signal) a.signal[t] = signal;
}

// Picked adapters become the rows that they consist of, each with its adapter's weight.
INLINE void spread(const Ffn& a, float* z, int32_t* picks) {
  for (int j = a.k * a.rank - 1; j >= 0; j--) {
    z[j] = z[j / a.rank];
    picks[j] = picks[j / a.rank] * a.rank + j % a.rank;
  }
}

// `ffn_route` with the tokens composed in an order in which neighbours share atoms: the same sums, so the same bits.
template <typename T>
INLINE void ffn_route_grouped(const Ffn& a, const FfnBuffers<T>& b, int64_t base, int64_t first, int64_t last) {
  float z[MAX_PICKS];
  int32_t rows[MAX_PICKS];
  int picked = a.rank > 0 ? a.k * a.rank : a.k;
  int64_t own = first - base, count = last - first;
  int32_t *picks = b.picks + own * a.k, *order = b.order + own;
  float* weights = b.weights + own * a.k;
  for (int64_t t = 0; t < count; t++)
    pick<T>(a, b.logits + (own + t) * b.logit_stride, first + t, weights + t * a.k, picks + t * a.k);
  min_hash_order(picks, count, a.k, b.keys + 2 * own, order);
  for (int64_t i = 0; i < count; i++) {
    int64_t t = order[i];
    memcpy(z, weights + t * a.k, a.k * sizeof *z);
    memcpy(rows, picks + t * a.k, a.k * sizeof *rows);
    spread(a, z, rows);
    compose((const T*)a.x + (first + t) * a.d, (const T*)a.u, (const T*)a.v, a.gamma, a.scalar_gamma, rows, z, picked,
            a.d, b.dynamic + (own + t) * a.d);
  }
}

// Selection and composition of tokens first … last − 1 (of the whole batch); buffers begin at token `base`.
template <typename T>
INLINE void ffn_route(const Ffn& a, const FfnBuffers<T>& b, int64_t base, int64_t first, int64_t last) {
  if (a.grouped) return ffn_route_grouped(a, b, base, first, last);
  float values[2][MAX_PICKS];
  int32_t rows[2][MAX_PICKS];
  int picked = a.rank > 0 ? a.k * a.rank : a.k;
  const T *u = (const T*)a.u, *v = (const T*)a.v, *x = (const T*)a.x;
  // one token behind: its rows travel from memory while the next token's atoms are selected
  for (int64_t t = first; t <= last; t++) {
    if (t < last) {
      float* z = values[t & 1];
      int32_t* picks = rows[t & 1];
      pick<T>(a, b.logits + (t - base) * b.logit_stride, t, z, picks);
      spread(a, z, picks);
      prefetch_rows(u, v, picks, picked, a.d);
    }
    if (t > first)
      compose(x + (t - 1) * a.d, u, v, a.gamma, a.scalar_gamma, rows[(t - 1) & 1], values[(t - 1) & 1], picked, a.d,
              b.dynamic + (t - 1 - base) * a.d);
  }
}

// The second product of tokens base … base + count − 1, with everything added: share `id` of `n` of its panels.
template <typename T>
INLINE void ffn_second(const Ffn& a, const FfnBuffers<T>& b, int64_t base, int64_t count, int64_t id, int64_t n) {
  int64_t panels = panel_count(a.d);
  const T* residual = a.residual ? (const T*)a.residual + base * a.d : nullptr;
  Epilogue e = {nullptr, NONE, nullptr, a.atoms > 0 ? b.dynamic : nullptr, residual, a.d};
  gemm<T, T>((const T*)a.down, b.hidden, b.hidden_stride, nullptr, count, a.hidden, a.d, e, (T*)a.out + base * a.d,
             part(panels, id, n), part(panels, id + 1, n));
}

// Products read pairs: the column after an odd width must hold a number, and 0 keeps it from mattering.
template <typename I>
INLINE void clear_padding(I* rows, int64_t count, int64_t width) {
  if (width % 2)
    for (int64_t t = 0; t < count; t++) rows[t * even(width) + width] = 0;
}

template <typename T>
int64_t ffn_scratch(const Ffn& a) {
  if (a.batch <= SMALL) return FfnBuffers<T>::bytes(a, a.batch);
  return FfnBuffers<T>::bytes(a, chunk_of(a.batch, a.threads)) * a.threads;
}

template <typename T>
void ffn(const Ffn& a) {
  if (a.batch <= SMALL) {
    FfnBuffers<T> b(a, a.batch, a.scratch);
    const auto* x = prepared<T>(a.x, 0, a.batch, a.d, b.x);
    clear_padding(b.hidden, a.batch, a.hidden);
#pragma omp parallel num_threads(a.threads)
    {
      int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
      ffn_first<T>(a, b, x, a.batch, id, n);
#pragma omp barrier
      if (a.atoms > 0) {
        ffn_route<T>(a, b, 0, part(a.batch, id, n), part(a.batch, id + 1, n));
#pragma omp barrier
      }
      ffn_second<T>(a, b, 0, a.batch, id, n);
    }
    return;
  }
  int64_t chunk = chunk_of(a.batch, a.threads), bytes = FfnBuffers<T>::bytes(a, chunk);
#pragma omp parallel num_threads(a.threads)
  {
    FfnBuffers<T> b(a, chunk, a.scratch + omp_get_thread_num() * bytes);
    clear_padding(b.hidden, chunk, a.hidden);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < a.batch; t += chunk) {
      int64_t count = a.batch - t < chunk ? a.batch - t : chunk;
      ffn_first<T>(a, b, prepared<T>(a.x, t, count, a.d, b.x), count, 0, 1);
      if (a.atoms > 0) ffn_route<T>(a, b, t, t, t + count);
      ffn_second<T>(a, b, t, count, 0, 1);
    }
  }
}

template <typename T>
int64_t attention_scratch(const Attention& a) {
  return a.threads * aligned(a.group * a.longest * 4);
}

template <typename T>
void attention(const Attention& a) {
  int64_t heads = a.kv_heads * a.group, bytes = aligned(a.group * a.longest * 4);
#pragma omp parallel num_threads(a.threads)
  {
    float* scores = (float*)(a.scratch + omp_get_thread_num() * bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < a.batch * a.kv_heads; i++) {
      int64_t s = i / a.kv_heads, h = i % a.kv_heads;
      attend((const T*)a.q + s * a.q_stride + h * a.group * a.size, (const T*)a.keys, (const T*)a.values,
             a.tables + s * a.width, a.contexts[s], a.block, a.kv_heads, h, a.group, a.size, a.scale, scores,
             (T*)a.out + (s * heads + h * a.group) * a.size);
    }
  }
}

template <typename T>
int64_t store_kv_scratch(const StoreKv&) {
  return 0;
}

template <typename T>
void store_kv(const StoreKv& a) {
  int64_t row = (a.heads + 2 * a.kv_heads) * a.size;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.tokens * row > 1 << 18)
  for (int64_t t = 0; t < a.tokens; t++) {
    T* own = (T*)a.qkv + t * row;
    if (a.angles) {
      const float* cosines = a.angles + a.positions[t] * a.size;
      for (int64_t h = 0; h < a.heads + a.kv_heads; h++)
        rotate(own + h * a.size, cosines, cosines + a.size / 2, a.size);
    }
    for (int64_t h = 0; h < a.kv_heads; h++) {
      int64_t at = ((a.blocks[t] * a.kv_heads + h) * a.block + a.offsets[t]) * a.size;
      memcpy((T*)a.keys + at, own + (a.heads + h) * a.size, a.size * sizeof(T));
      memcpy((T*)a.values + at, own + (a.heads + a.kv_heads + h) * a.size, a.size * sizeof(T));
    }
  }
}
