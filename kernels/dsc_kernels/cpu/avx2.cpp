#include "instruction_set.h"

DSC_KERNELS_BEGIN

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

DSC_KERNELS_END

constinit const dsc::InstructionSet dsc::avx2_set = avx2::instruction_set("avx2", avx2::supported);
