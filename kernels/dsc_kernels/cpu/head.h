// Each token's largest output of a product, without writing the outputs: greedy decoding needs no logits.
//
// Screened, the products are int8, with bounds on what that changes (router.h). Outputs whose upper bound is not below the
// best lower bound so far are nominees; their panels are then multiplied as they are. So the place is that of multiplying
// all, bit for bit, for any weights and inputs.
#pragma once

#include "layers.h"
#include "router.h"

struct Largest {
  const float* bias;  // [panels · 16]; −∞ behind the last output
  float* values;    // [tokens, 16]: the largest so far of every lane
  int32_t* places;  // and where it was
  INLINE void operator()(vf v, int64_t t, int64_t n) const {
    const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    v += load(bias + n);
    vf held = load(values + t * LANES);
    vi place;
    memcpy(&place, places + t * LANES, sizeof place);
    auto better = v > held;  // of equal ones the first stays
    place = better ? lanes + (int32_t)n : place;
    store(values + t * LANES, better ? v : held);
    memcpy(places + t * LANES, &place, sizeof place);
  }
};

// The best of outputs that come in any order, the first of equal ones; place 0 when all are NaN or −∞.
struct Best {
  float value = -INFINITY;
  int64_t place = 0;
  INLINE void meet(float v, int64_t n) {
    if (!(v > value || (v == value && n < place))) return;
    value = v;
    place = n;
  }
};

constexpr int NOMINEES = 256;  // of one token and thread; a token with more of them is multiplied out

struct Nominees {
  int64_t count;  // NOMINEES + 1: too many
  float bound;    // the best lower bound so far
  float margin;   // the largest error of any output
  float gate;     // bound − margin: a logit below it belongs to no nominee
  float uppers[NOMINEES];
  int32_t places[NOMINEES];

  INLINE void clear(float largest_error) {
    count = 0;
    bound = gate = -INFINITY;
    margin = largest_error;
  }

  INLINE bool too_many() const { return count > NOMINEES; }

  INLINE void drop_below() {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++) {
      uppers[kept] = uppers[i];
      places[kept] = places[i];
      kept += !(uppers[i] < bound);
    }
    count = kept;
  }

  __attribute__((noinline)) void take(vf logit, vf error, int64_t n) {
    if (too_many()) return;
    vf lower = logit - error, upper = logit + error;
    uint32_t kept = ~below(upper, bound) & 0xffff;
    for (int lane = 0; lane < LANES; lane++) bound = lower[lane] > bound ? lower[lane] : bound;
    gate = bound - margin;
    if (count + LANES > NOMINEES) drop_below();
    for (; kept; kept &= kept - 1) {
      int lane = __builtin_ctz(kept);
      float most = upper[lane] == upper[lane] ? upper[lane] : INFINITY;
      if (most < bound) continue;
      if (count == NOMINEES) {
        count = NOMINEES + 1;
        return;
      }
      uppers[count] = most;
      places[count++] = (int32_t)n + lane;
    }
  }
};

struct Nomination {
  const Reading* readings;
  const float* bias;  // [panels · 16]; −∞ behind the last output
  const Screen& screen;
  Nominees* nominees;
  const Outliers* outliers;
  INLINE void operator()(vi v, int64_t t, int64_t n) const {
    const Reading& r = readings[t];
    vi shift;
    memcpy(&shift, screen.shifts + n, sizeof shift);
    vf logit = __builtin_convertvector(v - shift, vf) * load(screen.steps + n) * r.scale + load(bias + n);
    if (__builtin_expect((~below(logit, nominees[t].gate) & 0xffff) == 0, 1)) return;
    vf error = r.from_weights * load(screen.errors + n) + r.from_input * load(screen.norms + n) + screen.slack;
    nominees[t].take(logit, error, n);
  }
};

template <int P, int TT>
INLINE void start(const Nomination& sink, const int8_t* w, int64_t panel, int64_t t, vi (&acc)[P][TT]) {
  add_outliers(sink.outliers + t, w, panel, acc);
}

// Screening that leaves more than an eighth of the panels to be multiplied again costs more than it saves.
INLINE bool screening_pays(const Head& a) {
  const int64_t* counts = a.screen.counts;
  return a.screen.packed && (counts[1] < 256 || counts[0] / counts[1] < panel_count(a.n) / 8 + 1);
}

template <typename T>
struct HeadBuffers {
  const typename Input<T>::type* x;
  float* values;    // [threads, tokens, 16]
  int32_t* places;
  Reading* readings;
  Outliers* outliers;
  uint8_t* shifted;
  Nominees* nominees;  // [threads, tokens]
  int64_t shifted_stride, size;

  INLINE HeadBuffers(const Head& a, bool screened, char* scratch) {
    shifted_stride = panel_count(a.d) * LANES;
    size = 0;
    auto take = [&](int64_t bytes) __attribute__((always_inline)) {
      char* start = scratch + size;
      size += aligned(bytes);
      return start;
    };
    x = (const typename Input<T>::type*)take(a.batch * even(a.d) * 4);
    if (screened) {
      readings = (Reading*)take(a.batch * sizeof *readings);
      outliers = (Outliers*)take(a.batch * sizeof *outliers);
      shifted = (uint8_t*)take(a.batch * shifted_stride);
      nominees = (Nominees*)take(a.threads * a.batch * sizeof *nominees);
    } else {
      values = (float*)take(a.threads * a.batch * LANES * 4);
      places = (int32_t*)take(a.threads * a.batch * LANES * 4);
    }
  }
};

