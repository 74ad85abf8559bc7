// One token per row of logits, without sorting a row: filters find where their kept prefix ends by histograms over the
// bits of the weights, which order as the weights do, and a token is drawn by inverting the kept weights' cumulative
// distribution in vocabulary order.
#pragma once

#include "vector.h"

constexpr int BUCKETS = 2048, RUN = 256;

// A prefix of the weights in falling order: all with bits above `bits`, and the first `ties` with exactly those.
struct Prefix {
  uint32_t bits;
  int64_t ties;
  double mass;
};

struct SampleBuffers {
  float* weights;     // [vocabulary], padded to LANES
  double* runs;       // mass of each RUN weights
  double* mass;       // [BUCKETS]
  int64_t* count;     // [BUCKETS]
};

INLINE int64_t sample_bytes(int64_t vocabulary) {
  return (vocabulary + LANES) / LANES * LANES * 4 + (vocabulary / RUN + 1) * 8 + BUCKETS * 16;
}

INLINE SampleBuffers sample_buffers(int64_t vocabulary, char* scratch) {
  SampleBuffers b;
  b.mass = (double*)scratch;
  b.count = (int64_t*)(b.mass + BUCKETS);
  b.runs = (double*)(b.count + BUCKETS);
  b.weights = (float*)(b.runs + vocabulary / RUN + 1);
  return b;
}

INLINE uint32_t bits_of(float weight) {
  uint32_t bits;
  memcpy(&bits, &weight, sizeof bits);
  return bits;
}

// The shortest prefix whose number (by_mass: whose mass) reaches `amount`; everything when all of it falls short.
// Three histograms, each within the bucket in which the one before ended: 11, 10 and 11 bits.
inline Prefix prefix_of(const SampleBuffers& b, int64_t size, bool by_mass, double amount) {
  const int shifts[] = {21, 11, 0};
  const int widths[] = {11, 10, 11};
  uint32_t above = 0;  // the bits fixed so far
  double number = 0, mass = 0;
  for (int level = 0; level < 3; level++) {
    int shift = shifts[level], buckets = 1 << widths[level];
    uint32_t fixed = level == 0 ? 0 : ~0u << (shift + widths[level]);
    memset(b.count, 0, buckets * sizeof *b.count);
    memset(b.mass, 0, buckets * sizeof *b.mass);
    for (int64_t i = 0; i < size; i++) {
      uint32_t bits = bits_of(b.weights[i]);
      if ((bits & fixed) != above) continue;
      uint32_t bucket = (bits >> shift) & (buckets - 1);
      b.count[bucket]++;
      b.mass[bucket] += b.weights[i];
    }
    int bucket = buckets - 1;
    for (;; bucket--) {
      double next = by_mass ? mass + b.mass[bucket] : number + b.count[bucket];
      if (next >= amount || bucket == 0) break;
      mass += b.mass[bucket];
      number += b.count[bucket];
    }
    above |= (uint32_t)bucket << shift;
    if (level == 2) {  // members of this bucket are equal
      int64_t members = b.count[bucket], ties = members;
      double each = members ? b.mass[bucket] / members : 0;
      double missing = by_mass ? (each > 0 ? (amount - mass) / each : 0) : amount - number;
      if (missing < members) ties = (int64_t)missing + ((double)(int64_t)missing < missing);
      if (ties < 1) ties = members > 0 && missing > 0 ? 1 : ties;
      return {above, ties, mass + each * ties};
    }
  }
  return {0, size, mass};
}

// The first weight of the prefix at which the running mass exceeds u · mass.
inline int64_t invert(const SampleBuffers& b, int64_t size, const Prefix& p, double u) {
  double target = u * p.mass, running = 0;
  int64_t ties = p.ties, last = 0;
  for (int64_t i = 0; i < size; i++) {
    uint32_t bits = bits_of(b.weights[i]);
    if (bits < p.bits || (bits == p.bits && ties-- <= 0) || bits == 0) continue;
    running += b.weights[i];
    last = i;
    if (running > target) return i;
  }
  return last;  // rounding: u · mass may reach the sum taken in another order
}

