// Attention of a chunk of a prompt over its sequence's paged keys and values, read where they lie.
//
// A tile of query rows meets KEYS positions at a time. Scores have the query rows side by side in a vector's lanes: the
// queries are packed once, keys are read row by row, and the softmax needs no sums across lanes. Of the second product the
// values are packed. What a row attends to comes in the same steps however a prompt is cut.
#pragma once

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "chunk_words.h"
#include "layers.h"
#include "namespace.h"

DSC_KERNELS_BEGIN

constexpr int64_t ROWS = 48;
constexpr float LOG2_E = 1.44269504f;

#if defined(__AVX512F__)
constexpr int WIDE = 4, HIGH = 6;         // of a tile of the second product: panels of values, query rows
constexpr int FEWER = 4;                  // rows where those waste less
constexpr int KEYS_OF[] = {0, 16, 8, 8};  // keys of a tile of the first, by panels of query rows
#else
constexpr int WIDE = 1, HIGH = 4, FEWER = 4;
constexpr int KEYS_OF[] = {0, 4, 2, 1};
#endif

// One thread's buffers for a tile. Keys [16] and own rows are copies where they cannot be read as they lie.
template <typename T>
struct ChunkBuffers {
  typedef typename Input<T>::type C;  // what both products are of
  int64_t stride;                     // of a row of queries or keys
  int64_t width;                      // of a row of sums
  C* q;                               // panels of 16 query rows [words of a row][16]
  C* keys;                            // [16, stride]
  C* values;                          // [panels][KEYS][16], neighbours of a word together
  C* weights;                         // [KEYS][ROWS], neighbours of a word together
  float* scores;                      // [KEYS][ROWS]
  float* sums;                        // [ROWS, width]
  float* highest;                     // [ROWS]: the largest score so far
  float* totals;                      // [ROWS]: of the weights
  float* rescale;                     // [ROWS]: what the sums so far count yet
  int32_t* begins;                    // [ROWS]: the first of the keys at hand that each query row sees
  int32_t* ends;                      // [ROWS]: the one after its last
  T *wide_keys, *wide_values;         // [KEYS, size]: what is at hand of a cache in int8; null without one

  INLINE ChunkBuffers(int64_t size, int64_t value_size, bool int8_kv, Scratch& scratch)
      : stride(sizeof(C) == 2 ? round_up_2(size) : size), width(panel_count(value_size) * LANES) {
    q = scratch.take<C>(ROWS * stride);
    keys = scratch.take<C>(LANES * stride);
    values = scratch.take<C>(KEYS * width);
    weights = scratch.take<C>(KEYS * ROWS);
    scores = scratch.take<float>(KEYS * ROWS);
    sums = scratch.take<float>(ROWS * width);
    highest = scratch.take<float>(ROWS);
    totals = scratch.take<float>(ROWS);
    rescale = scratch.take<float>(ROWS);
    begins = scratch.take<int32_t>(ROWS);
    ends = scratch.take<int32_t>(ROWS);
    wide_keys = int8_kv ? scratch.take<T>(KEYS * size) : nullptr;
    wide_values = int8_kv ? scratch.take<T>(KEYS * size) : nullptr;
  }
};

// Scores of P panels of query rows and N keys that lie `stride` apart.
template <int P, int N, typename C>
INLINE void score_tile(const C* q, int64_t stride, const C* keys, float* scores) {
  vf acc[P][N];
  clear(acc);
  for (int64_t w = 0; w < stride; w += GROUP<C>) {
    vi row[P];
    for (int p = 0; p < P; p++) row[p] = load_bits<vi>(q + p * stride * LANES + w * LANES);
    for (int n = 0; n < N; n++) {
      int32_t word;
      memcpy(&word, keys + n * stride + w, sizeof word);
      for (int p = 0; p < P; p++) acc[p][n] = plus_product(acc[p][n], row[p], word, C{});
    }
  }
  for (int n = 0; n < N; n++)
    for (int p = 0; p < P; p++) store(scores + n * ROWS + p * LANES, acc[p][n]);
}

// Whether rows lie one behind the other in a pool: blocks may follow each other in another order.
template <int N>
INLINE bool adjoin(const int64_t* rows_at, int64_t size) {
  bool all = true;
  for (int i = 1; i < N; i++) all &= rows_at[i] == rows_at[0] + i * size;
  return all;
}

