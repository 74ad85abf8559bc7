// Where the kernels live. Every header is compiled once per instruction set, each time into a namespace of that set's
// name and, within it, an unnamed one: the linker must never take one set's templates for another's.
#pragma once

#if defined(__AVX512BF16__)
#define DSC_INSTRUCTION_SET avx512bf16
#elif defined(__AVX512F__)
#define DSC_INSTRUCTION_SET avx512
#elif defined(__AVX2__)
#define DSC_INSTRUCTION_SET avx2
#else
#define DSC_INSTRUCTION_SET baseline
#endif

#define DSC_KERNELS_BEGIN         \
  namespace dsc {                 \
  namespace DSC_INSTRUCTION_SET { \
  namespace {

#define DSC_KERNELS_END \
  }                     \
  }                     \
  }
