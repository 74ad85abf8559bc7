// The mixture of experts, with the same care: routing, grouping by expert, both products and the weighted sum in one
// call, and in the same the expert that all tokens share.
#pragma once

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "api.h"
#include "layers.h"
#include "namespace.h"
#include "select.h"

DSC_KERNELS_BEGIN

// Whether experts are picked by more than the order of their logits.
INLINE bool picks_otherwise(const Moe& a) { return a.sigmoid || a.choice_bias || a.groups > 1; }

// One pick: which token, weighted how much. Picks are ordered by expert; expert e's are starts[e] … starts[e + 1] − 1.
template <typename T>
struct MoeBuffers {
  typedef typename Input<T>::type I;
  I* x;              // [batch, round_up_2(d)]
  float* logits;     // [batch, experts]
  float* choices;    // [batch, experts], where experts are not picked by their logits alone
  float* weights;    // [batch, k]
  int32_t* experts;  // [batch, k]
  int32_t* slots;    // [batch, k]: where each pick is in the order
  int32_t* tokens;   // [picks]: of each slot
  float* outputs;    // [picks, d]
  I* hidden;         // [picks, hidden_stride]
  Bytes x_bytes, hidden_bytes, shared_bytes;  // x, hidden and shared_hidden in int8, where weights are quantised
  float* wide = nullptr;                      // [batch, d]: x in float32, where tiles read it otherwise
  float* panels = nullptr;                    // [threads, d · 16]: the router's; both where it is quantised
  int32_t* starts;   // [experts + 1]
  float* shared_weights = nullptr;  // [batch], and both below: of the shared expert
  float* shared_outputs = nullptr;  // [batch, d]
  I* shared_hidden = nullptr;       // [batch, shared_stride]
  Branch gate, up, down;            // what adapters add to its products
  int64_t hidden_stride, shared_stride;

  INLINE explicit MoeBuffers(const Moe& a)
      : hidden_stride(round_up_2(a.hidden)), shared_stride(round_up_2(a.shared_hidden)) {
    Scratch& scratch = *a.scratch;
    int64_t picks = a.batch * a.k;
    x = scratch.take<I>(a.batch * round_up_2(a.d));
    logits = scratch.take<float>(a.batch * a.experts);
    choices = picks_otherwise(a) ? scratch.take<float>(a.batch * a.experts) : nullptr;
    weights = scratch.take<float>(picks);
    experts = scratch.take<int32_t>(picks);
    tokens = scratch.take<int32_t>(picks);
    slots = scratch.take<int32_t>(picks);
    outputs = scratch.take<float>(picks * a.d);
    hidden = scratch.take<I>(picks * hidden_stride);
    starts = scratch.take<int32_t>(a.experts + 1);
    x_bytes.take(scratch, a.batch, a.d, {a.up_format, a.gate_format, a.shared_up_format, a.shared_gate_format});
    hidden_bytes.take(scratch, picks, a.hidden, {a.down_format});
    shared_bytes.take(scratch, a.batch, a.shared_hidden, {a.shared_down_format});
    if (a.router_format) {
      if (sizeof(I) < sizeof(float)) wide = scratch.take<float>(a.batch * a.d);
      panels = scratch.take<float>(a.threads * a.d * LANES);
    }
    if (a.shared_hidden == 0) return;
    shared_weights = scratch.take<float>(a.batch);
    shared_outputs = scratch.take<float>(a.batch * a.d);
    shared_hidden = scratch.take<I>(a.batch * shared_stride);
    gate = Branch(a.adapted, GATE, a.shared_gate ? 1 : 0, sizeof(T) == 2, a.batch, scratch);
    up = Branch(a.adapted, UP, 1, sizeof(T) == 2, a.batch, scratch);
    down = Branch(a.adapted, DOWN, 1, sizeof(T) == 2, a.batch, scratch);
  }
};

