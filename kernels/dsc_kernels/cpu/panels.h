// Panels: how products read a weight, and what some inputs add to the sums of some tokens.
//
// A weight [N, D] is packed into panels of 16 outputs. A bfloat16 panel is [D/2][16][2], so that one vector holds 16
// outputs for two neighbouring k; a float32 panel is [D][16], an int8 panel [D/4][16][4]. N is padded to 16 and D to
// whole groups, with zeros. Sums are float32, of int8 int32.
#pragma once

#include <stdint.h>
#include <string.h>

#include "api.h"
#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

INLINE int64_t panel_count(int64_t n) { return (n + LANES - 1) / LANES; }

// Neighbouring k of one output that lie together: 4 bytes.
template <typename T>
constexpr int64_t GROUP = 4 / (int64_t)sizeof(T);

template <typename T>
struct Packed {
  static int64_t panel_size(int64_t d) { return (d + GROUP<T> - 1) / GROUP<T> * GROUP<T> * LANES; }
};

// The inputs as the tiles read them, and what their products are summed in. bfloat16 pairs stay as they lie where the
// processor multiplies those; with int8 weights go inputs shifted by 128.
template <typename T>
struct Input {
#if defined(__AVX512BF16__)
  typedef T type;  // of an input as tiles read it
#else
  typedef float type;  // of an input as tiles read it
#endif
  typedef vf sum;  // of products
};

template <>
struct Input<int8_t> {
  typedef uint8_t type;  // of an input: shifted by 128
  typedef vi sum;        // of products
};

#if defined(__AVX512F__)
constexpr int PANELS = 4, TOKENS = 6;
#else
constexpr int PANELS = 1, TOKENS = 4;
#endif

// The weights that come next: asked for while the present ones, already in the cache, meet further tokens, so that
// memory and arithmetic work at the same time.
struct Ahead {
  const char* at;
  const char* end;
  int lines;  // asked for per step of a tile
  INLINE void step() {
    for (int i = 0; i < lines && at < end; i++, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// What GROUP inputs from the k-th on add to the sums of P panels and T tokens.
template <int P, int T>
INLINE void add_group(const float* w, int64_t panel, const float* const* x, int64_t k, vf (&acc)[P][T]) {
  vf row[P];
  for (int p = 0; p < P; p++) row[p] = load(w + p * panel + k * LANES);
  for (int t = 0; t < T; t++) {
    vf value = splat(x[t][k]);
    for (int p = 0; p < P; p++) acc[p][t] += row[p] * value;
  }
}

#if defined(__AVX512BF16__)
template <int P, int T>
INLINE void add_group(const bf16* w, int64_t panel, const bf16* const* x, int64_t k, vf (&acc)[P][T]) {
  __m512bh row[P];
  for (int p = 0; p < P; p++) row[p] = (__m512bh)_mm512_loadu_si512(w + p * panel + k * LANES);
  for (int t = 0; t < T; t++) {
    int32_t pair;
    memcpy(&pair, x[t] + k, sizeof pair);
    __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
    for (int p = 0; p < P; p++) acc[p][t] = (vf)_mm512_dpbf16_ps((__m512)acc[p][t], row[p], value);
  }
}
#else
template <int P, int T>
INLINE void add_group(const bf16* w, int64_t panel, const float* const* x, int64_t k, vf (&acc)[P][T]) {
  vf even[P], odd[P];
  for (int p = 0; p < P; p++) load_pairs(w + p * panel + k * LANES, even[p], odd[p]);
  for (int t = 0; t < T; t++) {
    vf first = splat(x[t][k]), second = splat(x[t][k + 1]);
    for (int p = 0; p < P; p++) acc[p][t] += even[p] * first;
    for (int p = 0; p < P; p++) acc[p][t] += odd[p] * second;
  }
}
#endif

// sums + four unsigned inputs · 16 rows of four signed weights.
INLINE vi dot4(vi sums, uint32_t four, vi rows) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32((int32_t)four), (__m512i)rows);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  // by bytes 0 and 2, and by 1 and 3: products of pairs of 16 bits are exact
  __m256i even = _mm256_set1_epi32((int32_t)(four & 0x00ff00ff)), odd = _mm256_set1_epi32((int32_t)(four >> 8 & 0x00ff00ff));
  auto plus = [&](__m256i sum, __m256i row) __attribute__((always_inline)) {
    __m256i own = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(row, 8), 8), even);
    return _mm256_add_epi32(_mm256_add_epi32(sum, own), _mm256_madd_epi16(_mm256_srai_epi16(row, 8), odd));
  };
  return {(half_vi)plus((__m256i)sums.first, (__m256i)rows.first), (half_vi)plus((__m256i)sums.last, (__m256i)rows.last)};
#else
  for (int i = 0; i < 4; i++) sums += (rows << (24 - 8 * i) >> 24) * (int32_t)(four >> 8 * i & 0xff);
  return sums;
#endif
}

template <int P, int T>
INLINE void add_group(const int8_t* w, int64_t panel, const uint8_t* const* x, int64_t k, vi (&acc)[P][T]) {
  vi row[P];
  for (int p = 0; p < P; p++) row[p] = load_bits<vi>(w + p * panel + k * LANES);
  for (int t = 0; t < T; t++) {
    uint32_t four;
    memcpy(&four, x[t] + k, sizeof four);
    for (int p = 0; p < P; p++) acc[p][t] = dot4(acc[p][t], four, row[p]);
  }
}

template <int P, int TT, typename T, typename Sum>
INLINE void tile(const T* w, int64_t panel, const typename Input<T>::type* const* x, int64_t d, Ahead& ahead,
                 Sum (&acc)[P][TT]) {
  for (int64_t k = 0; k < d; k += GROUP<T>) {
    ahead.step();
    add_group<P, TT>(w, panel, x, k, acc);
  }
}

// What sums of tokens t, t + 1 … start from: 0, where a sink knows of nothing else.
template <typename T, typename Sum, int P, int TT, typename Sink>
INLINE void start(const Sink&, const T*, int64_t, int64_t, Sum (&)[P][TT]) {}

template <typename T>
void pack(const T* w, int64_t size, int64_t d, T* out) {
  int64_t panel = Packed<T>::panel_size(d);
  for (int64_t p = 0; p < panel_count(size); p++)
    for (int64_t k = 0; k < panel / LANES; k++)
      for (int lane = 0; lane < LANES; lane++) {
        int64_t n = p * LANES + lane;
        out[p * panel + (k / GROUP<T> * LANES + lane) * GROUP<T> + k % GROUP<T>] =
            n < size && k < d ? w[n * d + k] : T{};
      }
}

DSC_KERNELS_END
