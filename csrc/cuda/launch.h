// How work gets to a GPU: what a kernel is given, what its threads see of a tensor, and how it is started.
//
// A kernel is a class K with
//
//   kThreads                                    threads of a block
//   Shared                                      what they share
//   block(arguments, block, shared, team)       what a block does, in phases: team.each(f) calls f(thread) for each of its
//                                               threads, and all are through before it returns to any of them;
//                                               team.is_last(arrived, blocks) is true for the last one of so many blocks
//                                               that ask, which sees all that the others wrote before
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

// Elements of a chunk, which a block takes: fewer where there are few in all, so that every multiprocessor has work. By
// their number alone, so that sums are the same on every GPU.
constexpr std::int64_t chunk_of(std::int64_t elements) {
  constexpr std::int64_t kLeast = kThreads * kVector, kMost = 8 * kLeast, kBlocks = 512;
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
    __shared__ bool last;
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicInc(arrived, blocks - 1) == blocks - 1;
      __threadfence();
    }
    __syncthreads();
    return last;
  }
};

// At least one block at a time: without that word, ptxas spills a register here and there to fit more of them.
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
  kFormat,  // ScalarType of the parameter, and kAligned; 32 bits up, in how many chunks of the pass the row has a part
  kSpan,    // the first of these, and, 32 bits up, the one after the last
  kStep,    // int64*: updates made
  kTick,    // int64*: the tower's tick at which the last one was made
  kPointers
};
constexpr std::uint64_t kAligned = 8;  // every run of kVector elements from its start can be read at once

// The pointers, which are those of a Slice: the states follow kStates, then what only some kernels read, traces or grad_state
// and grad_input.
struct Pointer {
  static constexpr int kParam = 0, kGrad = 1, kLastGrad = 2, kLastParam = 3, kStates = 4;
};

// What a pass adds up: first over each chunk, then over those of each row.
struct Sums {
  double* partial;     // [columns, chunks]: sums over each chunk
  std::int32_t* rows;  // [chunks]: the row of the tower of each
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

// What one block, or one thread of Count, sees of its tensor.
struct Entry {
  const std::uint64_t* words;

  HX_FN Entry(const Launch& launch, int tensor) : words(launch.words + tensor * launch.stride) {}
  HX_FN std::int64_t count() const { return std::int64_t(words[kCount]); }
  HX_FN int first_chunk() const { return int(words[kPlace] & 0xffffffffu); }
  HX_FN int row() const { return int(words[kPlace] >> 32); }
  HX_FN unsigned row_chunks() const { return unsigned(words[kFormat] >> 32); }
  HX_FN int row_begin() const { return int(words[kSpan] & 0xffffffffu); }
  HX_FN int row_end() const { return int(words[kSpan] >> 32); }
  HX_FN ScalarType type() const { return ScalarType(words[kFormat] & (kAligned - 1)); }
  HX_FN bool aligned() const { return (words[kFormat] & kAligned) != 0; }
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

// A chunk, and how its tensor stands to the tower.
struct Chunk {
  Entry entry;
  std::int64_t begin, count;
  const double *header, *used, *previous;
  std::int64_t step;
  double scale;   // what gradients are multiplied by
  bool ok;        // level 0 moves in this step
  bool recorded;  // its last update was made at the tower's present tick
  bool pending;   // or at the one before
  bool known;     // or at some tick

  HX_FN Chunk(const Launch& launch, int block, int hypers) : entry(launch, tensor_of(launch, block)) {
    begin = std::int64_t(block - entry.first_chunk()) * launch.chunk;
    count = entry.count() - begin < launch.chunk ? entry.count() - begin : launch.chunk;
    header = launch.header(entry.row());
    used = header + kHeader;
    previous = used + hypers;
    step = entry.step();
    scale = launch.grad_scale == nullptr ? launch.scale : launch.scale / double(*launch.grad_scale);
    const double tick = double(entry.tick()), ticks = header[kTicks];
    ok = header[kOk] != 0.0;
    recorded = step > 0 && tick == ticks;
    pending = step > 0 && tick == ticks - 1.0;
    known = tick >= 0.0;
  }

