// Attention of a chunk of a prompt over its sequence's paged keys and values, read where they lie.
//
// A tile of query rows meets KEYS positions at a time. Both products are gemm.h's: the keys are packed as the weight of
// the first, the values as that of the second. What a row attends to comes in the same steps however a prompt is cut.
#pragma once

#include "layers.h"

constexpr int64_t KEYS = 64, ROWS = 48;

// Rows of 16 words become columns.
INLINE void transpose(vi (&rows)[LANES]) {
  const vi low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const vi high = low + 8;
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
    vi next[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + LANES / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + LANES / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = next[i];
  }
}

// Rows [count, size] at `places` of a pool, packed for products over `size`.
template <typename T>
INLINE void pack_keys(const T* pool, const int64_t* places, int64_t count, int64_t size, T* out) {
  int64_t panel = Packed<T>::panel_size(size);
  for (int64_t first = 0; first < count; first += LANES, out += panel)
    for (int64_t c = 0; c < size; c += LANES * GROUP<T>) {
      vi rows[LANES] = {};
      int64_t left = size - c, width = left < LANES * GROUP<T> ? left : LANES * GROUP<T>;
      if (width == LANES * GROUP<T> && count - first >= LANES)
        for (int i = 0; i < LANES; i++) memcpy(&rows[i], pool + places[first + i] + c, sizeof rows[i]);
      else
        for (int64_t i = 0; i < LANES && first + i < count; i++)
          memcpy(&rows[i], pool + places[first + i] + c, width * sizeof(T));
      transpose(rows);
      for (int64_t i = 0; i * GROUP<T> < width; i++)
        memcpy(out + c * LANES + i * LANES * GROUP<T>, &rows[i], sizeof rows[i]);
    }
}

template <typename T>
INLINE vf load_up_to(const T* p, int64_t count) {
  return count >= LANES ? load(p) : load_some(p, (int)count);
}

// The same rows, packed for products over `count`.
INLINE void pack_values(const float* pool, const int64_t* places, int64_t count, int64_t size, float* out) {
  for (int64_t c = 0; c < size; c += LANES)
    for (int64_t i = 0; i < count; i++, out += LANES) store(out, load_up_to(pool + places[i] + c, size - c));
}

INLINE void pack_values(const bf16* pool, const int64_t* places, int64_t count, int64_t size, bf16* out) {
  for (int64_t c = 0; c < size; c += LANES)
    for (int64_t i = 0; i < count; i += 2, out += 2 * LANES) {
      vf second = i + 1 < count ? load_up_to(pool + places[i + 1] + c, size - c) : vf{};
      vu pairs = (vu)load_up_to(pool + places[i] + c, size - c) >> 16 | (vu)second;
      memcpy(out, &pairs, sizeof pairs);
    }
}

struct Scores {
  float* out;  // [rows, KEYS]
  float scale;
  INLINE void operator()(vf v, int64_t t, int64_t n) const { store(out + t * KEYS + n, scale * v); }
};

struct Accumulated {
  float* out;          // [rows, width]
  const float* fading; // [rows]: what the sums so far count yet
  int64_t width;
  INLINE void operator()(vf v, int64_t t, int64_t n) const {
    float* o = out + t * width + n;
    store(o, load(o) * fading[t] + v);
  }
};

// One thread's buffers for a tile.
template <typename T>
struct ChunkBuffers {
  typedef typename Input<T>::type I;
  int64_t stride, width;  // of a query row, of a row of sums
  int64_t bytes;
  T *keys, *values;
  I *q, *weights;         // weights [ROWS, KEYS]
  float *scores, *sums, *highest, *totals, *fading;

  INLINE ChunkBuffers(int64_t size, char* at) : stride(even(size)), width(panel_count(size) * LANES) {
    char* start = at;
    auto take = [&at](auto*& p, int64_t count) {
      p = (decltype(p + 0))at;
      at += aligned(count * sizeof(*p));
    };
    take(keys, KEYS * stride);
    take(values, KEYS * width);
    take(q, ROWS * stride);
    take(weights, ROWS * KEYS);
    take(scores, ROWS * KEYS);
    take(sums, ROWS * width);
    take(highest, ROWS);
    take(totals, ROWS);
    take(fading, ROWS);
    bytes = at - start;
  }
};

// Where scores [count] of one row leave its running maximum and total, and the weights they become: those of keys
// behind `last` are 0.
template <typename I>
INLINE float soften(float* scores, int64_t count, int64_t last, float& highest, float& total, I* weights) {
  const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vf most = splat(-INFINITY);
  for (int64_t n = 0; n < count; n += LANES) {
    vf s = load(scores + n);
    if (last < n + LANES - 1) {
      s = lanes > (int32_t)(last - n) ? splat(-INFINITY) : s;
      store(scores + n, s);
    }
    most = vmax(s, most);
  }
  float before = highest, now = largest(most);
  highest = now > before ? now : before;
  vf sums = {};
  for (int64_t n = 0; n < count; n += LANES) {
    vf e = vexp(load(scores + n) - highest);
    store(weights + n, e);
    sums += e;
  }
  float fading = highest > before ? expf(before - highest) : 1.0f;
  total = total * fading + sum(sums);
  return fading;
}

