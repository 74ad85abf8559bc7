// Tokens in int8, with what that leaves out, for products whose error must be bounded.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "gemm.h"
#include "namespace.h"

DSC_KERNELS_BEGIN

// How a token's products become logits, scale · product + bias, and how far they may be off when screened:
// from_weights · (the row's error) + from_input · (the row's norm) + slack.
struct LogitScale {
  float rstd, scale, from_weights, from_input;
};

// The few inputs of a token that are far larger than the others would cost all others their precision. Groups of four
// inputs with such ones have a second digit, worth 128 of the first: its positive and its negative part, in bytes.
constexpr int MAX_OUTLIERS = 8;
constexpr float FAR = 5;  // times the mean size: beyond what some thousand normally distributed inputs have

struct Outliers {
  int count;
  int32_t groups[MAX_OUTLIERS];
  uint32_t plus[MAX_OUTLIERS], minus[MAX_OUTLIERS];
};

template <typename T>
INLINE vf inputs_at(const T* x, int64_t i, int64_t d) {
  return i + LANES <= d ? load(x + i) : load_some(x + i, (int)(d - i));
}

// The groups whose largest input is beyond `far`, at most MAX_OUTLIERS; returns the largest input of the others.
template <typename T>
INLINE float set_apart(const T* x, int64_t d, float far, Outliers& out) {
  float peaks[MAX_OUTLIERS], rest = 0;
  out.count = 0;
  for (int64_t i = 0; i < d; i += 4) {
    float peak = 0;
    for (int64_t j = i; j < i + 4 && j < d; j++) {
      float size = fabsf(to_float(x[j]));
      peak = size > peak ? size : peak;
    }
    int32_t group = (int32_t)(i / 4);
    if (peak > far) {
      if (out.count < MAX_OUTLIERS) {
        peaks[out.count] = peak;
        out.groups[out.count++] = group;
        continue;
      }
      int least = 0;
      for (int k = 1; k < MAX_OUTLIERS; k++) least = peaks[k] < peaks[least] ? k : least;
      if (peak > peaks[least]) {
        float other = peaks[least];
        peaks[least] = peak;
        out.groups[least] = group;
        peak = other;
      }
    }
    rest = peak > rest ? peak : rest;
  }
  return rest;
}

// The second digits of a group, in units of 128 steps.
template <typename T>
struct SecondDigits {
  float digits[MAX_OUTLIERS][4];

  INLINE SecondDigits(const T* x, int64_t d, float step, Outliers& out) {
    for (int k = 0; k < out.count; k++) {
      out.plus[k] = out.minus[k] = 0;
      for (int64_t j = 0, i = 4 * out.groups[k]; j < 4; j++) {
        float digit = i + j < d ? rintf(to_float(x[i + j]) / (128 * step)) : 0;
        digits[k][j] = digit;
        uint32_t byte = (uint32_t)fabsf(digit) << 8 * j;
        (digit > 0 ? out.plus : out.minus)[k] |= byte;
      }
    }
  }

  // The inputs from i on without them.
  INLINE vf without(vf v, int64_t i, float step, const Outliers& out) const {
    for (int k = 0; k < out.count; k++)
      if (out.groups[k] / (LANES / 4) == i / LANES)
        for (int j = 0; j < 4; j++) {
          int lane = out.groups[k] % (LANES / 4) * 4 + j;
          set_lane(v, lane, v[lane] - digits[k][j] * (128 * step));
        }
    return v;
  }
};

// A token in steps of its largest value that is not set apart / 127, shifted by 128, and what that leaves out. A
// token too large or too small to be bounded gets bounds that are NaN, which screen nothing.
template <typename T>
INLINE LogitScale quantise(const T* x, int64_t d, float rstd, uint8_t* out, Outliers& outliers) {
  vf highest = {}, squares = {}, sizes = {}, left = {};
  for (int64_t i = 0; i < d; i += LANES) {
    vf v = inputs_at(x, i, d), size = (vf)((vi)v & 0x7fffffff);
    highest = blend(size > highest, size, highest);
    squares += v * v;
    sizes += size;
  }
  float peak = 0;
  for (int lane = 0; lane < LANES; lane++) peak = highest[lane] > peak ? highest[lane] : peak;
  float norm = sqrtf(sum(squares)), mean = sum(sizes) / (float)d;
  bool bounded = norm > 1e-15f && norm < 1e15f;
  outliers.count = 0;
  if (bounded && peak > FAR * mean) {
    float rest = set_apart(x, d, FAR * mean, outliers), least = peak / 128;
    peak = rest > least ? rest : least;
  }
  float step = bounded ? peak / 127 : 0, inverse = bounded ? 127 / peak : 0;
  SecondDigits<T> second(x, d, step, outliers);
  for (int64_t i = 0; i < d; i += LANES) {
    vf v = bounded ? second.without(inputs_at(x, i, d), i, step, outliers) : vf{};
    vf shifted = v * inverse + 12582912.0f;  // 1.5 · 2^23: the low bits are the integer
    vf rest = v - (shifted - 12582912.0f) * step;
    left += rest * rest;
    store_bytes(out + i, (vi)shifted - 0x4b400000 + 128);
  }
  if (!bounded) return {rstd, NAN, NAN, NAN};
  constexpr float UP = 1.00001f;  // for the rounding of the norms themselves
  return {rstd, rstd * step, rstd * norm * UP, rstd * sqrtf(sum(left)) * UP};
}

// The sums of TT tokens with P panels start from what their second digits give.
template <int P, int TT>
INLINE void add_outliers(const Outliers* tokens, const int8_t* w, int64_t panel, vi (&acc)[P][TT]) {
  for (int t = 0; t < TT; t++) {
    const Outliers& o = tokens[t];
    if (__builtin_expect(!o.count, 1)) continue;
    for (int p = 0; p < P; p++) {
      vi plus = {}, minus = {};
      for (int k = 0; k < o.count; k++) {
        vi rows = load_bits<vi>(w + p * panel + o.groups[k] * 4 * LANES);
        plus = dot4(plus, o.plus[k], rows);
        minus = dot4(minus, o.minus[k], rows);
      }
      acc[p][t] = (plus - minus) << 7;
    }
  }
}

DSC_KERNELS_END
