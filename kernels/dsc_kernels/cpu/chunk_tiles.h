// The products of a chunk's attention by tiles (tiles.h), where heads are whole tiles wide: 16 keys meet 16 query rows as
// both lie, and the weights of 16 query rows meet values as they are packed.
//
// Every row of such a chunk takes these, in the same steps however a prompt is cut.
#pragma once

#include <stdint.h>
#include <string.h>

#include "chunk_words.h"
#include "namespace.h"
#include "tiles.h"

DSC_KERNELS_BEGIN

// Whether a chunk's heads are multiplied so.
template <typename C>
INLINE bool takes_tiles([[maybe_unused]] int64_t size, [[maybe_unused]] int64_t value_size) {
#if defined(__AVX512BF16__)
  constexpr int64_t STEP = TILE_STEP / (int64_t)sizeof(bf16);
  if (sizeof(C) == 2) return tiles_in_use && size % STEP == 0 && value_size % LANES == 0;
#endif
  return false;
}

#if defined(__AVX512BF16__)

constexpr int64_t TILED_KEYS = TILE_STEP / (int64_t)sizeof(bf16);  // that a tile of weights holds

// While one lives, this thread's tiles are whole ones.
struct WholeTiles {
  bool used;
  INLINE explicit WholeTiles(bool use) : used(use) {
    if (used) shape_tiles(TILED_TOKENS);
  }
  INLINE ~WholeTiles() {
    if (used) release_tiles();
  }
};

// Words [pairs of keys][stride] of 16 query rows become the rows [16, KEYS] of a tile; what is missing of its keys is 0.
INLINE void turn_weights(const bf16* weights, int64_t stride, int64_t count, int64_t keys, bf16* rows) {
  const int32_t* from = (const int32_t*)(const void*)weights;  // words
  for (int64_t first = 0; first < count; first += TILED_KEYS) {
    vi block[LANES];
    for (int i = 0; i < LANES; i++)
      block[i] = first + 2 * i < count ? load_bits<vi>(from + (first / 2 + i) * stride) : vi{};
    transpose(block);
    for (int i = 0; i < LANES; i++) store_bits(rows + i * keys + first, block[i]);
  }
}

// Whether all of so many are finite; count: whole vectors.
INLINE bool all_finite(const bf16* x, int64_t count) {
  const vi exponents = vi{} + 0x7f800000;
  vi found = {};
  for (int64_t i = 0; i < count; i += 2 * LANES) {
    vi both = load_bits<vi>(x + i);
    found |= ((both & exponents) == exponents) | (((both << 16) & exponents) == exponents);
  }
  return _mm512_movepi32_mask((__m512i)found) == 0;
}

#endif

DSC_KERNELS_END
