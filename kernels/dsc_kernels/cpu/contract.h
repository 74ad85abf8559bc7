// What the tokens of adapters are contracted to, before a product that they add to: once for all neighbours that share a
// basis, whatever their adapters are, and then through the core of each.
#pragma once

#include <stdint.h>

#include "adapter.h"
#include "gemm.h"
#include "namespace.h"

DSC_KERNELS_BEGIN

#if defined(__AVX512F__)  // sums of a token, for which AVX2 has no registers
constexpr int SUMS = 4;
#else
constexpr int SUMS = 1;
#endif

// One panel times a few tokens, in several sums of each: one alone would wait for itself. A token's is the same
// whatever its company.
template <typename T, int TT>
INLINE void contract_tile(const T* w, const typename Input<T>::type* const* x, int64_t d, Ahead& ahead,
                          const Latents& sink, int64_t t, int64_t n) {
  vf sums[SUMS][1][TT];
  for (int s = 0; s < SUMS; s++) clear(sums[s]);
  int64_t k = 0;
  for (; k + SUMS * GROUP<T> <= d; k += SUMS * GROUP<T>)
    for (int s = 0; s < SUMS; s++) {
      ahead.step();
      add_group<1, TT>(w, 0, x, k + s * GROUP<T>, sums[s]);
    }
  for (; k < d; k += GROUP<T>) add_group<1, TT>(w, 0, x, k, sums[0]);
  for (int i = 0; i < TT; i++) {
    vf total = sums[0][0][i];
    for (int s = 1; s < SUMS; s++) total += sums[s][0][i];
    sink(total, t + i, n);
  }
}

// A thread's panels one after the other: while one meets its tokens the next, which lies elsewhere, is asked for.
template <typename T>
struct Contraction {
  typedef typename Input<T>::type I;
  struct Panel {
    const T* w = nullptr;
    const I* x;     // of its first token
    int64_t count;  // of tokens
    int64_t n;      // its first output
    Latents sink;
  };

  int64_t stride, d;
  Panel present = {};  // asked for and not yet multiplied

  void then(const Panel& next) {
    multiply(next.w);
    present = next;
  }

  void multiply(const T* next) const {
    if (!present.w) return;
    int64_t bytes = next ? Packed<T>::panel_size(d) * (int64_t)sizeof(T) : 0;
    Ahead ahead = {(const char*)next, (const char*)next + bytes, LANES * 4 / 64};  // lines of a group of inputs
    const I* at[TOKENS];
    by_tiles(present.count, [&]<int TT>(int64_t t) __attribute__((always_inline)) {
      for (int i = 0; i < TT; i++) at[i] = present.x + (t + i) * stride;
      contract_tile<T, TT>(present.w, at, d, ahead, present.sink, t, present.n);
    });
  }
};

// Latents of a branch's first `count` tokens, whose inputs are x: share id of n of all their panels.
template <typename T>
void contract_panels(const Branch& b, const typename Input<T>::type* x, int64_t count, int64_t id, int64_t n,
                     Contraction<T>& panels) {
  if (!b.adapted) return;
  int64_t unit = 0, runs = b.adapted->run_count, size = Packed<T>::panel_size(panels.d);
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
          panels.then({(const T*)update->down + p * size, x + first * panels.stride, end_of(last) - first, p * LANES,
                       sink});
    }
  }
}

// The same, cores included, of branches that have the same inputs. Where n threads share it, all of them must come here:
// with cores they wait for each other once. Who adds what a branch gives waits for its contraction by itself.
template <typename T, typename... Branches>
void contract(const typename Input<T>::type* x, int64_t stride, int64_t count, int64_t d, int64_t id, int64_t n,
              const Branches&... branches) {
  int64_t turn = id;  // so that those of few panels do not all fall to the same thread
  Contraction<T> panels = {stride, d};
  (contract_panels<T>(branches, x, count, turn++ % n, n, panels), ...);
  panels.multiply(nullptr);
  if ((branches.cored || ...)) {
    if (n > 1) {
#pragma omp barrier
    }
    int64_t first = count * id / n, last = count * (id + 1) / n;
    auto mix = [&](const Branch& b) {
      if (b.cored) b.mix(first, last);
    };
    (mix(branches), ...);
  }
  auto arrive = [&](const Branch& b) {
    if (b.adapted) b.meeting->arrive(n);
  };
  if (n > 1) (arrive(branches), ...);
}

DSC_KERNELS_END
