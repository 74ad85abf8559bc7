// RMSNorm of rows, in float32 with one rounding at the end.
#pragma once

#include "vector.h"

template <typename T>
INLINE void rms_norm_row(const T* x, const T* weight, int64_t d, float eps, T* out) {
  vf squares = {};
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    vf v = load(x + i);
    squares += v * v;
  }
  if (i < d) {
    vf v = load_some(x + i, (int)(d - i));
    squares += v * v;
  }
  float scale = 1.0f / sqrtf(sum(squares) / d + eps);
  for (i = 0; i + LANES <= d; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
  if (i < d)
    store_some(out + i, load_some(x + i, (int)(d - i)) * scale * load_some(weight + i, (int)(d - i)), (int)(d - i));
}

template <typename T>
int64_t rms_norm_scratch(const RmsNorm&) {
  return 0;
}

template <typename T>
void rms_norm(const RmsNorm& a) {
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.batch * a.d > 1 << 16)
  for (int64_t t = 0; t < a.batch; t++)
    rms_norm_row((const T*)a.x + t * a.d, (const T*)a.weight, a.d, a.eps, (T*)a.out + t * a.d);
}
