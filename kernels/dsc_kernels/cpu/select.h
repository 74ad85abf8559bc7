// Which atoms a token picks, and with what coefficients.
#pragma once

#include <math.h>
#include <stdint.h>

#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

constexpr int MAX_PICKS = 64;

INLINE float truncate(float logit, float tau) { return logit < -tau ? -tau : (logit > tau ? tau : logit); }

// The k ≤ MAX_PICKS largest of clamp(scale · raw + bias, −tau, tau), by value descending, then index ascending.
//
// One pass that keeps the k best so far and compares 16 values at a time with the worst of them; equal values that come
// later never displace, which is the index rule. A NaN ranks below every number; its value is returned as it is.
INLINE void select(const float* raw, float scale, const float* bias, int64_t size, int k, float tau, float* values,
                   int32_t* picks) {
  int held = 0;
  auto insert = [&](float value, int64_t index) __attribute__((always_inline)) {
    int place = held < k ? held++ : k - 1;
    for (; place > 0 && value > values[place - 1]; place--) {
      values[place] = values[place - 1];
      picks[place] = picks[place - 1];
    }
    values[place] = value;
    picks[place] = (int32_t)index;
  };
  auto score = [&](int64_t i)
                   __attribute__((always_inline)) { return truncate(scale * raw[i] + (bias ? bias[i] : 0.0f), tau); };
  int64_t i = 0;
  for (; i < k; i++) {
    float value = score(i);
    insert(value == value ? value : -INFINITY, i);
  }
  for (; i + LANES <= size; i += LANES) {
    vf v = load(raw + i) * scale;
    if (bias) v += load(bias + i);
    // no need to clamp before comparing with a truncated bound: beyond τ only equality would follow
    uint32_t better = values[k - 1] < tau ? above(v, values[k - 1]) : 0;
    for (; better; better &= better - 1) {
      int lane = __builtin_ctz(better);
      float value = truncate(v[lane], tau);
      if (value > values[k - 1]) insert(value, i + lane);
    }
  }
  for (; i < size; i++) {
    float value = score(i);
    if (value > values[k - 1]) insert(value, i);
  }
  for (int j = 0; j < k; j++)
    if (values[j] == -INFINITY) values[j] = score(picks[j]);
}

// The same of few values, by counting for each how many come before it: nothing to guess wrong.
constexpr int64_t FEW = 64;

INLINE void select_few(const float* raw, int64_t size, int k, float tau, float* values, int32_t* picks) {
  float scores[FEW];
  int32_t order[FEW];
  for (int64_t i = 0; i < size; i += LANES) {
    vf v = i + LANES <= size ? load(raw + i) : load_some(raw + i, (int)(size - i));
    store(scores + i, blend(v == v, vmax(vmin(v, splat(tau)), splat(-tau)), splat(-INFINITY)));
  }
  for (int64_t i = 0; i < size; i++) {
    uint64_t before = 0;
    for (int64_t j = 0; j < size; j += LANES) {
      vf v = load(scores + j);
      int64_t earlier = i - j < 0 ? 0 : (i - j > LANES ? LANES : i - j);
      before |= (uint64_t)(above(v, scores[i]) | (~below(v, scores[i]) & ((1u << earlier) - 1))) << j;
    }
    if (size < FEW) before &= (1ull << size) - 1;
    order[__builtin_popcountll(before)] = (int32_t)i;
  }
  for (int j = 0; j < k; j++) {
    picks[j] = order[j];
    values[j] = truncate(raw[order[j]], tau);
  }
}

// ẑ in place of the truncated logits; returns the signal S.
INLINE float coefficients(float* values, int k, float eps) {
  float signal = 0;
  for (int j = 0; j < k; j += LANES) {
    int count = k - j < LANES ? k - j : LANES;
    vf v = softplus(load_some(values + j, count));
    store_some(values + j, v, count);
    for (int i = 0; i < count; i++) signal += v[i];
  }
  float factor = tanhf(signal) / (signal + eps);
  for (int j = 0; j < k; j++) values[j] *= factor;
  return signal;
}

// Softmax over the k selected logits, in place.
INLINE void softmax(float* values, int k) {
  float highest = values[0], total = 0;
  for (int j = 0; j < k; j++) total += values[j] = expf(values[j] - highest);
  for (int j = 0; j < k; j++) values[j] /= total;
}

// LayerNorm's 1 / √(variance + eps) of a row.
template <typename T>
INLINE float reciprocal_std(const T* x, int64_t d, float eps) {
  vf s = {};
  int64_t i = 0;
  float rest = 0;
  for (; i + LANES <= d; i += LANES) s += load(x + i);
  for (int64_t j = i; j < d; j++) rest += to_float(x[j]);
  float mean = (sum(s) + rest) / d;
  vf q = {};
  rest = 0;
  for (i = 0; i + LANES <= d; i += LANES) {
    vf c = load(x + i) - mean;
    q += c * c;
  }
  for (; i < d; i++) rest += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
  return 1.0f / sqrtf((sum(q) + rest) / d + eps);
}

DSC_KERNELS_END
