// An FFN layer: a static MLP and, where it is routed, a composition of picked rows.
#pragma once

#include <math.h>
#include <omp.h>
#include <stdint.h>

#include "namespace.h"
#include "routing.h"

DSC_KERNELS_BEGIN

constexpr int64_t READ_ALONE = 4;  // tokens whose norms take one thread less time than waiting for another

// What the router needs to know of tokens first … last − 1 (of the whole batch); buffers begin at token `base`.
template <typename T>
INLINE void ffn_read(const Ffn& a, const FfnBuffers<T>& b, int64_t base, int64_t first, int64_t last) {
  for (int64_t t = first; t < last; t++) {
    const T* x = (const T*)a.x + t * a.d;
    float rstd = a.norm_eps >= 0 ? reciprocal_std(x, a.d, a.norm_eps) : 1.0f;
    int64_t own = t - base;
    b.logit_scales[own] = a.screen.rows ? quantise(x, a.d, rstd, b.shifted + own * b.shifted_stride, b.outliers[own])
                                    : LogitScale{rstd, rstd, 0, 0};
  }
}

// What adapters' tokens are contracted to before the first products: share `id` of `n`. One buffer's inputs are x.
template <typename T>
INLINE void ffn_contract(const Ffn& a, const FfnBuffers<T>& b, const typename Input<T>::type* x, int64_t count,
                         int64_t id, int64_t n) {
  contract<T>(b.gate, x, row_stride<T>(a.d), count, a.d, id, n);
  contract<T>(b.up, x, row_stride<T>(a.d), count, a.d, (id + 1) % n, n);
}

// Router logits and the static MLP's hidden layer: share `id` of `n` of all their panels together.
template <typename T>
INLINE void ffn_first(const Ffn& a, const FfnBuffers<T>& b, const typename Input<T>::type* x, int64_t count, int64_t id,
                      int64_t n, PhaseTimer& timer) {
  typedef typename Input<T>::type I;
  int64_t stride = row_stride<T>(a.d), routed = panel_count(a.atoms), width = panel_count(a.hidden);
  // what a panel costs, in panels of the screened router or of the router
  int64_t cost = (a.gate ? 2 : 1) * (a.screen.rows ? (int64_t)sizeof(T) : 1), total = routed + cost * width;
  int64_t first = split_point(total, id, n), last = split_point(total, id + 1, n);
  float* peaks = routed > 0 ? b.peaks + id * b.peaks_size : nullptr;
  if (routed > 0)
    for (int64_t i = 0; i < count * slots_of(a.k) * LANES; i += LANES) store(peaks + i, splat(-INFINITY));
  if (first < routed) {
    int64_t end = last < routed ? last : routed;
    Logits logits = {b.logit_scales, a.router_bias, b.logits, b.logit_stride, peaks, slots_of(a.k)};
    if (a.screen.rows)
      multiply<int8_t>(a.screen.packed, b.shifted, b.shifted_stride, nullptr, count, a.d,
                       Bounds{logits, a.screen, b.outliers}, first, end);
    else multiply<T>((const T*)a.router, x, stride, nullptr, count, a.d, logits, first, end);
    timer.end(ROUTER);
  }
  int64_t from = first > routed ? (first - routed) / cost : 0, to = last > routed ? (last - routed) / cost : 0;
  if (id == n - 1) to = width;
  if (from >= to) return;
  const Branch *gate = b.gate.adapted ? &b.gate : nullptr, *up = b.up.adapted ? &b.up : nullptr;
  Epilogue e = {a.up_bias, a.activation, nullptr, nullptr, nullptr, b.hidden_stride, up};
  if (a.gate) {
    e.bias = a.gate_bias, e.branch = gate;
    gemm<T, I>((const T*)a.gate, x, stride, nullptr, count, a.d, a.hidden, e, b.hidden, from, to);
    e = {a.up_bias, NONE, b.hidden, nullptr, nullptr, b.hidden_stride, up};
  }
  gemm<T, I>((const T*)a.up, x, stride, nullptr, count, a.d, a.hidden, e, b.hidden, from, to);
  timer.end(STATIC);
}

// The second product of tokens base … base + count − 1, with everything added: share `id` of `n` of its panels.
template <typename T>
INLINE void ffn_second(const Ffn& a, const FfnBuffers<T>& b, int64_t base, int64_t count, int64_t id, int64_t n) {
  int64_t panels = panel_count(a.d);
  const T* residual = a.residual ? (const T*)a.residual + base * a.d : nullptr;
  Epilogue e = {a.down_bias, NONE, nullptr, a.atoms > 0 ? b.dynamic : nullptr, residual, a.d};
  if (b.down.adapted) e.branch = &b.down;
  gemm<T, T>((const T*)a.down, b.hidden, b.hidden_stride, nullptr, count, a.hidden, a.d, e, (T*)a.out + base * a.d,
             split_point(panels, id, n), split_point(panels, id + 1, n));
}

template <typename T>
void ffn(const Ffn& a) {
  if (a.batch <= SMALL_BATCH) {
    FfnBuffers<T> b(a, a.batch, a.threads);
    const auto* x = pack_inputs<T>(a.x, 0, a.batch, a.d, b.x);
    clear_padding(b.hidden, a.batch, a.hidden);
    bool alone = a.batch <= READ_ALONE, adapted = a.adapted.run_count > 0;
    if (a.atoms > 0 && alone) ffn_read<T>(a, b, 0, 0, a.batch);
#pragma omp parallel num_threads(a.threads)
    {
      int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
      int64_t first = split_point(a.batch, id, n), last = split_point(a.batch, id + 1, n);
      PhaseTimer timer(a.phase_ns, FFN_PHASES, id);
      if (a.atoms > 0 && !alone) {
        ffn_read<T>(a, b, 0, first, last);
        timer.end(ROUTER);
      }
      if (adapted) {
        ffn_contract<T>(a, b, x, a.batch, id, n);
        timer.end(STATIC);
      }
      if ((a.atoms > 0 && !alone) || adapted) {
#pragma omp barrier
        timer.end(WAITING);
      }
      ffn_first<T>(a, b, x, a.batch, id, n, timer);
#pragma omp barrier
      timer.end(WAITING);
      if (adapted) {
        contract<T>(b.down, b.hidden, b.hidden_stride, a.batch, a.hidden, id, n);
        timer.end(STATIC);
      }
      if (a.atoms > 0) {
        ffn_route<T>(a, b, 0, first, last, id, (int)n);
        timer.end(COMPOSE);
      }
      if (a.atoms > 0 || adapted) {
#pragma omp barrier
        timer.end(WAITING);
      }
      ffn_second<T>(a, b, 0, a.batch, id, n);
      timer.end(STATIC);
    }
    return;
  }
  int64_t chunk = chunk_of(a.batch, a.threads);
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
      if (a.atoms > 0) ffn_read<T>(a, b, t, t, t + count), timer.end(ROUTER);
      const auto* x = pack_inputs<T>(a.x, t, count, a.d, b.x);
      b.gate.base = b.up.base = b.down.base = t;
      ffn_contract<T>(a, b, x, count, 0, 1);
      ffn_first<T>(a, b, x, count, 0, 1, timer);
      if (a.atoms > 0) ffn_route<T>(a, b, t, t, t + count, 0, 1), timer.end(COMPOSE);
      contract<T>(b.down, b.hidden, b.hidden_stride, count, a.hidden, 0, 1);
      ffn_second<T>(a, b, t, count, 0, 1);
      timer.end(STATIC);
    }
  }
}

DSC_KERNELS_END
