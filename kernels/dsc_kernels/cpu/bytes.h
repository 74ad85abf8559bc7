// Tokens in int8 for products with quantised weights, and what float16 numbers are worth.
//
// Inputs are rounded in groups of 32 to steps of their largest / 127, so that each is off by at most half a step: a
// product Σ w x is off by at most ½ Σ |w| · (the step of its group), plus what float32 sums round.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "api.h"
#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

constexpr int64_t INPUT_GROUP = 32;

INLINE int64_t input_groups(int64_t d) { return (d + INPUT_GROUP - 1) / INPUT_GROUP; }

// Sixteen float16 numbers, none of which is infinite or NaN.
INLINE vf load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)(const void*)p));
#elif defined(__F16C__)
  __m256 half[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(const void*)p)),
                    _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(const void*)(p + 8)))};
  vf v;
  memcpy(&v, half, sizeof v);
  return v;
#else
  vh h;
  memcpy(&h, p, sizeof h);
  vu bits = __builtin_convertvector(h, vu);
  vf size = (vf)((bits & 0x7fff) << 13) * 0x1p112f;  // subnormal numbers come out right, too
  return (vf)((vu)size | (bits & 0x8000) << 16);
#endif
}

INLINE float half_to_float(uint16_t h) {
  uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
  float size;
  memcpy(&size, &bits, sizeof size);
  size *= 0x1p112f;
  return h & 0x8000 ? -size : size;
}

// What 1 in a group's int8 is worth, and the sums of its first 16, of the others and of all; the same sums in what they
// are worth.
struct InputGroup {
  float scale;
  int32_t sums[3];
  float scaled[3];
  float unused;
};

// Tokens in int8, each of whole groups with zeros behind the last input.
struct Bytes {
  int8_t* values = nullptr;      // [tokens, count · 32]
  InputGroup* groups = nullptr;  // [tokens, count]
  int64_t count = 0;             // groups of a token

  INLINE void take(Scratch& scratch, int64_t tokens, int64_t d) {
    count = input_groups(d);
    values = scratch.take<int8_t>(tokens * count * INPUT_GROUP);
    groups = scratch.take<InputGroup>(tokens * count);
  }

  // From token t on.
  INLINE Bytes from(int64_t t) const {
    Bytes b = *this;
    if (values) b.values += t * count * INPUT_GROUP, b.groups += t * count;
    return b;
  }

  template <typename I>
  INLINE void round_token(int64_t t, const I* x, int64_t d) const;

  template <typename I>
  INLINE void round_tokens(const I* x, int64_t stride, int64_t first, int64_t last, int64_t d) const {
    for (int64_t t = first; t < last; t++) round_token(t, x + t * stride, d);
  }
};

template <typename I>
INLINE void Bytes::round_token(int64_t t, const I* x, int64_t d) const {
  typedef int8_t bytes __attribute__((vector_size(16)));
  int8_t* out = values + t * count * INPUT_GROUP;
  InputGroup* group = groups + t * count;
  for (int64_t g = 0; g < count; g++, out += INPUT_GROUP, group++) {
    vf v[2];
    for (int h = 0; h < 2; h++) {
      int64_t i = g * INPUT_GROUP + h * LANES;
      v[h] = i + LANES <= d ? load(x + i) : (i < d ? load_some(x + i, (int)(d - i)) : vf{});
    }
    vf first = (vf)((vi)v[0] & 0x7fffffff), second = (vf)((vi)v[1] & 0x7fffffff);
    float peak = max_lane(first > second ? first : second);
    float spoilt = sum((v[0] - v[0]) + (v[1] - v[1]));  // 0, or NaN where a number is infinite or none
    // what is smaller than that has no inverse in float32, and counts as 0
    bool counts = peak > 1e-36f && spoilt == 0;
    float inverse = counts ? 127 / peak : 0;
    group->scale = (counts ? peak / 127 : 0) + spoilt;
    float sums[2];
    for (int h = 0; h < 2; h++) {
      vf shifted = (spoilt == 0 ? v[h] : vf{}) * inverse + 12582912.0f;  // 1.5 · 2^23: the low bits are the integer
      bytes rounded = __builtin_convertvector((vi)shifted - 0x4b400000, bytes);
      memcpy(out + h * LANES, &rounded, sizeof rounded);
      sums[h] = sum(shifted - 12582912.0f);
    }
    float all[3] = {sums[0], sums[1], sums[0] + sums[1]};
    for (int i = 0; i < 3; i++) group->sums[i] = (int32_t)all[i], group->scaled[i] = all[i] * group->scale;
  }
}

DSC_KERNELS_END