template <typename T>
int64_t largest_scratch(const Head& a) {
  int64_t exact = HeadBuffers<T>(a, false, nullptr).size, screened = HeadBuffers<T>(a, true, nullptr).size;
  return exact > screened ? exact : screened;
}

template <typename T>
void largest_of_all(const Head& a) {
  HeadBuffers<T> b(a, false, a.scratch);
  b.x = prepared<T>(a.x, 0, a.batch, a.d, (char*)b.x);
  int64_t panels = panel_count(a.n), all = a.batch * LANES;
#pragma omp parallel num_threads(a.threads)
  {
    int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
    for (int64_t i = id * all; i < (id + 1) * all; i += LANES) store(b.values + i, splat(-INFINITY));
    memset(b.places + id * all, 0, all * sizeof *b.places);
    Largest sink = {a.bias, b.values + id * all, b.places + id * all};
    multiply<T>((const T*)a.w, b.x, row_stride<T>(a.d), nullptr, a.batch, a.d, sink, part(panels, id, n),
                part(panels, id + 1, n));
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.batch; t++) {
      Best best;
      for (int64_t w = 0; w < n; w++)
        for (int64_t i = w * all + t * LANES; i < w * all + (t + 1) * LANES; i++) best.meet(b.values[i], b.places[i]);
      a.out[t] = best.place;
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

// A token's place from what the threads have nominated; returns how many panels were multiplied for it.
template <typename T>
INLINE int64_t elect(const Head& a, const HeadBuffers<T>& b, int64_t t, int64_t threads) {
  Best best;
  BestOfPanel sink = {a.bias, best};
  int64_t panels = panel_count(a.n), stride = row_stride<T>(a.d), multiplied = 0;
  float bound = -INFINITY;
  bool all = false;
  for (int64_t w = 0; w < threads; w++) {
    const Nominees& own = b.nominees[w * a.batch + t];
    all |= own.too_many();
    bound = own.bound > bound ? own.bound : bound;
  }
  if (all) {
    multiply<T>((const T*)a.w, b.x + t * stride, stride, nullptr, 1, a.d, sink, 0, panels);
    a.out[t] = best.place;
    return panels;
  }
  for (int64_t w = 0; w < threads; w++) {
    Nominees& own = b.nominees[w * a.batch + t];
    own.bound = bound;
    own.drop_below();
  }
  for (;;) {
    float most = -INFINITY;
    int64_t panel = -1;
    for (int64_t w = 0; w < threads; w++) {
      const Nominees& own = b.nominees[w * a.batch + t];
      for (int64_t i = 0; i < own.count; i++)
        if (own.uppers[i] > most) {
          most = own.uppers[i];
          panel = own.places[i] / LANES;
        }
    }
    if (panel < 0 || most < best.value) break;
    multiply<T>((const T*)a.w, b.x + t * stride, stride, nullptr, 1, a.d, sink, panel, panel + 1);
    multiplied++;
    for (int64_t w = 0; w < threads; w++) {
      Nominees& own = b.nominees[w * a.batch + t];
      for (int64_t i = 0; i < own.count; i++)
        if (own.places[i] / LANES == panel) own.uppers[i] = -INFINITY;
    }
  }
  a.out[t] = best.place;
  return multiplied;
}

template <typename T>
void largest_screened(const Head& a) {
  HeadBuffers<T> b(a, true, a.scratch);
  b.x = prepared<T>(a.x, 0, a.batch, a.d, (char*)b.x);
  int64_t panels = panel_count(a.n), multiplied = 0;
#pragma omp parallel num_threads(a.threads)
  {
    int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
    Nominees* own = b.nominees + id * a.batch;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.batch; t++)
      b.readings[t] = quantise((const T*)a.x + t * a.d, a.d, 1, b.shifted + t * b.shifted_stride, b.outliers[t]);
    for (int64_t t = 0; t < a.batch; t++)
      own[t].clear(b.readings[t].from_weights * a.largest_error + b.readings[t].from_input * a.largest_norm +
                   a.screen.slack);
    multiply<int8_t>(a.screen.packed, b.shifted, b.shifted_stride, nullptr, a.batch, a.d,
                     Nomination{b.readings, a.bias, a.screen, own, b.outliers}, part(panels, id, n), part(panels, id + 1, n));
#pragma omp barrier
#pragma omp for schedule(static) reduction(+ : multiplied)
    for (int64_t t = 0; t < a.batch; t++) multiplied += elect<T>(a, b, t, n);
  }
  __atomic_fetch_add(&a.screen.counts[0], multiplied, __ATOMIC_RELAXED);
  __atomic_fetch_add(&a.screen.counts[1], a.batch, __ATOMIC_RELAXED);
}

template <typename T>
void largest(const Head& a) {
  if (screening_pays(a))
    largest_screened<T>(a);
  else
    largest_of_all<T>(a);
}
