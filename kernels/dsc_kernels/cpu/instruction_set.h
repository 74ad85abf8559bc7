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

#include "layers.h"
#include "chunk_attention.h"
#include "ffn.h"
#include "head.h"
#include "moe.h"
#include "norm.h"
#include "sample.h"

template <typename T>
void pack_any(const void* w, int64_t n, int64_t d, void* out) {
  pack<T>((const T*)w, n, d, (T*)out);
}

int64_t sample_scratch(const Sampling& a) { return aligned(sample_bytes(a.vocabulary)) * a.threads; }

void sample(const Sampling& a) {
#pragma omp parallel num_threads(a.threads)
  {
    char* own = a.scratch + omp_get_thread_num() * aligned(sample_bytes(a.vocabulary));
    SampleBuffers b = sample_buffers(a.vocabulary, own);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < a.batch; i++)
      a.out[i] = sample_row(a.logits + i * a.vocabulary, a.vocabulary, a.temperature[i], a.top_k[i], a.top_p[i],
                            a.min_p[i], a.u[i], b);
  }
}

template <typename T>
constexpr Kernels table() {
  return {pack_any<T>,
          linear<T>,
          largest<T>,
          ffn<T>,
          moe<T>,
          attention<T>,
          chunk_attention<T>,
          store_kv<T>,
          norm<T>,
          linear_scratch<T>,
          largest_scratch<T>,
          ffn_scratch<T>,
          moe_scratch<T>,
          attention_scratch<T>,
          chunk_attention_scratch<T>,
          store_kv_scratch<T>,
          norm_scratch<T>};
}

}  // namespace
