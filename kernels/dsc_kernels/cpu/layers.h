// What layers share, and the short ones. One call is one parallel region, with a barrier only where threads need each
// other's results.
//
// Up to SMALL tokens the threads share each product by its outputs, so that every weight is streamed once. Beyond, they
// share the tokens: each takes chunks through all phases by itself, with intermediate results that stay in its cache.
#pragma once

#include "attention.h"
#include "gemm.h"

constexpr int64_t SMALL = 24, CHUNK = 96, RUNS = 16;

INLINE int64_t even(int64_t d) { return (d + 1) / 2 * 2; }

INLINE int64_t part(int64_t size, int64_t i, int64_t n) { return size * i / n; }

// Tokens that one thread takes at a time beyond SMALL: as even as the threads allow.
INLINE int64_t chunk_of(int64_t batch, int threads) {
  int64_t share = (batch + threads - 1) / threads;
  int64_t rounds = (share + CHUNK - 1) / CHUNK;
  return (share + rounds - 1) / rounds;
}

// A thread's time by phase, where somebody wants to know.
struct Laps {
  int64_t* spent;
  int64_t last;
  static INLINE int64_t now() { return (int64_t)(1e9 * omp_get_wtime()); }
  INLINE Laps(int64_t* all, int64_t phases, int64_t id)
      : spent(all ? all + id * phases : nullptr), last(all ? now() : 0) {}
  INLINE void end(int phase) {
    if (!spent) return;
    int64_t time = now();
    spent[phase] += time - last;
    last = time;
  }
};

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

// Products read pairs: the column after an odd width must hold a number, and 0 keeps it from mattering.
template <typename I>
INLINE void clear_padding(I* rows, int64_t count, int64_t width) {
  if (width % 2)
    for (int64_t t = 0; t < count; t++) rows[t * even(width) + width] = 0;
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

template <typename T>
int64_t attention_scratch(const Attention& a) {
  return a.threads * a.group * gathered_bytes(a.size);
}

template <typename T>
void attention(const Attention& a) {
  int64_t pairs = a.batch * a.kv_heads, runs = RUNS * a.threads < pairs ? RUNS * a.threads : pairs;
#pragma omp parallel num_threads(a.threads)
  {
    char* own = a.scratch + omp_get_thread_num() * a.group * gathered_bytes(a.size);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < runs; i++) {
      int64_t first = part(pairs, i, runs);
      attend<T>(a, first, part(pairs, i + 1, runs) - first, own);
    }
  }
}

template <typename T>
int64_t store_kv_scratch(const StoreKv&) {
  return 0;
}

constexpr int64_t EARLIER = 8;  // tokens between asking for a place in the pools and writing to it

template <typename T>
void store_kv(const StoreKv& a) {
  int64_t row = (a.heads + 2 * a.kv_heads) * a.size;
  auto place = [&](int64_t t, int64_t h) __attribute__((always_inline)) {
    return ((a.blocks[t] * a.kv_heads + h) * a.block + a.offsets[t]) * a.size;
  };
  auto ask = [&](int64_t t) __attribute__((always_inline)) {
    for (int64_t h = 0; h < a.kv_heads; h++)
      for (int64_t c = 0; c < a.size; c += 64 / (int64_t)sizeof(T)) {
        __builtin_prefetch((T*)a.keys + place(t, h) + c, 1);
        __builtin_prefetch((T*)a.values + place(t, h) + c, 1);
      }
  };
  for (int64_t t = 0; t < EARLIER && t < a.tokens; t++) ask(t);
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.tokens * row > 1 << 18)
  for (int64_t t = 0; t < a.tokens; t++) {
    T* own = (T*)a.qkv + t * row;
    if (t + EARLIER < a.tokens) ask(t + EARLIER);
    if (a.angles) {
      const float* cosines = a.angles + a.positions[t] * a.size;
      for (int64_t h = 0; h < a.heads + a.kv_heads; h++)
        rotate(own + h * a.size, cosines, cosines + a.size / 2, a.size);
    }
    for (int64_t h = 0; h < a.kv_heads; h++) {
      int64_t at = place(t, h);
      memcpy((T*)a.keys + at, own + (a.heads + h) * a.size, a.size * sizeof(T));
      memcpy((T*)a.values + at, own + (a.heads + a.kv_heads + h) * a.size, a.size * sizeof(T));
    }
  }
}
