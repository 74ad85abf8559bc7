// Products with a packed weight: out[t, n] = Σ_k x[t, k] · w[n, k], for any number of tokens.
//
// The weight is streamed once for up to TOKENS tokens by vectors, or for as many as there are by tiles (tiles.h).
#pragma once

#include <stdint.h>
#include <string.h>

#include "adapter.h"
#include "api.h"
#include "namespace.h"
#include "panels.h"
#include "tiles.h"
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

#if defined(__AVX512BF16__)
// An adapter's panels lie one behind the other: memory gives some kilobytes of one sooner than a little of many.
template <typename O>
constexpr int64_t SUMMED_TOGETHER<AdaptedOutput<O>> = 4;
#endif

template <typename T, int P, int TT, typename Sink>
INLINE void block(const T* w, int64_t panel, const typename Input<T>::type* const* x, int64_t d, const Sink& sink,
                  int64_t t, int64_t n, Ahead& ahead) {
  typename Input<T>::sum acc[P][TT];
  clear(acc);
  start(sink, w, panel, t, acc);
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2 && TT < FEWEST_TILED) {
    if (tiles_in_use) tile_in_their_order<P, TT>(w, panel, x, d, ahead, acc);
    else tile<P, TT>(w, panel, x, d, ahead, acc);
  } else {
    tile<P, TT>(w, panel, x, d, ahead, acc);
  }
#else
  tile<P, TT>(w, panel, x, d, ahead, acc);
#endif
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
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) < 4)
    if (tiles_in_use && count >= FEWEST_TILED)
      return multiply_by_tiles<T>(w, x, stride, rows, count, d, sink, first, last);
#endif
  int64_t panel = Packed<T>::panel_size(d), p = first;
  for (; p + PANELS <= last; p += PANELS)
    tokens<T, PANELS>(w + p * panel, panel, x, stride, rows, count, d, sink, p * LANES, last - p - PANELS);
  for (; p < last; p++) tokens<T, 1>(w + p * panel, panel, x, stride, rows, count, d, sink, p * LANES, last - p - 1);
}

// Panels first … last − 1 of out [count, size] = x[rows] · wᵀ.
template <typename T, typename O>
void gemm(const T* w, const typename Input<T>::type* x, int64_t stride, const int32_t* rows, int64_t count, int64_t d,
          int64_t size, const Epilogue& e, O* out, int64_t first, int64_t last) {
  if (e.branch) {
    multiply<T>(w, x, stride, rows, count, d, AdaptedOutput<O>{e, out, size}, first, last);
    return;
  }
  multiply<T>(w, x, stride, rows, count, d, Output<O>{e, out, size}, first, last);
}

DSC_KERNELS_END
