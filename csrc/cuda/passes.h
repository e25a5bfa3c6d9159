// The two passes and the towers on a GPU: what cpu/passes.h is for the CPU. Nothing here waits for the device, and all that
// the host needs to know is in the arguments, so every call can be captured in a CUDA graph.
#pragma once

#include "../pass.h"

namespace hyperopt_ext {

extern const Backend cuda_backend;

}  // namespace hyperopt_ext
