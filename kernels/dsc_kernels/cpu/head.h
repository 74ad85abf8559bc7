// Each token's largest output of a product, without writing the outputs: greedy decoding needs no logits.
//
// Screened, the products are int8, with bounds on what that changes (router.h). Outputs whose upper bound is not below the
// best lower bound so far are candidates; their panels are then multiplied as they are. So the index is that of multiplying
// all, bit for bit, for any weights and inputs.
#pragma once

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "layers.h"
#include "namespace.h"
#include "quantise.h"

DSC_KERNELS_BEGIN

struct LaneMaxima {
  const float* bias;  // [panels · 16]; −∞ behind the last output
  float* values;      // [tokens, 16]: the largest so far of every lane
  int32_t* indices;   // and where it was
  INLINE void operator()(vf v, int64_t t, int64_t n) const {
    v += load(bias + n);
    vf held = load(values + t * LANES);
    vi index = load_bits<vi>(indices + t * LANES), better = v > held;  // of equal ones the first stays
    store_bits(indices + t * LANES, blend(better, lane_numbers() + (int32_t)n, index));
    store(values + t * LANES, blend(better, v, held));
  }
};

// The best of outputs that come in any order, the first of equal ones; index 0 when all are NaN or −∞.
struct Best {
  float value = -INFINITY;
  int64_t index = 0;
  INLINE void meet(float v, int64_t n) {
    if (!(v > value || (v == value && n < index))) return;
    value = v;
    index = n;
  }
};

// The panels of 16 outputs in which one thread finds that a token's largest output may be.
struct ArgmaxCandidates {
  float* shared;  // the best lower bound that any thread has found for the token; whoever is late only keeps more
  float* uppers;  // [the thread's panels]: a panel's largest upper bound
  int32_t* panels;
  int64_t count;
  float margin;  // the largest error of any output
  float bound;   // the best lower bound that is known here
  float gate;    // bound − margin: a panel of logits below it is none

  INLINE void raise(float lower) {
    float best;
    __atomic_load(shared, &best, __ATOMIC_RELAXED);
    if (lower > best) {
      best = lower;
      __atomic_store(shared, &best, __ATOMIC_RELAXED);
    }
    bound = best > bound ? best : bound;
    gate = bound - margin;
  }

  __attribute__((noinline)) void take(vf logit, vf error, int64_t n) {
    vf lower = logit - error, upper = logit + error;
    raise(max_lane(blend(lower == lower, lower, splat(-INFINITY))));
    float most = max_lane(blend(upper == upper, upper, splat(INFINITY)));
    if (most < bound) return;
    uppers[count] = most;
    panels[count++] = (int32_t)(n / LANES);
  }
};

struct CollectCandidates {
  const LogitScale* logit_scales;
  const float* bias;  // [panels · 16]; −∞ behind the last output
  const Screen& screen;
  ArgmaxCandidates* candidates;
  const Outliers* outliers;
  INLINE void operator()(vi v, int64_t t, int64_t n) const {
    const LogitScale& r = logit_scales[t];
    vi shift = load_bits<vi>(screen.shifts + n);
    vf logit = to_floats(v - shift) * load(screen.steps + n) * r.scale + load(bias + n);
    if (__builtin_expect((~below(logit, candidates[t].gate) & 0xffff) == 0, 1)) return;
    vf error = r.from_weights * load(screen.errors + n) + r.from_input * load(screen.norms + n) + screen.slack;
    candidates[t].take(logit, error, n);
  }
};

template <int P, int TT>
INLINE void start(const CollectCandidates& sink, const int8_t* w, int64_t panel, int64_t t, vi (&acc)[P][TT]) {
  add_outliers(sink.outliers + t, w, panel, acc);
}

// Screening costs more than it saves where a thread multiplies more than an eighth of all panels again. So after WATCHED
// calls in which it did, on average, everything is multiplied for PAUSE calls, and then it is tried again.
constexpr int64_t WATCHED = 8, PAUSE = 512;

INLINE void watch_screening(const Head& a, int64_t multiplied) {
  ScreenCounters& c = *a.screen.counters;
  c.watched_panels += multiplied / (a.batch < a.threads ? a.batch : a.threads);
  if (++c.watched_calls < WATCHED) return;
  if (c.watched_panels > WATCHED * panel_count(a.n) / 8) c.paused_calls = PAUSE;
  c.watched_panels = c.watched_calls = 0;
}

template <typename T>
struct HeadBuffers {
  typedef typename Input<T>::type I;
  const I* x;                    // [tokens, round_up_2(d)], or the inputs themselves
  Bytes bytes;                   // the same in int8, where the weight is quantised
  float* values = nullptr;       // [threads, tokens, 16], and the next: where all is multiplied out
  int32_t* indices = nullptr;    // [threads, tokens, 16]
  LogitScale* logit_scales = nullptr;  // [tokens], and all below: where the head is screened
  Outliers* outliers = nullptr;  // [tokens]
  uint8_t* shifted = nullptr;    // [tokens, shifted_stride]: inputs in int8
  ArgmaxCandidates* candidates = nullptr;  // [threads, tokens]
  float* bounds = nullptr;       // [tokens]
  float* uppers = nullptr;       // [tokens, panels], of which each thread has its part
  int32_t* panels = nullptr;     // the same
  int64_t shifted_stride;

