// From a token's logits to its dynamic part: candidates, the atoms picked among them, their composition.
#pragma once

#include "compose.h"
#include "grouping.h"
#include "layers.h"
#include "router.h"

// Intermediate results of an FFN for `tokens` tokens by `workers` threads, laid out in one piece of scratch.
template <typename T>
struct FfnBuffers {
  typedef typename Input<T>::type I;
  char* x = nullptr;
  float *logits = nullptr, *peaks = nullptr, *dynamic = nullptr;
  I* hidden = nullptr;
  Reading* readings = nullptr;
  Outliers* outliers = nullptr;
  uint8_t* shifted = nullptr;
  int32_t *candidates = nullptr, *picks = nullptr, *order = nullptr;  // picks to keys: where the composition is grouped
  float* weights = nullptr;
  uint64_t* keys = nullptr;
  int64_t logit_stride, hidden_stride, shifted_stride, peaks_size, size;

  INLINE FfnBuffers(const Ffn& a, int64_t tokens, int workers, char* scratch) {
    logit_stride = panel_count(a.atoms) * LANES;
    hidden_stride = even(a.hidden);
    shifted_stride = panel_count(a.d) * LANES;
    peaks_size = tokens * slots_of(a.k) * LANES;
    size = 0;
    auto take = [&](int64_t bytes) __attribute__((always_inline)) {
      char* start = scratch + size;
      size += aligned(bytes);
      return start;
    };
    x = take(tokens * even(a.d) * 4);
    hidden = (I*)take(tokens * hidden_stride * 4);
    if (a.atoms == 0) return;
    logits = (float*)take(tokens * logit_stride * 4);
    peaks = (float*)take(workers * peaks_size * 4);
    dynamic = (float*)take(tokens * a.d * 4);
    readings = (Reading*)take(tokens * sizeof *readings);
    outliers = (Outliers*)take(a.screen.rows ? tokens * sizeof *outliers : 0);
    shifted = (uint8_t*)take(a.screen.rows ? tokens * shifted_stride : 0);
    candidates = (int32_t*)take(workers * 4 * (logit_stride + LANES) * 4);
    if (!a.grouped) return;
    picks = (int32_t*)take(tokens * a.k * 4);
    weights = (float*)take(tokens * a.k * 4);
    order = (int32_t*)take(tokens * 4);
    keys = (uint64_t*)take(tokens * 2 * 8);
  }
};

// A token on its way from logits to its atoms. Found are its candidates, with their logits or, screened, upper bounds.
struct Choice {
  int32_t* found;
  float* values;
  int64_t count;
  float weights[MAX_PICKS];
  int32_t atoms[MAX_PICKS];
};

template <typename T>
struct Routing {
  const Ffn& a;
  const FfnBuffers<T>& b;
  int64_t base;  // the buffers' first token
  int writers;   // threads that shared the router's panels
  Choice ring[4];
  int64_t scored = 0;

  INLINE const T* x(int64_t t) const { return (const T*)a.x + t * a.d; }
  INLINE const T* row(int32_t atom) const { return (const T*)a.screen.rows + atom * a.d; }
  INLINE float logit(int64_t t, int32_t atom) const {
    return b.readings[t - base].rstd * dot(x(t), row(atom), a.d) + a.router_bias[atom];
  }

  INLINE void best(Choice& c, float tau) const {
    if (c.count <= FEW)
      select_few(c.values, c.count, a.k, tau, c.weights, c.atoms);
    else
      select(c.values, 1, nullptr, c.count, a.k, tau, c.weights, c.atoms);
    for (int j = 0; j < a.k; j++) c.atoms[j] = c.found[c.atoms[j]];
  }

  INLINE void find(int64_t t) {
    Choice& c = ring[t & 3];
    int64_t slots = slots_of(a.k);
    c.values = b.logits + (t - base) * b.logit_stride;
    float bound = reached(b.peaks + (t - base) * slots * LANES, slots, writers, b.peaks_size, a.k, a.tau);
    c.count = candidates(c.values, a.atoms, bound, c.found);
    for (int64_t i = 0; i < c.count; i++) c.values[i] = c.values[c.found[i]];
    if (!a.screen.rows) return;
    best(c, INFINITY);
    prefetch_rows((const T*)a.screen.rows, c.atoms, a.k, a.d);
  }

  // The true logits of the K that promise most are a better bound for the others.
  INLINE void narrow(int64_t t) {
    Choice& c = ring[t & 3];
    float bound = INFINITY;
    for (int j = 0; j < a.k; j++) {
      float value = logit(t, c.atoms[j]);
      bound = value >= bound ? bound : (value == value ? value : -INFINITY);
    }
    bound = attainable(bound, a.tau);
    int64_t kept = 0;
    for (int64_t i = 0; i < c.count; i++) {
      c.found[kept] = c.found[i];
      kept += !(c.values[i] < bound);
    }
    c.count = kept;
    scored += kept;
    prefetch_rows((const T*)a.screen.rows, c.found, kept, a.d);
  }