// The k largest softmax probabilities, as weights, and their experts: over all experts, or normalised over the k.
INLINE void route(const float* raw, float scale, const float* bias, int64_t experts, int k, bool normalize,
                  float* weights, int32_t* picks) {
  select(raw, scale, bias, experts, k, INFINITY, weights, picks);
  float highest = weights[0], total = 0, kept = 0;
  for (int j = 0; j < k; j++) kept += weights[j] = expf(weights[j] - highest);
  for (int64_t e = 0; !normalize && e < experts; e++)
    total += expf(scale * raw[e] + (bias ? bias[e] : 0.0f) - highest);
  for (int j = 0; j < k; j++) weights[j] /= normalize ? kept : total;
}

// Where the largest of `count` values is, the first of equal ones; a NaN is never larger.
INLINE int64_t argmax_ignoring_nan(const float* values, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; i++)
    if (values[i] > values[best] || values[best] != values[best]) best = i;
  return best;
}

// A group's score: that of its best experts, added.
INLINE float group_score(const float* choices, int64_t count, int best) {
  float first = -INFINITY, second = -INFINITY;
  for (int64_t i = 0; i < count; i++) {
    if (choices[i] > first) second = first, first = choices[i];
    else if (choices[i] > second) second = choices[i];
  }
  return best > 1 ? first + second : first;
}

// The k experts of the best scores within the best groups; logits [experts] become scores, choices is room for as many.
INLINE void route_otherwise(const Moe& a, float* logits, float scale, float* choices, float* weights, int32_t* picks) {
  float highest = -INFINITY, total = 0, kept = 0;
  for (int64_t e = 0; e < a.experts; e++) {
    logits[e] = scale * logits[e] + (a.router_bias ? a.router_bias[e] : 0.0f);
    if (logits[e] > highest) highest = logits[e];
  }
  for (int64_t e = 0; e < a.experts; e++)
    total += logits[e] = a.sigmoid ? 1.0f / (1.0f + expf(-logits[e])) : expf(logits[e] - highest);
  for (int64_t e = 0; e < a.experts; e++) {
    if (!a.sigmoid) logits[e] /= total;
    choices[e] = logits[e] + (a.choice_bias ? a.choice_bias[e] : 0.0f);
  }
  int64_t size = a.experts / a.groups;
  for (int dropped = a.groups; dropped > a.groups_used; dropped--) {
    int64_t worst = -1;
    float least = INFINITY;
    for (int64_t g = 0; g < a.groups; g++) {
      if (choices[g * size] == -INFINITY) continue;
      float own = group_score(choices + g * size, size, a.group_picks);
      if (own <= least) worst = g, least = own;
    }
    for (int64_t e = 0; worst >= 0 && e < size; e++) choices[worst * size + e] = -INFINITY;
  }
  for (int j = 0; j < a.k; j++) {
    int64_t e = argmax_ignoring_nan(choices, a.experts);
    picks[j] = (int32_t)e, choices[e] = -INFINITY;
    kept += weights[j] = logits[e];
  }
  for (int j = 0; a.normalize && j < a.k; j++) weights[j] /= kept;
}

// Logits of tokens first … last − 1; a quantised router's inputs stay as they are, since what is picked hangs on them.
template <typename T>
INLINE void moe_logits(const Moe& a, const MoeBuffers<T>& b, const Inputs<T>& x, int64_t first, int64_t last) {
  Epilogue e = {nullptr, NONE, nullptr, nullptr, nullptr, a.experts};
  float* logits = b.logits + first * a.experts;
  if (!a.router_format) {
    gemm<T, float>((const T*)a.router, x.rows + first * x.stride, x.stride, nullptr, last - first, a.d, a.experts, e,
                   logits, 0, panel_count(a.experts));
    return;
  }
  for (int64_t i = first * a.d; b.wide && i < last * a.d; i++) b.wide[i] = to_float(((const T*)a.x)[i]);
  const float* wide = b.wide ? b.wide + first * a.d : (const float*)(const void*)(x.rows + first * x.stride);
  multiply_dequantised((const uint8_t*)a.router, *a.router_format, wide, b.wide ? a.d : x.stride, last - first, a.d,
                       Output<float>{e, logits, a.experts}, 0, panel_count(a.experts),
                       b.panels + omp_get_thread_num() * a.d * LANES);
}

