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

#include "chunk_products.h"
#include "namespace.h"

DSC_KERNELS_BEGIN

constexpr float LOG2_E = 1.44269504f;

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

// Query rows first … first + rows − 1 of one key-value head; row r is query head r % group of token r / group.
template <typename T, bool INT8>
INLINE void attend_tile(const ChunkAttention& a, int64_t head, int64_t first, int64_t rows, const ChunkBuffers<T>& b) {
  typedef typename Input<T>::type C;
  int64_t before = a.context - a.count, seen = before + (first + rows - 1) / a.group + 1;
  int64_t offset = head * a.group * a.size, panels = panel_count(rows);
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
    score_rows(own_keys, own_at, count, a.size, panels, b);
    for (int64_t p = 0; p < panels; p++) {
      if (a.cap > 0) cap_panel(b, p, words, a.scale, a.cap);
      softmax_panel(b, p, words, begin[p], last[p], scale);
      begin[p] -= (int32_t)KEYS, last[p] -= (int32_t)KEYS;
    }
    if (a.value_size == 64) pack_values(own_values, own_at, count, 64, b.values);
    else pack_values(own_values, own_at, count, a.value_size, b.values);
    gather_rows(b, rows, words);
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
#if defined(__AVX512BF16__)
    const WholeTiles tiles_at_hand(own.tiled);
#endif
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
