#include "instruction_set.h"

namespace {
bool supported() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
}  // namespace

const InstructionSet avx512bf16_set = {"avx512bf16", supported, table<float>(), table<bf16>(), sample, sample_scratch};
