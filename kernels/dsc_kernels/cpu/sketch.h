// What a step's picks leave behind: counts of atoms, and bitmaps of the atoms that requests and token ids picked.
#pragma once

#include <stdint.h>
#include <string.h>

#include "grouping.h"
#include "namespace.h"

DSC_KERNELS_BEGIN

constexpr int SKETCH_WORDS = 16;

struct Sketch {
  const int32_t* picks;        // [layers, tokens, k], the layers `layer_stride` numbers apart
  const int64_t* token_ids;    // [tokens]
  const int64_t* owners;       // [tokens]: the request of each, an index into signatures
  const uint64_t* signatures;  // addresses of the requests' bitmaps [SKETCH_WORDS], which gain what was picked
  uint64_t* vocabulary;        // [rows, SKETCH_WORDS]: bitmaps of token ids modulo rows, which hold the last occurrence
  int64_t* counts;             // [layers, atoms]
  int32_t* last;               // [layers, atoms]: the step in which an atom was picked last
  int64_t* distinct;           // [layers]: gains the different atoms of this step
  int64_t layers, tokens, k, atoms, layer_stride, rows, divisor;
  int32_t step;
};

// Of all atoms of all layers, one in `divisor` is followed, and sets one of the bitmap's bits.
inline void sketch(const Sketch& a) {
  for (int64_t t = 0; t < a.tokens; t++)
    memset(a.vocabulary + a.token_ids[t] % a.rows * SKETCH_WORDS, 0, 8 * SKETCH_WORDS);
  for (int64_t l = 0; l < a.layers; l++)
    for (int64_t t = 0; t < a.tokens; t++) {
      uint64_t* own = (uint64_t*)(uintptr_t)a.signatures[a.owners[t]];
      uint64_t* row = a.vocabulary + a.token_ids[t] % a.rows * SKETCH_WORDS;
      for (int64_t j = 0; j < a.k; j++) {
        int64_t pick = a.picks[l * a.layer_stride + t * a.k + j], atom = l * a.atoms + pick;
        if (pick < 0 || pick >= a.atoms) continue;
        a.counts[atom]++;
        a.distinct[l] += a.last[atom] != a.step;
        a.last[atom] = a.step;
        uint32_t hash = scramble((uint32_t)atom);
        if (hash % a.divisor) continue;
        int64_t bit = hash / a.divisor % (64 * SKETCH_WORDS);
        own[bit / 64] |= (uint64_t)1 << bit % 64;
        row[bit / 64] |= (uint64_t)1 << bit % 64;
      }
    }
}

DSC_KERNELS_END
