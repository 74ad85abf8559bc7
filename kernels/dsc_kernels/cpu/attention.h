// Attention of one new token per sequence over its paged keys and values, read where they lie, and their writing.
#pragma once

#include "vector.h"

// One sequence and one key-value head: `group` query heads share its keys and values. out may alias nothing.
// keys, values: pools [blocks, kv heads, block size, size]; table: the sequence's blocks; scores: room for
// group · context floats.
template <typename T>
INLINE void attend(const T* q, const T* keys, const T* values, const int64_t* table, int64_t context, int64_t block,
                   int64_t heads, int64_t head, int64_t group, int64_t size, float scale, float* scores, T* out) {
  for (int64_t at = 0; at < context; at += block) {
    int64_t rows = context - at < block ? context - at : block;
    const T* k = keys + (table[at / block] * heads + head) * block * size;
    for (int64_t g = 0; g < group; g++) {
      float* s = scores + g * context + at;
      int64_t r = 0;
      for (; r + LANES <= rows; r += LANES) {
        vf products[LANES];
        for (int i = 0; i < LANES; i++) products[i] = partial_dot(q + g * size, k + (r + i) * size, size);
        store(s + r, scale * sums(products));
      }
      for (; r < rows; r++) s[r] = scale * dot(q + g * size, k + r * size, size);
    }
  }
  for (int64_t g = 0; g < group; g++) {
    float* s = scores + g * context;
    float highest = -INFINITY, total = 0;
    for (int64_t i = 0; i < context; i++) highest = s[i] > highest || s[i] != s[i] ? s[i] : highest;
    int64_t i = 0;
    vf sums = {};
    for (; i + LANES <= context; i += LANES) {
      vf e = vexp(load(s + i) - highest);
      store(s + i, e);
      sums += e;
    }
    for (; i < context; i++) total += s[i] = expf(s[i] - highest);
    total += sum(sums);
    float inverse = 1.0f / total;
    for (int64_t c = 0; c < size; c += 4 * LANES) {
      int64_t width = size - c < 4 * LANES ? size - c : 4 * LANES;
      vf acc[4] = {};
      for (int64_t at = 0; at < context; at += block) {
        int64_t rows = context - at < block ? context - at : block;
        const T* v = values + (table[at / block] * heads + head) * block * size + c;
        if (width == 4 * LANES) {
          for (int64_t r = 0; r < rows; r++)
            for (int p = 0; p < 4; p++) acc[p] += s[at + r] * load(v + r * size + p * LANES);
        } else {
          for (int64_t r = 0; r < rows; r++)
            for (int64_t p = 0; p * LANES < width; p++) {
              int64_t rest = width - p * LANES;
              vf row = rest >= LANES ? load(v + r * size + p * LANES) : load_some(v + r * size + p * LANES, (int)rest);
              acc[p] += s[at + r] * row;
            }
        }
      }
      for (int64_t p = 0; p * LANES < width; p++) {
        int64_t rest = width - p * LANES;
        T* o = out + g * size + c + p * LANES;
        if (rest >= LANES)
          store(o, acc[p] * inverse);
        else
          store_some(o, acc[p] * inverse, (int)rest);
      }
    }
  }
}

// Turn the halves of one head [size] by its position's cosines and sines.
template <typename T>
INLINE void rotate(T* head, const float* cosines, const float* sines, int64_t size) {
  int64_t half = size / 2, i = 0;
  T *a = head, *b = head + half;
  for (; i + LANES <= half; i += LANES) {
    vf first = load(a + i), second = load(b + i), c = load(cosines + i), s = load(sines + i);
    store(a + i, first * c - second * s);
    store(b + i, second * c + first * s);
  }
  for (; i < half; i++) {
    float first = to_float(a[i]), second = to_float(b[i]);
    put(a + i, first * cosines[i] - second * sines[i]);
    put(b + i, second * cosines[i] + first * sines[i]);
  }
}
