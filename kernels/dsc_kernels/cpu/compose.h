// The picked rank-1 atoms: y += (Σ_j (x·u_j) z_j v_j) ⊙ γ.
#pragma once

#include <stdint.h>

#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

// Rows that will be needed soon, asked for ahead of time: they may lie beyond the caches.
template <typename T>
INLINE void prefetch_rows(const T* rows, const int32_t* picks, int64_t count, int64_t d) {
  constexpr int64_t MOST = 64;  // more would push each other out
  for (int64_t j = 0; j < (count < MOST ? count : MOST); j++)
    for (int64_t i = 0; i < d; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(rows + picks[j] * d + i);
}

// z [k] becomes the latents c; y [d] float32 = (Σ c_j v_j) ⊙ gamma; gamma is [d], or one number when scalar.
template <typename T>
INLINE void compose(const T* x, const T* u, const T* v, const float* gamma, bool scalar, const int32_t* picks, float* z,
                    int k, int64_t d, float* y) {
  for (int j = 0; j < k; j++) z[j] *= dot(x, u + picks[j] * d, d);
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    vf s = {};
    for (int j = 0; j < k; j++) s += z[j] * load(v + picks[j] * d + i);
    store(y + i, s * (scalar ? splat(gamma[0]) : load(gamma + i)));
  }
  for (; i < d; i++) {
    float s = 0;
    for (int j = 0; j < k; j++) s += z[j] * to_float(v[picks[j] * d + i]);
    y[i] = s * gamma[scalar ? 0 : i];
  }
}

DSC_KERNELS_END
