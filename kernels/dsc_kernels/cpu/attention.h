// Attention of one new token per sequence over its paged keys and values, which are read where they lie.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "api.h"
#include "kv_int8.h"
#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

constexpr int64_t KEYS = 64;  // taken at a time

// Where one sequence's rows of one key-value head lie in a pool [blocks, kv heads, block, size].
struct KvCursor {
  const int64_t* table;
  int64_t kv_heads, head, block, size;
  int64_t seen;  // positions to walk up to
  int64_t at;    // positions behind it
  int64_t page;  // the table's entry it is in
  int64_t line;  // the row of that block it comes to next
  INLINE KvCursor(const int64_t* table, int64_t kv_heads, int64_t head, int64_t block, int64_t size, int64_t first,
                  int64_t seen)
      : table(table), kv_heads(kv_heads), head(head), block(block), size(size), seen(seen), at(first),
        page(first / block), line(first % block) {}
  // Where the next rows begin, at most KEYS; returns how many.
  INLINE int64_t next(int64_t* rows_at) {
    int64_t count = seen - at < KEYS ? seen - at : KEYS;
    for (int64_t i = 0; i < count;) {
      int64_t start = ((table[page] * kv_heads + head) * block + line) * size;
      int64_t run = block - line < count - i ? block - line : count - i;
      for (int64_t j = 0; j < run; j++) rows_at[i + j] = start + j * size;
      i += run, line += run;
      if (line == block) page++, line = 0;
    }
    at += count;
    return count;
  }
};

// Rows needed soon are asked for ahead of time: blocks are too short for the processor to guess the next.
template <typename T>
INLINE void prefetch_kv(const T* pool, const int64_t* rows_at, int64_t count, int64_t size) {
  if (size * sizeof(T) == 128) {
    for (int64_t i = 0; i < count; i++) {
      __builtin_prefetch(pool + rows_at[i], 0, 2);
      __builtin_prefetch(pool + rows_at[i] + size / 2, 0, 2);
    }
    return;
  }
  for (int64_t i = 0; i < count; i++)
    for (int64_t c = 0; c < size; c += 64 / (int64_t)sizeof(T)) __builtin_prefetch(pool + rows_at[i] + c, 0, 2);
}

// What one query head has gathered so far: its sums are over values weighted by e^(score − highest).
struct SoftmaxState {
  float highest, total;
  float sums[];  // [size]; where columns are `paired`, the even ones of 32 and then their odd ones
};

// Of one of several, each of which begins at a cache line.
INLINE int64_t softmax_state_bytes(int64_t size) { return ((int64_t)sizeof(SoftmaxState) + size * 4 + 63) / 64 * 64; }

// Of the keys or the values at hand, where they are widened.
template <typename T>
INLINE int64_t wide_bytes(int64_t size) {
  return (KEYS * size * (int64_t)sizeof(T) + 63) / 64 * 64;
}

template <typename T>
INLINE vf load_up_to(const T* p, int64_t count) {
  return count >= LANES ? load(p) : load_some(p, (int)count);
}

template <typename T>
INLINE void store_up_to(T* p, vf v, int64_t count) {
  count >= LANES ? store(p, v) : store_some(p, v, (int)count);
}

template <typename T>
INLINE void score(const T* q, const T* keys, const int64_t* rows_at, int64_t count, int64_t size, float scale,
                  float* scores) {
  for (int64_t n = 0; n < count; n += LANES) {
    vf products[LANES] = {};
    if (count - n >= LANES) {
      for (int i = 0; i < LANES; i++) products[i] = partial_dot(q, keys + rows_at[n + i], size);
      store(scores + n, scale * sums(products));
    } else {
      for (int64_t i = n; i < n + LANES; i++)
        scores[i] = i < count ? scale * dot(q, keys + rows_at[i], size) : -INFINITY;
    }
  }
}

// Scores bounded by ±cap; those of no key stay what they are.
INLINE void cap_scores(float* scores, int64_t count, float cap) {
  for (int64_t n = 0; n < count; n += LANES) {
    vf s = load(scores + n);
    store(scores + n, s > -INFINITY ? cap * vtanh(s / cap) : s);
  }
}

