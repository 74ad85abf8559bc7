#include "instruction_set.h"

namespace {
bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace

const InstructionSet avx2_set = {"avx2", supported, table<float>(), table<bf16>(), sample, sample_scratch};
