// Each token's largest output of a product, without writing the outputs: greedy decoding needs no logits.
#pragma once

#include "layers.h"

struct Largest {
  const float* bias;  // [size] or null
  int64_t size;
  float* values;    // [tokens, 16]: the largest so far of every lane
  int32_t* places;  // and where it was
  INLINE void operator()(vf v, int64_t t, int64_t n) const {
    const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int count = size - n < LANES ? (int)(size - n) : LANES;
    if (bias) v += count == LANES ? load(bias + n) : load_some(bias + n, count);
    if (count < LANES) v = lanes < count ? v : splat(-INFINITY);
    vf held = load(values + t * LANES);
    vi place;
    memcpy(&place, places + t * LANES, sizeof place);
    auto better = v > held;  // of equal ones the first stays
    place = better ? lanes + (int32_t)n : place;
    store(values + t * LANES, better ? v : held);
    memcpy(places + t * LANES, &place, sizeof place);
  }
};

template <typename T>
int64_t largest_scratch(const Linear& a) {
  return aligned(a.batch * even(a.d) * 4) + 2 * aligned(a.threads * a.batch * LANES * 4);
}

template <typename T>
void largest(const Linear& a) {
  const auto* x = prepared<T>(a.x, 0, a.batch, a.d, a.scratch);
  int64_t panels = panel_count(a.n), all = a.batch * LANES;
  float* values = (float*)(a.scratch + aligned(a.batch * even(a.d) * 4));
  int32_t* places = (int32_t*)((char*)values + aligned(a.threads * all * 4));
  int64_t* out = (int64_t*)a.out;
#pragma omp parallel num_threads(a.threads)
  {
    int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
    for (int64_t i = id * all; i < (id + 1) * all; i += LANES) store(values + i, splat(-INFINITY));
    memset(places + id * all, 0, all * sizeof *places);
    Largest sink = {a.bias, a.n, values + id * all, places + id * all};
    multiply<T>((const T*)a.w, x, row_stride<T>(a.d), nullptr, a.batch, a.d, sink, part(panels, id, n),
                part(panels, id + 1, n));
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.batch; t++) {
      float best = -INFINITY;
      out[t] = 0;
      for (int64_t w = 0; w < n; w++)
        for (int64_t i = w * all + t * LANES; i < w * all + (t + 1) * LANES; i++)
          if (values[i] > best || (values[i] == best && places[i] < out[t])) {
            best = values[i];
            out[t] = places[i];
          }
    }
  }
}