// The first position that a token sees.
INLINE int64_t first_seen(int64_t position, int64_t window) {
  return window && position >= window ? position - window + 1 : 0;
}

// Scores [count] become weights; returns what the sums so far count yet.
INLINE float softmax_step(float* scores, int64_t count, SoftmaxState& g) {
  vf most = splat(-INFINITY), total = {};
  for (int64_t n = 0; n < count; n += LANES) most = vmax(load(scores + n), most);
  float before = g.highest, now = max_lane(most);
  if (now > before) g.highest = now;
  float base = g.highest > -INFINITY ? g.highest : 0;
  for (int64_t n = 0; n < count; n += LANES) {
    vf e = vexp(load(scores + n) - base);
    store(scores + n, e);
    total += e;
  }
  float rescale = now > before ? vexp(splat(before - base))[0] : 1.0f;
  g.total = g.total * rescale + sum(total);
  return rescale;
}

// A sum of weights as a factor. Where no key has any weight the sums are 0, and stay 0.
INLINE float inverse_of(float total) { return total == 0 ? 0.0f : 1.0f / total; }

// Neighbouring bfloat16 are told apart faster than they are widened in order.
template <typename T>
INLINE bool paired(int64_t size) {
  return sizeof(T) == 2 && size % (4 * LANES) == 0;
}

INLINE void gather_pairs(const float*, const int64_t*, const float*, int64_t, int64_t, float, float*) {}

INLINE void gather_pairs(const bf16* values, const int64_t* rows_at, const float* weights, int64_t count, int64_t size,
                         float rescale, float* sums) {
  for (int64_t c = 0; c < size; c += 4 * LANES) {
    vf acc[4];
    for (int p = 0; p < 4; p++) acc[p] = rescale * load(sums + c + p * LANES);
    for (int64_t i = 0; i < count; i++)
      for (int p = 0; p < 4; p += 2) {
        vf even, odd;
        load_pairs(values + rows_at[i] + c + p * LANES, even, odd);
        acc[p] += weights[i] * even;
        acc[p + 1] += weights[i] * odd;
      }
    for (int p = 0; p < 4; p++) store(sums + c + p * LANES, acc[p]);
  }
}

template <typename T>
INLINE void gather(const T* values, const int64_t* rows_at, const float* weights, int64_t count, int64_t size,
                   float rescale, float* sums) {
  int64_t c = 0;
  for (; c + 4 * LANES <= size; c += 4 * LANES) {
    vf acc[4];
    for (int p = 0; p < 4; p++) acc[p] = rescale * load(sums + c + p * LANES);
    for (int64_t i = 0; i < count; i++)
      for (int p = 0; p < 4; p++) acc[p] += weights[i] * load(values + rows_at[i] + c + p * LANES);
    for (int p = 0; p < 4; p++) store(sums + c + p * LANES, acc[p]);
  }
  for (; c < size; c += LANES) {
    vf acc = rescale * load_up_to(sums + c, size - c);
    for (int64_t i = 0; i < count; i++) acc += weights[i] * load_up_to(values + rows_at[i] + c, size - c);
    store_up_to(sums + c, acc, size - c);
  }
}

INLINE void write_pairs(const SoftmaxState&, int64_t, float*) {}

INLINE void write_pairs(const SoftmaxState& g, int64_t size, bf16* out) {
  vf factor = splat(inverse_of(g.total));
  for (int64_t c = 0; c < size; c += 2 * LANES)
    store_pairs(out + c, load(g.sums + c) * factor, load(g.sums + c + LANES) * factor);
}

template <typename T>
INLINE void write(const SoftmaxState& g, int64_t size, T* out) {
  if (paired<T>(size)) return write_pairs(g, size, out);
  for (int64_t c = 0; c < size; c += LANES) {
    vf sum = load_up_to(g.sums + c, size - c) * inverse_of(g.total);
    store_up_to(out + c, sum, size - c);
  }
}

