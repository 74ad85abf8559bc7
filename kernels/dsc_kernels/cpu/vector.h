// Sixteen numbers at a time: the same source serves every instruction set.
// Included once per instruction set, inside an unnamed namespace (instruction_set.h), and free of the standard library,
// whose inline functions the linker could take from the wrong translation unit.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "namespace.h"
#include "wide.h"

DSC_KERNELS_BEGIN

typedef uint16_t bf16;

INLINE vf splat(float x) { return x - vf{}; }  // with + the compiler has to add: −0 would become 0

INLINE vf load(const float* p) { return load_bits<vf>(p); }

INLINE vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(widen(h) << 16);
}

// Sixteen numbers of 8 bits, and the low bytes of sixteen; gcc takes such conversions of vectors apart, byte by byte.
INLINE vf load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  __m128i bytes = _mm_loadu_si128((const __m128i*)(const void*)p);
  return (vf)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif defined(__AVX2__)
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(const void*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(const void*)(p + 8))))};
#else
  vi whole = {};
  for (int i = 0; i < LANES; i++) set_lane(whole, i, p[i]);
  return to_floats(whole);
#endif
}

INLINE void store_bytes(void* p, vi v) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v));
#else
  uint8_t bytes[LANES];
  for (int i = 0; i < LANES; i++) bytes[i] = (uint8_t)v[i];
  memcpy(p, bytes, sizeof bytes);
#endif
}

INLINE void store(float* p, vf v) { store_bits(p, v); }

// The bits of bfloat16: to nearest even; a NaN stays one.
INLINE vu to_bf16_bits(vf v) {
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  vu nan = (bits >> 16) | 0x40;
  return blend(v != v, nan, rounded);
}

INLINE void store(bf16* p, vf v) {
  vh h = narrow(to_bf16_bits(v));
  memcpy(p, &h, sizeof h);
}

// 32 numbers in turn from two vectors.
INLINE void load_pairs(const bf16* p, vf& even, vf& odd) {
  vu pairs = load_bits<vu>(p);
  even = (vf)(pairs << 16), odd = (vf)(pairs & 0xffff0000u);
}

INLINE void store_pairs(bf16* p, vf even, vf odd) {
  store_bits(p, to_bf16_bits(even) | to_bf16_bits(odd) << 16);
}

INLINE float to_float(float x) { return x; }

INLINE float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

INLINE void put(float* p, float x) { *p = x; }

