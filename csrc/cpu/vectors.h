// The kernels that no rule changes.
#pragma once

#include "../registry.h"

namespace hyperopt_ext {

struct VectorKernels {
  // sums[0] += sum_i G_i^2
  void (*squared_norm)(const Slice&, double* sums);
  // sums [3]: of G z, z^2 and G^2, for the trace z of one hyperparameter
  void (*products)(const Slice&, int hyper, double* sums);
  // z <- keep z for all traces
  void (*decay)(const Slice&);
};

extern const VectorKernels vectors[kArithmeticTypes];

// Between a type of half precision and fp32.
struct HalfKernels {
  void (*widen)(const void* from, std::int64_t count, float* to);
  void (*narrow)(const float* from, std::int64_t count, void* to);
};

extern const HalfKernels halves[2];  // kHalf, kBFloat16

}  // namespace hyperopt_ext
