// Products with a packed weight: out[t, n] = Σ_k x[t, k] · w[n, k], for any number of tokens.
//
// A weight [N, D] is packed into panels of 16 outputs. A bfloat16 panel is [D/2][16][2], so that one vector holds 16
// outputs for two neighbouring k; a float32 panel is [D][16]. N is padded to 16 and an odd D to even, with zeros. The
// weight is streamed once for up to TOKENS tokens; sums are float32.
#pragma once

#include "vector.h"

enum Activation { NONE = 0, GELU = 1, SILU = 2 };

// What happens to a sum before it is stored, in this order; null pointers and NONE are skipped.
struct Epilogue {
  const float* bias;    // [N]
  int activation;
  const void* times;    // [B, ld] in the output's dtype: the other half of a gated MLP
  const float* plus;    // float32 [B, ld]
  const void* residual; // [B, ld] in the output's dtype
  int64_t ld;           // row stride of all of these and of the output
};

INLINE int64_t panel_count(int64_t n) { return (n + LANES - 1) / LANES; }

template <typename T>
struct Packed;

template <>
struct Packed<float> {
  static int64_t panel_size(int64_t d) { return d * LANES; }
};

template <>
struct Packed<bf16> {
  static int64_t panel_size(int64_t d) { return (d + 1) / 2 * 2 * LANES; }
};

// The inputs as the tiles read them: bfloat16 pairs as they lie where the processor multiplies those, else float32.
#if defined(__AVX512BF16__)
template <typename T>
struct Input {
  typedef T type;
};
#else
template <typename T>
struct Input {
  typedef float type;
};
#endif

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

template <int P, int T>
INLINE void tile(const float* w, int64_t panel, const float* const* x, int64_t d, Ahead& ahead, vf (&acc)[P][T]) {
  for (int64_t k = 0; k < d; k++) {
    ahead.step();
    vf row[P];
    for (int p = 0; p < P; p++) row[p] = load(w + p * panel + k * LANES);
    for (int t = 0; t < T; t++) {
      vf value = splat(x[t][k]);
      for (int p = 0; p < P; p++) acc[p][t] += row[p] * value;
    }
  }
}

#if defined(__AVX512BF16__)
template <int P, int T>
INLINE void tile(const bf16* w, int64_t panel, const bf16* const* x, int64_t d, Ahead& ahead, vf (&acc)[P][T]) {
  for (int64_t k = 0; k < d; k += 2) {
    ahead.step();
    __m512bh row[P];
    for (int p = 0; p < P; p++) row[p] = (__m512bh)_mm512_loadu_si512(w + p * panel + k * LANES);
    for (int t = 0; t < T; t++) {
      int32_t pair;
      memcpy(&pair, x[t] + k, sizeof pair);
      __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      for (int p = 0; p < P; p++) acc[p][t] = (vf)_mm512_dpbf16_ps((__m512)acc[p][t], row[p], value);
    }
  }
}
#else
template <int P, int T>
INLINE void tile(const bf16* w, int64_t panel, const float* const* x, int64_t d, Ahead& ahead, vf (&acc)[P][T]) {
  for (int64_t k = 0; k < d; k += 2) {
    ahead.step();
    vf even[P], odd[P];
    for (int p = 0; p < P; p++) {
      vu pairs;
      memcpy(&pairs, w + p * panel + k * LANES, sizeof pairs);
      even[p] = (vf)(pairs << 16);
      odd[p] = (vf)(pairs & 0xffff0000u);
    }
    for (int t = 0; t < T; t++) {
      vf first = splat(x[t][k]), second = splat(x[t][k + 1]);
      for (int p = 0; p < P; p++) acc[p][t] += even[p] * first + odd[p] * second;
    }
  }
}
#endif

template <typename O>
INLINE void finish(vf v, const Epilogue& e, O* out, int64_t t, int64_t n, int64_t size) {
  int count = size - n < LANES ? (int)(size - n) : LANES;
  int64_t at = t * e.ld + n;
  if (count == LANES) {
    if (e.bias) v += load(e.bias + n);
    if (e.activation == GELU) v = gelu(v);
    if (e.activation == SILU) v = silu(v);
    if (e.times) v *= load((const O*)e.times + at);
    if (e.plus) v += load(e.plus + at);
    if (e.residual) v += load((const O*)e.residual + at);
    store(out + at, v);
  } else {
    if (e.bias) v += load_some(e.bias + n, count);
    if (e.activation == GELU) v = gelu(v);
    if (e.activation == SILU) v = silu(v);
    if (e.times) v *= load_some((const O*)e.times + at, count);
    if (e.plus) v += load_some(e.plus + at, count);
    if (e.residual) v += load_some((const O*)e.residual + at, count);
    store_some(out + at, v, count);
  }
}

