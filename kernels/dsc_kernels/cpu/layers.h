// What layers share, and the short ones. One call is one parallel region, with a barrier only where threads need each
// other's results.
//
// In small batches the threads share each product by its outputs, so that every weight is streamed once. In larger ones they
// share the tokens: each takes chunks through all phases by itself, with intermediate results that stay in its cache.
#pragma once

#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "api.h"
#include "attention.h"
#include "contract.h"
#include "namespace.h"
#include "norm.h"
#include "products.h"

DSC_KERNELS_BEGIN

constexpr int64_t SMALL_SHARE = 12;        // tokens for each of at least two threads up to which they share weights …
constexpr int64_t SMALL_TILED_SHARE = 64;  // … that tiles multiply: reading them is most of what takes time
constexpr int64_t CHUNK_TOKENS = 96;      // that a thread takes at a time beyond: their logits stay in its cache …
constexpr int64_t TILED_CHUNK_TOKENS = 192;  // … and that tiles multiply: in less time than weights take to be read
constexpr int64_t READ_ALONE = 4;         // tokens that one thread reads in less time than waiting for another takes
constexpr int64_t TASKS_PER_THREAD = 16;  // of attention, so that the threads end together

INLINE int64_t round_up_2(int64_t d) { return (d + 1) / 2 * 2; }

// Where share i of n of `size` things begins.
INLINE int64_t split_point(int64_t size, int64_t i, int64_t n) { return size * i / n; }

template <typename T>
INLINE bool in_tiles() {
#if defined(__AVX512BF16__)
  return sizeof(T) == 2 && tiles_in_use;
#endif
  return false;
}

template <typename T>
INLINE bool is_small(int64_t batch, int threads) {
  return batch <= (in_tiles<T>() ? SMALL_TILED_SHARE : SMALL_SHARE) * (threads > 2 ? threads : 2);
}

// Tokens that one thread takes at a time of a batch that is not small: as even as the threads allow.
template <typename T>
INLINE int64_t chunk_of(int64_t batch, int threads) {
  int64_t most = in_tiles<T>() ? TILED_CHUNK_TOKENS : CHUNK_TOKENS;
  int64_t share = (batch + threads - 1) / threads, rounds = (share + most - 1) / most;
  return (share + rounds - 1) / rounds;
}

// A thread's time by phase, where somebody wants to know.
struct PhaseTimer {
  int64_t* phase_ns;  // the thread's own, or null
  int64_t last;       // when the phase before ended
  static INLINE int64_t now() { return (int64_t)(1e9 * omp_get_wtime()); }
  INLINE PhaseTimer(int64_t* all, int64_t phases, int64_t id)
      : phase_ns(all ? all + id * phases : nullptr), last(all ? now() : 0) {}
  INLINE void end(int phase) {
    if (!phase_ns) return;
    int64_t time = now();
    phase_ns[phase] += time - last;
    last = time;
  }
};

template <typename T>
constexpr bool converts() {
  return sizeof(typename Input<T>::type) != sizeof(T);
}

// x as the tiles want it: itself, or a copy in `room` [count, round_up_2(d)] where the type or an odd width asks for one.
template <typename T>
INLINE const typename Input<T>::type* pack_inputs(const void* x, int64_t first, int64_t count, int64_t d,
                                                  typename Input<T>::type* room) {
  typedef typename Input<T>::type I;
  const T* rows = (const T*)x + first * d;
  if (!converts<T>() && (sizeof(T) == 4 || d % 2 == 0)) return (const I*)(const void*)rows;
  I* out = room;
  int64_t width = round_up_2(d);
  for (int64_t t = 0; t < count; t++) {
    for (int64_t i = 0; i < d; i++) {
      if (converts<T>()) put(&out[t * width + i], to_float(rows[t * d + i]));
      else memcpy(&out[t * width + i], &rows[t * d + i], sizeof(T));
    }
    if (width > d) out[t * width + d] = 0;
  }
  return out;
}

template <typename T>
INLINE int64_t row_stride(int64_t d) {
  return sizeof(T) == 4 ? d : (converts<T>() || d % 2 ? round_up_2(d) : d);
}

// Products read pairs: the column after an odd width must hold a number, and 0 keeps it from mattering.
template <typename I>
INLINE void clear_padding(I* rows, int64_t count, int64_t width) {
  if (width % 2)
    for (int64_t t = 0; t < count; t++) rows[t * round_up_2(width) + width] = 0;
}