template <typename T>
INLINE void moe_route(const Moe& a, const MoeBuffers<T>& b, const Inputs<T>& x, int64_t first, int64_t last) {
  moe_logits<T>(a, b, x, first, last);
  for (int64_t t = first; t < last; t++) {
    float scale = a.norm_eps >= 0 ? reciprocal_std((const T*)a.x + t * a.d, a.d, a.norm_eps) : 1.0f;
    float *logits = b.logits + t * a.experts, *weights = b.weights + t * a.k;
    int32_t* picks = b.experts + t * a.k;
    if (b.choices) route_otherwise(a, logits, scale, b.choices + t * a.experts, weights, picks);
    else route(logits, scale, a.router_bias, a.experts, a.k, a.normalize, weights, picks);
    for (int j = 0; j < a.k; j++) weights[j] *= a.weight_scale;
    if (a.picks) memcpy(a.picks + t * a.k, picks, a.k * sizeof *a.picks);
    if (a.weights) memcpy(a.weights + t * a.k, weights, a.k * sizeof *a.weights);
    if (a.shared_hidden == 0) continue;
    const T *scores = (const T*)a.shared_scale, *row = (const T*)a.x + t * a.d;
    b.shared_weights[t] = scores ? 1.0f / (1.0f + expf(-dot(row, scores, a.d))) : 1.0f;
  }
}

// A counting sort of the picks by expert; `slots` says where each token's picks went.
template <typename T>
INLINE void moe_group(const Moe& a, const MoeBuffers<T>& b) {
  int64_t picks = a.batch * a.k;
  memset(b.starts, 0, (a.experts + 1) * sizeof *b.starts);
  for (int64_t i = 0; i < picks; i++) b.starts[b.experts[i] + 1]++;
  for (int64_t e = 0; e < a.experts; e++) b.starts[e + 1] += b.starts[e];
  for (int64_t i = 0; i < picks; i++) {
    int32_t slot = b.starts[b.experts[i]]++;
    b.slots[i] = slot;
    b.tokens[slot] = (int32_t)(i / a.k);
  }
  for (int64_t e = a.experts; e > 0; e--) b.starts[e] = b.starts[e - 1];
  b.starts[0] = 0;
}

// One expert's packed matrices.
template <typename T>
struct Expert {
  Matrix up, gate, down;  // gate: none unless gated
  int64_t d, hidden;
  int activation;

  INLINE static Expert picked(const Moe& a, int64_t e) {
    return {Matrix(a.up, a.up_format).at<T>(e, a.hidden, a.d), Matrix(a.gate, a.gate_format).at<T>(e, a.hidden, a.d),
            Matrix(a.down, a.down_format).at<T>(e, a.d, a.hidden), a.d, a.hidden, a.activation};
  }

  INLINE static Expert shared(const Moe& a) {
    return {{a.shared_up, a.shared_up_format}, {a.shared_gate, a.shared_gate_format},
            {a.shared_down, a.shared_down_format}, a.d, a.shared_hidden, a.activation};
  }
};

// Panels first … last − 1 of an expert's inner activations for `count` of the tokens x: those in rows, or in order
// where it is null. gate, up: what adapters add, or null.
template <typename T>
INLINE void expert_first(const Expert<T>& e, const Inputs<T>& x, const int32_t* rows, int64_t count,
                         typename Input<T>::type* hidden, int64_t first, int64_t last, const Branch* gate = nullptr,
                         const Branch* up = nullptr) {
  typedef typename Input<T>::type I;
  Epilogue ep = {nullptr, e.activation, nullptr, nullptr, nullptr, round_up_2(e.hidden), up};
  if (e.gate.packed) {
    ep.branch = gate;
    gemm<T, I>(e.gate, x, rows, count, e.d, e.hidden, ep, hidden, first, last);
    ep.activation = NONE;
    ep.times = hidden;
    ep.branch = up;
  }
  gemm<T, I>(e.up, x, rows, count, e.d, e.hidden, ep, hidden, first, last);
}

