// An order of tokens in which neighbours share atoms. Free of the standard library (see vector.h).
#pragma once

#include <stdint.h>
#include <string.h>

#include "namespace.h"

DSC_KERNELS_BEGIN

constexpr int64_t TILE = 16;
constexpr int INDEX_BITS = 20;  // tokens that can be ordered at once: 2^20

inline uint32_t scramble(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352dU;
  x = (x ^ (x >> 15)) * 0x846ca68bU;
  return x ^ (x >> 16);
}

// Sorts keys [count], all different; `spare` has as much room.
inline void sort_keys(uint64_t* keys, uint64_t* spare, int64_t count) {
  uint64_t *from = keys, *to = spare;
  for (int64_t width = 1; width < count; width *= 2) {
    for (int64_t start = 0; start < count; start += 2 * width) {
      int64_t left = start, middle = start + width < count ? start + width : count;
      int64_t right = middle, end = middle + width < count ? middle + width : count;
      for (int64_t i = start; i < end; i++) {
        bool first = right == end || (left < middle && from[left] < from[right]);
        to[i] = first ? from[left++] : from[right++];
      }
    }
    uint64_t* swapped = from;
    from = to;
    to = swapped;
  }
  if (from != keys) memcpy(keys, from, count * sizeof *keys);
}

// order [count]: tokens by the smallest and then the second smallest hash of their picks [count, k], then by index. Two
// tokens agree in the smallest as often as their sets overlap. keys has room for 2 · count.
inline void min_hash_order(const int32_t* picks, int64_t count, int k, uint64_t* keys, int32_t* order) {
  for (int64_t t = 0; t < count; t++) {
    uint32_t first = UINT32_MAX, second = UINT32_MAX;
    for (int j = 0; j < k; j++) {
      uint32_t hash = scramble((uint32_t)picks[t * k + j]);
      if (hash < first) {
        second = first;
        first = hash;
      } else if (hash < second) {
        second = hash;
      }
    }
    keys[t] = (uint64_t)(first >> 9) << 40 | (uint64_t)(second >> 12) << INDEX_BITS | (uint64_t)t;
  }
  sort_keys(keys, keys + count, count);
  for (int64_t i = 0; i < count; i++) order[i] = (int32_t)(keys[i] & ((1 << INDEX_BITS) - 1));
}

// Different atoms of each tile of `tile` tokens in the given order (null: as they come), ascending, one tile after the
// other; offsets [tiles + 1] says where each begins. atoms has room for count · k, keys for 2 · tile · k.
inline void tile_unions(const int32_t* picks, const int32_t* order, int64_t count, int k, int64_t tile, uint64_t* keys,
                        int32_t* atoms, int64_t* offsets) {
  int64_t total = 0, tiles = 0;
  for (int64_t start = 0; start < count; start += tile) {
    int64_t held = 0, end = start + tile < count ? start + tile : count;
    for (int64_t i = start; i < end; i++)
      for (int j = 0; j < k; j++, held++)
        keys[held] = (uint64_t)picks[(order ? order[i] : i) * k + j] << 32 | (uint64_t)held;
    sort_keys(keys, keys + held, held);
    offsets[tiles++] = total;
    for (int64_t i = 0; i < held; i++)
      if (!i || keys[i] >> 32 != keys[i - 1] >> 32) atoms[total++] = (int32_t)(keys[i] >> 32);
  }
  offsets[tiles] = total;
}

DSC_KERNELS_END