template <int P, typename T>
INLINE void score_panels(const T* pool, const int64_t* rows_at, int64_t count, int64_t size, int64_t panel,
                         const ChunkBuffers<T>& b) {
  typedef typename Input<T>::type C;
  constexpr int N = KEYS_OF[P];
  const C* q = b.q + panel * b.stride * LANES;
  for (int64_t n = 0; n < count; n += N) {
    int64_t last = (count - n < N ? count - n : N) - 1;
    const C* keys = b.keys;
    if (sizeof(T) == sizeof(C) && size == b.stride && last == N - 1 && adjoin<N>(rows_at + n, size))
      keys = (const C*)(const void*)(pool + rows_at[n]);
    else
      for (int64_t i = 0; i <= last; i++) copy_row(pool + rows_at[n + i], size, b.keys + i * b.stride);
    float* scores = b.scores + n * ROWS + panel * LANES;
    if (size == 64) score_tile<P, N>(q, 64, keys, scores);
    else score_tile<P, N>(q, b.stride, keys, scores);
  }
}

// Products of one panel bounded so that, once scaled, they are scores within ±cap.
template <typename T>
INLINE void cap_panel(const ChunkBuffers<T>& b, int64_t panel, int64_t count, float scale, float cap) {
  float* products = b.scores + panel * LANES;
  float within = scale / cap, back = cap / scale;
  for (int64_t n = 0; n < count; n++) store(products + n * ROWS, back * vtanh(load(products + n * ROWS) * within));
}

// Scores of one panel become weights, those before a row's `first` key and behind its `last` one 0; count is whole
// words.
template <typename T>
INLINE void softmax_panel(const ChunkBuffers<T>& b, int64_t panel, int64_t count, vi first, vi last, float scale) {
  float* scores = b.scores + panel * LANES;
  vf most = splat(-INFINITY);
  vi all = vi{} + (int32_t)count, ends = blend(last < 0, vi{}, blend(last < all, last + 1, all));
  vi begins = blend(first < 0, vi{}, blend(first < all, first, all));
  store_bits(b.begins + panel * LANES, begins);
  store_bits(b.ends + panel * LANES, ends);
  auto mask = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
    for (int64_t n = from; n < to; n++) {
      vf s = blend((last < (int32_t)n) | (first > (int32_t)n), splat(-INFINITY), load(scores + n * ROWS));
      store(scores + n * ROWS, s);
      most = vmax(s, most);
    }
  };
  // Rows come in the order of their positions: the first ends and the last begins where all see what lies between.
  int32_t open = begins[LANES - 1], closed = ends[0] > open ? ends[0] : open;
  mask(0, open);
  for (int64_t n = open; n < closed; n++) most = vmax(load(scores + n * ROWS), most);
  mask(closed, count);
  vf before = load(b.highest + panel * LANES), now = vmax(most * scale, before);
  vf base = blend(now > -INFINITY, now, vf{}), total = {};
  constexpr int G = GROUP<typename Input<T>::type>;
  for (int64_t n = 0; n < count; n += G) {
    vf e[G];
    for (int i = 0; i < G; i++) {
      e[i] = vexp2(load(scores + (n + i) * ROWS) * scale - base);
      total += e[i];
    }
    store_words(b.weights + n * ROWS + panel * LANES * G, e);
  }
  vf rescale = vexp2(before - base);
  store(b.highest + panel * LANES, now);
  store(b.rescale + panel * LANES, rescale);
  store(b.totals + panel * LANES, load(b.totals + panel * LANES) * rescale + total);
}

// Which keys of the word from n on a row sees, of those from `begin` to before `end`, as bits of the word.
template <typename C>
INLINE int32_t seen_of(int64_t n, int32_t begin, int32_t end) {
  int32_t before = n + GROUP<C> <= end ? -1 : (n < end ? 0xffff : 0);
  return before & (n >= begin ? -1 : (n + GROUP<C> > begin ? -0x10000 : 0));
}

// Products of the words of keys from … to − 1. On the diagonal, and where windows begin, rows see different keys, and
// what one does not see is taken out of its values: a weight of 0 would not silence a NaN.
template <bool DIAGONAL, int P, int R, typename C>
INLINE void gather_words(const C* values, const C* weights, int64_t from, int64_t to, const int32_t* begins,
                         const int32_t* ends, vf (&acc)[P][R]) {
  for (int64_t n = from; n < to; n += GROUP<C>) {
    vi row[P];
    for (int p = 0; p < P; p++) row[p] = load_bits<vi>(values + (p * KEYS + n) * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      int32_t word, seen = DIAGONAL ? seen_of<C>(n, begins[r], ends[r]) : -1;
      memcpy(&word, weights + n * ROWS + r * GROUP<C>, sizeof word);
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) acc[p][r] = plus_product(acc[p][r], DIAGONAL ? row[p] & seen : row[p], word, C{});
    }
  }
}

