// Which tokens attend together: one of each sequence, and neighbours of those that have a few.
#pragma once

#include <stdint.h>

#include "api.h"
#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

constexpr int64_t MEMBERS = 64;  // at most, of a unit of several tokens: their sums stay in a thread's cache

// Neighbouring tokens of a sequence that attend together: each of its key-value heads is read once for all of them.
struct AttendUnit {
  int64_t token;    // the first of them in the step
  int64_t count;
  int64_t context;  // positions up to the first of them
  const int64_t* table;

  INLINE int64_t seen() const { return context + count - 1; }
};

// The units of a call: one of each sequence of one token, and those that sequences of a few tokens are cut into.
struct AttendUnits {
  const Attention& a;
  AttendUnit* few = nullptr;
  int64_t count, most = 1;  // units, and tokens of the longest

  INLINE AttendUnits(const Attention& a) : a(a), count(a.batch) {
    if (!a.drafted_count) return;
    // With a window each token begins elsewhere, and walks by itself.
    int64_t tokens = 0, rows = a.window || a.group >= MEMBERS ? 1 : MEMBERS / a.group;
    for (int64_t j = 0; j < a.drafted_count; j++) tokens += a.drafted[j].length;
    few = a.scratch->take<AttendUnit>(tokens);
    cut(rows);
    if (count * a.kv_heads < 2 * a.threads) cut((most + 1) / 2);  // so that no thread waits for the longest
  }

  INLINE AttendUnit operator[](int64_t i) const {
    if (i >= a.batch) return few[i - a.batch];
    return {i, 1, a.contexts[i], a.tables + i * a.width};
  }

 private:
  // Into units of at most so many tokens.
  INLINE void cut(int64_t rows) {
    count = a.batch, most = 1;
    for (int64_t j = 0; j < a.drafted_count; j++) {
      const Chunk& c = a.drafted[j];
      for (int64_t first = 0; first < c.length; first += rows) {
        int64_t own = c.length - first < rows ? c.length - first : rows;
        few[count++ - a.batch] = {c.start + first, own, c.context - c.length + first + 1, a.tables + c.row * a.width};
        if (own > most) most = own;
      }
    }
  }
};

DSC_KERNELS_END