INLINE void put(bf16* p, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  *p = x != x ? (bf16)((bits >> 16) | 0x40) : (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The first `count` < 16 lanes; the others are 0.
template <typename T>
INLINE vf load_some(const T* p, int count) {
  float some[LANES] = {};
  for (int i = 0; i < count; i++) some[i] = to_float(p[i]);
  return load(some);
}

template <typename T>
INLINE void store_some(T* p, vf v, int count) {
  float some[LANES];
  store(some, v);
  for (int i = 0; i < count; i++) put(p + i, some[i]);
}

INLINE float sum(vf v) {
  typedef float quarter __attribute__((vector_size(16)));
  half_vf h[2];
  split(v, h);
  h[0] += h[1];
  quarter q[2];
  memcpy(q, h, sizeof q);
  q[0] += q[1];
  return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
}

// The largest lane; not for a NaN.
INLINE float max_lane(vf v) {
  typedef float quarter __attribute__((vector_size(16)));
  half_vf h[2];
  split(v, h);
  h[0] = h[0] > h[1] ? h[0] : h[1];
  quarter q[2];
  memcpy(q, h, sizeof q);
  q[0] = q[0] > q[1] ? q[0] : q[1];
  float a = q[0][0] > q[0][2] ? q[0][0] : q[0][2], b = q[0][1] > q[0][3] ? q[0][1] : q[0][3];
  return a > b ? a : b;
}

// The sums of 16 vectors, in order.
#if defined(__AVX512F__)
// Neighbours are added in four rounds that halve the vectors.
INLINE vf sums(vf (&rows)[LANES]) {
  const vi even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const vi odd = even + 1;
  for (int count = LANES; count > 1; count /= 2)
    for (int i = 0; i < count / 2; i++)
      rows[i] =
          __builtin_shuffle(rows[2 * i], rows[2 * i + 1], even) + __builtin_shuffle(rows[2 * i], rows[2 * i + 1], odd);
  return rows[0];
}
#elif defined(__AVX2__)
INLINE __m256 sums_of_8(const vf* rows) {
  __m256 four[2];
  for (int i = 0; i < 2; i++) {
    const vf* own = rows + 4 * i;
    __m256 one = _mm256_hadd_ps(own[0].first + own[0].last, own[1].first + own[1].last);
    __m256 other = _mm256_hadd_ps(own[2].first + own[2].last, own[3].first + own[3].last);
    four[i] = _mm256_hadd_ps(one, other);
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
}

INLINE vf sums(vf (&rows)[LANES]) { return {sums_of_8(rows), sums_of_8(rows + LANES / 2)}; }
#else
INLINE vf sums(vf (&rows)[LANES]) {
  float all[LANES];
  for (int i = 0; i < LANES; i++) all[i] = sum(rows[i]);
  return load(all);
}
#endif

INLINE vf vmin(vf a, vf b) { return blend(a < b, a, b); }
INLINE vf vmax(vf a, vf b) { return blend(a > b, a, b); }

// e^x to about 2 units in the last place; 0 below −87.3, the largest finite value's neighbourhood above 88.3.
INLINE vf vexp(vf x) {
  vf clamped = vmin(vmax(x, splat(-87.3f)), splat(88.3f));
  vf shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: the sum's low bits are the rounded exponent
  vf n = shifted - 12582912.0f;
  vf r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vf scale = (vf)(((vi)shifted << 23) + 0x3f800000);
  return blend(x < -87.3f, splat(0.0f), blend(x != x, x, p * scale));
}

// 2^x for x ≤ 0 to about 2 units in the last place; 0 below −126.
INLINE vf vexp2(vf x) {
  vf clamped = vmax(splat(-200.0f), x);
#if defined(__AVX512F__)
  vf n = (vf)_mm512_maskz_roundscale_ps(0xffff, (__m512)clamped, 0), r = clamped - n;
#else
  vf shifted = clamped + 12582912.0f, n = shifted - 12582912.0f, r = clamped - n;
#endif
  vf p = splat(1.535336188e-4f);
  p = p * r + 1.339887440e-3f;
  p = p * r + 9.618437357e-3f;
  p = p * r + 5.550332472e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472028e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  return blend(x < -126.0f, splat(0.0f), p * (vf)(((vi)shifted << 23) + 0x3f800000));
#endif
}

// log(1 + y) for y in [0, 1], as 2 artanh(y / (2 + y)).
INLINE vf vlog1p(vf y) {
  vf s = y / (2.0f + y), q = s * s;
  vf p = splat(1.0f / 15);
  for (int i = 13; i > 0; i -= 2) p = p * q + 1.0f / i;
  return 2.0f * s * p;
}

INLINE vf softplus(vf x) {
  vf low = vexp(blend(x > 0.0f, -x, x));
  return vmax(x, splat(0.0f)) + vlog1p(low);
}

// erf by a rational function of odd over even degree, exact to float32's rounding within a few units.
INLINE vf verf(vf x) {
  vf c = vmin(vmax(x, splat(-4.0f)), splat(4.0f));
  vf q = c * c;
  vf a = splat(-2.72614225801306e-10f);
  a = a * q + 2.77068142495902e-08f;
  a = a * q - 2.10102402082508e-06f;
  a = a * q - 5.69250639462346e-05f;
  a = a * q - 7.34990630326855e-04f;
  a = a * q - 2.95459980854025e-03f;
  a = a * q - 1.60960333262415e-02f;
  vf b = splat(-1.45660718464996e-05f);
  b = b * q - 2.13374055278905e-04f;
  b = b * q - 1.68282697438203e-03f;
  b = b * q - 7.37332916720468e-03f;
  b = b * q - 1.42647390514189e-02f;
  return blend(x != x, x, c * a / b);
}

INLINE vf gelu(vf x) { return 0.5f * x * (1.0f + verf(x * 0.70710678f)); }

INLINE vf silu(vf x) { return x / (1.0f + vexp(-x)); }

// x · (1 + tanh y) / 2 with y = √(2 / π) · (x + 0.044715 x³), which is x · sigmoid(2 y).
INLINE vf gelu_tanh(vf x) { return x / (1.0f + vexp(-1.5957691216057308f * (x + 0.044715f * x * x * x))); }

// tanh to about 3 units in the last place: near 0 its series, which keeps what 1 − 2 / (1 + e^2x) would cancel.
INLINE vf vtanh(vf x) {
  vf q = x * x;
  vf p = splat(-8.863235529902197e-3f);
  p = p * q + 2.1869488536155203e-2f;
  p = p * q - 5.396825396825397e-2f;
  p = p * q + 1.3333333333333333e-1f;
  p = p * q - 3.333333333333333e-1f;
  vf near = x + x * q * p, far = 1.0f - 2.0f / (1.0f + vexp(x + x));
  return blend(q < 0.09f, near, far);
}

// One bit per lane that is greater, or less, than the bound; none for a NaN.
INLINE uint32_t above(vf v, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_GT_OQ);
#elif defined(__AVX2__)
  __m256 b = _mm256_set1_ps(bound);
  return _mm256_movemask_ps(_mm256_cmp_ps(v.first, b, _CMP_GT_OQ)) |
         _mm256_movemask_ps(_mm256_cmp_ps(v.last, b, _CMP_GT_OQ)) << 8;
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; i++) bits |= (uint32_t)(v[i] > bound) << i;
  return bits;
#endif
}

INLINE uint32_t below(vf v, float bound) { return above(-v, -bound); }

// A vector whose sum is the product of a and b.
template <typename T>
INLINE vf partial_dot(const T* a, const T* b, int64_t n) {
  vf s0 = {}, s1 = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + LANES) * load(b + i + LANES);
  }
  for (; i + LANES <= n; i += LANES) s0 += load(a + i) * load(b + i);
  if (i < n) s1 += load_some(a + i, n - i) * load_some(b + i, n - i);
  return s0 + s1;
}

#if defined(__AVX512BF16__)
template <>
INLINE vf partial_dot<bf16>(const bf16* a, const bf16* b, int64_t n) {
  __m512 s = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES)
    s = _mm512_dpbf16_ps(s, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(b + i));
  vf rest = {};
  for (; i + LANES <= n; i += LANES) rest += load(a + i) * load(b + i);
  if (i < n) rest += load_some(a + i, n - i) * load_some(b + i, n - i);
  return (vf)s + rest;
}
#endif

template <typename T>
INLINE float dot(const T* a, const T* b, int64_t n) {
  return sum(partial_dot(a, b, n));
}

DSC_KERNELS_END
