// What adapters add to a product, in float32 and before anything else happens to its sums: tokens of a run are contracted
// by the panels of its updates first (contract.h), and where the product's sums are stored, each is expanded into them.
// In between latents go through a core, where an update has one: what is contracted and expanded by then is a basis that
// many adapters share.
//
// Nothing is rounded in between, and there is no buffer of what is added. A product without adapters knows nothing of this.
#pragma once

#include <sched.h>
#include <stdint.h>
#include <string.h>

#include <atomic>
#include <new>

#include "api.h"
#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

INLINE int64_t to_lanes(int64_t n) { return (n + LANES - 1) & -(int64_t)LANES; }

// Panels after the one at hand that is asked for: of many adapters at once the processor follows no stream by itself.
constexpr int64_t PANELS_AHEAD = 4;

// Rows of up, of which `panel` is one of its own, times an update's latents. Each sum has a name, so that it is a register.
// asks: whether a later panel's lines are asked for, one with each that is taken: of many at once the processor waits.
template <bool ASKS>
INLINE vf expand_panel(const float* up, int64_t panel, int64_t rank, const float* latents) {
  const float* w = up + panel * rank * LANES;
  vf first = {}, second = {};
  auto add = [&](int64_t j, vf& sum) __attribute__((always_inline)) {
    if constexpr (ASKS) __builtin_prefetch(w + (PANELS_AHEAD * rank + j) * LANES, 0, 3);
    sum += load(w + j * LANES) * latents[j];
  };
  int64_t j = 0;
  for (; j + 2 <= rank; j += 2) add(j, first), add(j + 1, second);
  if (j < rank) add(j, first);
  return first + second;
}

template <bool ASKS>
INLINE vf expand_panel(const bf16* up, int64_t panel, int64_t rank, const float* latents) {
  int64_t groups = (rank + 1) / 2, j = 0;
  const bf16* w = up + panel * groups * 2 * LANES;
  vf even = {}, odd = {}, next_even = {}, next_odd = {};
  auto add = [&](int64_t group, vf& evens, vf& odds) __attribute__((always_inline)) {
    if constexpr (ASKS) __builtin_prefetch(w + (PANELS_AHEAD * groups + group) * 2 * LANES, 0, 3);
    vf own_even, own_odd;
    load_pairs(w + group * 2 * LANES, own_even, own_odd);
    evens += own_even * latents[2 * group];
    odds += own_odd * latents[2 * group + 1];
  };
  for (; j + 2 <= groups; j += 2) {
    add(j, even, odd);
    add(j + 1, next_even, next_odd);
  }
  if (j < groups) add(j, even, odd);
  return even + next_even + (odd + next_odd);
}

// Threads that share a contraction and then need all of it. None waits before it adds the first latents to a sum: what the
// others have left of theirs is then mostly done.
struct Meeting {
  static constexpr int PATIENCE = 1 << 12;  // looks at who has come, before the core is given to somebody else in between
  std::atomic<int64_t> expected{0}, come{0};

  INLINE void arrive(int64_t threads) {
    expected.store(threads, std::memory_order_relaxed);
    come.fetch_add(1, std::memory_order_release);
  }
  INLINE bool complete() const {
    return come.load(std::memory_order_acquire) >= expected.load(std::memory_order_relaxed);
  }
  // Where nobody has arrived nobody is waited for.
  INLINE void wait() const {
    if (complete()) return;
    for (int looks = 0; !complete(); looks++) {
      if (looks < PATIENCE) __builtin_ia32_pause();
      else sched_yield();
    }
  }
};

// What an update takes of a row of latents: what its inputs are contracted to, and behind it what a core makes of that.
INLINE int64_t latent_width(const LowRank& u) { return to_lanes(u.inner) + (u.core ? to_lanes(u.rank) : 0); }

// What is added to a product of tokens `base` and following, of which row t of its inputs is token base + t.
struct Branch {
  const Adapted* adapted = nullptr;  // null: nothing
  int module = 0, modules = 0;       // that the product consists of
  int is_bf16 = 0;                   // whether updates are
  bool cored = false;                // whether any update has a core
  int64_t width = 0;                 // of a row of latents: those of all updates, each in whole panels
  int64_t base = 0;
  float* rows = nullptr;  // [tokens, width]
  Meeting* meeting = nullptr;

