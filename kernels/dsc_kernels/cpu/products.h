// Products of a layer, whatever its weights are made of.
#pragma once

#include <stdint.h>

#include "api.h"
#include "dequantised.h"
#include "gemm.h"
#include "namespace.h"
#include "quantised.h"

DSC_KERNELS_BEGIN

// A packed weight, with its format where it is quantised.
struct Matrix {
  const void* packed = nullptr;
  bool quantised = false;
  Format format{};

  Matrix() = default;
  INLINE Matrix(const void* w, const Format* f) : packed(w), quantised(f != nullptr) {
    if (f) format = *f;
  }

  // Number e of several of one size [n, d] that lie one after the other.
  template <typename T>
  INLINE Matrix at(int64_t e, int64_t n, int64_t d) const {
    Matrix m = *this;
    if (!packed) return m;
    if (!quantised) {
      m.packed = (const T*)packed + e * panel_count(n) * Packed<T>::panel_size(d);
      return m;
    }
    m.packed = (const uint8_t*)packed + e * panel_count(n) * panel_bytes(format, d);
    if (!format.rank) return m;
    m.format.left = (const T*)format.left + e * panel_count(n) * Packed<T>::panel_size(format.rank);
    m.format.right = (const T*)format.right + e * panel_count(format.rank) * Packed<T>::panel_size(d);
    return m;
  }
};

// What 32 inputs of an output take, in bytes: what reading them costs.
template <typename T>
INLINE int64_t cost_of(const Format* f) {
  return f ? 2 * group_bytes(*f) / f->group : 32 * (int64_t)sizeof(T);
}

// Tokens as tiles read them, and in int8 where a weight is quantised.
template <typename T>
struct Inputs {
  typedef typename Input<T>::type I;
  const I* rows = nullptr;  // [tokens, stride]
  int64_t stride = 0;       // of a token's inputs
  Bytes bytes{};            // the same in int8

  // From token t on.
  INLINE Inputs from(int64_t t) const { return {rows + t * stride, stride, bytes.from(t)}; }
};

template <typename T, typename Sink>
INLINE void multiply(const Matrix& w, const Inputs<T>& x, const int32_t* rows, int64_t count, int64_t d,
                     const Sink& sink, int64_t first, int64_t last) {
  if (w.quantised)
    multiply_quantised<T>((const uint8_t*)w.packed, w.format, x.rows, x.stride, x.bytes, rows, count, d, sink, first,
                          last);
  else multiply<T>((const T*)w.packed, x.rows, x.stride, rows, count, d, sink, first, last);
}

template <typename T, typename O>
__attribute__((noinline)) void gemm_quantised(const Matrix& w, const Inputs<T>& x, const int32_t* rows, int64_t count,
                                              int64_t d, int64_t size, const Epilogue& e, O* out, int64_t first,
                                              int64_t last) {
  auto to = [&](const auto& sink) __attribute__((always_inline)) {
    multiply_quantised<T>((const uint8_t*)w.packed, w.format, x.rows, x.stride, x.bytes, rows, count, d, sink, first,
                          last);
  };
  if (e.branch) {
    to(AdaptedOutput<O>{e, out, size});
    return;
  }
  to(Output<O>{e, out, size});
}

// Panels first … last − 1 of out [count, size] = x[rows] · wᵀ.
template <typename T, typename O>
INLINE void gemm(const Matrix& w, const Inputs<T>& x, const int32_t* rows, int64_t count, int64_t d, int64_t size,
                 const Epilogue& e, O* out, int64_t first, int64_t last) {
  if (w.quantised) gemm_quantised<T, O>(w, x, rows, count, d, size, e, out, first, last);
  else gemm<T, O>((const T*)w.packed, x.rows, x.stride, rows, count, d, size, e, out, first, last);
}

DSC_KERNELS_END
