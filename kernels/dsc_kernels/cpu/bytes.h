// Tokens in int8 for products with quantised weights, and what float16 numbers are worth.
//
// Inputs are rounded in groups of 32 to steps of their largest / 127, or with a second digit, which says what the first
// leaves in 254ths of its step, to steps of their largest / 32258. Each is off by at most half a step: a product Σ w x is
// off by at most ½ Σ |w| · (the step of its group), plus what float32 sums round.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <initializer_list>

#include "api.h"
#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

constexpr int64_t INPUT_GROUP = 32;
constexpr int SECOND_DIGIT = 254;  // how many of it are one of the first digit

INLINE int64_t input_groups(int64_t d) { return (d + INPUT_GROUP - 1) / INPUT_GROUP; }

// Sixteen float16 numbers, none of which is infinite or NaN.
INLINE vf load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)(const void*)p));
#elif defined(__F16C__)
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(const void*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(const void*)(p + 8)))};
#else
  vh h;
  memcpy(&h, p, sizeof h);
  vu bits = widen(h);
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

// What a product needs to know of a group of inputs beside its numbers.
struct InputGroup {
  float scale;      // what 1 in its last digit is worth
  int32_t sums[3];  // of its first 16 numbers, of the others and of all, in that
  float scaled[3];  // the same sums in what they are worth
  float unused;     // so that a group takes 32 bytes
};

// Tokens in int8, each of whole groups with zeros behind the last input.
struct Bytes {
  int8_t* values = nullptr;      // [tokens, count, digits, 32]
  InputGroup* groups = nullptr;  // [tokens, count]
  int64_t count = 0;             // groups of a token
  int64_t digits = 0;            // of a number: 1 or 2

  // Inputs of weights of these formats, null for one that is not quantised: with as many digits as any of them asks for.
  INLINE void take(Scratch& scratch, int64_t tokens, int64_t d, std::initializer_list<const Format*> formats) {
    for (const Format* f : formats)
      if (f && f->digits > digits) digits = f->digits;
    if (!digits) return;
    count = input_groups(d);
    values = scratch.take<int8_t>(tokens * token_bytes());
    groups = scratch.take<InputGroup>(tokens * count);
  }

  INLINE int64_t token_bytes() const { return count * digits * INPUT_GROUP; }

  // From token t on.
  INLINE Bytes from(int64_t t) const {
    Bytes b = *this;
    if (values) b.values += t * token_bytes(), b.groups += t * count;
    return b;
  }

  template <typename I>
  INLINE void round_token(int64_t t, const I* x, int64_t d) const;

  template <typename I>
  INLINE void round_tokens(const I* x, int64_t stride, int64_t first, int64_t last, int64_t d) const {
    for (int64_t t = first; t < last; t++) round_token(t, x + t * stride, d);
  }
};

// What a group's largest number is worth in int8, and what makes numbers int8; its bits tell those that are no number.
INLINE float step_of(int32_t peak_bits, float& inverse) {
  float peak;
  memcpy(&peak, &peak_bits, sizeof peak);
  bool finite = peak_bits < 0x7f800000, counts = finite && peak > 1e-36f;  // what is smaller has no inverse in float32
  inverse = counts ? 127 / peak : 0;
  return counts ? peak / 127 : (finite ? 0 : NAN);
}

INLINE void note_sums(InputGroup* group, float scale, int32_t first, int32_t second) {
  group->scale = scale;
  int32_t all[3] = {first, second, first + second};
  for (int i = 0; i < 3; i++) group->sums[i] = all[i], group->scaled[i] = (float)all[i] * group->scale;
}

#if defined(__AVX2__)

INLINE __m256 load_8(const float* p) { return _mm256_loadu_ps(p); }

