// Attention of one new token per sequence, or of a few, over its paged keys and values, which are read where they lie.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "api.h"
#include "attend_units.h"
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

// The keys and values that come next, which are asked for a few rows at a time while those at hand are computed: blocks
// are too short for the processor to guess the next, and of too many lines at once it waits for the first.
template <typename T>
struct KvAhead {
  const T* keys;
  const T* values;  // null: they lie within the keys
  const int64_t* rows_at;
  int64_t count, size;
  int64_t asked = 0;

  INLINE void ask(int64_t rows) {
    int64_t last = asked + rows < count ? asked + rows : count;
    for (; asked < last; asked++) {
      ask_for(keys + rows_at[asked]);
      if (values) ask_for(values + rows_at[asked]);
    }
  }

 private:
  INLINE void ask_for(const T* row) const {
    constexpr int64_t LINE = 64 / (int64_t)sizeof(T);
    if (size == 2 * LINE) {
      __builtin_prefetch(row, 0, 3);
      __builtin_prefetch(row + LINE, 0, 3);
      return;
    }
    for (int64_t c = 0; c < size; c += LINE) __builtin_prefetch(row + c, 0, 3);
  }
};

// Rows that are asked for while one head scores LANES keys, divided by the heads of a group; scoring takes longer than
// gathering does, where one is asked for with every second value.
constexpr int64_t ASKED_IN_SCORES = 8;

// What one query head has gathered so far: its sums are over values weighted by e^(score − highest).
struct SoftmaxState {
  float highest, total;
  float sums[];  // [size]; where columns are `paired`, the even ones of 32 and then their odd ones
};

// Of one of several, each of which begins at a cache line.
INLINE int64_t softmax_state_bytes(int64_t size) { return ((int64_t)sizeof(SoftmaxState) + size * 4 + 63) / 64 * 64; }

// Of the keys at hand, where they are widened.
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

