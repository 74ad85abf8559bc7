// An FFN layer: a static MLP and, where it is routed, a composition of picked rows.
#pragma once

#include <math.h>
#include <omp.h>
#include <stdint.h>

#include "namespace.h"
#include "routing.h"

DSC_KERNELS_BEGIN

// What the first products need to know of the buffers' tokens, which begin at `base`: share `id` of `n` of `count`.
template <typename T>
INLINE void ffn_read(const Ffn& a, const FfnBuffers<T>& b, int64_t base, int64_t count, int64_t id, int64_t n) {
  const T* rows = (const T*)a.x + base * a.d;
  if (b.x_bytes.values)
    for (int64_t t = split_point(count, id, n); t < split_point(count, id + 1, n); t++)
      b.x_bytes.round_token(t, rows + t * a.d, a.d);
  for (int64_t own = split_point(b.routed, id, n); own < split_point(b.routed, id + 1, n); own++) {
    const T* x = rows + b.token(own) * a.d;
    if (b.wide)
      for (int64_t i = 0; i < a.d; i++) b.wide[own * a.d + i] = to_float(x[i]);
    float rstd = a.norm_eps >= 0 ? reciprocal_std(x, a.d, a.norm_eps) : 1.0f;
    b.logit_scales[own] = a.screen.rows ? quantise(x, a.d, rstd, b.shifted + own * b.shifted_stride, b.outliers[own])
                                    : LogitScale{rstd, rstd, 0, 0};
  }
}

// Where share i of n of the panels of router and static MLP begins; `cost` says what a panel of either takes.
struct FirstShare {
  int64_t routed, width, routed_cost, width_cost, i, n;
  INLINE int64_t at() const { return split_point(routed * routed_cost + width * width_cost, i, n); }
  INLINE int64_t router_panel() const { return at() < routed * routed_cost ? at() / routed_cost : routed; }
  INLINE int64_t static_panel() const {
    if (i == n) return width;
    return at() > routed * routed_cost ? (at() - routed * routed_cost) / width_cost : 0;
  }
};

// Panels first … last − 1 of the router's logits, which raise `peaks`.
template <typename T, typename Bias>
INLINE void ffn_logits(const Ffn& a, const FfnBuffers<T>& b, const Inputs<T>& x, const Bias& bias, float* peaks,
                       int64_t worker, int64_t first, int64_t last) {
  Logits<Bias> logits = {b.logit_scales, bias, b.logits, b.logit_stride, peaks, slots_of(a.k)};
  int64_t count = b.routed;
  if (a.screen.rows) {
    Bounds<Bias> bounds = {logits, a.screen, b.outliers};
    multiply<int8_t>(a.screen.packed, b.shifted, b.shifted_stride, nullptr, count, a.d, bounds, first, last);
  } else if (a.router_format) {
    // what is picked hangs on small differences: its inputs stay as they are
    const float* wide = b.wide ? b.wide : (const float*)(const void*)x.rows;
    multiply_dequantised((const uint8_t*)a.router, *a.router_format, wide, b.wide ? a.d : x.stride, count, a.d, logits,
                         first, last, b.panels + worker * a.d * LANES);
  } else {
    multiply<T>((const T*)a.router, x.rows, x.stride, b.rows, count, a.d, logits, first, last);
  }
}

// What adapters' tokens are contracted to before the first products: share `id` of `n`. One buffer's inputs are x.
template <typename T>
INLINE void ffn_contract(const Ffn& a, const FfnBuffers<T>& b, const typename Input<T>::type* x, int64_t count,
                         int64_t id, int64_t n) {
  contract<T>(x, row_stride<T>(a.d), count, a.d, id, n, b.gate, b.up);
}

// Router logits and the static MLP's hidden layer: share `id` of `n` of all their panels together.
template <typename T>
INLINE void ffn_first(const Ffn& a, const FfnBuffers<T>& b, const Inputs<T>& x, int64_t count, int64_t id, int64_t n,
                      PhaseTimer& timer) {
  typedef typename Input<T>::type I;
  int64_t routed_cost = a.screen.rows ? 32 : cost_of<T>(a.router_format);
  int64_t width_cost = cost_of<T>(a.up_format) + (a.gate ? cost_of<T>(a.gate_format) : 0);
  FirstShare share = {b.routed > 0 ? panel_count(a.atoms) : 0, panel_count(a.hidden), routed_cost, width_cost, id, n}, next = share;
  next.i++;
  float* peaks = b.routed > 0 ? b.peaks + id * b.peaks_size : nullptr;
  for (int64_t i = 0; i < b.routed * slots_of(a.k) * LANES; i += LANES) store(peaks + i, splat(-INFINITY));
  if (share.router_panel() < next.router_panel()) {
    int64_t first = share.router_panel(), last = next.router_panel();
    if (b.tunings) ffn_logits<T>(a, b, x, TunedBias{b.tunings}, peaks, id, first, last);
    else ffn_logits<T>(a, b, x, LayerBias{a.router_bias, a.screen.slack}, peaks, id, first, last);
    timer.end(ROUTER);
  }
  int64_t from = share.static_panel(), to = next.static_panel();
  if (from >= to) return;
  const Branch *gate = b.gate.adapted ? &b.gate : nullptr, *up = b.up.adapted ? &b.up : nullptr;
  Epilogue e = {a.up_bias, a.activation, nullptr, nullptr, nullptr, b.hidden_stride, up};
  if (a.gate) {
    e.bias = a.gate_bias, e.branch = gate;
    gemm<T, I>({a.gate, a.gate_format}, x, nullptr, count, a.d, a.hidden, e, b.hidden, from, to);
    e = {a.up_bias, NONE, b.hidden, nullptr, nullptr, b.hidden_stride, up};
  }
  gemm<T, I>({a.up, a.up_format}, x, nullptr, count, a.d, a.hidden, e, b.hidden, from, to);
  timer.end(STATIC);
}