// `count` (sequence, key-value head) pairs from `first` on, one after the other, each for the query heads of its group.
// room: for a group's states and, INT8, for the keys and values at hand as they are computed with.
template <typename T, bool INT8>
INLINE void attend(const Attention& a, int64_t first, int64_t count, char* room) {
  typedef typename Stored<T, INT8>::type S;
  const S *keys = (const S*)a.keys, *values = (const S*)a.values;
  const int64_t row = INT8 ? a.size + SCALE_BYTES : a.size;
  auto walk = [&](int64_t i) __attribute__((always_inline)) {
    int64_t s = i / a.kv_heads;
    int64_t from = first_seen(a.contexts[s] - 1, a.window);
    return KvCursor(a.tables + s * a.width, a.kv_heads, i % a.kv_heads, a.block, row, from, a.contexts[s]);
  };
  float scores[KEYS];
  int64_t rows_at[2][KEYS], held = 0, wide_at[INT8 ? KEYS : 1];
  T *wide_keys = (T*)(room + a.group * softmax_state_bytes(a.value_size)),
    *wide_values = (T*)((char*)wide_keys + wide_bytes<T>(a.size));
  if constexpr (INT8) in_order(wide_at, KEYS, a.size);
  auto gathered = [&](int64_t g)
                      __attribute__((always_inline)) { return (SoftmaxState*)(room + g * softmax_state_bytes(a.value_size)); };
  KvCursor at = walk(first);
  int64_t rows = at.next(rows_at[0]), next;
  prefetch_kv(keys, rows_at[0], rows, row);
  for (int64_t i = first; i < first + count; i++) {
    const T* q = (const T*)a.q + i / a.kv_heads * a.q_stride + i % a.kv_heads * a.group * a.size;
    for (int64_t g = 0; g < a.group; g++) {
      gathered(g)->highest = -INFINITY, gathered(g)->total = 0;
      memset(gathered(g)->sums, 0, a.value_size * sizeof(float));
    }
    for (bool more = true; more; rows = next, held ^= 1) {
      prefetch_kv(values, rows_at[held], rows, INT8 ? row : a.value_size);
      more = at.at < at.seen;
      if (!more && i + 1 < first + count) at = walk(i + 1);
      next = at.next(rows_at[held ^ 1]);
      prefetch_kv(keys, rows_at[held ^ 1], next, row);
      const T *own_keys, *own_values;
      const int64_t* own_at;
      if constexpr (INT8) {
        widen_rows(keys, rows_at[held], rows, a.size, wide_keys);
        if (a.value_size == a.size) widen_rows(values, rows_at[held], rows, a.size, wide_values);
        own_keys = wide_keys, own_at = wide_at;
        own_values = a.value_size == a.size ? wide_values : wide_keys + (a.size - a.value_size);
      } else {
        own_keys = keys, own_values = values, own_at = rows_at[held];
      }
      for (int64_t g = 0; g < a.group; g++) {
        if (a.size == 64) score(q + g * 64, own_keys, own_at, rows, 64, a.scale, scores);
        else score(q + g * a.size, own_keys, own_at, rows, a.size, a.scale, scores);
        if (a.cap > 0) cap_scores(scores, rows, a.cap);
        float rescale = softmax_step(scores, rows, *gathered(g));
        int64_t width = a.value_size;
        if (paired<T>(width))
          gather_pairs(own_values, own_at, scores, rows, width == 64 ? 64 : width, rescale, gathered(g)->sums);
        else gather(own_values, own_at, scores, rows, width, rescale, gathered(g)->sums);
      }
    }
    T* out = (T*)a.out + i * a.group * a.value_size;
    for (int64_t g = 0; g < a.group; g++) write(*gathered(g), a.value_size, out + g * a.value_size);
  }
}

// Turn the halves of one head [size] by its position's cosines and sines.
template <typename T>
INLINE void rotate(T* head, const float* cosines, const float* sines, int64_t size) {
  int64_t half = size / 2, i = 0;
  T *a = head, *b = head + half;
  for (; i + LANES <= half; i += LANES) {
    vf first = load(a + i), second = load(b + i), c = load(cosines + i), s = load(sines + i);
    store(a + i, first * c - second * s);
    store(b + i, second * c + first * s);
  }
  for (; i < half; i++) {
    float first = to_float(a[i]), second = to_float(b[i]);
    put(a + i, first * cosines[i] - second * sines[i]);
    put(b + i, second * cosines[i] + first * sines[i]);
  }
}

DSC_KERNELS_END
