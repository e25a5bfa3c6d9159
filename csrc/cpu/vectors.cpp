#include "vectors.h"

#include "kernels.h"

namespace hyperopt_ext {
namespace {

template <class T>
HX_CLONES void squared_norm(const Slice& slice, double* sums) {
  using A = Arithmetic<T>;
  const T* const g = static_cast<const T*>(slice.grad);
  const A scale = A(slice.scale);
  for (std::int64_t begin = 0; begin < slice.count; begin += kSumBlock) {
    const std::int64_t end = std::min(begin + kSumBlock, slice.count);
    A square = A(0);
    HX_INDEPENDENT
    for (std::int64_t i = begin; i < end; ++i) square += (scale * A(g[i])) * (scale * A(g[i]));
    sums[0] += double(square);
  }
}

template <class T>
HX_CLONES void products(const Slice& slice, int hyper, double* sums) {
  using A = Arithmetic<T>;
  const T* const g = static_cast<const T*>(slice.grad);
  const A* const z = static_cast<const A*>(slice.trace[hyper]);
  const A scale = A(slice.scale);
  for (std::int64_t begin = 0; begin < slice.count; begin += kSumBlock) {
    const std::int64_t end = std::min(begin + kSumBlock, slice.count);
    A product = A(0), trace = A(0), square = A(0);
    HX_INDEPENDENT
    for (std::int64_t i = begin; i < end; ++i) {
      const A upstream = scale * A(g[i]);
      product += upstream * z[i];
      trace += z[i] * z[i];
      square += upstream * upstream;
    }
    sums[0] += double(product);
    sums[1] += double(trace);
    sums[2] += double(square);
  }
}

template <class T>
HX_CLONES void decay(const Slice& slice) {
  using A = Arithmetic<T>;
  const A keep = A(slice.keep);
  for (void* trace : slice.trace) {
    A* const z = static_cast<A*>(trace);
    if (z == nullptr) continue;
    HX_INDEPENDENT
    for (std::int64_t i = 0; i < slice.count; ++i) z[i] = next_trace(keep, z[i], A(0));
  }
}

template <class T>
constexpr VectorKernels kernels() {
  return {squared_norm<T>, products<T>, decay<T>};
}

}  // namespace

const VectorKernels vectors[kScalarTypes] = {kernels<float>(), kernels<double>(), kernels<c10::Half>(),
                                             kernels<c10::BFloat16>()};

}  // namespace hyperopt_ext
