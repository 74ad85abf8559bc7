// Defines what one instruction set's table needs; compiled with that set's flags.
//
// Everything but the system's headers and api.h is in an unnamed namespace: the same templates are compiled once per
// instruction set, and the linker must not take one's for another's.
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "api.h"

namespace {

#include "moe.h"

template <typename T>
void pack_any(const void* w, int64_t n, int64_t d, void* out) {
  pack<T>((const T*)w, n, d, (T*)out);
}

template <typename T>
constexpr Kernels table() {
  return {pack_any<T>,       linear<T>,      ffn<T>,         moe<T>,
          attention<T>,      linear_scratch<T>, ffn_scratch<T>, moe_scratch<T>,
          attention_scratch<T>};
}

}  // namespace
