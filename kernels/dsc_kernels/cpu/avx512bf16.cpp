// Two sets of one translation unit: with vectors alone, and with tiles where there are enough tokens for them.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "instruction_set.h"

DSC_KERNELS_BEGIN

bool supported() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Linux lets a process use tiles that has asked for them: its threads' states are larger then.
bool may_use_tiles() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25;
  unsigned a, b, c, d;
  if (!supported() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & (BF16 | TILE | INT8)) == (BF16 | TILE | INT8) && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA);
}

bool supports_tiles() {
  static const bool may = may_use_tiles();
  return may;
}

void use_tiles() { tiles_in_use = true; }
void use_vectors() { tiles_in_use = false; }

DSC_KERNELS_END

constinit const dsc::InstructionSet dsc::amx_set =
    avx512bf16::instruction_set("amx", avx512bf16::supports_tiles, avx512bf16::use_tiles);
constinit const dsc::InstructionSet dsc::avx512bf16_set =
    avx512bf16::instruction_set("avx512bf16", avx512bf16::supported, avx512bf16::use_vectors);
