// From a token's logits to its dynamic part: candidates, the atoms picked among them, their composition.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "compose.h"
#include "grouping.h"
#include "layers.h"
#include "namespace.h"
#include "router.h"

DSC_KERNELS_BEGIN

// Intermediate results of an FFN for `tokens` tokens by `workers` threads, laid out in one piece of scratch.
//
// What is about routing has a place for each token that is routed, in their order: these are all, but in a layer that is
// silent only those with a tuning of their own.
template <typename T>
struct FfnBuffers {
  typedef typename Input<T>::type I;
  int64_t logit_stride, hidden_stride, shifted_stride;
  int64_t peaks_size;                  // of one worker
  I* x = nullptr;                      // [tokens, round_up_2(d)]
  I* hidden = nullptr;                 // [tokens, hidden_stride]
  Bytes x_bytes, hidden_bytes;         // the same in int8, where weights are quantised
  float* wide = nullptr;               // [tokens, d]: x of the routed in float32, where the router is quantised
  float* panels = nullptr;             // [workers, d · 16]: the router's, where it is quantised
  float* logits = nullptr;             // [tokens, logit_stride]; screened, upper bounds
  float* peaks = nullptr;              // [workers, tokens, slots, 16]
  float* dynamic = nullptr;            // [tokens, d]: what the picked rows add
  LogitScale* logit_scales = nullptr;  // [tokens]
  Outliers* outliers = nullptr;        // [tokens], where the router is screened
  uint8_t* shifted = nullptr;          // [tokens, shifted_stride]: inputs in int8, where it is screened
  int32_t* candidate_atoms = nullptr;  // [workers, 4, logit_stride + 16]
  int32_t* picks = nullptr;            // [tokens, k], and all below: where the composition is grouped
  float* weights = nullptr;            // [tokens, k]
  int32_t* order = nullptr;            // [tokens]
  uint64_t* keys = nullptr;            // [tokens, 2]
  Branch gate, up, down;               // what adapters add to the static MLP's products
  int32_t* rows = nullptr;             // [tokens]: the routed ones, from the buffers' first token on; null: all
  Tuning* tunings = nullptr;           // [tokens], of the routed ones; null: all have the layer's
  int64_t routed = 0;                  // how many there are

  INLINE FfnBuffers(const Ffn& a, int64_t tokens, int workers)
      : logit_stride(panel_count(a.atoms) * LANES), hidden_stride(round_up_2(a.hidden)),
        shifted_stride(panel_count(a.d) * LANES), peaks_size(tokens * slots_of(a.k) * LANES) {
    Scratch& scratch = *a.scratch;
    x = scratch.take<I>(tokens * round_up_2(a.d));
    hidden = scratch.take<I>(tokens * hidden_stride);
    gate = Branch(a.adapted, GATE, a.gate ? 1 : 0, sizeof(T) == 2, tokens, scratch);
    up = Branch(a.adapted, UP, 1, sizeof(T) == 2, tokens, scratch);
    down = Branch(a.adapted, DOWN, 1, sizeof(T) == 2, tokens, scratch);
    x_bytes.take(scratch, tokens, a.d, {a.up_format, a.gate_format});
    hidden_bytes.take(scratch, tokens, a.hidden, {a.down_format});
    if (a.atoms == 0 || (a.silent && !tuned(a))) return;
    if (tuned(a)) tunings = scratch.take<Tuning>(tokens);
    if (a.silent) rows = scratch.take<int32_t>(tokens);
    if (a.router_format) {
      if (sizeof(I) < sizeof(float) || rows) wide = scratch.take<float>(tokens * a.d);
      panels = scratch.take<float>(workers * a.d * LANES);
    }
    logits = scratch.take<float>(tokens * logit_stride);
    peaks = scratch.take<float>(workers * peaks_size);
    dynamic = scratch.take<float>(tokens * a.d);
    logit_scales = scratch.take<LogitScale>(tokens);
    if (a.screen.rows) {
      outliers = scratch.take<Outliers>(tokens);
      shifted = scratch.take<uint8_t>(tokens * shifted_stride);
    }
    candidate_atoms = scratch.take<int32_t>(workers * 4 * (logit_stride + LANES));
    if (!a.grouped) return;
    picks = scratch.take<int32_t>(tokens * a.k);
    weights = scratch.take<float>(tokens * a.k);
    order = scratch.take<int32_t>(tokens);
    keys = scratch.take<uint64_t>(tokens * 2);
  }

  // Whether any token has a tuning of its own.
  static INLINE bool tuned(const Ffn& a) {
    for (int64_t run = 0; run < a.adapted.run_count; run++)
      if (a.adapted.tuning(run)) return true;
    return false;
  }