// The same for all weights, by the masses of runs.
inline int64_t invert_all(const SampleBuffers& b, int64_t size, double total, double u) {
  double target = u * total, running = 0;
  int64_t run = 0, runs = (size + RUN - 1) / RUN;
  while (run + 1 < runs && running + b.runs[run] <= target) running += b.runs[run++];
  int64_t last = -1;
  for (int64_t i = run * RUN; i < size; i++) {
    if (!(b.weights[i] > 0)) continue;
    running += b.weights[i];
    last = i;
    if (running > target) return i;
  }
  for (int64_t i = size - 1; last < 0 && i >= 0; i--)
    if (b.weights[i] > 0) last = i;
  return last < 0 ? 0 : last;
}

// The index of the largest of row [size]; the lowest among equals. A NaN is larger than every number.
INLINE int64_t argmax(const float* row, int64_t size) {
  int64_t best = 0, i = 0;
  float highest = row[0];
  if (highest != highest) return 0;
  for (; i + LANES <= size; i += LANES) {
    vf v = load(row + i);
    vi unordered = v != v;
    uint32_t better = above(v, highest);
    int nan = 0;
    for (int lane = 0; lane < LANES; lane++) nan |= unordered[lane];
    if (!better && !nan) continue;
    for (int lane = 0; lane < LANES; lane++) {
      if (v[lane] != v[lane]) return i + lane;
      if (v[lane] > highest) highest = v[lane], best = i + lane;
    }
  }
  for (; i < size; i++) {
    if (row[i] != row[i]) return i;
    if (row[i] > highest) highest = row[i], best = i;
  }
  return best;
}

// A row's token: temperature 0 takes the most likely; k == size, top_p == 1 and min_p == 0 switch a filter off.
inline int64_t sample_row(const float* row, int64_t size, float temperature, int64_t k, double top_p, float min_p,
                          double u, const SampleBuffers& b) {
  int64_t best = argmax(row, size);
  float highest = row[best];
  if (temperature == 0) return best;
  bool fair = highest != highest || highest == -INFINITY || highest == INFINITY;
  double total = 0;
  for (int64_t run = 0; run * RUN < size; run++) {
    int64_t end = (run + 1) * RUN < size ? (run + 1) * RUN : size, i = run * RUN;
    vf sums = {};
    float rest = 0;
    for (; i + LANES <= end; i += LANES) {
      vf w = vexp((load(row + i) - highest) / temperature);
      store(b.weights + i, w);
      sums += w;
    }
    for (; i < end; i++) rest += b.weights[i] = expf((row[i] - highest) / temperature);
    b.runs[run] = sum(sums) + rest;
    total += b.runs[run];
  }
  if (fair) {  // nothing finite to draw by: no error here, and no harm to other rows
    for (int64_t i = 0; i < size; i++) {
      bool infinite = highest == INFINITY && row[i] == INFINITY;
      b.weights[i] = highest == -INFINITY || row[i] != row[i] || infinite ? 1.0f : 0.0f;
    }
    total = 0;
    for (int64_t run = 0; run * RUN < size; run++) {
      int64_t end = (run + 1) * RUN < size ? (run + 1) * RUN : size;
      b.runs[run] = 0;
      for (int64_t i = run * RUN; i < end; i++) b.runs[run] += b.weights[i];
      total += b.runs[run];
    }
  }
  if (k >= size && top_p >= 1 && min_p <= 0) return invert_all(b, size, total, u);
  Prefix kept = {1, 0, total};
  bool limited = false;
  auto narrow = [&](const Prefix& p) __attribute__((always_inline)) {
    if (!limited || p.bits > kept.bits || (p.bits == kept.bits && p.ties < kept.ties)) kept = p;
    limited = true;
  };
  if (k < size) narrow(prefix_of(b, size, false, (double)k));
  if (top_p < 1) narrow(prefix_of(b, size, true, top_p * kept.mass));
  if (min_p > 0) {
    uint32_t floor = bits_of(min_p);
    if (!limited || floor > kept.bits) {
      kept = {floor, size, 0};
      for (int64_t i = 0; i < size; i++) kept.mass += b.weights[i] >= min_p ? b.weights[i] : 0;
    }
  }
  return invert(b, size, kept, u);
}