// Panels first … last − 1 of what the expert makes of them.
template <typename T>
INLINE void expert_second(const Expert<T>& e, const Inputs<T>& hidden, int64_t count, float* out, int64_t first,
                          int64_t last, const Branch* down = nullptr) {
  Epilogue ep = {nullptr, NONE, nullptr, nullptr, nullptr, e.d, down};
  gemm<T, float>(e.down, hidden, nullptr, count, e.hidden, e.d, ep, out, first, last);
}

// The shared expert is shared by its outputs however many tokens there are, some at a time so that they stay in the
// cache: no thread waits for a task as large as that.
template <typename T>
INLINE void shared_first(const Moe& a, const MoeBuffers<T>& b, const Inputs<T>& x, int64_t id, int64_t n) {
  int64_t panels = panel_count(a.shared_hidden), from = split_point(panels, id, n), to = split_point(panels, id + 1, n);
  for (int64_t t = 0; a.shared_hidden && t < a.batch; t += CHUNK_TOKENS) {
    int64_t count = a.batch - t < CHUNK_TOKENS ? a.batch - t : CHUNK_TOKENS;
    const Branch gate = b.gate.from(t), up = b.up.from(t);
    expert_first(Expert<T>::shared(a), x.from(t), nullptr, count, b.shared_hidden + t * b.shared_stride, from, to,
                 gate.adapted ? &gate : nullptr, up.adapted ? &up : nullptr);
  }
}

template <typename T>
INLINE void shared_second(const Moe& a, const MoeBuffers<T>& b, int64_t id, int64_t n) {
  int64_t panels = panel_count(a.d), from = split_point(panels, id, n), to = split_point(panels, id + 1, n);
  for (int64_t t = 0; a.shared_hidden && t < a.batch; t += CHUNK_TOKENS) {
    int64_t count = a.batch - t < CHUNK_TOKENS ? a.batch - t : CHUNK_TOKENS;
    const Branch down = b.down.from(t);
    expert_second(Expert<T>::shared(a), Inputs<T>{b.shared_hidden, b.shared_stride, b.shared_bytes}.from(t), count,
                  b.shared_outputs + t * a.d, from, to, down.adapted ? &down : nullptr);
  }
}

template <typename T>
INLINE void moe_sum(const Moe& a, const MoeBuffers<T>& b, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; t++) {
    const float* w = b.weights + t * a.k;
    const int32_t* slot = b.slots + t * a.k;
    const T* residual = a.residual ? (const T*)a.residual + t * a.d : nullptr;
    const float* shared = a.shared_hidden ? b.shared_outputs + t * a.d : nullptr;
    float weight = shared ? b.shared_weights[t] : 0;
    T* out = (T*)a.out + t * a.d;
    int64_t i = 0;
    for (; i + LANES <= a.d; i += LANES) {
      vf s = residual ? load(residual + i) : vf{};
      if (shared) s += weight * load(shared + i);
      for (int j = 0; j < a.k; j++) s += w[j] * load(b.outputs + slot[j] * a.d + i);
      store(out + i, s);
    }
    for (; i < a.d; i++) {
      float s = residual ? to_float(residual[i]) : 0;
      if (shared) s += weight * shared[i];
      for (int j = 0; j < a.k; j++) s += w[j] * b.outputs[slot[j] * a.d + i];
      put(out + i, s);
    }
  }
}

// Share id of n of the panels of all picked experts, one expert's after the other's: long runs of weights for each
// thread, however small the experts are.
template <typename T, typename Work>
INLINE void share_panels(const MoeBuffers<T>& b, int64_t experts, int64_t panels, int64_t id, int64_t n,
                         const Work& work) {
  int64_t picked = 0, at = 0;
  for (int64_t e = 0; e < experts; e++) picked += b.starts[e + 1] > b.starts[e];
  int64_t first = split_point(picked * panels, id, n), last = split_point(picked * panels, id + 1, n);
  for (int64_t e = 0; e < experts && at < last; e++) {
    if (b.starts[e + 1] == b.starts[e]) continue;
    int64_t from = first > at ? first - at : 0, to = last - at < panels ? last - at : panels;
    if (from < to) work(e, b.starts[e], b.starts[e + 1] - b.starts[e], from, to);
    at += panels;
  }
}