  // Room for so many tokens.
  INLINE Branch() = default;
  INLINE Branch(const Adapted& a, int module, int modules, int is_bf16, int64_t tokens, Scratch& scratch) {
    if (!a.run_count) return;
    adapted = &a, this->module = module, this->modules = modules, this->is_bf16 = is_bf16;
    for (int64_t run = 0; run < a.run_count; run++) {
      int64_t own = 0;
      for (int64_t i = 0; i < modules * a.runs[run].parts; i++) {
        const LowRank& update = a.updates(run, module)[i];
        own += latent_width(update), cored |= update.core != nullptr;
      }
      if (own > width) width = own;
    }
    if (!width) adapted = nullptr;  // tenants of a bank alone
    else rows = scratch.take<float>(tokens * width), meeting = new (scratch.take<Meeting>(1)) Meeting;
  }

  // The same for the tokens from the t-th on.
  INLINE Branch from(int64_t t) const {
    Branch later = *this;
    later.base += t, later.rows += t * width;
    return later;
  }

  // Whether update i of a run is contracted with that of the run before: its tokens follow, and the basis is the same.
  INLINE bool continues(int64_t run, int64_t i) const {
    if (run == 0) return false;
    const AdapterRun &last = adapted->runs[run - 1], &own = adapted->runs[run];
    if (last.first + last.count != own.first) return false;
    if (i >= modules * last.parts || i >= modules * own.parts) return false;
    const LowRank *before = adapted->updates(run - 1, module), *updates = adapted->updates(run, module);
    if (!updates[i].core || !before[i].core || updates[i].down != before[i].down) return false;
    int64_t difference = 0;  // of where they stand in a row of latents
    for (int64_t j = 0; j < i; j++) difference += latent_width(updates[j]) - latent_width(before[j]);
    return difference == 0;
  }

  // What tokens first … last − 1 have been contracted to goes through the cores of their adapters.
  void mix(int64_t first, int64_t last) const {
    for (int64_t t = first; t < last; t++) {
      int32_t run = adapted->run_of[base + t];
      if (run < 0) continue;
      const LowRank* update = adapted->updates(run, module);
      float* latents = rows + t * width;
      for (int64_t i = 0; i < modules * adapted->runs[run].parts; i++, update++) {
        float* mixed = latents + to_lanes(update->inner);
        for (int64_t p = 0; update->core && p < to_lanes(update->rank) / LANES; p++) {
          vf v = is_bf16 ? expand_panel<false>((const bf16*)update->core, p, update->inner, latents)
                         : expand_panel<false>((const float*)update->core, p, update->inner, latents);
          store(mixed + p * LANES, v * load(update->scale + p * LANES));
        }
        latents += latent_width(*update);
      }
    }
  }

  // Not inlined: sums are stored from many places, and there is more to do here than a call costs.
  __attribute__((noinline)) vf add(vf v, int64_t t, int64_t n) const {
    int32_t run = adapted->run_of[base + t];
    if (run < 0) return v;
    meeting->wait();
    int64_t panel = n / LANES, count = modules * adapted->runs[run].parts;
    bool asks = base + t == adapted->runs[run].first;  // for all tokens of its run
    const LowRank* update = adapted->updates(run, module);
    const float* latents = rows + t * width;
    for (int64_t i = 0; i < count; i++, update++) {
      if (update->rank && panel >= update->first && panel < update->end) {
        int64_t own = panel - update->first;
        const float* given = update->core ? latents + to_lanes(update->inner) : latents;
        v += asks ? expand<true>(*update, own, given) : expand<false>(*update, own, given);
      }
      latents += latent_width(*update);
    }
    return v;
  }

 private:
  template <bool ASKS>
  INLINE vf expand(const LowRank& u, int64_t panel, const float* latents) const {
    return is_bf16 ? expand_panel<ASKS>((const bf16*)u.up, panel, u.rank, latents)
                   : expand_panel<ASKS>((const float*)u.up, panel, u.rank, latents);
  }
};

// Where latents go: in rows of a branch, scaled where no core comes after them.
struct Latents {
  float* rows;
  int64_t width;
  const float* scale;  // or null
  INLINE void operator()(vf v, int64_t t, int64_t n) const {
    store(rows + t * width + n, scale ? v * load(scale + n) : v);
  }
};

DSC_KERNELS_END