INLINE __m256 load_8(const bf16* p) {
  __m128i halves = _mm_loadu_si128((const __m128i*)(const void*)p);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// 32 numbers as whole ones, whose sums it adds up by the first 16 and the others, times `worth`.
INLINE void put_digits(const __m256i* q, int8_t* out, int32_t worth, int32_t* sums) {
  __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));  // packing went by halves
  _mm256_storeu_si256((__m256i*)(void*)out, bytes);
  __m256i all = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
  all = _mm256_hadd_epi32(all, all);
  all = _mm256_hadd_epi32(all, all);
  sums[0] += worth * _mm_cvtsi128_si32(_mm256_castsi256_si128(all));
  sums[1] += worth * _mm_cvtsi128_si32(_mm256_extracti128_si256(all, 1));
}

// 32 numbers.
template <int DIGITS, typename I>
INLINE void round_group(const I* x, int8_t* out, InputGroup* group) {
  __m256 v[4];
  __m256i top = _mm256_setzero_si256();
  for (int i = 0; i < 4; i++) {
    v[i] = load_8(x + 8 * i);
    top = _mm256_max_epi32(top, _mm256_and_si256(_mm256_castps_si256(v[i]), _mm256_set1_epi32(0x7fffffff)));
  }
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
  float inverse, step = step_of(_mm_cvtsi128_si32(most), inverse);
  int32_t sums[2] = {0, 0};
  __m256i q[4];
  for (int i = 0; i < 4; i++) {
    v[i] = _mm256_mul_ps(v[i], _mm256_set1_ps(inverse));
    q[i] = _mm256_cvtps_epi32(v[i]);
  }
  put_digits(q, out, DIGITS == 2 ? SECOND_DIGIT : 1, sums);
  if constexpr (DIGITS == 2) {
    for (int i = 0; i < 4; i++) {
      __m256 left = _mm256_sub_ps(v[i], _mm256_cvtepi32_ps(q[i]));
      q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(left, _mm256_set1_ps(SECOND_DIGIT)));
    }
    put_digits(q, out + INPUT_GROUP, 1, sums);
    step /= SECOND_DIGIT;
  }
  note_sums(group, step, sums[0], sums[1]);
}

#else

template <int DIGITS, typename I>
INLINE void round_group(const I* x, int8_t* out, InputGroup* group) {
  vf v[2] = {load(x), load(x + LANES)};
  vi first = (vi)v[0] & 0x7fffffff, second = (vi)v[1] & 0x7fffffff, both = blend(first > second, first, second);
  int32_t most = 0, sums[2] = {0, 0};
  for (int lane = 0; lane < LANES; lane++) most = both[lane] > most ? both[lane] : most;
  float inverse, step = step_of(most, inverse);
  for (int h = 0; h < 2; h++) v[h] = (most < 0x7f800000 ? v[h] : vf{}) * inverse;
  for (int digit = 0; digit < DIGITS; digit++, out += INPUT_GROUP)
    for (int h = 0; h < 2; h++) {
      vi whole = (vi)(v[h] + 12582912.0f) - 0x4b400000;  // 1.5 · 2^23: the low bits are the integer
      store_bytes(out + h * LANES, whole);
      for (int lane = 0; lane < LANES; lane++) sums[h] += whole[lane] * (digit + 1 < DIGITS ? SECOND_DIGIT : 1);
      v[h] = (v[h] - to_floats(whole)) * (float)SECOND_DIGIT;
    }
  note_sums(group, DIGITS == 2 ? step / SECOND_DIGIT : step, sums[0], sums[1]);
}

#endif

template <int DIGITS, typename I>
INLINE void round_groups(const I* x, int64_t d, int8_t* out, InputGroup* group) {
  int64_t i = 0;
  for (; i + INPUT_GROUP <= d; i += INPUT_GROUP) round_group<DIGITS>(x + i, out + i * DIGITS, group++);
  if (i == d) return;
  I rest[INPUT_GROUP] = {};
  memcpy(rest, x + i, (d - i) * sizeof(I));
  round_group<DIGITS>(rest, out + i * DIGITS, group);
}

template <typename I>
INLINE void Bytes::round_token(int64_t t, const I* x, int64_t d) const {
  int8_t* out = values + t * token_bytes();
  InputGroup* group = groups + t * count;
  if (digits == 2) round_groups<2>(x, d, out, group);
  else round_groups<1>(x, d, out, group);
}

DSC_KERNELS_END
