// RMSNorm, or LayerNorm where there is a bias, of rows, plus a residual where there is one, in float32 with one
// rounding at the end.
#pragma once

#include <math.h>
#include <stdint.h>

#include "api.h"
#include "namespace.h"
#include "vector.h"

DSC_KERNELS_BEGIN

template <typename T>
INLINE void norm_row(const T* x, const T* weight, const T* bias, const T* residual, int64_t d, float eps, T* out) {
  auto at = [d](const T* p, int64_t i) __attribute__((always_inline)) {
    return i + LANES <= d ? load(p + i) : load_some(p + i, (int)(d - i));
  };
  float mean = 0;
  if (bias) {
    vf total = {};
    for (int64_t i = 0; i < d; i += LANES) total += at(x, i);
    mean = sum(total) / d;
  }
  vf squares = {};
  int64_t i = 0;
  for (; i + LANES <= d; i += LANES) {
    vf v = load(x + i) - mean;
    squares += v * v;
  }
  float rest = 0;
  for (; i < d; i++) rest += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
  float scale = 1.0f / sqrtf((sum(squares) + rest) / d + eps);
  for (i = 0; i < d; i += LANES) {
    vf v = (at(x, i) - mean) * scale * at(weight, i);
    if (bias) v += at(bias, i);
    if (residual) v += at(residual, i);
    if (i + LANES <= d) store(out + i, v);
    else store_some(out + i, v, (int)(d - i));
  }
}

template <typename T>
void norm(const Norm& a) {
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.batch * a.d > 1 << 16)
  for (int64_t t = 0; t < a.batch; t++)
    norm_row((const T*)a.x + t * a.d, (const T*)a.weight, (const T*)a.bias,
             a.residual ? (const T*)a.residual + t * a.d : nullptr, a.d, a.eps, (T*)a.out + t * a.d);
}

DSC_KERNELS_END