  INLINE void choose(int64_t t) {
    Choice& c = ring[t & 3];
    if (a.screen.rows)
      for (int64_t i = 0; i < c.count; i++) c.values[i] = logit(t, c.found[i]);
    best(c, a.tau);
    float signal = 0;
    if (a.rank > 0)
      softmax(c.weights, a.k);
    else
      signal = coefficients(c.weights, a.k, a.eps);
    if (a.picks) memcpy(a.picks + t * a.k, c.atoms, a.k * sizeof *c.atoms);
    if (a.weights) memcpy(a.weights + t * a.k, c.weights, a.k * sizeof *c.weights);
    if (a.signal) a.signal[t] = signal;
  }

  // Picked adapters become the rows that they consist of, each with its adapter's weight.
  INLINE void spread(Choice& c) const {
    for (int j = a.k * a.rank - 1; j >= 0; j--) {
      c.weights[j] = c.weights[j / a.rank];
      c.atoms[j] = c.atoms[j / a.rank] * a.rank + j % a.rank;
    }
  }

  INLINE void fetch(int64_t t) {
    Choice& c = ring[t & 3];
    spread(c);
    prefetch_rows((const T*)a.u, c.atoms, picks(), a.d);
    prefetch_rows((const T*)a.v, c.atoms, picks(), a.d);
  }

  INLINE void composed(int64_t t, Choice& c) const {
    compose(x(t), (const T*)a.u, (const T*)a.v, a.gamma, a.scalar_gamma, c.atoms, c.weights, picks(), a.d,
            b.dynamic + (t - base) * a.d);
  }

  INLINE int picks() const { return a.rank > 0 ? a.k * a.rank : a.k; }
};

// Tokens first … last − 1 (of the whole batch) follow each other a phase apart: rows travel from memory while others are
// worked on.
template <typename T>
INLINE void route_in_order(Routing<T>& r, int64_t first, int64_t last) {
  for (int64_t t = first; t < last + 3; t++) {
    if (t < last) r.find(t);
    if (r.a.screen.rows && t - 1 >= first && t - 1 < last) r.narrow(t - 1);
    if (t - 2 >= first && t - 2 < last) r.choose(t - 2), r.fetch(t - 2);
    if (t - 3 >= first) r.composed(t - 3, r.ring[(t - 3) & 3]);
  }
}

// The same with the tokens composed in an order in which neighbours share atoms: the same sums, so the same bits.
template <typename T>
INLINE void route_grouped(Routing<T>& r, int64_t first, int64_t last) {
  const Ffn& a = r.a;
  int64_t own = first - r.base, count = last - first;
  int32_t *picks = r.b.picks + own * a.k, *order = r.b.order + own;
  float* weights = r.b.weights + own * a.k;
  for (int64_t t = first; t < last + 2; t++) {
    if (t < last) r.find(t);
    if (a.screen.rows && t - 1 >= first && t - 1 < last) r.narrow(t - 1);
    if (t - 2 < first) continue;
    r.choose(t - 2);
    const Choice& c = r.ring[(t - 2) & 3];
    memcpy(picks + (t - 2 - first) * a.k, c.atoms, a.k * sizeof *c.atoms);
    memcpy(weights + (t - 2 - first) * a.k, c.weights, a.k * sizeof *c.weights);
  }
  min_hash_order(picks, count, a.k, r.b.keys + 2 * own, order);
  Choice& c = r.ring[0];
  for (int64_t i = 0; i < count; i++) {
    memcpy(c.atoms, picks + order[i] * a.k, a.k * sizeof *c.atoms);
    memcpy(c.weights, weights + order[i] * a.k, a.k * sizeof *c.weights);
    r.spread(c);
    r.composed(first + order[i], c);
  }
}

// Selection and composition of tokens first … last − 1 by one of the workers.
template <typename T>
INLINE void ffn_route(const Ffn& a, const FfnBuffers<T>& b, int64_t base, int64_t first, int64_t last, int64_t worker,
                      int writers) {
  Routing<T> r = {a, b, base, writers, {}};
  for (int i = 0; i < 4; i++) r.ring[i].found = b.candidates + (worker * 4 + i) * (b.logit_stride + LANES);
  if (a.grouped)
    route_grouped(r, first, last);
  else
    route_in_order(r, first, last);
  if (!a.screen.rows) return;
  __atomic_fetch_add(&a.screen.counts[0], r.scored, __ATOMIC_RELAXED);
  __atomic_fetch_add(&a.screen.counts[1], last - first, __ATOMIC_RELAXED);
}