template <typename T, typename O>
INLINE void linear_as(const Linear& a) {
  typedef typename Input<T>::type I;
  const I* rows = pack_inputs<T>(a.x, 0, a.batch, a.d, a.scratch->take<I>(a.batch * round_up_2(a.d)));
  Inputs<T> x = {rows, row_stride<T>(a.d)};
  x.bytes.take(*a.scratch, a.batch, a.d, {a.w_format});
  bool alone = a.batch <= READ_ALONE;
  if (a.w_format && alone) x.bytes.round_tokens((const T*)a.x, a.d, 0, a.batch, a.d);
  int64_t panels = panel_count(a.n);
  bool by_tokens = !is_small<T>(a.batch, a.threads);
  int64_t chunk = by_tokens ? chunk_of<T>(a.batch, a.threads) : a.batch;
  const Branch branch(a.adapted, a.module, a.modules, sizeof(T) == 2, a.batch, *a.scratch);
  const Matrix w(a.w, a.w_format);
#pragma omp parallel num_threads(a.threads)
  {
    int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
    Epilogue e = {a.bias, a.activation, nullptr, nullptr, a.residual, a.n};
    if (a.w_format && !alone) {
      x.bytes.round_tokens((const T*)a.x, a.d, split_point(a.batch, id, n), split_point(a.batch, id + 1, n), a.d);
#pragma omp barrier
    }
    if (!by_tokens) {
      if (branch.adapted) {
        e.branch = &branch;
        contract<T>(x.rows, x.stride, a.batch, a.d, id, n, branch);
      }
      gemm<T, O>(w, x, nullptr, a.batch, a.d, a.n, e, (O*)a.out, split_point(panels, id, n),
                 split_point(panels, id + 1, n));
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < a.batch; t += chunk) {
        int64_t count = a.batch - t < chunk ? a.batch - t : chunk;
        e.residual = a.residual ? (const O*)a.residual + t * a.n : nullptr;
        const Branch own = branch.from(t);
        if (own.adapted) {
          e.branch = &own;
          contract<T>(x.from(t).rows, x.stride, count, a.d, 0, 1, own);
        }
        gemm<T, O>(w, x.from(t), nullptr, count, a.d, a.n, e, (O*)a.out + t * a.n, 0, panels);
      }
    }
  }
}

template <typename T>
void linear(const Linear& a) {
  if (a.float_out) linear_as<T, float>(a);
  else linear_as<T, T>(a);
}

template <typename T>
void attention(const Attention& a) {
  const AttendUnits units(a);
  int64_t pairs = units.count * a.kv_heads,
          runs = TASKS_PER_THREAD * a.threads < pairs ? TASKS_PER_THREAD * a.threads : pairs;
  int64_t states = units.most * a.group * softmax_state_bytes(a.value_size);
  int64_t own_bytes = states + (a.int8_kv ? wide_bytes<T>(a.size) : 0);
  char* room = a.scratch->take<char>(a.threads * own_bytes);
#pragma omp parallel num_threads(a.threads)
  {
    char* own = room + omp_get_thread_num() * own_bytes;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < runs; i++) {
      int64_t first = split_point(pairs, i, runs);
      int64_t count = split_point(pairs, i + 1, runs) - first;
      if (a.int8_kv) attend<T, true>(units, first, count, own);
      else attend<T, false>(units, first, count, own);
    }
  }
}

constexpr int64_t EARLIER = 8;  // tokens between asking for a row of the KV cache and writing to it

// A token's heads, in place, but for the first `skipped` numbers of each.
template <typename T>
INLINE void norm_heads(T* x, const T* weight, int64_t heads, int64_t size, int64_t skipped, const QkNorm& n) {
  int64_t rows = n.together ? 1 : heads, width = n.together ? heads * size : size;
  for (int64_t i = 0; i < rows; i++) {
    T* head = x + i * width + skipped;
    norm_row<T>(head, weight, nullptr, nullptr, width - skipped, n.eps, head);
  }
}

template <typename T>
void store_kv(const StoreKv& a) {
  int64_t row = (a.heads + (a.values ? 2 : 1) * a.kv_heads) * a.size;
  int64_t bytes = a.int8_kv ? a.size + SCALE_BYTES : a.size * (int64_t)sizeof(T);  // of a row of the cache
  auto row_at = [&](int64_t t, int64_t h) __attribute__((always_inline)) {
    return ((a.blocks[t] * a.kv_heads + h) * a.block + a.offsets[t]) * bytes;
  };
  auto prefetch_rows_of = [&](int64_t t) __attribute__((always_inline)) {
    for (int64_t h = 0; h < a.kv_heads; h++)
      for (int64_t c = 0; c < bytes; c += 64) {
        __builtin_prefetch((char*)a.keys + row_at(t, h) + c, 1);
        if (a.values) __builtin_prefetch((char*)a.values + row_at(t, h) + c, 1);
      }
  };
  for (int64_t t = 0; t < EARLIER && t < a.tokens; t++) prefetch_rows_of(t);
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.tokens * row > 1 << 18)
  for (int64_t t = 0; t < a.tokens; t++) {
    T* own = (T*)a.qkv + t * row;
    if (t + EARLIER < a.tokens) prefetch_rows_of(t + EARLIER);
    if (a.norm.query) norm_heads(own, (const T*)a.norm.query, a.heads, a.size, 0, a.norm);
    if (a.norm.key)
      norm_heads(own + a.heads * a.size, (const T*)a.norm.key, a.kv_heads, a.size, a.norm.skipped, a.norm);
    if (a.cos_sin_cache) {
      const float* cosines = a.cos_sin_cache + a.positions[t] * a.turned;
      for (int64_t h = 0; h < a.heads + a.kv_heads; h++)
        rotate(own + h * a.size, cosines, cosines + a.turned / 2, a.turned);
    }
    for (int64_t h = 0; h < a.kv_heads; h++) {
      char *key = (char*)a.keys + row_at(t, h), *value = a.values ? (char*)a.values + row_at(t, h) : nullptr;
      const T *from = own + (a.heads + h) * a.size, *other = from + a.kv_heads * a.size;
      if (a.int8_kv) {
        narrow_row(from, a.size, (int8_t*)key);
        if (value) narrow_row(other, a.size, (int8_t*)value);
      } else {
        memcpy(key, from, bytes);
        if (value) memcpy(value, other, bytes);
      }
    }
  }
}

DSC_KERNELS_END
