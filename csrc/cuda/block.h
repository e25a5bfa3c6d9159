// How a kernel is written and started.
//
// A kernel is a class K with
//
//   kThreads                                    threads of a block
//   Shared                                      what they share
//   block(arguments, block, shared, team)       what a block does, in phases: team.each(f) calls f(thread) for each of its
//                                               threads, and all are through before it returns to any of them;
//                                               team.arrive(arrived, blocks), called by one thread of each of so many
//                                               blocks, is a ticket, of which team.is_last(ticket, blocks) is true for
//                                               the last one: what the others did before they took theirs is done
//
// so that nvcc makes a kernel of it, and any C++ compiler a loop over blocks and threads (the tests run that one).
#pragma once

#include <cstddef>
#include <cstdint>

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

// Arguments of a kernel are at most this large: the tensors of most models fit in. CUDA allows twice as much, from 12.1 on,
// with a driver from 530 on; a launch copies all of it.
constexpr std::size_t kArgumentBytes = 16384;

#ifdef __CUDACC__

struct DeviceTeam {
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    f(int(threadIdx.x));
    __syncthreads();
  }
  // `arrived` is 0 before the first one and after the last.
  __device__ __forceinline__ unsigned arrive(unsigned* arrived, unsigned blocks) const {
    if (blocks == 1) return 0;
    fence();
    return atomicInc(arrived, blocks - 1);
  }
  __device__ __forceinline__ bool is_last(unsigned ticket, unsigned blocks) const {
    const bool last = ticket == blocks - 1;
    if (last && blocks > 1) fence();
    return last;
  }

 private:
  // __threadfence() is one of sequential consistency, which takes longer.
  __device__ static void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
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
  unsigned arrive(unsigned* arrived, unsigned blocks) const {
    const unsigned ticket = *arrived;
    *arrived = ticket + 1 == blocks ? 0 : ticket + 1;
    return ticket;
  }
  bool is_last(unsigned ticket, unsigned blocks) const { return ticket == blocks - 1; }
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

}  // namespace cuda
}  // namespace hyperopt_ext
