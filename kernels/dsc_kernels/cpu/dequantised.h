// Quantised weights as the numbers that they stand for: panels for products whose inputs must stay as they are, single
// rows of a packed weight, and rows that are picked from a bank.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "bytes.h"
#include "gemm.h"
#include "namespace.h"
#include "quantised.h"

DSC_KERNELS_BEGIN

// Byte `which` of each lane: signed, or the half of it that is asked for.
INLINE vi level_of(vi unit, int64_t bits, int64_t which, bool high) {
  if (bits == 8) return unit << (24 - 8 * which) >> 24;
  return (unit >> (8 * which + (high ? 4 : 0))) & 15;
}

// A packed panel as float32 [d][16].
INLINE void dequantise_panel(const uint8_t* w, const Format& f, int64_t d, float* out) {
  int64_t step = group_bytes(f), levels = levels_bytes(f.bits, f.group), halves = f.bits == 4 ? 2 : 1;
  for (int64_t k = 0; k < d; w += step) {
    const uint16_t* more = (const uint16_t*)(const void*)(w + levels);
    vf scales = load_half(more), minimums = f.minimums ? load_half(more + LANES) : vf{};
    for (int64_t u = 0; u < levels / UNIT; u++) {
      vi unit = load_bits<vi>(w + u * UNIT);
      for (int64_t h = 0; h < halves; h++)
        for (int64_t i = 0; i < 4 && k < d; i++, k++) {
          vi level = level_of(unit, f.bits, i, h) - (int32_t)f.centre;
          store(out + k * LANES, to_floats(level) * scales + minimums);
        }
    }
  }
}

// What `multiply` gives with the weight's own numbers and float32 inputs. room: [d · 16].
template <typename Sink>
INLINE void multiply_dequantised(const uint8_t* w, const Format& f, const float* x, int64_t stride, int64_t count,
                                 int64_t d, const Sink& sink, int64_t first, int64_t last, float* room) {
  for (int64_t p = first; count > 0 && p < last; p++) {
    dequantise_panel(w + p * panel_bytes(f, d), f, d, room);
    tokens<float, 1>(room, d * LANES, x, stride, nullptr, count, d, sink, p * LANES, 0);
  }
}

// One number of a packed weight that is not quantised.
template <typename T>
INLINE float packed_number(const void* w, int64_t n, int64_t k, int64_t d) {
  const T* panel = (const T*)w + n / LANES * Packed<T>::panel_size(d);
  return to_float(panel[(k / GROUP<T> * LANES + n % LANES) * GROUP<T> + k % GROUP<T>]);
}

// Row n of a packed weight [.., d], with what its compensation adds.
template <typename T>
void quantised_row(const void* packed, const Format& f, int64_t n, int64_t d, void* to) {
  T* out = (T*)to;
  int64_t step = group_bytes(f), levels = levels_bytes(f.bits, f.group), per_unit = f.bits == 4 ? 8 : 4;
  const uint8_t* panel = (const uint8_t*)packed + n / LANES * panel_bytes(f, d);
  for (int64_t k = 0; k < d; k++) {
    const uint8_t* group = panel + k / f.group * step;
    const uint16_t* more = (const uint16_t*)(const void*)(group + levels);
    int64_t i = k % f.group, lane = n % LANES;
    uint8_t byte = group[i / per_unit * UNIT + lane * 4 + i % 4];
    int level = f.bits == 8 ? (int8_t)byte : (i % per_unit < 4 ? byte & 15 : byte >> 4) - (int)f.centre;
    float value = (float)level * half_to_float(more[lane]);
    if (f.minimums) value += half_to_float(more[LANES + lane]);
    for (int64_t r = 0; r < f.rank; r++)
      value += packed_number<T>(f.left, n, r, f.rank) * packed_number<T>(f.right, r, k, d);
    put(out + k, value);
  }
}

// Rows [.., d] that are read by their number: of T, or of int8 with scales of groups (RowFormat).
template <typename T>
struct PlainRows {
  const T* rows;
  int64_t d;
  INLINE float product(const T* x, int64_t n) const { return dot(x, rows + n * d, d); }
  INLINE vf at(int64_t n, int64_t i) const { return load(rows + n * d + i); }
  INLINE float one(int64_t n, int64_t i) const { return to_float(rows[n * d + i]); }
  INLINE void prefetch(int64_t n) const {
    for (int64_t i = 0; i < d; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(rows + n * d + i);
  }
};

struct LevelRows {
  const int8_t* rows;
  const RowFormat& f;
  int64_t d, groups;

  INLINE LevelRows(const void* levels, const RowFormat& format, int64_t width)
      : rows((const int8_t*)levels), f(format), d(width), groups((width + format.group - 1) / format.group) {}

  INLINE float scale(int64_t n, int64_t i) const { return half_to_float(f.scales[n * groups + i / f.group]); }
  INLINE float minimum(int64_t n, int64_t i) const {
    return f.minimums ? half_to_float(f.minimums[n * groups + i / f.group]) : 0;
  }
  INLINE float one(int64_t n, int64_t i) const { return rows[n * d + i] * scale(n, i) + minimum(n, i); }
  // i: a multiple of 16, so that one scale is that of all.
  INLINE vf at(int64_t n, int64_t i) const {
    return load_bytes(rows + n * d + i) * scale(n, i) + minimum(n, i);
  }
  template <typename T>
  INLINE float product(const T* x, int64_t n) const {
    vf s = {};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) s += load(x + i) * at(n, i);
    float rest = 0;
    for (; i < d; i++) rest += to_float(x[i]) * one(n, i);
    return sum(s) + rest;
  }
  INLINE void prefetch(int64_t n) const {
    for (int64_t i = 0; i < d; i += 64) __builtin_prefetch(rows + n * d + i);
    __builtin_prefetch(f.scales + n * groups);
    if (f.minimums) __builtin_prefetch(f.minimums + n * groups);
  }
};

DSC_KERNELS_END
