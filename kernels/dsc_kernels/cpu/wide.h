// Vectors of sixteen numbers: the compiler's own where the processor has registers of that size, elsewhere two halves.
// Of a vector without a register of its size gcc keeps every piece in memory, from which each operation then waits for it.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "namespace.h"

DSC_KERNELS_BEGIN

#define INLINE inline __attribute__((always_inline))

constexpr int LANES = 16;

typedef uint16_t vh __attribute__((vector_size(32)));

#if defined(__AVX512F__)

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef float half_vf __attribute__((vector_size(32)));

INLINE vf blend(vi mask, vf a, vf b) { return mask ? a : b; }
INLINE vi blend(vi mask, vi a, vi b) { return mask ? a : b; }
INLINE vu blend(vi mask, vu a, vu b) { return mask ? a : b; }

INLINE vf to_floats(vi v) { return __builtin_convertvector(v, vf); }
INLINE vu widen(vh v) { return __builtin_convertvector(v, vu); }
INLINE vh narrow(vu v) { return __builtin_convertvector(v, vh); }  // their low halves

template <typename V>
INLINE V load_bits(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <typename V>
INLINE void store_bits(void* p, V v) {
  memcpy(p, &v, sizeof v);
}

template <typename V, typename E>
INLINE void set_lane(V& v, int lane, E value) {
  v[lane] = value;
}

INLINE void split(vf v, half_vf (&parts)[2]) { memcpy(parts, &v, sizeof parts); }

INLINE vi lane_numbers() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// The first, or last, eight lanes of each in turn.
INLINE vi interleave_first(vi a, vi b) {
  return __builtin_shuffle(a, b, vi{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
}
INLINE vi interleave_last(vi a, vi b) {
  return __builtin_shuffle(a, b, vi{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}

#else

template <typename E>
struct Wide;

typedef Wide<float> vf;
typedef Wide<int32_t> vi;
typedef Wide<uint32_t> vu;
typedef float half_vf __attribute__((vector_size(32)));
typedef int32_t half_vi __attribute__((vector_size(32)));

#define DSC_OPERATOR(OP)                                                                       \
  friend INLINE Wide operator OP(Wide a, Wide b) { return {a.first OP b.first, a.last OP b.last}; } \
  friend INLINE Wide operator OP(Wide a, E b) { return {a.first OP b, a.last OP b}; }          \
  friend INLINE Wide operator OP(E a, Wide b) { return {a OP b.first, a OP b.last}; }          \
  friend INLINE Wide& operator OP##=(Wide& a, Wide b) { return a = a OP b; }                   \
  friend INLINE Wide& operator OP##=(Wide& a, E b) { return a = a OP b; }

#define DSC_COMPARISON(OP)                                                                           \
  friend INLINE Wide<int32_t> operator OP(Wide a, Wide b) {                                         \
    return {(half_vi)(a.first OP b.first), (half_vi)(a.last OP b.last)};                            \
  }                                                                                                 \
  friend INLINE Wide<int32_t> operator OP(Wide a, E b) {                                            \
    return {(half_vi)(a.first OP b), (half_vi)(a.last OP b)};                                       \
  }

// Lanes 0 to 7, and 8 to 15, with the operators of the compiler's vectors. A cast keeps the bits, as theirs does.
template <typename E>
struct Wide {
  typedef E half __attribute__((vector_size(32)));
  half first, last;

  INLINE E operator[](int lane) const { return lane < LANES / 2 ? first[lane] : last[lane - LANES / 2]; }

  template <typename F>
  INLINE explicit operator Wide<F>() const {
    return {(typename Wide<F>::half)first, (typename Wide<F>::half)last};
  }

  INLINE Wide operator-() const { return {-first, -last}; }

  DSC_OPERATOR(+)
  DSC_OPERATOR(-)
  DSC_OPERATOR(*)
  DSC_OPERATOR(/)
  DSC_COMPARISON(==)
  DSC_COMPARISON(!=)
  DSC_COMPARISON(<)
  DSC_COMPARISON(>)
};

#define DSC_BIT_OPERATOR(OP)                                                                                      \
  template <typename E>                                                                                          \
  INLINE Wide<E> operator OP(Wide<E> a, Wide<E> b) {                                                             \
    return {a.first OP b.first, a.last OP b.last};                                                               \
  }                                                                                                              \
  template <typename E, typename S>                                                                              \
  INLINE Wide<E> operator OP(Wide<E> a, S b) {                                                                   \
    return {a.first OP(E) b, a.last OP(E) b};                                                                    \
  }

DSC_BIT_OPERATOR(&)
DSC_BIT_OPERATOR(|)
DSC_BIT_OPERATOR(^)
DSC_BIT_OPERATOR(<<)
DSC_BIT_OPERATOR(>>)

#undef DSC_OPERATOR
#undef DSC_COMPARISON
#undef DSC_BIT_OPERATOR

template <typename E>
INLINE Wide<E> blend(vi mask, Wide<E> a, Wide<E> b) {
  return {mask.first ? a.first : b.first, mask.last ? a.last : b.last};
}

INLINE vf to_floats(vi v) {
  return {__builtin_convertvector(v.first, half_vf), __builtin_convertvector(v.last, half_vf)};
}

#if defined(__AVX2__)
INLINE vu widen(vh v) {
  __m256i all = (__m256i)v;
  return {(vu::half)_mm256_cvtepu16_epi32(_mm256_castsi256_si128(all)),
          (vu::half)_mm256_cvtepu16_epi32(_mm256_extracti128_si256(all, 1))};
}

INLINE vh narrow(vu v) {  // their low halves
  __m256i low = _mm256_set1_epi32(0xffff);
  __m256i both = _mm256_packus_epi32(_mm256_and_si256((__m256i)v.first, low), _mm256_and_si256((__m256i)v.last, low));
  return (vh)_mm256_permute4x64_epi64(both, 0xd8);  // packing went by halves
}
#else
INLINE vu widen(vh v) {
  vu out = {};
  for (int i = 0; i < LANES / 2; i++) out.first[i] = v[i], out.last[i] = v[i + LANES / 2];
  return out;
}

INLINE vh narrow(vu v) {  // their low halves
  vh out = {};
  for (int i = 0; i < LANES / 2; i++) out[i] = (uint16_t)v.first[i], out[i + LANES / 2] = (uint16_t)v.last[i];
  return out;
}
#endif

template <typename V>
INLINE V load_bits(const void* p) {
  V v;
  memcpy(&v.first, p, sizeof v.first);
  memcpy(&v.last, (const char*)p + sizeof v.first, sizeof v.last);
  return v;
}

template <typename V>
INLINE void store_bits(void* p, V v) {
  memcpy(p, &v.first, sizeof v.first);
  memcpy((char*)p + sizeof v.first, &v.last, sizeof v.last);
}

template <typename V, typename E>
INLINE void set_lane(V& v, int lane, E value) {
  if (lane < LANES / 2) v.first[lane] = value;
  else v.last[lane - LANES / 2] = value;
}

INLINE void split(vf v, half_vf (&parts)[2]) { parts[0] = v.first, parts[1] = v.last; }

INLINE vi lane_numbers() { return {half_vi{0, 1, 2, 3, 4, 5, 6, 7}, half_vi{8, 9, 10, 11, 12, 13, 14, 15}}; }

INLINE vi interleave(half_vi a, half_vi b) {
  return {__builtin_shuffle(a, b, half_vi{0, 8, 1, 9, 2, 10, 3, 11}),
          __builtin_shuffle(a, b, half_vi{4, 12, 5, 13, 6, 14, 7, 15})};
}

// The first, or last, eight lanes of each in turn.
INLINE vi interleave_first(vi a, vi b) { return interleave(a.first, b.first); }
INLINE vi interleave_last(vi a, vi b) { return interleave(a.last, b.last); }

#endif

// All 0, each by itself: gcc clears an array of halves in memory, and reads it from there.
template <typename V, int P, int T>
INLINE void clear(V (&all)[P][T]) {
  for (int p = 0; p < P; p++)
    for (int t = 0; t < T; t++) all[p][t] = V{};
}

DSC_KERNELS_END
