#include "instruction_set.h"

DSC_KERNELS_BEGIN

bool supported() { return true; }

DSC_KERNELS_END

constinit const dsc::InstructionSet dsc::baseline_set = baseline::instruction_set("baseline", baseline::supported);
