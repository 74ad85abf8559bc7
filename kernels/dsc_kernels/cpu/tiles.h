// Products by tiles of 16 tokens, 16 outputs and 64 bytes of inputs, on processors with AMX, whose instructions read panels
// as they lie. For fewer than FEWEST_TILED tokens vectors are faster, and add in the order that tiles add in: a token comes
// out the same in any company.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "namespace.h"
#include "panels.h"

DSC_KERNELS_BEGIN

#if defined(__AVX512BF16__)

constexpr int64_t TILE_STEP = 64;    // bytes of a token's inputs that a tile holds
constexpr int64_t TILE_BYTES = 1024;  // of a panel, for as many inputs
constexpr int TILE_ROWS = 16, TILED_TOKENS = 2 * TILE_ROWS, TILED_PANELS = 4;
constexpr int64_t SUMS_STRIDE = TILED_PANELS * LANES;  // of a token's sums
constexpr int64_t FEWEST_TILED = 4;                    // tokens

// Times TILED_PANELS panels whose sums go to a sink together, token by token.
template <typename Sink>
constexpr int64_t SUMMED_TOGETHER = 1;

bool tiles_in_use = false;  // the set "amx" is chosen

// While one lives, numbers below 2⁻¹²⁶ are 0, as they are to tiles.
struct FlushedToZero {
  unsigned before = _mm_getcsr();
  FlushedToZero() { _mm_setcsr(before | _MM_FLUSH_ZERO_ON | 0x40); }
  ~FlushedToZero() { _mm_setcsr(before); }
};

// What tiles sum: the products of 32 inputs, those of even and of odd ones apart, and then both to what there was.
template <int P, int TT>
INLINE void tile_in_their_order(const bf16* w, int64_t panel, const bf16* const* x, int64_t d, Ahead& ahead,
                                vf (&acc)[P][TT]) {
  constexpr int64_t STEP = TILE_STEP / (int64_t)sizeof(bf16);
  int64_t whole = d / STEP * STEP;
  {
    const FlushedToZero flushed;
    for (int64_t k = 0; k < whole; k += STEP) {
      vf even[P][TT] = {}, odd[P][TT] = {};
      for (int64_t i = k; i < k + STEP; i += 2) {
        ahead.step();
        vf first[P], second[P];
        for (int p = 0; p < P; p++) load_pairs(w + p * panel + i * LANES, first[p], second[p]);
        for (int t = 0; t < TT; t++) {
          int32_t pair;
          memcpy(&pair, x[t] + i, sizeof pair);
          vf own = (vf)(vi{} + (pair << 16)), next = (vf)(vi{} + (pair & (int32_t)0xffff0000));
          for (int p = 0; p < P; p++) {
            even[p][t] = (vf)_mm512_fmadd_ps((__m512)first[p], (__m512)own, (__m512)even[p][t]);
            odd[p][t] = (vf)_mm512_fmadd_ps((__m512)second[p], (__m512)next, (__m512)odd[p][t]);
          }
        }
      }
      for (int p = 0; p < P; p++)
        for (int t = 0; t < TT; t++) acc[p][t] += even[p][t] + odd[p][t];
    }
  }
  const bf16* rest[TT];
  for (int t = 0; t < TT; t++) rest[t] = x[t] + whole;
  tile<P, TT>(w + whole * LANES, panel, rest, d - whole, ahead, acc);
}

// Some tokens' sums with up to four panels.
struct TiledCall {
  const char* w;
  const char* x;
  int64_t panel, stride;  // bytes of a panel, and of a token's inputs
  int64_t steps;
  int panels, tokens;
  char* sums;  // [tokens, sums_stride]
  int64_t sums_stride = SUMS_STRIDE * 4;  // bytes from token to token
};

#define TILED __attribute__((noinline, target("amx-tile,amx-bf16,amx-int8")))
#define DSC_TILE_PRODUCT(SUMS, INPUTS, WEIGHTS)                           \
  do {                                                                    \
    if constexpr (sizeof(T) == 2) _tile_dpbf16ps(SUMS, INPUTS, WEIGHTS);  \
    else _tile_dpbusd(SUMS, INPUTS, WEIGHTS);                             \
  } while (0)

