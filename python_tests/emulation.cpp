// The CUDA kernels of the library as loops on the host (csrc/cuda/block.h), behind operators of their own for CPU tensors:
// torch.ops.hyperopt_ext_emulated, or hyperopt_ext_ptx, has all that torch.ops.hyperopt_ext has.
#include "cuda/block.h"
#include "library.h"
#include "ops.h"

namespace hyperopt_ext {
extern const char* const kNamespace;  // of ops.cpp
const char* const kNamespace = "hyperopt_ext_" HX_KIND;
}  // namespace hyperopt_ext

using namespace hyperopt_ext;

extern "C" {

// Defines the operators, for the rules of another library.
HX_EXPORT void emulate(const Library* from) {
  rules().assign(from->rules, from->rules + from->count);
  define_tower_ops();
  for (const Rule* rule : rules()) define_ops(*rule);
}

HX_EXPORT int emulated_built_in(const char* name) {
  return built_in(name);
}

// See block.h.
HX_EXPORT void emulate_order(int order) {
  cuda::host_order = order;
}

}  // extern "C"
