// The two products of a chunk's attention: scores of query rows and keys, and values weighted by them.
#pragma once

#include <stdint.h>
#include <string.h>

#include "chunk_tiles.h"
#include "chunk_words.h"
#include "layers.h"
#include "namespace.h"

DSC_KERNELS_BEGIN

constexpr int64_t ROWS = 48;

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
  bool tiled;                         // whether both products are by tiles
  C* seen;                            // as values, of what one query row sees

  INLINE ChunkBuffers(int64_t size, int64_t value_size, bool int8_kv, Scratch& scratch)
      : stride(sizeof(C) == 2 ? round_up_2(size) : size), width(panel_count(value_size) * LANES),
        tiled(takes_tiles<C>(size, value_size)) {
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
    seen = tiled ? scratch.take<C>(KEYS * width) : nullptr;
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

#if defined(__AVX512BF16__)
// Scores of `panels` panels of query rows and so many keys.
template <typename T>
INLINE void score_tiled(const T* pool, const int64_t* rows_at, int64_t count, int64_t size, int64_t panels,
                        const ChunkBuffers<T>& b) {
  for (int64_t n = 0; n < count; n += LANES) {
    const bf16* keys = b.keys;
    if (count - n >= LANES && adjoin<LANES>(rows_at + n, size)) keys = pool + rows_at[n];
    else
      for (int64_t i = n; i < n + LANES && i < count; i++) memcpy(b.keys + (i - n) * size, pool + rows_at[i], size * 2);
    sum_one_tile<bf16>({(const char*)b.q, (const char*)keys, size * LANES * 2, size * 2, size * 2 / TILE_STEP,
                        (int)panels, TILE_ROWS, (char*)(b.scores + n * ROWS), ROWS * 4});
  }
}

// What `gather_panels` gives, of the packed values of `count` keys: whole words.
template <typename T>
INLINE void gather_tiled(const ChunkBuffers<T>& b, int64_t rows, int64_t count) {
  alignas(64) bf16 weights[LANES * KEYS];
  alignas(64) float sums[LANES * SUMS_STRIDE];
  int64_t steps = (count + TILED_KEYS - 1) / TILED_KEYS, columns = b.width / LANES;
  for (int64_t c = 0; c < columns && count < steps * TILED_KEYS; c++)
    memset(b.values + (c * KEYS + count) * LANES, 0, (steps * TILED_KEYS - count) * LANES * sizeof(bf16));
  auto gather = [&](const bf16* values, int64_t first, int64_t from, int64_t to) __attribute__((always_inline)) {
    for (int64_t c = 0; c < columns; c += TILED_PANELS) {
      int panels = (int)(columns - c < TILED_PANELS ? columns - c : TILED_PANELS);
      sum_one_tile<bf16>({(const char*)(values + c * KEYS * LANES), (const char*)weights, KEYS * LANES * 2, KEYS * 2, steps,
                          panels, TILE_ROWS, (char*)sums});
      for (int64_t r = from; r < to; r++)
        for (int p = 0; p < panels; p++) {
          float* s = b.sums + (first + r) * b.width + (c + p) * LANES;
          store(s, load(s) * b.rescale[first + r] + load(sums + r * SUMS_STRIDE + p * LANES));
        }
    }
  };
  // a weight of 0 would not silence a NaN: where there is one that not all see, each row meets what it sees
  bool together = b.begins[rows - 1] == 0 && b.ends[0] >= count;
  for (int64_t c = 0; c < columns && !together; c++)
    if (!all_finite(b.values + c * KEYS * LANES, steps * TILED_KEYS * LANES)) break;
    else together = c + 1 == columns;
  for (int64_t first = 0; first < rows; first += LANES) {
    int64_t some = rows - first < LANES ? rows - first : LANES;
    turn_weights(b.weights + first * GROUP<bf16>, ROWS, count, KEYS, weights);
    if (together) {
      gather(b.values, first, 0, some);
      continue;
    }
    for (int64_t r = 0; r < some; r++) {
      for (int64_t c = 0; c < columns; c++)
        for (int64_t n = 0; n < steps * TILED_KEYS; n += GROUP<bf16>) {
          int64_t at = (c * KEYS + n) * LANES;
          int32_t seen = seen_of<bf16>(n, b.begins[first + r], b.ends[first + r]);
          store_bits(b.seen + at, load_bits<vi>(b.values + at) & seen);
        }
      gather(b.seen, first, r, r + 1);
    }
  }
}
#endif

template <typename T>
INLINE void score_rows(const T* pool, const int64_t* rows_at, int64_t count, int64_t size, int64_t panels,
                       const ChunkBuffers<T>& b) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2)
    if (b.tiled) return score_tiled(pool, rows_at, count, size, panels, b);
#endif
  switch (panels) {
    case 1: return score_panels<1>(pool, rows_at, count, size, 0, b);
    case 2: return score_panels<2>(pool, rows_at, count, size, 0, b);
    default: score_panels<3>(pool, rows_at, count, size, 0, b);
  }
}

// count: of keys, whole words.
template <typename T>
INLINE void gather_rows(const ChunkBuffers<T>& b, int64_t rows, [[maybe_unused]] int64_t count) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2)
    if (b.tiled) return gather_tiled(b, rows, count);
#endif
  int64_t c = 0, columns = b.width / LANES;
  for (; c + WIDE <= columns; c += WIDE)
    gather_panels<WIDE>(b.values + c * KEYS * LANES, b.weights, rows, b.begins, b.ends, b.rescale, b.width,
                        b.sums + c * LANES);
  for (; c < columns; c++)
    gather_panels<1>(b.values + c * KEYS * LANES, b.weights, rows, b.begins, b.ends, b.rescale, b.width,
                     b.sums + c * LANES);
}

DSC_KERNELS_END
