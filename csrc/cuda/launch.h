// What a kernel of the passes or of the towers is given, and what its threads see of a tensor.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "../elements.h"
#include "../tower.h"
#include "block.h"

namespace hyperopt_ext {
namespace cuda {

// Elements that a thread takes at once: 16 bytes of fp32.
constexpr int kVector = 4;
constexpr int kThreads = 256;

// Elements of a chunk, which a block takes: fewer where there are few in all, so that every multiprocessor has work, and
// that all blocks run at once. By their number alone, so that sums are the same on every GPU.
constexpr std::int64_t chunk_of(std::int64_t elements) {
  constexpr std::int64_t kLeast = kThreads * kVector, kMost = 8 * kLeast, kBlocks = 256;
  const std::int64_t share = (elements / kBlocks + kLeast - 1) / kLeast * kLeast;
  return share < kLeast ? kLeast : share > kMost ? kMost : share;
}

// One tensor of a launch, in 64-bit words: these, and pointers after them.
enum Word : int {
  kCount,   // elements
  kPlace,   // its first chunk in this launch, and, 32 bits up, its row of the tower
  kFormat,  // ScalarType of the parameter, kAligned, kGradAligned
  kSpan,    // of the chunks of its row, which are consecutive, the first and, 32 bits up, the one after the last
  kStep,    // int64*: updates made
  kTick,    // int64*: the tower's tick at which the last one was made
  kPointers
};
// Every run of kVector elements from the start can be read at once: of the gradient; of all the others.
constexpr std::uint64_t kGradAligned = 8, kAligned = 16;

// The pointers, which are those of a Slice: the states follow kStates, then what only some kernels read, traces or grad_state
// and grad_input.
struct Pointer {
  static constexpr int kParam = 0, kGrad = 1, kLastGrad = 2, kLastParam = 3, kStates = 4;
};

// What a pass adds up: first over each chunk, then over those of each row.
struct Sums {
  double* partial;  // [columns, chunks]: sums over each chunk
  std::int64_t chunks;
  double* result;  // [rows of the tower, width]
  std::int32_t width;
  std::int32_t columns;
  std::int32_t hypers;  // of a hypergradient: width is 2 hypers + 1; else -1, and the columns are those of `partial`
  Mask set, learn;      // of the hyperparameters in the columns, and of those asked for
};

// The arguments of a kernel of the passes: a list of tensors, which are cut into chunks, a block each.
struct Launch {
  static constexpr int kWords = 2023;
  double* tower;  // [rows, width], see tower.h
  std::int64_t width;
  double horizon, horizon_growth, scale;
  const float* grad_scale;  // what gradients are divided by after they were multiplied by scale; null: 1
  Sums sums;
  std::int32_t first_chunk;  // of this launch among those of the pass
  std::int32_t tensors;
  std::int32_t blocks;
  std::int32_t stride;  // words of a tensor
  std::int32_t extra;   // of these the last ones: pointers beyond the states
  std::int32_t chunk;   // elements of a chunk
  Mask learn;
  bool counts;   // an update counts the steps
  bool adds_up;  // the last block of a row adds its chunks up
  std::uint64_t words[kWords];

  HX_FN double* header(std::int64_t row) const { return tower + row * width; }
  HX_FN unsigned* arrived(std::int64_t row) const { return reinterpret_cast<unsigned*>(header(row) + kArrived); }
};

using LaunchFunction = void (*)(const Launch&, std::int64_t blocks, void* stream);

// What a block sees of its tensor.
struct Entry {
  const std::uint64_t* words;