// Hidden activations of tokens first … last − 1 of the buffers in int8, where the second product reads them so.
template <typename T>
INLINE void ffn_round(const Ffn& a, const FfnBuffers<T>& b, int64_t first, int64_t last) {
  if (b.hidden_bytes.values) b.hidden_bytes.round_tokens(b.hidden, b.hidden_stride, first, last, a.hidden);
}

// The second product of tokens base … base + count − 1, with everything added: share `id` of `n` of its panels.
template <typename T>
INLINE void ffn_second(const Ffn& a, const FfnBuffers<T>& b, int64_t base, int64_t count, int64_t id, int64_t n) {
  int64_t panels = panel_count(a.d);
  const T* residual = a.residual ? (const T*)a.residual + base * a.d : nullptr;
  Epilogue e = {a.down_bias, NONE, nullptr, b.routed > 0 ? b.dynamic : nullptr, residual, a.d};
  if (b.down.adapted) e.branch = &b.down;
  gemm<T, T>({a.down, a.down_format}, Inputs<T>{b.hidden, b.hidden_stride, b.hidden_bytes}, nullptr, count, a.hidden,
             a.d, e, (T*)a.out + base * a.d, split_point(panels, id, n), split_point(panels, id + 1, n));
}

template <typename T>
void ffn(const Ffn& a) {
  if (is_small<T>(a.batch, a.threads)) {
    FfnBuffers<T> b(a, a.batch, a.threads);
    b.bind(a, 0, a.batch);
    const Inputs<T> x = {pack_inputs<T>(a.x, 0, a.batch, a.d, b.x), row_stride<T>(a.d), b.x_bytes};
    clear_padding(b.hidden, a.batch, a.hidden);
    bool routes = b.routed > 0, reads = routes || b.x_bytes.values;
    bool alone = a.batch <= READ_ALONE, adapted = b.gate.adapted || b.up.adapted || b.down.adapted;
    if (reads && alone) ffn_read<T>(a, b, 0, a.batch, 0, 1);
#pragma omp parallel num_threads(a.threads)
    {
      int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
      int64_t first = split_point(a.batch, id, n), last = split_point(a.batch, id + 1, n);
      PhaseTimer timer(a.phase_ns, FFN_PHASES, id);
      if (reads && !alone) {
        ffn_read<T>(a, b, 0, a.batch, id, n);
        timer.end(routes ? ROUTER : STATIC);
      }
      if (adapted) {
        ffn_contract<T>(a, b, x.rows, a.batch, id, n);
        timer.end(STATIC);
      }
      if (reads && !alone) {
#pragma omp barrier
        timer.end(WAITING);
      }
      ffn_first<T>(a, b, x, a.batch, id, n, timer);
#pragma omp barrier
      timer.end(WAITING);
      bool rounds = b.hidden_bytes.values;
      if (adapted) {
        contract<T>(b.hidden, b.hidden_stride, a.batch, a.hidden, id, n, b.down);
        timer.end(STATIC);
      }
      if (routes || rounds) {
        ffn_round<T>(a, b, first, last);
        if (routes) ffn_route<T>(a, b, 0, split_point(b.routed, id, n), split_point(b.routed, id + 1, n), id, (int)n);
        timer.end(routes ? COMPOSE : STATIC);
      }
      if (routes || rounds) {
#pragma omp barrier
        timer.end(WAITING);
      }
      ffn_second<T>(a, b, 0, a.batch, id, n);
      timer.end(STATIC);
    }
    return;
  }
  int64_t chunk = chunk_of<T>(a.batch, a.threads);
  auto* buffers = a.scratch->take<FfnBuffers<T>>(a.threads);
  for (int i = 0; i < a.threads; i++) buffers[i] = FfnBuffers<T>(a, chunk, 1);
#pragma omp parallel num_threads(a.threads)
  {
    FfnBuffers<T> b = buffers[omp_get_thread_num()];
    clear_padding(b.hidden, chunk, a.hidden);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < a.batch; t += chunk) {
      int64_t count = a.batch - t < chunk ? a.batch - t : chunk;
      PhaseTimer timer(a.phase_ns, FFN_PHASES, omp_get_thread_num());
      b.bind(a, t, count);
      ffn_read<T>(a, b, t, count, 0, 1);
      timer.end(b.routed > 0 ? ROUTER : STATIC);
      const Inputs<T> x = {pack_inputs<T>(a.x, t, count, a.d, b.x), row_stride<T>(a.d), b.x_bytes};
      b.gate.base = b.up.base = b.down.base = t;
      ffn_contract<T>(a, b, x.rows, count, 0, 1);
      ffn_first<T>(a, b, x, count, 0, 1, timer);
      ffn_round<T>(a, b, 0, count);
      if (b.routed > 0) ffn_route<T>(a, b, t, 0, b.routed, 0, 1), timer.end(COMPOSE);
      contract<T>(b.hidden, b.hidden_stride, count, a.hidden, 0, 1, b.down);
      ffn_second<T>(a, b, t, count, 0, 1);
      timer.end(STATIC);
    }
  }
}

DSC_KERNELS_END