  // Find which of the tokens base … base + count − 1 are routed, and how. Those that are not pick nothing.
  INLINE void bind(const Ffn& a, int64_t base, int64_t count) {
    routed = dynamic ? count : 0;
    if (!tunings) {
      if (a.silent)
        for (int64_t t = base; t < base + count; t++) pick_nothing(a, t);
      return;
    }
    const Tuning own = {a.router_bias, nullptr, &a.screen.slack};
    routed = 0;
    for (int64_t t = 0; t < count; t++) {
      int32_t run = a.adapted.run_of[base + t];
      const Tuning* tuning = run < 0 ? nullptr : a.adapted.tuning(run);
      if (!tuning && rows) {
        pick_nothing(a, base + t);
        memset(dynamic + t * a.d, 0, a.d * sizeof *dynamic);
        continue;
      }
      tunings[routed] = tuning ? *tuning : own;
      if (rows) rows[routed] = (int32_t)t;
      routed++;
    }
  }

  static INLINE void pick_nothing(const Ffn& a, int64_t t) {
    for (int j = 0; a.picks && j < a.k; j++) a.picks[t * a.k + j] = j;
    for (int j = 0; a.weights && j < a.k; j++) a.weights[t * a.k + j] = 0;
    if (a.signal) a.signal[t] = 0;
  }

  // The token of a place among the routed, from the buffers' first one on.
  INLINE int64_t token(int64_t place) const { return rows ? rows[place] : place; }
  INLINE const float* bias(const Ffn& a, int64_t place) const {
    return tunings ? tunings[place].bias : a.router_bias;
  }
};

// A token on its way from logits to its atoms. It has candidates, with their logits or, screened, upper bounds.
struct Selection {
  int32_t* candidates;
  float* values;             // theirs
  int64_t count;             // of candidates
  float weights[MAX_PICKS];  // of the picks, as far as it has come
  int32_t atoms[MAX_PICKS];
};

template <typename T>
struct Routing {
  const Ffn& a;
  const FfnBuffers<T>& b;
  int64_t base;          // the buffers' first token; below, tokens are named by their places among the routed
  int writers;           // threads that shared the router's panels
  Selection ring[4];     // of the tokens that are on their way
  int64_t rescored = 0;  // rows

  INLINE int64_t token(int64_t t) const { return base + b.token(t); }  // of the whole batch
  INLINE const T* x(int64_t t) const { return (const T*)a.x + token(t) * a.d; }
  // What a function makes of rows in their format.
  template <typename Use>
  INLINE auto with_rows(const void* rows, const RowFormat* f, const Use& use) const {
    return f ? use(LevelRows(rows, *f, a.d)) : use(PlainRows<T>{(const T*)rows, a.d});
  }
  INLINE void ask_for(const void* rows, const RowFormat* f, const int32_t* picks, int64_t count) const {
    with_rows(rows, f, [&](const auto& r) __attribute__((always_inline)) { prefetch_rows(r, picks, count); });
  }
  INLINE float logit(int64_t t, int32_t atom) const {
    float product = with_rows(a.screen.rows, a.screen.rows_format, [&](const auto& r) __attribute__((always_inline)) {
      return r.product(x(t), atom);
    });
    return b.logit_scales[t].rstd * product + b.bias(a, t)[atom];
  }

  INLINE void select_best(Selection& c, float tau) const {
    if (c.count <= FEW) select_few(c.values, c.count, a.k, tau, c.weights, c.atoms);
    else select(c.values, 1, nullptr, c.count, a.k, tau, c.weights, c.atoms);
    for (int j = 0; j < a.k; j++) c.atoms[j] = c.candidates[c.atoms[j]];
  }

  INLINE void scan_candidates(int64_t t) {
    Selection& c = ring[t & 3];
    int64_t slots = slots_of(a.k);
    c.values = b.logits + t * b.logit_stride;
    float bound = reached(b.peaks + t * slots * LANES, slots, writers, b.peaks_size, a.k, a.tau);
    c.count = find_candidates(c.values, a.atoms, bound, c.candidates);
    for (int64_t i = 0; i < c.count; i++) c.values[i] = c.values[c.candidates[i]];
    if (!a.screen.rows) return;
    select_best(c, INFINITY);
    ask_for(a.screen.rows, a.screen.rows_format, c.atoms, a.k);
  }

  // The true logits of the K that promise most are a better bound for the others.
  INLINE void prune(int64_t t) {
    Selection& c = ring[t & 3];
    float bound = INFINITY;
    for (int j = 0; j < a.k; j++) {
      float value = logit(t, c.atoms[j]);
      bound = value >= bound ? bound : (value == value ? value : -INFINITY);
    }
    bound = attainable(bound, a.tau);
    int64_t kept = 0;
    for (int64_t i = 0; i < c.count; i++) {
      c.candidates[kept] = c.candidates[i];
      kept += !(c.values[i] < bound);
    }
    c.count = kept;
    rescored += kept;
    ask_for(a.screen.rows, a.screen.rows_format, c.candidates, kept);
  }

