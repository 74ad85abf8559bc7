// One token per row of logits, without sorting a row: filters find where their kept prefix ends by bisecting the bits of the
// weights, which order as the weights do, among ever fewer of them, and a token is drawn by inverting the kept weights'
// cumulative distribution in vocabulary order.
#pragma once

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "api.h"
#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

constexpr int RUN = 256;

// A prefix of the weights in falling order: all with bits above `bits`, and the first `ties` with exactly those.
struct Prefix {
  uint32_t bits;
  int64_t ties;
  double mass;
};

struct SampleBuffers {
  float* weights;  // [vocabulary], padded to LANES
  float* left;     // the same: those among which a prefix may end
  double* runs;    // mass of each RUN weights

  INLINE SampleBuffers(int64_t vocabulary, Scratch& scratch) {
    int64_t padded = (vocabulary + LANES - 1) / LANES * LANES;
    weights = scratch.take<float>(padded);
    left = scratch.take<float>(padded);
    runs = scratch.take<double>(vocabulary / RUN + 1);
  }
};

INLINE uint32_t bits_of(float weight) {
  uint32_t bits;
  memcpy(&bits, &weight, sizeof bits);
  return bits;
}

INLINE float weight_of(uint32_t bits) {
  float weight;
  memcpy(&weight, &bits, sizeof weight);
  return weight;
}

struct Measure {
  int64_t count;
  double mass;
};

// Of the weights that have at least these bits, which must not be 0.
INLINE Measure measure(const float* weights, int64_t size, uint32_t bits) {
  typedef double wide __attribute__((vector_size(64)));
  float below_it = weight_of(bits - 1);
  wide sums[2] = {};
  Measure m = {0, 0};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    vf v = load(weights + i), kept = blend(v > below_it, v, vf{});
    m.count += __builtin_popcount(above(v, below_it));
    half_vf parts[2];
    split(kept, parts);
    for (int j = 0; j < 2; j++) sums[j] += __builtin_convertvector(parts[j], wide);
  }
  for (int lane = 0; lane < 8; lane++) m.mass += sums[0][lane] + sums[1][lane];
  for (; i < size; i++)
    if (weights[i] > below_it) m.count++, m.mass += weights[i];
  return m;
}

// The weights with at least, or with less than, these bits go to `out`, which may be where they are; returns how many.
INLINE int64_t pick_out(const float* weights, int64_t size, uint32_t bits, bool at_least, float* out) {
  float below_it = weight_of(bits - 1);
  int64_t kept = 0, i = 0;
#if defined(__AVX512F__)
  for (; i + LANES <= size; i += LANES) {
    __m512 v = _mm512_loadu_ps(weights + i);
    __mmask16 mask = _mm512_cmp_ps_mask(v, _mm512_set1_ps(below_it), _CMP_GT_OQ);
    if (!at_least) mask = (__mmask16)~mask;
    _mm512_storeu_ps(out + kept, _mm512_maskz_compress_ps(mask, v));  // what follows is written later, or never read
    kept += __builtin_popcount(mask);
  }
#endif
  for (; i < size; i++) {
    float weight = weights[i];
    out[kept] = weight;
    kept += (weight > below_it) == at_least;
  }
  return kept;
}

// The shortest prefix whose number (by_mass: whose mass) reaches `amount`; everything when all of it falls short.
inline Prefix prefix_of(const SampleBuffers& b, int64_t size, bool by_mass, double amount) {
  const float* left = b.weights;
  uint32_t low = 0,
           high = bits_of(1.0f) + 1;  // the prefix ends at bits from low to high − 1; all weights are at most 1
  double number = 0, mass = 0;        // of the weights from high on
  for (int octaves = 4; high - low > 1 && size > 0; octaves = octaves < 64 ? 2 * octaves : octaves) {
    // few weights count in most rows: the first bounds are some octaves below the largest weight
    uint32_t guess = octaves < 64 ? bits_of(1.0f) - ((uint32_t)octaves << 23) : 0;
    uint32_t bits = low == 0 && guess > 0 && guess < high ? guess : low + (high - low) / 2;
    Measure m = measure(left, size, bits);
    bool reached = (by_mass ? mass + m.mass : number + (double)m.count) >= amount;
    if (reached ? m.count < size : m.count > 0) {
      size = pick_out(left, size, bits, reached, b.left);
      left = b.left;
    }
    if (reached) {
      low = bits;
    } else {
      high = bits;
      number += (double)m.count;
      mass += m.mass;
    }
  }
  // what is left is equal
  double each = size > 0 ? weight_of(low) : 0, missing = amount - number;
  if (by_mass) missing = each > 0 ? (amount - mass) / each : 0;
  int64_t ties = size;
  if (missing < (double)size) ties = (int64_t)missing + ((double)(int64_t)missing < missing);
  if (ties < 1) ties = size > 0 && missing > 0 ? 1 : ties;
  return {low, ties, mass + each * (double)ties};
}

// The first weight of the prefix at which the running mass exceeds u · mass.
inline int64_t invert(const SampleBuffers& b, int64_t size, const Prefix& p, double u) {
  double target = u * p.mass, running = 0, before = 0, each = weight_of(p.bits);
  int64_t ties = p.ties, own_ties = 0, run = -1;  // the first run that exceeds it, or else the last that has members
  for (int64_t start = 0; start < size; start += RUN) {
    int64_t count = start + RUN < size ? RUN : size - start;
    Measure above_it = measure(b.weights + start, count, p.bits + 1);
    int64_t equal = p.bits == 0 || ties <= 0 ? 0 : measure(b.weights + start, count, p.bits).count - above_it.count;
    if (equal > ties) equal = ties;
    if (above_it.count + equal == 0) continue;
    run = start, before = running, own_ties = ties;
    running += above_it.mass + each * (double)equal;
    ties -= equal;
    if (running > target) break;
  }
  int64_t last = 0;
  for (int64_t i = run; run >= 0 && i < run + RUN && i < size; i++) {
    uint32_t bits = bits_of(b.weights[i]);
    if (bits < p.bits || (bits == p.bits && own_ties-- <= 0) || bits == 0) continue;
    before += b.weights[i];
    last = i;
    if (before > target) break;
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
      kept = {floor, size, measure(b.weights, size, floor).mass};
    }
  }
  return invert(b, size, kept, u);
}

inline void sample(const Sampling& a) {
  auto* buffers = a.scratch->take<SampleBuffers>(a.threads);
  for (int i = 0; i < a.threads; i++) buffers[i] = SampleBuffers(a.vocabulary, *a.scratch);
#pragma omp parallel num_threads(a.threads)
  {
    const SampleBuffers own = buffers[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < a.batch; i++)
      a.out[i] = sample_row(a.logits + i * a.vocabulary, a.vocabulary, a.temperature[i], a.top_k[i], a.top_p[i],
                            a.min_p[i], a.u[i], own);
  }
}

DSC_KERNELS_END
