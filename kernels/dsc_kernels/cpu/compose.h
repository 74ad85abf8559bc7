// The picked rank-1 atoms: y += (Σ_j (x·u_j) z_j v_j) ⊙ γ.
#pragma once

#include <stdint.h>

#include "dequantised.h"
#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

// Rows that will be needed soon, asked for ahead of time: they may lie beyond the caches.
template <typename Rows>
INLINE void prefetch_rows(const Rows& rows, const int32_t* picks, int64_t count) {
  constexpr int64_t MOST = 64;  // more would push each other out
  for (int64_t j = 0; j < (count < MOST ? count : MOST); j++) rows.prefetch(picks[j]);
}

// z [k] becomes the latents c; y [d] float32 = (Σ c_j v_j) ⊙ gamma; gamma is [d], or one number when scalar.
template <typename T, typename U, typename V>
INLINE void compose(const T* x, const U& u, const V& v, const float* gamma, bool scalar, const int32_t* picks, float* z,
                    int k, int64_t d, float* y) {
  for (int j = 0; j < k; j++) z[j] *= u.product(x, picks[j]);
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    vf s = {};
    for (int j = 0; j < k; j++) s += z[j] * v.at(picks[j], i);
    store(y + i, s * (scalar ? splat(gamma[0]) : load(gamma + i)));
  }
  for (; i < d; i++) {
    float s = 0;
    for (int j = 0; j < k; j++) s += z[j] * v.one(picks[j], i);
    y[i] = s * gamma[scalar ? 0 : i];
  }
}

DSC_KERNELS_END
