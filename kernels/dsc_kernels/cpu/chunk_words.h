// Rows of keys, values and queries as the products of a chunk take them: by words of 32 bits, panels of 16 side by side.
#pragma once

#include <stdint.h>
#include <string.h>

#include "layers.h"
#include "namespace.h"

DSC_KERNELS_BEGIN

// A sum plus the products of 16 words of one side with one word of the other.
INLINE vf plus_product(vf sum, vi words, int32_t word, float) { return sum + (vf)words * (vf)(vi{} + word); }

INLINE void store_words(float* out, const vf (&rows)[1]) { store(out, rows[0]); }

// Rows [count] of a pool become panels [KEYS][16], neighbours of a word together; what is missing of a word is 0.
template <typename T>
INLINE void pack_values(const T* pool, const int64_t* rows_at, int64_t count, int64_t size, float* out) {
  for (int64_t c = 0; c < size; c += LANES, out += KEYS * LANES)
    for (int64_t i = 0; i < count; i++) store(out + i * LANES, load_up_to(pool + rows_at[i] + c, size - c));
}

#if defined(__AVX512BF16__)
INLINE vf plus_product(vf sum, vi words, int32_t word, bf16) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)words, (__m512bh)_mm512_set1_epi32(word));
}

typedef bf16 vw __attribute__((vector_size(64)));

INLINE vw pairs_from(int start) {
  vw order;
  for (int i = 0; i < 2 * LANES; i++) order[i] = (bf16)(start + i / 2 + i % 2 * 2 * LANES);
  return order;
}

INLINE void store_words(bf16* out, const vf (&rows)[2]) {
  vw both = (vw)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]), order;
  for (int i = 0; i < 2 * LANES; i++) order[i] = (bf16)(i / 2 + i % 2 * LANES);
  both = __builtin_shuffle(both, order);
  memcpy(out, &both, sizeof both);
}

INLINE vw load_words(const bf16* p, int64_t count) {
  if (count >= 2 * LANES) return (vw)_mm512_loadu_si512(p);
  return (vw)_mm512_maskz_loadu_epi16((1u << count) - 1, p);
}

INLINE void pack_values(const bf16* pool, const int64_t* rows_at, int64_t count, int64_t size, bf16* out) {
  const vw low = pairs_from(0), high = pairs_from(LANES);
  for (int64_t i = 0; i < count; i += 2)
    for (int64_t c = 0; c < size; c += 2 * LANES) {
      vw first = load_words(pool + rows_at[i] + c, size - c);
      vw second = i + 1 < count ? load_words(pool + rows_at[i + 1] + c, size - c) : vw{};
      vw lower = __builtin_shuffle(first, second, low), upper = __builtin_shuffle(first, second, high);
      memcpy(out + (c * KEYS / LANES + i) * LANES, &lower, sizeof lower);
      if (size - c > LANES) memcpy(out + (c * KEYS / LANES + KEYS + i) * LANES, &upper, sizeof upper);
    }
}
#endif

// Rows of 16 words become columns.
INLINE void transpose(vi (&rows)[LANES]) {
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
    vi next[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      next[2 * i] = interleave_first(rows[i], rows[i + LANES / 2]);
      next[2 * i + 1] = interleave_last(rows[i], rows[i + LANES / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = next[i];
  }
}

// A row [size] as it is computed with, padded to whole words.
template <typename T, typename C>
INLINE void copy_row(const T* row, int64_t size, C* out) {
  if (sizeof(T) == sizeof(C)) {
    memcpy(out, row, size * sizeof(T));
    clear_padding(out, sizeof(C) == 2, size);
  } else {
    for (int64_t c = 0; c < size; c += LANES) store_up_to(out + c, load_up_to(row + c, size - c), size - c);
  }
}

// Rows [16, stride] become a panel [words of a row][16].
template <typename C>
INLINE void pack_panel(const C* rows, int64_t stride, C* out) {
  int64_t words = stride / GROUP<C>;
  const int32_t* from = (const int32_t*)rows;
  int32_t* to = (int32_t*)out;
  int64_t w = 0;
  for (; w + LANES <= words; w += LANES) {
    vi block[LANES];
    for (int i = 0; i < LANES; i++) block[i] = load_bits<vi>(from + i * words + w);
    transpose(block);
    for (int i = 0; i < LANES; i++) store_bits(to + (w + i) * LANES, block[i]);
  }
  for (; w < words; w++)
    for (int i = 0; i < LANES; i++) memcpy(to + w * LANES + i, from + i * words + w, 4);
}

DSC_KERNELS_END
