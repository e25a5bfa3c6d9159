// The two passes over the parameters on the CPU, for any rule and a whole list of tensors in one call.
#pragma once

#include "../pass.h"

namespace hyperopt_ext {

extern const Backend cpu_backend;

}  // namespace hyperopt_ext
