// Which instruction sets this processor and operating system can run.
#pragma once

#include "../ops.h"

namespace sparsebert {

bool isa_supported(Isa isa);

}  // namespace sparsebert