  HX_FN Entry(const Launch& launch, int tensor) : words(launch.words + tensor * launch.stride) {}
  HX_FN std::int64_t count() const { return std::int64_t(words[kCount]); }
  HX_FN int first_chunk() const { return int(words[kPlace] & 0xffffffffu); }
  HX_FN int row() const { return int(words[kPlace] >> 32); }
  HX_FN int row_begin() const { return int(words[kSpan] & 0xffffffffu); }
  HX_FN int row_end() const { return int(words[kSpan] >> 32); }
  HX_FN ScalarType type() const { return ScalarType(words[kFormat] & (kGradAligned - 1)); }
  HX_FN bool aligned() const { return (words[kFormat] & kAligned) != 0; }
  HX_FN bool grad_aligned() const { return (words[kFormat] & kGradAligned) != 0; }
  HX_FN std::int64_t& step() const { return *reinterpret_cast<std::int64_t*>(words[kStep]); }
  HX_FN std::int64_t& tick() const { return *reinterpret_cast<std::int64_t*>(words[kTick]); }
  template <class T>
  HX_FN T* pointer(int which) const {
    return reinterpret_cast<T*>(words[kPointers + which]);
  }
};

// The tensor of a chunk: the last one that starts at it or before.
HX_FN int tensor_of(const Launch& launch, int chunk) {
  int low = 0, high = launch.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (Entry(launch, middle).first_chunk() <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// A run of elements from i that a thread takes; whole: n is kVector.
struct Run {
  std::int64_t i;
  int n;
  bool whole;
};

// What a block works on.
struct Chunk {
  Entry entry;
  std::int64_t begin, count;

  HX_FN Chunk(const Launch& launch, int block) : entry(launch, tensor_of(launch, block)) {
    begin = std::int64_t(block - entry.first_chunk()) * launch.chunk;
    count = entry.count() - begin < launch.chunk ? entry.count() - begin : launch.chunk;
  }

  // f(run) for the runs of a thread.
  template <class F>
  HX_FN void each_run(int thread, int threads, F&& f) const {
    for (std::int64_t at = std::int64_t(thread) * kVector; at < count; at += std::int64_t(threads) * kVector) {
      const int n = int(count - at < kVector ? count - at : kVector);
      f(Run{begin + at, n, n == kVector});
    }
  }
};

// What gradients are multiplied by.
HX_FN double scale_of(const Launch& launch) {
  return launch.grad_scale == nullptr ? launch.scale : launch.scale / double(*launch.grad_scale);
}

// How a tensor stands to the tower. An update is free to count the step once all threads that read this are through.
struct Status {
  const double *used, *previous;
  std::int64_t step;
  bool ticking;   // level 0 moves in this step
  bool recorded;  // its last update was made at the tower's present tick
  bool pending;   // or at the one before
  bool known;     // or at some tick

  HX_FN Status(const Launch& launch, const Entry& entry, int hypers) {
    const double* const header = launch.header(entry.row());
    used = header + kHeader;
    previous = used + hypers;
    step = entry.step();
    const double tick = double(entry.tick()), ticks = header[kTicks];
    ticking = header[kTicking] != 0.0;
    recorded = step > 0 && tick == ticks;
    pending = step > 0 && tick == ticks - 1.0;
    known = tick >= 0.0;
  }
};

// What the traces of the parameter's elements are multiplied by in the step after `step`.
template <class A>
HX_FN A keep_of(const Launch& launch, std::int64_t step) {
  return A(hyperopt_ext::keep_of(launch.horizon, launch.horizon_growth, double(step + 1)));
}

template <class T>
struct Type {
  using type = T;
};

template <class S>
struct alignas(kVector * sizeof(S) < 16 ? kVector * sizeof(S) : 16) Vector {
  S values[kVector];
};

// All of a vector, 16 bytes at a time: of an assignment, nvcc makes a store for each number. (All stores are cached as
// __stcg says, in the second cache.)
template <class S>
HX_FN void store(const Vector<S>& from, S* to) {
#ifdef __CUDA_ARCH__
  constexpr int kWords = sizeof(Vector<S>) / sizeof(unsigned);
  unsigned words[kWords];
  memcpy(words, &from, sizeof(words));
  if constexpr (kWords == 2) {
    __stcg(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
  } else {
    HX_UNROLL
    for (int k = 0; k < kWords; k += 4)
      __stcg(reinterpret_cast<uint4*>(to) + k / 4, make_uint4(words[k], words[k + 1], words[k + 2], words[k + 3]));
  }
#else
  *reinterpret_cast<Vector<S>*>(to) = from;
#endif
}

// at_once: it is a whole run, and aligned.
template <class S, class A>
HX_FN void read(const void* start, const Run& run, bool at_once, A (&to)[kVector]) {
  const S* const from = static_cast<const S*>(start) + run.i;
  if (at_once) {
    const Vector<S> vector = *reinterpret_cast<const Vector<S>*>(from);
    HX_UNROLL
    for (int j = 0; j < kVector; ++j) to[j] = A(vector.values[j]);
  } else {
    HX_UNROLL
    for (int j = 0; j < kVector; ++j) to[j] = j < run.n ? A(from[j]) : A(0);
  }
}

template <class S, class A>
HX_FN void write(const A (&from)[kVector], void* start, const Run& run, bool at_once) {
  S* const to = static_cast<S*>(start) + run.i;
  if (at_once) {
    Vector<S> vector;
    HX_UNROLL
    for (int j = 0; j < kVector; ++j) vector.values[j] = S(from[j]);
    store(vector, to);
  } else {
    HX_UNROLL
    for (int j = 0; j < kVector; ++j)
      if (j < run.n) to[j] = S(from[j]);
  }
}

// f(Type<T>()) for the type of a parameter, which a kernel learns at run time: it is compiled for the arithmetic types.
template <class A, class F>
HX_FN void with_type(ScalarType type, F&& f) {
  if constexpr (sizeof(A) == 8)
    f(Type<double>());
  else if (type == kFloat)
    f(Type<float>());
  else if (type == kHalf)
    f(Type<c10::Half>());
  else
    f(Type<c10::BFloat16>());
}

// The arguments of a kernel of the towers, a block each.
struct TowerLaunch {
  static constexpr int kTowers = 48;
  std::int32_t towers;
  std::int32_t from, to;        // moves the levels from `from` down to `to`,
  std::int32_t differentiates;  // after the hypergradients were taken
  TowerView views[kTowers];
};

// The kernels of a rule for one arithmetic type.
struct LearnedLaunches {
  LaunchFunction update, norms, traced_update, hypergradient;
};
struct RuleLaunches {
  LaunchFunction settle, backward, vjp;
  const LearnedLaunches* sets;  // as Rule::sets
};

// All of a rule: for fp32 and for fp64.
struct DeviceRule {
  const char* name;
  RuleLaunches arithmetic[2];
  // Moves coordinates by this rule, for towers that are not compiled with it.
  void (*level)(const TowerLaunch&, void* stream);
};

// The kernels that no rule changes, [2]: fp32 and fp64.
struct VectorLaunches {
  LaunchFunction squared_norm, products, decay;
};
extern const VectorLaunches vector_launches[2];

// Takes the last step of every tensor off the record.
void forget_steps(const Launch& launch, void* stream);

// Adds all chunks up, of a single row: where there are so many that one block would take too long.
void sum_chunks(const Sums& sums, void* stream);

// All levels by the rules that are built in.
void move_towers(const TowerLaunch& launch, void* stream);
void cap_towers(const TowerLaunch& launch, void* stream);

}  // namespace cuda
}  // namespace hyperopt_ext