// sums [R, P panels] = faded sums + weights · values, of the keys that each row sees; later rows begin and end no sooner.
template <int P, int R, typename C>
INLINE void gather_tile(const C* values, const C* weights, const int32_t* begins, const int32_t* ends,
                        const float* rescale, int64_t width, float* sums) {
  vf acc[P][R];
  clear(acc);
  constexpr int64_t G = GROUP<C>;
  int64_t from = begins[0] / G * G, together = (begins[R - 1] + G - 1) / G * G, apart = ends[0] / G * G;
  if (together > apart) together = apart = ends[R - 1];
  gather_words<true>(values, weights, from, together, begins, ends, acc);
  gather_words<false>(values, weights, together, apart, begins, ends, acc);
  gather_words<true>(values, weights, apart, ends[R - 1], begins, ends, acc);
  for (int r = 0; r < R; r++)
    for (int p = 0; p < P; p++) {
      float* s = sums + r * width + p * LANES;
      store(s, load(s) * rescale[r] + acc[p][r]);
    }
}

template <int P, typename C>
INLINE void gather_panels(const C* values, const C* weights, int64_t rows, const int32_t* begins, const int32_t* ends,
                          const float* rescale, int64_t width, float* sums) {
  for (int64_t r = 0; r < rows;) {
    int64_t left = rows - r;
    if (left <= FEWER || left == FEWER + 3 || left == 2 * FEWER) {
      gather_tile<P, FEWER>(values, weights + r * GROUP<C>, begins + r, ends + r, rescale + r, width,
                            sums + r * width);
      r += FEWER;
    } else {
      gather_tile<P, HIGH>(values, weights + r * GROUP<C>, begins + r, ends + r, rescale + r, width,
                           sums + r * width);
      r += HIGH;
    }
  }
}

// Query rows first … first + rows − 1 of one key-value head; row r is query head r % group of token r / group.
template <typename T, bool INT8>
INLINE void attend_tile(const ChunkAttention& a, int64_t head, int64_t first, int64_t rows, const ChunkBuffers<T>& b) {
  typedef typename Input<T>::type C;
  int64_t before = a.context - a.count, seen = before + (first + rows - 1) / a.group + 1;
  int64_t offset = head * a.group * a.size, panels = panel_count(rows), columns = panel_count(a.value_size);
  // Keys are taken in the same steps whichever rows a tile has: their sums do not change with how a prompt is cut.
  int64_t start = first_seen(before + first / a.group, a.window) / KEYS * KEYS;
  float scale = a.scale * LOG2_E;
  int64_t rows_at[2][KEYS], wide_at[INT8 ? KEYS : 1];
  typedef typename Stored<T, INT8>::type S;
  const S *keys = (const S*)a.keys, *values = (const S*)a.values;
  const int64_t row = INT8 ? a.size + SCALE_BYTES : a.size;
  if constexpr (INT8) in_order(wide_at, KEYS, a.size);
  vi begin[ROWS / LANES], last[ROWS / LANES];  // of the keys that query rows see, counted from those at hand
  for (int64_t r = 0; r < panels * LANES; r++) {
    int64_t one = first + (r < rows ? r : rows - 1), token = one / a.group;  // lanes that are left over are copies
    copy_row((const T*)a.q + token * a.q_stride + offset + one % a.group * a.size, a.size,
             b.keys + r % LANES * b.stride);
    if (r % LANES == LANES - 1) pack_panel(b.keys, b.stride, b.q + r / LANES * LANES * b.stride);
    set_lane(begin[r / LANES], r % LANES, (int32_t)(first_seen(before + token, a.window) - start));
    set_lane(last[r / LANES], r % LANES, (int32_t)(before + token - start));
    b.highest[r] = -INFINITY, b.totals[r] = 0;
  }
  memset(b.sums, 0, panels * LANES * b.width * sizeof(float));
  KvCursor walk(a.table, a.kv_heads, head, a.block, row, start, seen);
  int64_t count = walk.next(rows_at[0]), next, held = 0;
  const S* apart = a.value_size == a.size ? values : nullptr;
  KvAhead<S>{keys, apart, rows_at[0], count, row}.ask(count);
  for (; count > 0; count = next, held ^= 1) {
    next = walk.next(rows_at[held ^ 1]);
    KvAhead<S>{keys, apart, rows_at[held ^ 1], next, row}.ask(next);
    const T *own_keys, *own_values;
    const int64_t* own_at;
    if constexpr (INT8) {
      widen_rows(keys, rows_at[held], count, a.size, b.wide_keys);
      if (apart) widen_rows(values, rows_at[held], count, a.size, b.wide_values);
      own_keys = b.wide_keys, own_at = wide_at;
      own_values = apart ? b.wide_values : b.wide_keys + (a.size - a.value_size);
    } else {
      own_keys = keys, own_values = values, own_at = rows_at[held];
    }
    int64_t words = (count + GROUP<C> - 1) / GROUP<C> * GROUP<C>;
    switch (panels) {
      case 1: score_panels<1>(own_keys, own_at, count, a.size, 0, b); break;
      case 2: score_panels<2>(own_keys, own_at, count, a.size, 0, b); break;
      default: score_panels<3>(own_keys, own_at, count, a.size, 0, b);
    }
    for (int64_t p = 0; p < panels; p++) {
      if (a.cap > 0) cap_panel(b, p, words, a.scale, a.cap);
      softmax_panel(b, p, words, begin[p], last[p], scale);
      begin[p] -= (int32_t)KEYS, last[p] -= (int32_t)KEYS;
    }
    if (a.value_size == 64) pack_values(own_values, own_at, count, 64, b.values);
    else pack_values(own_values, own_at, count, a.value_size, b.values);
    int64_t c = 0;
    for (; c + WIDE <= columns; c += WIDE)
      gather_panels<WIDE>(b.values + c * KEYS * LANES, b.weights, rows, b.begins, b.ends, b.rescale, b.width,
                          b.sums + c * LANES);
    for (; c < columns; c++)
      gather_panels<1>(b.values + c * KEYS * LANES, b.weights, rows, b.begins, b.ends, b.rescale, b.width,
                       b.sums + c * LANES);
  }
  for (int64_t r = 0; r < rows; r++) {
    int64_t token = (first + r) / a.group, member = (first + r) % a.group;
    T* out = (T*)a.out + ((token * a.kv_heads + head) * a.group + member) * a.value_size;
    float inverse = inverse_of(b.totals[r]);
    for (int64_t c = 0; c < a.value_size; c += LANES)
      store_up_to(out + c, load(b.sums + r * b.width + c) * inverse, a.value_size - c);
  }
}

