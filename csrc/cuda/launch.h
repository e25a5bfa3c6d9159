// How work gets to a GPU: what a kernel is given, what its threads see of a tensor, and how it is started.
//
// A kernel is a class K with
//
//   kThreads                                    threads of a block
//   Shared                                      what they share
//   block(arguments, block, shared, team)       what a block does, in phases: team.each(f) calls f(thread) for each of its
//                                               threads, and all are through before it returns to any of them;
//                                               team.is_last(arrived, blocks), called by one thread, is true for the
//                                               last of so many blocks that ask: what the others did before they asked
//                                               is done
//
// so that nvcc makes a kernel of it, and any C++ compiler a loop over blocks and threads (the tests run that one).
#pragma once

#include <cstdint>
#include <new>

#include "../elements.h"
#include "../tower.h"

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#define HX_UNROLL _Pragma("unroll")
#define HX_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define HX_UNROLL_BY(n) HX_PRAGMA(unroll n)
#else
#include <algorithm>
#include <numeric>
#include <random>
#include <vector>
#define HX_UNROLL
#define HX_UNROLL_BY(n)
#endif

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

// Arguments of a kernel are at most this large, whatever the driver.
constexpr std::size_t kArgumentBytes = 4096;

#ifdef __CUDACC__

struct DeviceTeam {
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }
  // `arrived` is 0 before the first one and after the last.
  __device__ __forceinline__ bool is_last(unsigned* arrived, unsigned blocks) const {
    if (blocks == 1) return true;
    fence();
    const bool last = atomicInc(arrived, blocks - 1) == blocks - 1;
    if (last) fence();
    return last;
  }

 private:
  // __threadfence() is one of sequential consistency, which takes longer.
  __device__ static void fence() {
#if __CUDA_ARCH__ >= 700
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
    __threadfence();
#endif
  }
};

// One block on a multiprocessor is enough: otherwise ptxas spills registers to fit more.
template <class K, class Arguments>
__global__ void __launch_bounds__(K::kThreads, 1) kernel(const __grid_constant__ Arguments arguments) {
  __shared__ typename K::Shared shared;
  K::block(arguments, int(blockIdx.x), shared, DeviceTeam{});
}

template <class K, class Arguments>
void launch(const Arguments& arguments, std::int64_t blocks, void* stream) {
  static_assert(sizeof(Arguments) <= kArgumentBytes, "too large for the arguments of a kernel");
  kernel<K, Arguments><<<unsigned(blocks), K::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
}

#else

// The order in which the host runs the blocks of a kernel and the threads of each phase: it must not matter. 0: that of
// their numbers; 1: the reverse; 2: a random one, another each time.
inline int host_order = 0;

template <class F>
void each_in_order(std::int64_t n, F&& f) {
  if (host_order == 0)
    for (std::int64_t i = 0; i < n; ++i) f(i);
  else if (host_order == 1)
    for (std::int64_t i = n; i-- > 0;) f(i);
  else {
    static std::minstd_rand random;
    std::vector<std::int64_t> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    for (std::int64_t i : order) f(i);
  }
}

template <int Threads>
struct HostTeam {
  template <class F>
  void each(F&& f) const {
    each_in_order(Threads, [&](std::int64_t thread) { f(int(thread)); });
  }
  bool is_last(unsigned* arrived, unsigned blocks) const {
    *arrived = *arrived + 1 == blocks ? 0 : *arrived + 1;
    return *arrived == 0;
  }
};

#ifdef HX_RUN_PTX  // what nvcc made of the kernel, as a function of the host of the same name: the tests
template <class K, class Arguments>
void kernel(const Arguments arguments);

template <class K, class Arguments>
void run_block(const Arguments& arguments, std::int64_t block) {
  using Translated = void (*)(const void* arguments, unsigned block, unsigned threads);
  reinterpret_cast<Translated>(&kernel<K, Arguments>)(&arguments, unsigned(block), unsigned(K::kThreads));
}
#else
template <class K, class Arguments>
void run_block(const Arguments& arguments, std::int64_t block) {
  typename K::Shared shared;
  K::block(arguments, int(block), shared, HostTeam<K::kThreads>{});
}
#endif

template <class K, class Arguments>
void launch(const Arguments& arguments, std::int64_t blocks, void*) {
  static_assert(sizeof(Arguments) <= kArgumentBytes, "too large for the arguments of a kernel");
  each_in_order(blocks, [&](std::int64_t block) { run_block<K>(arguments, block); });
}

#endif

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
  static constexpr int kWords = 487;
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
  bool ok;        // level 0 moves in this step
  bool recorded;  // its last update was made at the tower's present tick
  bool pending;   // or at the one before
  bool known;     // or at some tick

  HX_FN Status(const Launch& launch, const Entry& entry, int hypers) {
    const double* const header = launch.header(entry.row());
    used = header + kHeader;
    previous = used + hypers;
    step = entry.step();
    const double tick = double(entry.tick()), ticks = header[kTicks];
    ok = header[kOk] != 0.0;
    recorded = step > 0 && tick == ticks;
    pending = step > 0 && tick == ticks - 1.0;
    known = tick >= 0.0;
  }
};

// What the traces of the parameter's elements are multiplied by in the step after `step`.
template <class A>
HX_FN A keep_of(const Launch& launch, std::int64_t step) {
  const double part = launch.horizon_growth * double(step + 1);
  return A(1.0 - 1.0 / (part > launch.horizon ? part : launch.horizon));
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
