// What one instruction set's translation unit offers; compiled with that set's flags.
#pragma once

#include "api.h"
#include "chunk_attention.h"
#include "dequantised.h"
#include "ffn.h"
#include "head.h"
#include "layers.h"
#include "moe.h"
#include "namespace.h"
#include "norm.h"
#include "sample.h"

DSC_KERNELS_BEGIN

template <typename T>
void pack_any(const void* w, int64_t n, int64_t d, void* out) {
  pack<T>((const T*)w, n, d, (T*)out);
}

template <typename T>
constexpr Kernels kernels() {
  return {pack_any<T>, quantised_row<T>, linear<T>, argmax<T>, ffn<T>, moe<T>, attention<T>, chunk_attention<T>,
          store_kv<T>, norm<T>};
}

constexpr InstructionSet instruction_set(const char* name, bool (*supported)(), void (*begin)() = nullptr) {
  return {name, supported, kernels<float>(), kernels<bf16>(), sample, begin};
}

DSC_KERNELS_END
