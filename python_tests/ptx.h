// Runs the lists of numbers that ptx.py makes of PTX: included by the C++ that it makes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

using std::int16_t, std::int32_t, std::int64_t, std::int8_t, std::uint16_t, std::uint32_t, std::uint64_t, std::uint8_t;

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

// Numbers in memory, at an address that an access to so many at once must have.
template <class T>
T* at(uint64_t address, int width) {
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
  return bits<double>(bits<uint64_t>(1.0 / a) & 0xffffffff00000000u);
}
template <class T>
T popc_(T a) {
  return T(__builtin_popcountll(a));
}
// A shift by all bits, or more, leaves none.
template <class T>
T shl_(T a, T by) {
  return uint32_t(by) < 8 * sizeof(T) ? T(a << uint32_t(by)) : T(0);
}
template <class T>
T shr_(T a, T by) {
  const bool all = uint32_t(by) >= 8 * sizeof(T);
  return all && a >= 0 && !std::is_signed_v<T> ? T(0) : T(a >> (all ? 8 * sizeof(T) - 1 : uint32_t(by)));
}
// A conversion to a range that ends.
template <class To, class From>
To clamped(From value) {
  if (value != value) return 0;
  if (value <= From(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (value >= From(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return To(value);
}
inline float from_half(uint16_t value) {
  return float(bits<_Float16>(value));
}
inline uint16_t to_half(float value) {
  return bits<uint16_t>(_Float16(value));
}
inline float from_bfloat16(uint16_t value) {
  return bits<float>(uint32_t(value) << 16);
}
inline uint16_t to_bfloat16(float value) {
  const auto all = bits<uint32_t>(value);
  return value != value ? 0x7fff : uint16_t((all + 0x7fff + (all >> 16 & 1)) >> 16);
}

// A thread of a kernel, or of a function that it calls.
struct Thread {
  uint64_t* slots;
  uint32_t at = 0;  // the next instruction
  bool is_done = false;

  template <class T>
  T& slot(uint32_t i) {
    return *reinterpret_cast<T*>(slots + i);
  }
  bool done() {
    is_done = true;
    return false;
  }
};

// An instruction: false if the thread must wait for the others, or is done.
using Step = bool (*)(Thread& thread, const uint32_t* operands);

// What a slot starts with, but for a number that is added: of ptx.py's _BASES.
enum Base { kNone, kLocal, kSlots, kResult, kParam0, kParam1, kShared, kThread, kBlock, kThreads, kBases };
using Bases = uint64_t[kBases];

// Of words in the code: its instructions, each with the number of its Step and, in the last 8 bits, how many words it has;
// and for each slot that starts with something the slot, the Base, and the number.
struct Function {
  uint32_t code, starts, starting, slots;
  uint32_t shared, local;  // bytes

  // Of a thread: an even number, so that what is local begins at a multiple of 16 bytes.
  std::size_t words() const { return slots + local / sizeof(uint64_t); }
};

extern const Step steps[];
extern const Function functions[];
inline std::vector<uint32_t> code;

// The thread on so many words of memory. What nobody wrote is no plausible number.
inline Thread start(const Function& function, uint64_t* words, Bases& bases) {
  std::memset(words, 0xff, function.words() * sizeof(uint64_t));
  bases[kSlots] = uint64_t(words);
  bases[kLocal] = uint64_t(words + function.slots);
  const uint32_t* const starts = code.data() + function.starts;
  for (uint32_t i = 0; i < function.starting; ++i) {
    const uint32_t* const start = starts + 4 * i;
    words[start[0]] = bases[start[1]] + (start[2] | uint64_t(start[3]) << 32);
  }
  return Thread{words};
}

// Up to the next barrier, or the end.
inline void run(const Function& function, Thread& thread) {
  for (bool goes_on = true; goes_on;) {
    const uint32_t* const words = code.data() + function.code + thread.at;
    thread.at += *words & 0xff;
    goes_on = steps[*words >> 8](thread, words + 1);
  }
}

// places: of the result, and of what it is called with.
inline void call(uint32_t callee, std::initializer_list<uint64_t> places) {
  const Function& function = functions[callee];
  std::vector<uint64_t> words(function.words());
  Bases bases = {};
  std::copy(places.begin(), places.end(), bases + kResult);
  Thread thread = start(function, words.data(), bases);
  run(function, thread);
  require(thread.is_done, "a function waits at a barrier");
}

// Each thread up to the next barrier, then all of them from there.
inline void run_block(const Function& function, const void* argument, unsigned block, unsigned threads) {
  static std::vector<uint64_t> words;
  words.resize(std::max(words.size(), threads * function.words()));
  std::vector<unsigned char> shared(function.shared + 16, 0xff);
  const uint64_t aligned = (uint64_t(shared.data()) + 15) / 16 * 16;
  std::vector<Thread> all;
  for (unsigned i = 0; i < threads; ++i) {
    Bases bases = {};
    bases[kParam0] = uint64_t(argument);
    bases[kShared] = aligned;
    bases[kThread] = i;
    bases[kBlock] = block;
    bases[kThreads] = threads;
    all.push_back(start(function, words.data() + i * function.words(), bases));
  }
  while (!all[0].is_done) {
    for (Thread& thread : all) {
      run(function, thread);
      require(thread.is_done == all[0].is_done && (thread.is_done || thread.at == all[0].at),
              "threads wait at different barriers");
    }
  }
}

extern "C" __attribute__((visibility("default"))) void load_code(const uint32_t* words, std::size_t count) {
  code.assign(words, words + count);
}

#define KERNEL(name, i)                                                          \
  extern "C" void name(const void* argument, unsigned block, unsigned threads) { \
    run_block(functions[i], argument, block, threads);                           \
  }
