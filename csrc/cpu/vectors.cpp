#include "vectors.h"

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace hyperopt_ext {
namespace {

template <class A>
HX_CLONES void squared_norm(const Slice& slice, double* sums) {
  const A* const g = static_cast<const A*>(slice.grad);
  const A scale = A(slice.scale);
  for (std::int64_t begin = 0; begin < slice.count; begin += kSumBlock) {
    const std::int64_t end = std::min(begin + kSumBlock, slice.count);
    A square = A(0);
    HX_INDEPENDENT
    for (std::int64_t i = begin; i < end; ++i) square += (scale * g[i]) * (scale * g[i]);
    sums[0] += double(square);
  }
}

template <class A>
HX_CLONES void products(const Slice& slice, int hyper, double* sums) {
  const A* const g = static_cast<const A*>(slice.grad);
  const A* const z = static_cast<const A*>(slice.trace[hyper]);
  const A scale = A(slice.scale);
  for (std::int64_t begin = 0; begin < slice.count; begin += kSumBlock) {
    const std::int64_t end = std::min(begin + kSumBlock, slice.count);
    A product = A(0), trace = A(0), square = A(0);
    HX_INDEPENDENT
    for (std::int64_t i = begin; i < end; ++i) {
      const A upstream = scale * g[i];
      product += upstream * z[i];
      trace += z[i] * z[i];
      square += upstream * upstream;
    }
    sums[0] += double(product);
    sums[1] += double(trace);
    sums[2] += double(square);
  }
}

template <class A>
HX_CLONES void decay(const Slice& slice) {
  const A keep = A(slice.keep);
  for (void* trace : slice.trace) {
    A* const z = static_cast<A*>(trace);
    if (z == nullptr) continue;
    HX_INDEPENDENT
    for (std::int64_t i = 0; i < slice.count; ++i) z[i] = next_trace(keep, z[i], A(0));
  }
}

template <class To, class From>
HX_FN To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The formats of half precision, as torch rounds them: to nearest, ties to even. Not by c10::Half, whose arithmetic relies
// on the order of two multiplications, which -fassociative-math does not keep: what overflows would become a number.
struct Half {
  static constexpr std::uint32_t kLeastNormal = 113u << 23, kInfinite = 143u << 23;  // 2^-14 and 2^16, as fp32

  HX_FN static float widen(std::uint16_t half) {
    const std::uint32_t magnitude = std::uint32_t(half & 0x7fff) << 13, sign = std::uint32_t(half & 0x8000) << 16;
    const std::uint32_t normal = magnitude + ((127u - 15u) << 23);
    const std::uint32_t infinite = magnitude + ((255u - 31u) << 23);
    const float subnormal = bits_of<float>(magnitude | kLeastNormal) - bits_of<float>(kLeastNormal);
    const std::uint32_t finite = magnitude < (1u << 23) ? bits_of<std::uint32_t>(subnormal) : normal;
    return bits_of<float>(sign | (magnitude < (31u << 23) ? finite : infinite));
  }

  HX_FN static std::uint16_t narrow(float value) {
    const std::uint32_t bits = bits_of<std::uint32_t>(value), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    const std::uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // The last bit of a number between 1/2 and 1 is that of the smallest half.
    const std::uint32_t subnormal =
        bits_of<std::uint32_t>(bits_of<float>(magnitude) + 0.5f) - bits_of<std::uint32_t>(0.5f);
    const std::uint32_t finite = magnitude < kLeastNormal ? subnormal : normal;
    const std::uint32_t infinite = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return std::uint16_t(sign | (magnitude < kInfinite ? finite : infinite));
  }
};

struct BFloat16 {
  HX_FN static float widen(std::uint16_t half) { return bits_of<float>(std::uint32_t(half) << 16); }

  HX_FN static std::uint16_t narrow(float value) {
    const std::uint32_t bits = bits_of<std::uint32_t>(value);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return std::uint16_t(is_nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

template <class Format>
HX_CLONES void widen(const void* from, std::int64_t count, float* to) {
  const std::uint16_t* const halves = static_cast<const std::uint16_t*>(from);
  HX_INDEPENDENT
  for (std::int64_t i = 0; i < count; ++i) to[i] = Format::widen(halves[i]);
}

template <class Format>
HX_CLONES void narrow(const float* from, std::int64_t count, void* to) {
  std::uint16_t* const halves = static_cast<std::uint16_t*>(to);
  HX_INDEPENDENT
  for (std::int64_t i = 0; i < count; ++i) halves[i] = Format::narrow(from[i]);
}

template <class A>
constexpr VectorKernels kernels() {
  return {squared_norm<A>, products<A>, decay<A>};
}

}  // namespace

const VectorKernels vectors[kArithmeticTypes] = {kernels<float>(), kernels<double>()};

const HalfKernels halves[2] = {{widen<Half>, narrow<Half>}, {widen<BFloat16>, narrow<BFloat16>}};

}  // namespace hyperopt_ext
