#include "instruction_set.h"

DSC_KERNELS_BEGIN

bool supported() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

DSC_KERNELS_END

constinit const dsc::InstructionSet dsc::avx512bf16_set =
    avx512bf16::instruction_set("avx512bf16", avx512bf16::supported);