  INLINE void select_top_k(int64_t t) {
    Selection& c = ring[t & 3];
    if (a.screen.rows)
      for (int64_t i = 0; i < c.count; i++) c.values[i] = logit(t, c.candidates[i]);
    select_best(c, a.tau);
    float signal = 0;
    if (a.rank > 0) softmax(c.weights, a.k);
    else signal = coefficients(c.weights, a.k, a.eps);
    int64_t row = token(t);
    if (a.picks) memcpy(a.picks + row * a.k, c.atoms, a.k * sizeof *c.atoms);
    if (a.weights) memcpy(a.weights + row * a.k, c.weights, a.k * sizeof *c.weights);
    if (a.signal) a.signal[row] = signal;
  }

  // Picked adapters become the rows that they consist of, each with its adapter's weight.
  INLINE void expand_adapters(Selection& c) const {
    for (int j = a.k * a.rank - 1; j >= 0; j--) {
      c.weights[j] = c.weights[j / a.rank];
      c.atoms[j] = c.atoms[j / a.rank] * a.rank + j % a.rank;
    }
  }

  INLINE void prefetch(int64_t t) {
    Selection& c = ring[t & 3];
    expand_adapters(c);
    ask_for(a.u, a.u_format, c.atoms, picks());
    ask_for(a.v, a.v_format, c.atoms, picks());
  }

  INLINE void compose_token(int64_t t, Selection& c) const {
    const float* own = b.tunings ? b.tunings[t].gamma : nullptr;
    const float* gamma = own ? own : a.gamma;
    bool scalar = !own && a.scalar_gamma;
    float* y = b.dynamic + b.token(t) * a.d;
    with_rows(a.u, a.u_format, [&](const auto& u) __attribute__((always_inline)) {
      with_rows(a.v, a.v_format, [&](const auto& v) __attribute__((always_inline)) {
        compose(x(t), u, v, gamma, scalar, c.atoms, c.weights, picks(), a.d, y);
      });
    });
  }

  INLINE int picks() const { return a.rank > 0 ? a.k * a.rank : a.k; }
};

// Routed tokens first … last − 1 follow each other a phase apart: rows travel from memory while others are
// worked on.
template <typename T>
INLINE void route_in_order(Routing<T>& r, int64_t first, int64_t last) {
  for (int64_t t = first; t < last + 3; t++) {
    if (t < last) r.scan_candidates(t);
    if (r.a.screen.rows && t - 1 >= first && t - 1 < last) r.prune(t - 1);
    if (t - 2 >= first && t - 2 < last) r.select_top_k(t - 2), r.prefetch(t - 2);
    if (t - 3 >= first) r.compose_token(t - 3, r.ring[(t - 3) & 3]);
  }
}

// The same with the tokens composed in an order in which neighbours share atoms: the same sums, so the same bits.
template <typename T>
INLINE void route_grouped(Routing<T>& r, int64_t first, int64_t last) {
  const Ffn& a = r.a;
  int64_t count = last - first;
  int32_t *picks = r.b.picks + first * a.k, *order = r.b.order + first;
  float* weights = r.b.weights + first * a.k;
  for (int64_t t = first; t < last + 2; t++) {
    if (t < last) r.scan_candidates(t);
    if (a.screen.rows && t - 1 >= first && t - 1 < last) r.prune(t - 1);
    if (t - 2 < first) continue;
    r.select_top_k(t - 2);
    const Selection& c = r.ring[(t - 2) & 3];
    memcpy(picks + (t - 2 - first) * a.k, c.atoms, a.k * sizeof *c.atoms);
    memcpy(weights + (t - 2 - first) * a.k, c.weights, a.k * sizeof *c.weights);
  }
  min_hash_order(picks, count, a.k, r.b.keys + 2 * first, order);
  Selection& c = r.ring[0];
  for (int64_t i = 0; i < count; i++) {
    memcpy(c.atoms, picks + order[i] * a.k, a.k * sizeof *c.atoms);
    memcpy(c.weights, weights + order[i] * a.k, a.k * sizeof *c.weights);
    r.expand_adapters(c);
    r.compose_token(first + order[i], c);
  }
}

// Selection and composition of the routed tokens first … last − 1 by one of the workers; the buffers begin at `base`.
template <typename T>
INLINE void ffn_route(const Ffn& a, const FfnBuffers<T>& b, int64_t base, int64_t first, int64_t last, int64_t worker,
                      int writers) {
  Routing<T> r = {a, b, base, writers, {}};
  for (int i = 0; i < 4; i++) r.ring[i].candidates = b.candidate_atoms + (worker * 4 + i) * (b.logit_stride + LANES);
  if (a.grouped) route_grouped(r, first, last);
  else route_in_order(r, first, last);
  if (!a.screen.rows) return;
  __atomic_fetch_add(&a.screen.counters->rescored, r.rescored, __ATOMIC_RELAXED);
  __atomic_fetch_add(&a.screen.counters->tokens, last - first, __ATOMIC_RELAXED);
}

DSC_KERNELS_END