template <typename T>
void moe(const Moe& a) {
  MoeBuffers<T> b(a);
  const Inputs<T> x = {pack_inputs<T>(a.x, 0, a.batch, a.d, b.x), row_stride<T>(a.d), b.x_bytes};
  const Inputs<T> hidden = {b.hidden, b.hidden_stride, b.hidden_bytes};
  bool alone = a.batch <= READ_ALONE;
  if (x.bytes.values && alone) x.bytes.round_tokens((const T*)a.x, a.d, 0, a.batch, a.d);
  clear_padding(b.hidden, a.batch * a.k, a.hidden);
  if (a.shared_hidden) clear_padding(b.shared_hidden, a.batch, a.shared_hidden);
  int64_t chunk = CHUNK_TOKENS, most = (a.batch * a.k + chunk - 1) / chunk + a.experts;
#pragma omp parallel num_threads(a.threads)
  {
    int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
    int64_t first = split_point(a.batch, id, n), last = split_point(a.batch, id + 1, n);
    auto first_of = [&](int64_t e, int64_t from, int64_t count, int64_t start, int64_t end)
                        __attribute__((always_inline)) {
      expert_first(Expert<T>::picked(a, e), x, b.tokens + from, count, b.hidden + from * b.hidden_stride, start, end);
    };
    auto second_of = [&](int64_t e, int64_t from, int64_t count, int64_t start, int64_t end)
                         __attribute__((always_inline)) {
      expert_second(Expert<T>::picked(a, e), hidden.from(from), count, b.outputs + from * a.d, start, end);
    };
    auto round_hidden = [&](int64_t from, int64_t to) __attribute__((always_inline)) {
      if (b.hidden_bytes.values) b.hidden_bytes.round_tokens(b.hidden, b.hidden_stride, from, to, a.hidden);
    };
    bool rounds = x.bytes.values && !alone;
    if (rounds) x.bytes.round_tokens((const T*)a.x, a.d, first, last, a.d);
    contract<T>(x.rows, x.stride, a.batch, a.d, id, n, b.gate, b.up);
    if (rounds) {
#pragma omp barrier
    }
    moe_route<T>(a, b, x, first, last);
    shared_first<T>(a, b, x, id, n);
#pragma omp barrier
    contract<T>(b.shared_hidden, b.shared_stride, a.batch, a.shared_hidden, id, n, b.down);
    if (b.shared_bytes.values)
      b.shared_bytes.round_tokens(b.shared_hidden, b.shared_stride, first, last, a.shared_hidden);
#pragma omp single
    moe_group<T>(a, b);
    shared_second<T>(a, b, id, n);
    if (is_small<T>(a.batch, a.threads)) {
      share_panels(b, a.experts, panel_count(a.hidden), id, n, first_of);
#pragma omp barrier
      if (b.hidden_bytes.values) {
        int64_t picks = a.batch * a.k;
        round_hidden(split_point(picks, id, n), split_point(picks, id + 1, n));
#pragma omp barrier
      }
      share_panels(b, a.experts, panel_count(a.d), id, n, second_of);
    } else {
      // tasks of at most `chunk` picks of one expert; task i of all is found by walking the experts
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < most; i++) {
        int64_t task = i;
        for (int64_t e = 0; e < a.experts; e++) {
          int64_t size = b.starts[e + 1] - b.starts[e], tasks = (size + chunk - 1) / chunk;
          if (task < tasks) {
            int64_t from = task * chunk, count = size - from < chunk ? size - from : chunk;
            first_of(e, b.starts[e] + from, count, 0, panel_count(a.hidden));
            round_hidden(b.starts[e] + from, b.starts[e] + from + count);
            second_of(e, b.starts[e] + from, count, 0, panel_count(a.d));
            break;
          }
          task -= tasks;
        }
      }
    }
#pragma omp barrier
    moe_sum<T>(a, b, first, last);
  }
}

DSC_KERNELS_END