  // f(i, n, whole) for every run of n elements from i that is the thread's; whole: they can be read at once.
  template <class F>
  HX_FN void each_run(int thread, int threads, F&& f) const {
    for (std::int64_t at = std::int64_t(thread) * kVector; at < count; at += std::int64_t(threads) * kVector) {
      const int n = int(count - at < kVector ? count - at : kVector);
      f(begin + at, n, n == kVector && entry.aligned());
    }
  }
};

// What the traces of the parameter's elements are multiplied by in the step after `step`.
template <class A>
HX_FN A keep_of(const Launch& launch, std::int64_t step) {
  const double part = launch.horizon_growth * double(step + 1);
  return A(1.0 - 1.0 / (part > launch.horizon ? part : launch.horizon));
}

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

template <class S, class A>
HX_FN void read(const void* start, std::int64_t i, int n, bool whole, A (&to)[kVector]) {
  const S* const from = static_cast<const S*>(start) + i;
  if (whole) {
    const Vector<S> vector = *reinterpret_cast<const Vector<S>*>(from);
    HX_UNROLL
    for (int j = 0; j < kVector; ++j) to[j] = A(vector.values[j]);
  } else {
    HX_UNROLL
    for (int j = 0; j < kVector; ++j) to[j] = j < n ? A(from[j]) : A(0);
  }
}

template <class S, class A>
HX_FN void write(const A (&from)[kVector], void* start, std::int64_t i, int n, bool whole) {
  S* const to = static_cast<S*>(start) + i;
  if (whole) {
    Vector<S> vector;
    HX_UNROLL
    for (int j = 0; j < kVector; ++j) vector.values[j] = S(from[j]);
    store(vector, to);
  } else {
    HX_UNROLL
    for (int j = 0; j < kVector; ++j)
      if (j < n) to[j] = S(from[j]);
  }
}

// The same for tensors of the parameter's dtype, which a kernel learns at run time: it is compiled for the arithmetic types.
template <class A>
HX_FN void read(ScalarType type, const void* start, std::int64_t i, int n, bool whole, A (&to)[kVector]) {
  if constexpr (sizeof(A) == 8)
    read<double>(start, i, n, whole, to);
  else if (type == kFloat)
    read<float>(start, i, n, whole, to);
  else if (type == kHalf)
    read<c10::Half>(start, i, n, whole, to);
  else
    read<c10::BFloat16>(start, i, n, whole, to);
}

template <class A>
HX_FN void write(ScalarType type, const A (&from)[kVector], void* start, std::int64_t i, int n, bool whole) {
  if constexpr (sizeof(A) == 8)
    write<double>(from, start, i, n, whole);
  else if (type == kFloat)
    write<float>(from, start, i, n, whole);
  else if (type == kHalf)
    write<c10::Half>(from, start, i, n, whole);
  else
    write<c10::BFloat16>(from, start, i, n, whole);
}

// Adds values [Columns][Threads] up over the threads, in a fixed order; folded() has the sum of a column then.
constexpr int kParts = 16;  // sums of every 16th value: neighbouring threads read from different banks

template <int Threads, int Columns, class Team>
HX_FN void fold(const Team& team, double* values) {
  static_assert(Columns <= Threads);
  team.each([&](int thread) {
    HX_UNROLL_BY(1)  // the registers of a kernel are those of its hungriest phase, and this one has the least to do
    for (int q = thread; q < Columns * kParts; q += Threads) {
      double* const part = values + q / kParts * Threads + q % kParts;
      double sum = 0.0;
      HX_UNROLL_BY(4)
      for (int j = 0; j < Threads; j += kParts) sum += part[j];
      part[0] = sum;
    }
  });
}

template <int Threads>
HX_FN double folded(const double* values, int column) {
  double sum = 0.0;
  HX_UNROLL_BY(4)
  for (int part = 0; part < kParts; ++part) sum += values[column * Threads + part];
  return sum;
}

// The values [Columns][Threads] of a block to those columns of `partial` that place(column) names.
template <int Threads, int Columns, class Team, class F>
HX_FN void sum_chunk(const Team& team, double* values, const Launch& launch, int block, F&& place) {
  fold<Threads, Columns>(team, values);
  team.each([&](int thread) {
    const int chunk = launch.first_chunk + block;
    if (thread == 0) launch.sums.rows[chunk] = Entry(launch, tensor_of(launch, block)).row();
    if (thread < Columns)
      launch.sums.partial[place(thread) * launch.sums.chunks + chunk] = folded<Threads>(values, thread);
  });
}

// The column of `partial` that a number of the result is the sum of; -1: it is 0.
HX_FN int source_of(const Sums& sums, int column) {
  if (sums.hypers < 0) return column;
  const int learned = count(sums.set), hyper = column % sums.hypers;
  if (column == 2 * sums.hypers) return 2 * learned;
  if ((sums.learn & bit(hyper)) == 0) return -1;
  return position(sums.set, hyper) + (column < sums.hypers ? 0 : learned);
}

// Adds the chunks of a row up, which are among those from `begin` to `end`: so many columns of them, from `first`. `values`
// has room for a number of each thread.
template <int Threads, class Team>
HX_FN void add_chunks(const Team& team, double* values, const Sums& sums, int row, int begin, int end, int first,
                      int columns) {
  const int lanes = Threads / columns, parts = lanes < kParts ? lanes : kParts;
  team.each([&](int thread) {
    if (thread >= columns * lanes) return;
    const double* const partial = sums.partial + (first + thread / lanes) * sums.chunks;
    double sum = 0.0;
    HX_UNROLL_BY(8)  // both are read, whatever the row is, so that many reads are under way at once
    for (int chunk = begin + thread % lanes; chunk < end; chunk += lanes) {
      const double part = partial[chunk];
      sum += sums.rows[chunk] == row ? part : 0.0;
    }
    values[thread] = sum;
  });
  team.each([&](int thread) {
    for (int q = thread; q < columns * parts; q += Threads) {
      double* const part = values + q / parts * lanes + q % parts;
      double sum = 0.0;
      HX_UNROLL_BY(4)
      for (int j = 0; j < lanes - q % parts; j += parts) sum += part[j];
      part[0] = sum;
    }
  });
  team.each([&](int thread) {
    for (int column = thread; column < sums.width; column += Threads) {
      const int source = source_of(sums, column), place = source - first;
      double& result = sums.result[std::int64_t(row) * sums.width + column];
      if (source < 0 && first == 0) result = 0.0;
      if (place < 0 || place >= columns) continue;
      double sum = 0.0;
      for (int part = 0; part < parts; ++part) sum += values[place * lanes + part];
      result = sum;
    }
  });
}

// After sum_chunk(): the last block of a row adds its chunks up.
template <int Threads, class Team>
HX_FN void sum_row(const Team& team, double* values, const Launch& launch, int block) {
  const Entry entry(launch, tensor_of(launch, block));
  if (!launch.adds_up || !team.is_last(launch.arrived(entry.row()), entry.row_chunks())) return;
  add_chunks<Threads>(team, values, launch.sums, entry.row(), entry.row_begin(), entry.row_end(), 0,
                      launch.sums.columns);
}

// At the end of a kernel with `Columns` sums of each chunk.
template <int Threads, int Columns, class Team>
HX_FN void finish_sums(const Team& team, double* values, const Launch& launch, int block) {
  sum_chunk<Threads, Columns>(team, values, launch, block, [](int column) { return column; });
  sum_row<Threads>(team, values, launch, block);
}

// f(entry, header of its row) for every tensor of a launch, by one block.
template <class F>
HX_FN void each_tensor(const Launch& launch, int thread, int threads, F&& f) {
  for (int tensor = thread; tensor < launch.tensors; tensor += threads) {
    const Entry entry(launch, tensor);
    f(entry, launch.header(entry.row()));
  }
}

// At the end of an update: its last block counts the step of every tensor. No block before it reads these any more.
template <int Threads, class Team>
HX_FN void count_steps(const Team& team, const Launch& launch) {
  if (!launch.counts || !team.is_last(launch.arrived(0), unsigned(launch.blocks))) return;
  team.each([&](int thread) {
    each_tensor(launch, thread, Threads, [](const Entry& entry, const double* header) {
      if (header[kOk] == 0.0) return;
      entry.step() += 1;
      entry.tick() = std::int64_t(header[kTicks]);
    });
  });
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
