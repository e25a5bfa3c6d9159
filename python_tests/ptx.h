// What kernels translated from PTX (ptx.py) need of the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

// The same bits as another type, of the same size or, of an integer, of its lower part.
template <class To, class From>
To bits(From value) {
  static_assert(sizeof(To) <= sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

// What a function is called with, and returns.
struct alignas(16) Parameter {
  unsigned char bytes[16];
};

// Numbers in memory, at an address that an access to so many at once must have.
template <class T>
T* at(std::uint64_t address, int width) {
  require(address % (unsigned(width) * sizeof(T)) == 0, "an access to memory is not aligned");
  return reinterpret_cast<T*>(address);
}

// The instructions that are no operator of C++.
template <class T>
bool is_nan(T a, T b) {
  return a != a || b != b;
}
template <class T>
T min_(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(a, b);
  else
    return std::min(a, b);
}
template <class T>
T max_(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(a, b);
  else
    return std::max(a, b);
}
template <class T>
T fma_(T a, T b, T c) {
  return std::fma(a, b, c);
}
template <class T>
T neg_(T a) {
  return -a;
}
template <class T>
T abs_(T a) {
  return std::abs(a);
}
template <class T>
T not_(T a) {
  if constexpr (std::is_same_v<T, bool>)
    return !a;
  else
    return ~a;
}
template <class T>
T sqrt_(T a) {
  return std::sqrt(a);
}
template <class T>
T rcp_(T a) {
  return T(1) / a;
}
inline double rcp_approximate_(double a) {  // of the upper half of the bits
  return bits<double>(bits<std::uint64_t>(1.0 / a) & 0xffffffff00000000u);
}
template <class T>
T popc_(T a) {
  return T(__builtin_popcountll(a));
}
// A shift by all bits, or more, leaves none.
template <class T>
T shl_(T a, T by) {
  return std::uint32_t(by) < 8 * sizeof(T) ? T(a << std::uint32_t(by)) : T(0);
}
template <class T>
T shr_(T a, T by) {
  const bool all = std::uint32_t(by) >= 8 * sizeof(T);
  return all && a >= 0 && !std::is_signed_v<T> ? T(0) : T(a >> (all ? 8 * sizeof(T) - 1 : std::uint32_t(by)));
}
// A conversion to a range that ends.
template <class To, class From>
To clamped(From value) {
  if (value != value) return 0;
  if (value <= From(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (value >= From(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return To(value);
}
inline float from_half(std::uint16_t value) {
  return float(bits<_Float16>(value));
}
inline std::uint16_t to_half(float value) {
  return bits<std::uint16_t>(_Float16(value));
}
inline float from_bfloat16(std::uint16_t value) {
  return bits<float>(std::uint32_t(value) << 16);
}
inline std::uint16_t to_bfloat16(float value) {
  const auto all = bits<std::uint32_t>(value);
  return value != value ? 0x7fff : std::uint16_t((all + 0x7fff + (all >> 16 & 1)) >> 16);
}

// Where a thread goes on.
struct Thread {
  int at;
  bool is_done;
};

// Runs a block: each thread up to the next barrier, then all of them from there. What nobody wrote is no plausible number.
template <class Registers, int SharedBytes, class Run>
void run_block(unsigned threads, Run&& run) {
  static std::vector<Registers> registers(1024);
  alignas(16) unsigned char shared[SharedBytes];
  std::memset(shared, 0xff, sizeof(shared));
  std::memset(static_cast<void*>(registers.data()), 0xff, threads * sizeof(Registers));
  for (unsigned i = 0; i < threads; ++i) registers[i].at = 0, registers[i].is_done = false;
  for (bool any = true; any;) {
    any = false;
    for (unsigned i = 0; i < threads; ++i) {
      Registers& r = registers[i];
      if (r.is_done) continue;
      r.is_done = !run(r, shared, i);
      any = any || !r.is_done;
      require(r.is_done == registers[0].is_done && (r.is_done || r.at == registers[0].at),
              "threads wait at different barriers");
    }
  }
}
