#include "instruction_set.h"

namespace {
bool supported() { return true; }
}  // namespace

const InstructionSet baseline_set = {"baseline", supported, table<float>(), table<bf16>(), sample, sample_scratch};
