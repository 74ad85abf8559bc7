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

typedef int8_t vb __attribute__((vector_size(16)));

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

// Rows [count] of a pool become numbers [count, size] of the kind that is computed with.
template <typename T>
INLINE void widen_rows(const int8_t* pool, const int64_t* rows_at, int64_t count, int64_t size, T* out) {
  for (int64_t i = 0; i < count; i++) {
    const int8_t* row = pool + rows_at[i];
    float scale;
    memcpy(&scale, row + size, sizeof scale);
    for (int64_t c = 0; c < size; c += LANES) {
      vb bytes{};
      int64_t left = size - c < LANES ? size - c : LANES;
      memcpy(&bytes, row + c, left);
      vf wide = scale * __builtin_convertvector(bytes, vf);
      left == LANES ? store(out + i * size + c, wide) : store_some(out + i * size + c, wide, (int)left);
    }
  }
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
