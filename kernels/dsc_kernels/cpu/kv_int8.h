// Keys and values in int8: of each row [size] the numbers, and behind them, in four bytes, what 1 is worth.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "api.h"
#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

constexpr int64_t SCALE_BYTES = sizeof(float);
constexpr float LEAST_SCALED = 1e-30f;  // below which numbers count as 0

// What a cache's rows are of.
template <typename T, bool INT8>
struct Stored {
  typedef T type;
};

template <typename T>
struct Stored<T, true> {
  typedef int8_t type;
};

// Where the rows of a cache lie that was widened: one behind the other.
INLINE void in_order(int64_t* rows_at, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; i++) rows_at[i] = i * size;
}

// Fewer than sixteen of a row's numbers.
INLINE vf some_bytes(const int8_t* row, int64_t count) {
  int8_t bytes[LANES] = {};
  memcpy(bytes, row, count);
  return load_bytes(bytes);
}

// What 1 is worth in a row.
INLINE float scale_behind(const int8_t* row, int64_t size) {
  float scale;
  memcpy(&scale, row + size, sizeof scale);
  return scale;
}

// Rows [count] of a pool become numbers [count, size] of the kind that is computed with.
template <typename T>
INLINE void widen_rows(const int8_t* pool, const int64_t* rows_at, int64_t count, int64_t size, T* out) {
  for (int64_t i = 0; i < count; i++, out += size) {
    const int8_t* row = pool + rows_at[i];
    float scale = scale_behind(row, size);
    int64_t c = 0;
    for (; c + LANES <= size; c += LANES) store(out + c, scale * load_bytes(row + c));
    if (c < size) store_some(out + c, scale * some_bytes(row + c, size - c), (int)(size - c));
  }
}

INLINE void store_whole(float* p, vf v) { store(p, v); }

// Whole numbers of 8 bits: the upper half of a float holds them.
INLINE void store_whole(bf16* p, vf v) {
  vh h = narrow((vu)v >> 16);
  memcpy(p, &h, sizeof h);
}

// As many vectors' pairs as the row has, where an instruction makes one of two; returns how many numbers.
INLINE int64_t store_pairs_of_whole(float*, const int8_t*, int64_t) { return 0; }

INLINE int64_t store_pairs_of_whole([[maybe_unused]] bf16* out, [[maybe_unused]] const int8_t* row,
                                    [[maybe_unused]] int64_t size) {
  int64_t c = 0;
#if defined(__AVX512BF16__)
  for (; c + 2 * LANES <= size; c += 2 * LANES) {
    __m512bh both = _mm512_cvtne2ps_pbh((__m512)load_bytes(row + c + LANES), (__m512)load_bytes(row + c));
    memcpy(out + c, &both, sizeof both);
  }
#endif
  return c;
}

// What 1 is worth in each of some rows, and 1 behind the last to a whole vector.
INLINE void scales_of(const int8_t* pool, const int64_t* rows_at, int64_t count, int64_t size, float* scales) {
  for (int64_t i = 0; i < count; i++) scales[i] = scale_behind(pool + rows_at[i], size);
  for (int64_t i = count; i % LANES; i++) scales[i] = 1;
}

// The same rows before they are scaled, which is cheaper and loses nothing.
template <typename T>
INLINE void widen_levels(const int8_t* pool, const int64_t* rows_at, int64_t count, int64_t size, T* out) {
  for (int64_t i = 0; i < count; i++, out += size) {
    const int8_t* row = pool + rows_at[i];
    int64_t c = store_pairs_of_whole(out, row, size);
    for (; c + LANES <= size; c += LANES) store_whole(out + c, load_bytes(row + c));
    if (c < size) store_some(out + c, some_bytes(row + c, size - c), (int)(size - c));
  }
}

// Each number [count] times its row's scale.
INLINE void scale_each(float* x, const float* scales, int64_t count) {
  for (int64_t n = 0; n < count; n += LANES) store(x + n, load(x + n) * load(scales + n));
}

// A row as it is kept. What is not finite makes all of the row NaN, whatever reads it.
template <typename T>
INLINE void narrow_row(const T* x, int64_t size, int8_t* out) {
  float most = 0;
  bool finite = true;
  for (int64_t i = 0; i < size; i++) {
    float value = fabsf(to_float(x[i]));
    finite &= value <= 3.4028235e38f;
    most = value > most ? value : most;
  }
  bool counts = finite && most >= LEAST_SCALED;
  float scale = !finite ? NAN : counts ? most / 127 : 0, inverse = counts ? 127 / most : 0;
  if (counts)
    for (int64_t i = 0; i < size; i++) out[i] = (int8_t)rintf(to_float(x[i]) * inverse);
  else memset(out, 0, size);
  memcpy(out + size, &scale, sizeof scale);
}

DSC_KERNELS_END