template <typename T, typename O, int P, int TT>
INLINE void block(const T* w, int64_t panel, const typename Input<T>::type* const* x, int64_t d, const Epilogue& e,
                  O* out, int64_t t, int64_t n, int64_t size, Ahead& ahead) {
  vf acc[P][TT] = {};
  tile<P, TT>(w, panel, x, d, ahead, acc);
  for (int p = 0; p < P; p++)
    for (int i = 0; i < TT; i++) finish(acc[p][i], e, out, t + i, n + p * LANES, size);
}

template <typename T, typename O, int P>
INLINE void tokens(const T* w, int64_t panel, const typename Input<T>::type* x, int64_t stride, const int32_t* rows,
                   int64_t count, int64_t d, const Epilogue& e, O* out, int64_t n, int64_t size, int64_t left) {
  const typename Input<T>::type* at[TOKENS];
  // the first tile waits for its own weights; the others have time to ask for as many again
  int64_t tiles = (count + TOKENS - 1) / TOKENS, bytes = (left < P ? left : P) * panel * (int64_t)sizeof(T);
  const char* next = (const char*)(w + P * panel);
  int64_t steps = (tiles - 1) * ((d + 4 / (int64_t)sizeof(T) - 1) / (4 / (int64_t)sizeof(T)));
  Ahead ahead = {next, next, 0};
  for (int64_t t = 0; t < count; t += TOKENS) {
    int group = count - t < TOKENS ? (int)(count - t) : TOKENS;
    if (t > 0 && ahead.lines == 0) ahead = {next, next + bytes, (int)((bytes / 64 + steps - 1) / steps)};
    for (int i = 0; i < group; i++) at[i] = x + (rows ? rows[t + i] : t + i) * stride;
    switch (group) {
      case 1: block<T, O, P, 1>(w, panel, at, d, e, out, t, n, size, ahead); break;
      case 2: block<T, O, P, 2>(w, panel, at, d, e, out, t, n, size, ahead); break;
      case 3: block<T, O, P, 3>(w, panel, at, d, e, out, t, n, size, ahead); break;
      case 4: block<T, O, P, 4>(w, panel, at, d, e, out, t, n, size, ahead); break;
#if defined(__AVX512F__)
      case 5: block<T, O, P, 5>(w, panel, at, d, e, out, t, n, size, ahead); break;
      case 6: block<T, O, P, 6>(w, panel, at, d, e, out, t, n, size, ahead); break;
#endif
    }
  }
}

// Panels first … last − 1 of out [count, size] = x[rows] · wᵀ. x has rows of `stride` elements, padded to an even d;
// rows picks some of them (null: all in order).
template <typename T, typename O>
void gemm(const T* w, const typename Input<T>::type* x, int64_t stride, const int32_t* rows, int64_t count, int64_t d,
          int64_t size, const Epilogue& e, O* out, int64_t first, int64_t last) {
  int64_t panel = Packed<T>::panel_size(d), p = first;
  for (; p + PANELS <= last; p += PANELS)
    tokens<T, O, PANELS>(w + p * panel, panel, x, stride, rows, count, d, e, out, p * LANES, size, last - p - PANELS);
  for (; p < last; p++)
    tokens<T, O, 1>(w + p * panel, panel, x, stride, rows, count, d, e, out, p * LANES, size, last - p - 1);
}

template <typename T>
void pack(const T* w, int64_t size, int64_t d, T* out) {
  int64_t panel = Packed<T>::panel_size(d);
  constexpr int PAIR = sizeof(T) == 2 ? 2 : 1;
  for (int64_t p = 0; p < panel_count(size); p++)
    for (int64_t k = 0; k < panel / LANES; k++)
      for (int lane = 0; lane < LANES; lane++) {
        int64_t n = p * LANES + lane;
        out[p * panel + (k / PAIR * LANES + lane) * PAIR + k % PAIR] = n < size && k < d ? w[n * d + k] : T{};
      }
}