// How a chunk's query rows are cut into tiles.
struct ChunkCut {
  int64_t rows, panels, tiles;

  INLINE explicit ChunkCut(const ChunkAttention& a)
      : rows(a.count * a.group), panels(panel_count(rows)), tiles((rows + ROWS - 1) / ROWS) {}

  // The first row of a tile.
  INLINE int64_t start(int64_t tile) const {
    int64_t first = LANES * split_point(panels, tile, tiles);
    return first < rows ? first : rows;
  }
};

// A chunk and those behind it, whose tiles the threads share.
template <typename T>
void chunk_attention(const ChunkAttention& a) {
  int64_t chunks = 1 + a.others, tiles = 0;
  auto* cuts = a.scratch->take<ChunkCut>(chunks);
  for (int64_t j = 0; j < chunks; j++) tiles += (cuts[j] = ChunkCut(*(&a + j))).tiles;
  // tiles of each, so that the threads end together
  int64_t wanted = ((2 * a.threads + a.kv_heads - 1) / a.kv_heads + chunks - 1) / chunks;
  if (tiles < wanted * chunks)
    for (int64_t j = 0; j < chunks; j++)
      if (cuts[j].tiles < wanted) cuts[j].tiles = wanted < cuts[j].panels ? wanted : cuts[j].panels;
  tiles = 0;
  for (int64_t j = 0; j < chunks; j++) tiles += cuts[j].tiles;
  auto* buffers = a.scratch->take<ChunkBuffers<T>>(a.threads);
  for (int i = 0; i < a.threads; i++) buffers[i] = ChunkBuffers<T>(a.size, a.value_size, a.int8_kv, *a.scratch);
#pragma omp parallel num_threads(a.threads)
  {
    const ChunkBuffers<T> own = buffers[omp_get_thread_num()];
    int64_t j = 0, before = 0;  // the chunk of the tile at hand, and the tiles of those before it
#pragma omp for schedule(monotonic : dynamic, 1)
    for (int64_t i = 0; i < tiles * a.kv_heads; i++) {
      while (i >= (before + cuts[j].tiles) * a.kv_heads) before += cuts[j++].tiles;
      int64_t unit = i - before * a.kv_heads, tile = cuts[j].tiles - 1 - unit / a.kv_heads;  // the longest first
      int64_t first = cuts[j].start(tile), count = cuts[j].start(tile + 1) - first;
      const ChunkAttention& chunk = *(&a + j);
      if (a.int8_kv) attend_tile<T, true>(chunk, unit % a.kv_heads, first, count, own);
      else attend_tile<T, false>(chunk, unit % a.kv_heads, first, count, own);
    }
  }
}

DSC_KERNELS_END