// Goes through one sequence's rows in a pool.
struct Walk {
  const ChunkAttention& a;
  int64_t head, seen, at = 0, page = 0, line = 0;
  // Where the next rows are, at most KEYS; returns how many.
  INLINE int64_t next(int64_t* places) {
    int64_t count = seen - at < KEYS ? seen - at : KEYS;
    for (int64_t i = 0; i < count; i++) {
      places[i] = ((a.table[page] * a.kv_heads + head) * a.block + line) * a.size;
      if (++line == a.block) page++, line = 0;
    }
    at += count;
    return count;
  }
};

template <typename T>
INLINE void fetch(const T* pool, const int64_t* places, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t c = 0; c < size; c += 64 / (int64_t)sizeof(T)) __builtin_prefetch(pool + places[i] + c, 0, 2);
}

// Query rows first … first + rows − 1 of one key-value head; row r is query head r % group of token r / group.
template <typename T>
INLINE void attend_tile(const ChunkAttention& a, int64_t head, int64_t first, int64_t rows, const ChunkBuffers<T>& b) {
  int64_t before = a.context - a.count, seen = before + (first + rows - 1) / a.group + 1;
  int64_t offset = head * a.group * a.size, panels = panel_count(a.size);
  int64_t places[KEYS];
  const T *keys = (const T*)a.keys, *values = (const T*)a.values;
  for (int64_t r = 0; r < rows; r++) {
    int64_t token = (first + r) / a.group, member = (first + r) % a.group;
    const T* own = (const T*)a.q + token * a.q_stride + offset + member * a.size;
    for (int64_t c = 0; c < a.size; c++) put(b.q + r * b.stride + c, to_float(own[c]));
    b.highest[r] = -INFINITY, b.totals[r] = 0;
  }
  clear_padding(b.q, rows, a.size);
  memset(b.sums, 0, rows * b.width * sizeof(float));
  Walk walk{a, head, seen};
  int64_t count = walk.next(places), next;
  for (int64_t at = 0; count > 0; at += KEYS, count = next) {
    pack_keys(keys, places, count, a.size, b.keys);
    pack_values(values, places, count, a.size, b.values);
    next = walk.next(places);
    fetch(keys, places, next, a.size);
    multiply<T>(b.keys, b.q, b.stride, nullptr, rows, a.size, Scores{b.scores, a.scale}, 0, panel_count(count));
    for (int64_t r = 0; r < rows; r++)
      b.fading[r] = soften(b.scores + r * KEYS, count, before + (first + r) / a.group - at, b.highest[r], b.totals[r],
                           b.weights + r * KEYS);
    fetch(values, places, next, a.size);
    multiply<T>(b.values, b.weights, KEYS, nullptr, rows, count, Accumulated{b.sums, b.fading, b.width}, 0, panels);
  }
  for (int64_t r = 0; r < rows; r++) {
    int64_t token = (first + r) / a.group, member = (first + r) % a.group;
    T* out = (T*)a.out + token * a.kv_heads * a.group * a.size + offset + member * a.size;
    float inverse = 1.0f / b.totals[r];
    for (int64_t c = 0; c < a.size; c++) put(out + c, b.sums[r * b.width + c] * inverse);
  }
}

template <typename T>
int64_t chunk_attention_scratch(const ChunkAttention& a) {
  return a.threads * ChunkBuffers<T>(a.size, nullptr).bytes;
}

template <typename T>
void chunk_attention(const ChunkAttention& a) {
  int64_t rows = a.count * a.group, least = (rows + TOKENS - 1) / TOKENS, tiles = (rows + ROWS - 1) / ROWS;
  int64_t wanted = (2 * a.threads + a.kv_heads - 1) / a.kv_heads;  // so that the threads end together
  if (tiles < wanted) tiles = wanted < least ? wanted : least;
#pragma omp parallel num_threads(a.threads)
  {
    ChunkBuffers<T> own(a.size, a.scratch + omp_get_thread_num() * chunk_attention_scratch<T>(a) / a.threads);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tiles * a.kv_heads; i++) {
      int64_t tile = tiles - 1 - i / a.kv_heads, first = part(rows, tile, tiles);  // the longest first
      attend_tile<T>(a, i % a.kv_heads, first, part(rows, tile + 1, tiles) - first, own);
    }
  }
}
