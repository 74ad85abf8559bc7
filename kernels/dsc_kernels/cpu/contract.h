// What the tokens of adapters are contracted to, before a product that they add to: once for all neighbours that share a
// basis, whatever their adapters are, and then through the core of each.
#pragma once

#include <stdint.h>

#include "adapter.h"
#include "gemm.h"
#include "namespace.h"

DSC_KERNELS_BEGIN

// Latents of a branch's first `count` tokens, whose inputs are x: share id of n of all their panels.
template <typename T>
void contract_panels(const Branch& b, const typename Input<T>::type* x, int64_t stride, int64_t count, int64_t d,
                     int64_t id, int64_t n) {
  if (!b.adapted) return;
  int64_t unit = 0, runs = b.adapted->run_count;
  auto end_of = [&](int64_t run) __attribute__((always_inline)) {
    int64_t end = b.adapted->runs[run].first + b.adapted->runs[run].count - b.base;
    return end < count ? end : count;
  };
  for (int64_t run = 0; run < runs; run++) {
    const AdapterRun& own = b.adapted->runs[run];
    int64_t first = own.first > b.base ? own.first - b.base : 0;
    if (first >= end_of(run)) continue;
    float* rows = b.rows + first * b.width;
    const LowRank* update = b.adapted->updates(run, b.module);
    for (int64_t i = 0; i < b.modules * own.parts; rows += latent_width(*update), i++, update++) {
      if (first > 0 && b.continues(run, i)) continue;
      int64_t last = run;
      while (last + 1 < runs && end_of(last) < count && b.continues(last + 1, i)) last++;
      Latents sink = {rows, b.width, update->core ? nullptr : update->scale};
      for (int64_t p = 0; p < panel_count(update->inner); p++)
        if (unit++ % n == id)
          multiply<T>((const T*)update->down, x + first * stride, stride, nullptr, end_of(last) - first, d, sink, p,
                      p + 1);
    }
  }
}

// The same, cores included, of branches that have the same inputs. Where n threads share it, all of them must come here:
// with cores they wait for each other once.
template <typename T, typename... Branches>
void contract(const typename Input<T>::type* x, int64_t stride, int64_t count, int64_t d, int64_t id, int64_t n,
              const Branches&... branches) {
  int64_t turn = id;  // so that those of few panels do not all fall to the same thread
  (contract_panels<T>(branches, x, stride, count, d, turn++ % n, n), ...);
  if (!(branches.cored || ...)) return;
  if (n > 1) {
#pragma omp barrier
  }
  int64_t first = count * id / n, last = count * (id + 1) / n;
  auto mix = [&](const Branch& b) {
    if (b.cored) b.mix(first, last);
  };
  (mix(branches), ...);
}

DSC_KERNELS_END
