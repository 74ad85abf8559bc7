// From a router's products to the atoms that can be picked, without sorting and mostly without reading the logits.
//
// While logits are written, each token keeps the largest of every class of them ("peaks"). The K-th largest peak is a
// bound that the K best logits reach, so one scan leaves a few candidates, among which `select` picks.
//
// Screened, the products are int8: a logit is known up to a bound on its error, peaks are of lower bounds and the scan is
// of upper bounds, so every atom that may be among the K best is a candidate. Candidates are scored again from the
// router's own rows. The result is that of scoring all rows so, whatever the weights.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "namespace.h"
#include "quantise.h"
#include "select.h"

DSC_KERNELS_BEGIN

// Classes are panel mod slots and lane: more than enough for few picks, and 256 for at most 64.
INLINE int64_t slots_of(int k) { return k <= 8 ? 4 : 16; }

INLINE void raise(float* peaks, int64_t slots, int64_t t, int64_t n, vf v) {
  float* peak = peaks + (t * slots + (n / LANES & (slots - 1))) * LANES;
  vf held = load(peak);
  store(peak, blend(v > held, v, held));  // a NaN raises nothing
}

// The router's bias [panels · 16], −∞ behind the last atom, and what bounds by it need: the same of all tokens …
struct LayerBias {
  const float* bias;
  float slack;
  INLINE const float* of(int64_t) const { return bias; }
  INLINE float slack_of(int64_t) const { return slack; }
};

// … or each token's own.
struct TunedBias {
  const Tuning* tunings;  // [tokens]
  INLINE const float* of(int64_t t) const { return tunings[t].bias; }
  INLINE float slack_of(int64_t t) const { return *tunings[t].slack; }
};

template <typename Bias>
struct Logits {
  const LogitScale* logit_scales;  // [tokens]: what makes a product a logit
  Bias bias;                       // of all atoms, or each token's own
  float* logits;                   // [tokens, stride]
  int64_t stride;                  // of a token's logits: all atoms, rounded up to whole panels
  float* peaks;                    // [tokens, slots, 16]: the largest logit of every class
  int64_t slots;                   // of a token, 16 classes each
  INLINE void operator()(vf v, int64_t t, int64_t n) const {
    v = logit_scales[t].scale * v + load(bias.of(t) + n);
    store(logits + t * stride + n, v);
    raise(peaks, slots, t, n, v);
  }
};

template <typename Bias>
struct Bounds {
  Logits<Bias> to;
  const Screen& screen;
  const Outliers* outliers;
  INLINE void operator()(vi v, int64_t t, int64_t n) const {
    const LogitScale& r = to.logit_scales[t];
    vi shift = load_bits<vi>(screen.shifts + n);
    vf product = to_floats(v - shift) * load(screen.steps + n);
    vf logit = r.scale * product + load(to.bias.of(t) + n);
    vf error = r.from_weights * load(screen.errors + n) + r.from_input * load(screen.norms + n) + to.bias.slack_of(t);
    store(to.logits + t * to.stride + n, logit + error);
    raise(to.peaks, to.slots, t, n, logit - error);
  }
};

// What the K best logits reach when K of them reach `bound`, in a selection that truncates: −∞ where nothing is left out.
INLINE float attainable(float bound, float tau) {
  float truncated = bound > tau ? tau : bound;
  return truncated > -tau ? truncated : -INFINITY;
}

// The k-th largest of 64 numbers that are no NaN: the largest of all is taken off its column until k are gone.
INLINE float kth_of_64(vf a, vf b, vf c, vf d, int k) {
  auto order = [](vf& high, vf& low) __attribute__((always_inline)) {
    vf least = vmin(high, low);
    high = vmax(high, low);
    low = least;
  };
  order(a, b), order(c, d), order(a, c), order(b, d), order(b, c);
  for (;;) {
    float top = max_lane(a);
    vi taken = a == splat(top);
    for (int lane = 0; lane < LANES; lane++) k += taken[lane];  // −1 where true
    if (k <= 0 || top == -INFINITY) return top;
    a = blend(taken, b, a);
    b = blend(taken, c, b);
    c = blend(taken, d, c);
    d = blend(taken, splat(-INFINITY), d);
  }
}

// What a token's K best logits reach at least; −∞ where every atom is a candidate. `writers` have raised own peaks,
// `apart` elements from each other.
INLINE float reached(const float* peaks, int64_t slots, int writers, int64_t apart, int k, float tau) {
  vf merged[16];
  for (int64_t i = 0; i < slots; i++) {
    merged[i] = load(peaks + i * LANES);
    for (int w = 1; w < writers; w++) merged[i] = vmax(merged[i], load(peaks + w * apart + i * LANES));
  }
  if (slots == 4) return attainable(kth_of_64(merged[0], merged[1], merged[2], merged[3], k), tau);
  float values[MAX_PICKS];
  int32_t indices[MAX_PICKS];
  select((const float*)merged, 1, nullptr, slots * LANES, k, INFINITY, values, indices);
  return attainable(values[k - 1], tau);
}

// The indices, in order, of the logits that are not below the bound; a NaN is not. Room for size + 1 is needed.
INLINE int64_t find_candidates(const float* logits, int64_t size, float bound, int32_t* out) {
  constexpr int64_t WORD = 64;
  int64_t count = 0;
  for (int64_t i = 0; i < size; i += WORD) {
    uint64_t kept = 0;
    for (int64_t j = 0; j < WORD && i + j < size; j += LANES)
      kept |= (uint64_t)(~below(load(logits + i + j), bound) & 0xffff) << j;
    if (size - i < WORD) kept &= (1ull << (size - i)) - 1;
    for (int j = 0; j < 2; j++) {  // mostly at most two: no branch that would be guessed wrong
      out[count] = (int32_t)i + __builtin_ctzll(kept | 1ull << 63);
      count += kept != 0;
      kept &= kept - 1;
    }
    for (; kept; kept &= kept - 1) out[count++] = (int32_t)i + __builtin_ctzll(kept);
  }
  return count;
}

template <typename Bias, int P, int TT>
INLINE void start(const Bounds<Bias>& sink, const int8_t* w, int64_t panel, int64_t t, vi (&acc)[P][TT]) {
  add_outliers(sink.outliers + t, w, panel, acc);
}

DSC_KERNELS_END
