#include "instruction_set.h"

DSC_KERNELS_BEGIN

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

DSC_KERNELS_END

constinit const dsc::InstructionSet dsc::avx512_set = avx512::instruction_set("avx512", avx512::supported);
