// Products with a packed weight: out[t, n] = Σ_k x[t, k] · w[n, k], for any number of tokens.
//
// A weight [N, D] is packed into panels of 16 outputs. A bfloat16 panel is [D/2][16][2], so that one vector holds 16
// outputs for two neighbouring k; a float32 panel is [D][16], an int8 panel [D/4][16][4]. N is padded to 16 and D to
// whole groups, with zeros. The weight is streamed once for up to TOKENS tokens; sums are float32, of int8 int32.
#pragma once

#include <stdint.h>
#include <string.h>

#include "adapter.h"
#include "api.h"
#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

// What happens to a sum before it is stored, in this order; null pointers and NONE are skipped.
struct Epilogue {
  const float* bias;  // [N]
  int activation;
  const void* times;     // [B, ld] in the output's dtype: the other half of a gated MLP
  const float* plus;     // float32 [B, ld]
  const void* residual;  // [B, ld] in the output's dtype
  int64_t ld;            // row stride of all of these and of the output
  const Branch* branch = nullptr;  // what adapters add, before all of these
};

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

template <typename O>
INLINE void finish(vf v, const Epilogue& e, O* out, int64_t t, int64_t n, int64_t size) {
  int count = size - n < LANES ? (int)(size - n) : LANES;
  int64_t at = t * e.ld + n;
  if (count == LANES) {
    if (e.bias) v += load(e.bias + n);
    if (e.activation == GELU) v = gelu(v);
    if (e.activation == SILU) v = silu(v);
    if (e.activation == GELU_TANH) v = gelu_tanh(v);
    if (e.times) v *= load((const O*)e.times + at);
    if (e.plus) v += load(e.plus + at);
    if (e.residual) v += load((const O*)e.residual + at);
    store(out + at, v);
  } else {
    if (e.bias) v += load_some(e.bias + n, count);
    if (e.activation == GELU) v = gelu(v);
    if (e.activation == SILU) v = silu(v);
    if (e.activation == GELU_TANH) v = gelu_tanh(v);
    if (e.times) v *= load_some((const O*)e.times + at, count);
    if (e.plus) v += load_some(e.plus + at, count);
    if (e.residual) v += load_some((const O*)e.residual + at, count);
    store_some(out + at, v, count);
  }
}

// Where sums go: activated and added to, in rows of an output.
template <typename O>
struct Output {
  const Epilogue& e;
  O* out;
  int64_t size;
  INLINE void operator()(vf v, int64_t t, int64_t n) const { finish(v, e, out, t, n, size); }
};

// The same for sums that adapters add to.
template <typename O>
struct AdaptedOutput {
  const Epilogue& e;
  O* out;
  int64_t size;
  INLINE void operator()(vf v, int64_t t, int64_t n) const { finish(e.branch->add(v, t, n), e, out, t, n, size); }
};

// What sums of tokens t, t + 1 … start from: 0, where a sink knows of nothing else.
template <typename T, typename Sum, int P, int TT, typename Sink>
INLINE void start(const Sink&, const T*, int64_t, int64_t, Sum (&)[P][TT]) {}

template <typename T, int P, int TT, typename Sink>
INLINE void block(const T* w, int64_t panel, const typename Input<T>::type* const* x, int64_t d, const Sink& sink,
                  int64_t t, int64_t n, Ahead& ahead) {
  typename Input<T>::sum acc[P][TT];
  clear(acc);
  start(sink, w, panel, t, acc);
  tile<P, TT>(w, panel, x, d, ahead, acc);
  for (int p = 0; p < P; p++)
    for (int i = 0; i < TT; i++) sink(acc[p][i], t + i, n + p * LANES);
}

// Calls run for a few tokens at a time, told how many at compile time and from which on: as even as they can be, since
// tiles of one token are slow.
template <typename Run>
INLINE void by_tiles(int64_t count, const Run& run) {
  int64_t tiles = (count + TOKENS - 1) / TOKENS;
  for (int64_t t = 0, group; t < count; t += group, tiles--) {
    group = (count - t + tiles - 1) / tiles;
    switch (group) {
      case 1: run.template operator()<1>(t); break;
      case 2: run.template operator()<2>(t); break;
      case 3: run.template operator()<3>(t); break;
      case 4: run.template operator()<4>(t); break;
#if defined(__AVX512F__)
      case 5: run.template operator()<5>(t); break;
      case 6: run.template operator()<6>(t); break;
#endif
    }
  }
}

template <typename T, int P, typename Sink>
INLINE void tokens(const T* w, int64_t panel, const typename Input<T>::type* x, int64_t stride, const int32_t* rows,
                   int64_t count, int64_t d, const Sink& sink, int64_t n, int64_t left) {
  if (!count) return;
  const typename Input<T>::type* at[TOKENS];
  // several tiles have time to ask for as many weights again; one alone reads as fast as it multiplies
  int64_t tiles = (count + TOKENS - 1) / TOKENS, bytes = (left < P ? left : P) * panel * (int64_t)sizeof(T);
  const char* next = (const char*)(w + P * panel);
  int64_t steps = tiles * ((d + GROUP<T> - 1) / GROUP<T>);
  Ahead ahead = {next, next + (tiles > 1 ? bytes : 0), (int)((bytes / 64 + steps - 1) / steps)};
  by_tiles(count, [&]<int TT>(int64_t t) __attribute__((always_inline)) {
    for (int i = 0; i < TT; i++) at[i] = x + (rows ? rows[t + i] : t + i) * stride;
    block<T, P, TT>(w, panel, at, d, sink, t, n, ahead);
  });
}

// Panels first … last − 1 of x[rows] · wᵀ go to the sink as (sums of 16 outputs, token, first output). x has rows of
// `stride` elements, padded to whole groups; rows picks some of them (null: all in order).
template <typename T, typename Sink>
INLINE void multiply(const T* w, const typename Input<T>::type* x, int64_t stride, const int32_t* rows, int64_t count,
                     int64_t d, const Sink& sink, int64_t first, int64_t last) {
  int64_t panel = Packed<T>::panel_size(d), p = first;
  for (; p + PANELS <= last; p += PANELS)
    tokens<T, PANELS>(w + p * panel, panel, x, stride, rows, count, d, sink, p * LANES, last - p - PANELS);
  for (; p < last; p++) tokens<T, 1>(w + p * panel, panel, x, stride, rows, count, d, sink, p * LANES, last - p - 1);
}

// Panels first … last − 1 of out [count, size] = x[rows] · wᵀ.
template <typename T, typename O>
void gemm(const T* w, const typename Input<T>::type* x, int64_t stride, const int32_t* rows, int64_t count, int64_t d,
          int64_t size, const Epilogue& e, O* out, int64_t first, int64_t last) {
  if (e.branch) multiply<T>(w, x, stride, rows, count, d, AdaptedOutput<O>{e, out, size}, first, last);
  else multiply<T>(w, x, stride, rows, count, d, Output<O>{e, out, size}, first, last);
}

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