struct TileShapes {
  uint8_t palette = 1, first_row = 0, unused[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

TILED void take_shapes(const TileShapes& shapes) {
  __asm__ volatile("" : : "m"(shapes));  // the compiler takes the next line to read eight bytes of them
  _tile_loadconfig(&shapes);
}

// Tiles 0 to 3 hold sums, 4 inputs of up to 16 tokens, 5 those of the others or weights, 6 and 7 weights.
INLINE void shape_tiles(int tokens) {
  TileShapes s;
  int first = tokens < TILE_ROWS ? tokens : TILE_ROWS, second = tokens - first;
  for (int i = 0; i < 8; i++) s.row_bytes[i] = 64, s.rows[i] = TILE_ROWS;
  for (int i = 0; i < 4; i++) s.rows[i] = (uint8_t)(i < 2 || !second ? first : second);
  s.rows[4] = (uint8_t)first;
  if (second) s.rows[5] = (uint8_t)second;
  take_shapes(s);
}

TILED void release_tiles() { _tile_release(); }

TILED void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// For up to 16 tokens: four panels meet them at once.
template <typename T>
TILED void sum_one_tile(const TiledCall& c) {
  clear_sums();
  const char *w = c.w, *x = c.x;
  for (int64_t k = 0; k < c.steps; k++, w += TILE_BYTES, x += TILE_STEP) {
    _tile_loadd(4, x, c.stride);
    _tile_loadd(5, w, 64);
    DSC_TILE_PRODUCT(0, 4, 5);
    if (c.panels > 1) {
      _tile_loadd(6, w + c.panel, 64);
      DSC_TILE_PRODUCT(1, 4, 6);
    }
    if (c.panels > 2) {
      _tile_loadd(7, w + 2 * c.panel, 64);
      DSC_TILE_PRODUCT(2, 4, 7);
    }
    if (c.panels > 3) {
      _tile_loadd(5, w + 3 * c.panel, 64);
      DSC_TILE_PRODUCT(3, 4, 5);
    }
  }
  _tile_stored(0, c.sums, c.sums_stride);
  if (c.panels > 1) _tile_stored(1, c.sums + 64, c.sums_stride);
  if (c.panels > 2) _tile_stored(2, c.sums + 128, c.sums_stride);
  if (c.panels > 3) _tile_stored(3, c.sums + 192, c.sums_stride);
}

// For 17 to 32 tokens: two panels at once.
template <typename T>
TILED void sum_two_tiles(const TiledCall& c) {
  for (int p = 0; p < c.panels; p += 2) {
    bool both = p + 1 < c.panels;
    clear_sums();
    const char *w = c.w + p * c.panel, *x = c.x, *second = x + TILE_ROWS * c.stride;
    for (int64_t k = 0; k < c.steps; k++, w += TILE_BYTES, x += TILE_STEP, second += TILE_STEP) {
      _tile_loadd(4, x, c.stride);
      _tile_loadd(6, w, 64);
      DSC_TILE_PRODUCT(0, 4, 6);
      _tile_loadd(5, second, c.stride);
      DSC_TILE_PRODUCT(2, 5, 6);
      if (both) {
        _tile_loadd(7, w + c.panel, 64);
        DSC_TILE_PRODUCT(1, 4, 7);
        DSC_TILE_PRODUCT(3, 5, 7);
      }
    }
    char *sums = c.sums + p * 64, *below = sums + TILE_ROWS * c.sums_stride;
    _tile_stored(0, sums, c.sums_stride);
    _tile_stored(2, below, c.sums_stride);
    if (both) {
      _tile_stored(1, sums + 64, c.sums_stride);
      _tile_stored(3, below + 64, c.sums_stride);
    }
  }
}

#undef DSC_TILE_PRODUCT
#undef TILED

// Room that a thread keeps for as long as it lives.
struct ThreadRoom {
  void* at = nullptr;
  size_t size = 0;

  INLINE void* take(size_t bytes) {
    if (bytes > size) {
      free(at);
      size = (bytes + 4095) / 4096 * 4096;
      at = aligned_alloc(64, size);
      if (!at) abort();
    }
    return at;
  }
  ~ThreadRoom() { free(at); }
};

thread_local ThreadRoom gathered_inputs;

// Inputs of some tokens, one row after the other, that meet up to TOGETHER · TILED_PANELS panels at a time.
template <typename T, int64_t TOGETHER>
struct TiledInputs {
  static constexpr int64_t MOST_PANELS = TOGETHER * TILED_PANELS, ROW = TOGETHER * SUMS_STRIDE;
  typedef typename Input<T>::type I;
  typedef typename Input<T>::sum Sum;
  const I* x;
  int64_t stride, count, d;
  int shaped = 0;  // tokens that tiles are shaped for
  alignas(64) char sums[TILED_TOKENS * ROW * 4];

  INLINE TiledInputs(const I* inputs, int64_t x_stride, const int32_t* rows, int64_t tokens, int64_t width)
      : x(inputs), stride(x_stride), count(tokens), d(width) {
    if (!rows) return;
    stride = Packed<T>::panel_size(d) / LANES;
    I* apart = (I*)gathered_inputs.take((size_t)(count * stride) * sizeof(I));
    for (int64_t t = 0; t < count; t++)
      memcpy(apart + t * stride, inputs + rows[t] * x_stride, (size_t)stride * sizeof(I));
    x = apart;
  }
  INLINE ~TiledInputs() { release_tiles(); }

  // The sums with up to MOST_PANELS panels, of which p is the first, go to the sink.
  template <typename Sink>
  INLINE void multiply(const T* w, int panels, const Sink& sink, int64_t p) {
    constexpr int64_t STEP = TILE_STEP / (int64_t)sizeof(I);
    int64_t panel = Packed<T>::panel_size(d), whole = d / STEP * STEP;
    for (int64_t t = 0; t < count; t += TILED_TOKENS) {
      int some = (int)(count - t < TILED_TOKENS ? count - t : TILED_TOKENS);
      if (some != shaped) shape_tiles(shaped = some);
      for (int j = 0; j < panels; j += TILED_PANELS) {
        TiledCall call = {(const char*)(w + j * panel), (const char*)(x + t * stride), panel * (int64_t)sizeof(T),
                          stride * (int64_t)sizeof(I), d / STEP, panels - j < TILED_PANELS ? panels - j : TILED_PANELS,
                          some, sums + j * LANES * 4, ROW * 4};
        if (some > TILE_ROWS) sum_two_tiles<T>(call);
        else sum_one_tile<T>(call);
      }
      for (int i = 0; i < some; i++)
        for (int j = 0; j < panels; j++) {
          Sum acc[1][1] = {}, tiled;
          start(sink, w + j * panel, panel, t + i, acc);
          memcpy(&tiled, sums + (i * ROW + j * LANES) * 4, sizeof tiled);
          acc[0][0] += tiled;
          const I* rest = x + (t + i) * stride + whole;
          Ahead none = {nullptr, nullptr, 0};
          tile<1, 1>(w + j * panel + whole * LANES, panel, &rest, d - whole, none, acc);
          sink(acc[0][0], t + i, (p + j) * LANES);
        }
    }
  }
};

// What `multiply` gives: panels first … last − 1 go to the sink.
template <typename T, typename Sink>
INLINE void multiply_by_tiles(const T* w, const typename Input<T>::type* x, int64_t stride, const int32_t* rows,
                              int64_t count, int64_t d, const Sink& sink, int64_t first, int64_t last) {
  TiledInputs<T, SUMMED_TOGETHER<Sink>> inputs(x, stride, rows, count, d);
  constexpr int64_t MOST = decltype(inputs)::MOST_PANELS;
  for (int64_t p = first; p < last; p += MOST)
    inputs.multiply(w + p * Packed<T>::panel_size(d), (int)(last - p < MOST ? last - p : MOST), sink, p);
}

#endif

DSC_KERNELS_END