  INLINE HeadBuffers(const Head& a, bool screened) : shifted_stride(panel_count(a.d) * LANES) {
    Scratch& scratch = *a.scratch;
    x = pack_inputs<T>(a.x, 0, a.batch, a.d, scratch.take<I>(a.batch * round_up_2(a.d)));
    bytes.take(scratch, a.batch, a.d, {a.w_format});
    if (screened) {
      logit_scales = scratch.take<LogitScale>(a.batch);
      outliers = scratch.take<Outliers>(a.batch);
      shifted = scratch.take<uint8_t>(a.batch * shifted_stride);
      candidates = scratch.take<ArgmaxCandidates>(a.threads * a.batch);
      bounds = scratch.take<float>(a.batch);
      uppers = scratch.take<float>(a.batch * panel_count(a.n));
      panels = scratch.take<int32_t>(a.batch * panel_count(a.n));
    } else {
      values = scratch.take<float>(a.threads * a.batch * LANES);
      indices = scratch.take<int32_t>(a.threads * a.batch * LANES);
    }
  }
};

template <typename T>
void argmax_exact(const Head& a) {
  HeadBuffers<T> b(a, false);
  int64_t panels = panel_count(a.n), all = a.batch * LANES;
#pragma omp parallel num_threads(a.threads)
  {
    int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
    for (int64_t i = id * all; i < (id + 1) * all; i += LANES) store(b.values + i, splat(-INFINITY));
    memset(b.indices + id * all, 0, all * sizeof *b.indices);
    LaneMaxima sink = {a.bias, b.values + id * all, b.indices + id * all};
    if (a.w_format) {
      b.bytes.round_tokens((const T*)a.x, a.d, split_point(a.batch, id, n), split_point(a.batch, id + 1, n), a.d);
#pragma omp barrier
    }
    multiply<T>(Matrix(a.w, a.w_format), Inputs<T>{b.x, row_stride<T>(a.d), b.bytes}, nullptr, a.batch, a.d, sink,
                split_point(panels, id, n), split_point(panels, id + 1, n));
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.batch; t++) {
      Best best;
      for (int64_t w = 0; w < n; w++)
        for (int64_t i = w * all + t * LANES; i < w * all + (t + 1) * LANES; i++) best.meet(b.values[i], b.indices[i]);
      a.out[t] = best.index;
    }
  }
}

// One token's products with one panel, as every tile sums them.
struct BestOfPanel {
  const float* bias;
  Best& best;
  INLINE void operator()(vf v, int64_t, int64_t n) const {
    v += load(bias + n);
    for (int lane = 0; lane < LANES; lane++) best.meet(v[lane], n + lane);
  }
};

// A token's index from the candidates of all threads; returns how many panels were multiplied for it. The first of
// them, that of the largest upper bound, leaves few others.
template <typename T>
INLINE int64_t pick_candidate(const Head& a, const HeadBuffers<T>& b, int64_t t, int64_t threads) {
  Best best;
  BestOfPanel sink = {a.bias, best};
  int64_t stride = row_stride<T>(a.d), multiplied = 0, first = -1;
  float most = -INFINITY;
  auto multiply_one = [&](int64_t panel) __attribute__((always_inline)) {
    multiply<T>((const T*)a.w, b.x + t * stride, stride, nullptr, 1, a.d, sink, panel, panel + 1);
    multiplied++;
  };
  for (int64_t w = 0; w < threads; w++) {
    const ArgmaxCandidates& own = b.candidates[w * a.batch + t];
    for (int64_t i = 0; i < own.count; i++)
      if (own.uppers[i] > most) most = own.uppers[i], first = own.panels[i];
  }
  if (first >= 0) multiply_one(first);
  for (int64_t w = 0; w < threads; w++) {
    const ArgmaxCandidates& own = b.candidates[w * a.batch + t];
    for (int64_t i = 0; i < own.count; i++)
      if (own.panels[i] != first && !(own.uppers[i] < b.bounds[t] || own.uppers[i] < best.value))
        multiply_one(own.panels[i]);
  }
  a.out[t] = best.index;
  return multiplied;
}

template <typename T>
void argmax_screened(const Head& a) {
  HeadBuffers<T> b(a, true);
  int64_t panels = panel_count(a.n), multiplied = 0;
#pragma omp parallel num_threads(a.threads)
  {
    int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
    ArgmaxCandidates* own = b.candidates + id * a.batch;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.batch; t++) {
      b.logit_scales[t] = quantise((const T*)a.x + t * a.d, a.d, 1, b.shifted + t * b.shifted_stride, b.outliers[t]);
      b.bounds[t] = -INFINITY;
    }
    for (int64_t t = 0; t < a.batch; t++) {
      const LogitScale& r = b.logit_scales[t];
      int64_t index = t * panels + split_point(panels, id, n);
      float margin = r.from_weights * a.max_error + r.from_input * a.max_norm + a.screen.slack;
      own[t] = {b.bounds + t, b.uppers + index, b.panels + index, 0, margin, -INFINITY, -INFINITY};
    }
    multiply<int8_t>(a.screen.packed, b.shifted, b.shifted_stride, nullptr, a.batch, a.d,
                     CollectCandidates{b.logit_scales, a.bias, a.screen, own, b.outliers}, split_point(panels, id, n),
                     split_point(panels, id + 1, n));
#pragma omp barrier
#pragma omp for schedule(static) reduction(+ : multiplied)
    for (int64_t t = 0; t < a.batch; t++) multiplied += pick_candidate<T>(a, b, t, n);
  }
  __atomic_fetch_add(&a.screen.counters->rescored, multiplied, __ATOMIC_RELAXED);
  __atomic_fetch_add(&a.screen.counters->tokens, a.batch, __ATOMIC_RELAXED);
  watch_screening(a, multiplied);
}

template <typename T>
void argmax(const Head& a) {
  if (!a.screen.packed) return argmax_exact<T>(a);
  int64_t& paused = a.screen.counters->paused_calls;
  if (paused == 0) return argmax_screened<T>(a);
  paused--;
  argmax_exact<T>(a);
}

DSC_KERNELS_END