// ahead: of which so many rows are asked for with every LANES keys.
template <typename T, typename S>
INLINE void score(const T* q, const T* keys, const int64_t* rows_at, int64_t count, int64_t size, float scale,
                  float* scores, KvAhead<S>& ahead, int64_t asks) {
  for (int64_t n = 0; n < count; n += LANES) {
    ahead.ask(asks);
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

// What lies behind the first `count` numbers, to a whole vector.
INLINE void fill_vector(float* x, int64_t count, float value) {
  for (int64_t i = count; i % LANES; i++) x[i] = value;
}

// Scores bounded by ±cap; those of no key stay what they are.
INLINE void cap_scores(float* scores, int64_t count, float cap) {
  for (int64_t n = 0; n < count; n += LANES) {
    vf s = load(scores + n);
    store(scores + n, blend(s > -INFINITY, cap * vtanh(s / cap), s));
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

// Query heads whose sums are gathered at a time, so that a value is widened once for all of them, and vectors of each
// that lie in registers.
#if defined(__AVX512F__)
constexpr int HEADS = 4, GATHERED = 4;
#else
constexpr int HEADS = 2, GATHERED = 2;
#endif

template <typename V>
INLINE vf load_value(const V* p, int64_t count) {
  return load_up_to(p, count);
}

INLINE vf load_value(const int8_t* p, int64_t count) { return count >= LANES ? load_bytes(p) : some_bytes(p, count); }

// The sums of H heads over values; weights of values in int8 count what 1 is worth in their rows.
template <int H, bool PAIRS, typename V, typename S>
INLINE void gather(const V* values, const int64_t* rows_at, const float (*weights)[KEYS], int64_t count, int64_t size,
                   const float* rescale, float* const* sums, KvAhead<S>& ahead) {
  int64_t c = 0;
  for (; c + GATHERED * LANES <= size; c += GATHERED * LANES) {
    vf acc[H][GATHERED];
    for (int h = 0; h < H; h++)
      for (int p = 0; p < GATHERED; p++) acc[h][p] = rescale[h] * load(sums[h] + c + p * LANES);
    for (int64_t i = 0; i < count; i++) {
      if (i % 2 == 0) ahead.ask(1);
      vf row[GATHERED];
      const V* from = values + rows_at[i] + c;
      for (int p = 0; p < GATHERED; p += PAIRS ? 2 : 1) {
        if constexpr (PAIRS) load_pairs(from + p * LANES, row[p], row[p + 1]);
        else row[p] = load_value(from + p * LANES, LANES);
      }
      for (int h = 0; h < H; h++)
        for (int p = 0; p < GATHERED; p++) acc[h][p] += weights[h][i] * row[p];
    }
    for (int h = 0; h < H; h++)
      for (int p = 0; p < GATHERED; p++) store(sums[h] + c + p * LANES, acc[h][p]);
  }
  for (; c < size; c += LANES) {
    int64_t left = size - c;
    vf acc[H];
    for (int h = 0; h < H; h++) acc[h] = rescale[h] * load_up_to(sums[h] + c, left);
    for (int64_t i = 0; i < count; i++) {
      vf row = load_value(values + rows_at[i] + c, left);
      for (int h = 0; h < H; h++) acc[h] += weights[h][i] * row;
    }
    for (int h = 0; h < H; h++) store_up_to(sums[h] + c, acc[h], left);
  }
}

template <bool PAIRS, typename V, typename S>
INLINE void gather(const V* values, const int64_t* rows_at, const float (*weights)[KEYS], int64_t count, int64_t size,
                   int64_t heads, const float* rescale, float* const* sums, KvAhead<S>& ahead) {
  auto of = [&]<int H>() __attribute__((always_inline)) {
    if (size == 64) gather<H, PAIRS>(values, rows_at, weights, count, 64, rescale, sums, ahead);
    else gather<H, PAIRS>(values, rows_at, weights, count, size, rescale, sums, ahead);
  };
  switch (heads) {
    case 1: return of.template operator()<1>();
    case 2: return of.template operator()<2>();
#if defined(__AVX512F__)
    case 3: return of.template operator()<3>();
    case 4: return of.template operator()<4>();
#endif
  }
}

INLINE void write_pairs(const SoftmaxState&, int64_t, float*) {}

INLINE void write_pairs(const SoftmaxState& g, int64_t size, bf16* out) {
  vf factor = splat(inverse_of(g.total));
  for (int64_t c = 0; c < size; c += 2 * LANES)
    store_pairs(out + c, load(g.sums + c) * factor, load(g.sums + c + LANES) * factor);
}

template <typename T>
INLINE void write(const SoftmaxState& g, int64_t size, bool pairs, T* out) {
  if (pairs) return write_pairs(g, size, out);
  for (int64_t c = 0; c < size; c += LANES) {
    vf sum = load_up_to(g.sums + c, size - c) * inverse_of(g.total);
    store_up_to(out + c, sum, size - c);
  }
}

// `count` (unit, key-value head) pairs from `first` on, one after the other, each for its members: the query heads of
// its group, of each of its tokens. What a member gathers does not depend on the others: of keys that it does not see its
// weights are 0.
// room: for the members' states and, INT8, for the keys at hand as they are computed with.
template <typename T, bool INT8>
INLINE void attend(const AttendUnits& units, int64_t first, int64_t count, char* room) {
  typedef typename Stored<T, INT8>::type S;
  const Attention& a = units.a;
  const S *keys = (const S*)a.keys, *values = (const S*)a.values;
  const int64_t row = INT8 ? a.size + SCALE_BYTES : a.size;
  auto walk = [&](int64_t i) __attribute__((always_inline)) {
    AttendUnit u = units[i / a.kv_heads];
    return KvCursor(u.table, a.kv_heads, i % a.kv_heads, a.block, row, first_seen(u.context - 1, a.window), u.seen());
  };
  float key_scales[INT8 ? KEYS : 1], value_scales[INT8 ? KEYS : 1], weights[HEADS][KEYS];
  int64_t rows_at[2][KEYS], held = 0, wide_at[INT8 ? KEYS : 1];
  T* wide_keys = (T*)(room + units.most * a.group * softmax_state_bytes(a.value_size));
  const bool apart = a.value_size == a.size;  // values from keys
  const bool pairs = !(INT8 && apart) && paired<T>(a.value_size);
  if constexpr (INT8) in_order(wide_at, KEYS, a.size);
  auto gathered = [&](int64_t g)
                      __attribute__((always_inline)) { return (SoftmaxState*)(room + g * softmax_state_bytes(a.value_size)); };
  KvCursor at = walk(first);
  int64_t rows = at.next(rows_at[0]), next;
  auto ahead = [&](int64_t held, int64_t rows) __attribute__((always_inline)) {
    return KvAhead<S>{keys, apart ? values : nullptr, rows_at[held], rows, row};
  };
  ahead(0, rows).ask(rows);
  for (int64_t i = first; i < first + count; i++) {
    const AttendUnit u = units[i / a.kv_heads];
    const int64_t head = i % a.kv_heads, members = u.count * a.group, asks = (ASKED_IN_SCORES + members - 1) / members;
    const T* q = (const T*)a.q + u.token * a.q_stride + head * a.group * a.size;
    for (int64_t g = 0; g < members; g++) {
      gathered(g)->highest = -INFINITY, gathered(g)->total = 0;
      memset(gathered(g)->sums, 0, a.value_size * sizeof(float));
    }
    int64_t left = u.context - at.at + rows;  // positions from those at hand on, up to the first token
    for (bool more = true; more; rows = next, held ^= 1, left -= KEYS) {
      more = at.at < at.seen;
      if (!more && i + 1 < first + count) at = walk(i + 1);
      next = at.next(rows_at[held ^ 1]);
      KvAhead<S> later = ahead(held ^ 1, next);
      const T *own_keys, *own_values;
      const int64_t* own_at;
      if constexpr (INT8) {
        widen_levels(keys, rows_at[held], rows, a.size == 64 ? 64 : a.size, wide_keys);
        scales_of(keys, rows_at[held], rows, a.size, key_scales);
        if (apart) scales_of(values, rows_at[held], rows, a.size, value_scales);
        own_keys = wide_keys, own_at = wide_at, own_values = wide_keys + (a.size - a.value_size);
      } else {
        own_keys = keys, own_values = values, own_at = rows_at[held];
      }
      auto weigh = [&](int64_t g, float* scores) __attribute__((always_inline)) {
        int64_t token = g / a.group, seen = left + token < rows ? left + token : rows;
        const T* own = q + token * a.q_stride + (g - token * a.group) * a.size;
        if (seen < rows) memset(scores, 0, KEYS * sizeof(float));
        if (seen <= 0) return 1.0f;
        if (a.size == 64) score(own, own_keys, own_at, seen, 64, a.scale, scores, later, asks);
        else score(own, own_keys, own_at, seen, a.size, a.scale, scores, later, asks);
        if constexpr (INT8) {
          scale_each(scores, key_scales, seen);
          if (seen < rows) fill_vector(scores, seen, -INFINITY);
        }
        if (a.cap > 0) cap_scores(scores, seen, a.cap);
        float rescale = softmax_step(scores, seen, *gathered(g));
        if constexpr (INT8) {
          scale_each(scores, apart ? value_scales : key_scales, seen);
          if (seen < rows) fill_vector(scores, seen, 0);
        }
        return rescale;
      };
      for (int64_t g = 0, heads; g < members; g += heads) {
        float rescale[HEADS], *sums[HEADS];
        heads = members - g < HEADS ? members - g : HEADS;
        for (int64_t h = 0; h < heads; h++) rescale[h] = weigh(g + h, weights[h]), sums[h] = gathered(g + h)->sums;
        if constexpr (INT8) {
          if (apart) {
            gather<false>((const int8_t*)values, rows_at[held], weights, rows, a.size, heads, rescale, sums, later);
            continue;
          }
        }
        if (pairs) gather<sizeof(T) == 2>(own_values, own_at, weights, rows, a.value_size, heads, rescale, sums, later);
        else gather<false>(own_values, own_at, weights, rows, a.value_size, heads, rescale, sums, later);
      }
      later.ask(next);
    }
    for (int64_t g = 0; g < members; g++) {
      int64_t token = g / a.group, of = ((u.token + token) * a.kv_heads + head) * a.group + g - token * a.group;
      write(*gathered(g), a.value_size, pairs, (T*)a.out + of * a.value_size);
    }
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
