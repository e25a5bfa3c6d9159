// The CPU kernels of a rule: one pass over a run of elements, for the update and for the hypergradient.
//
// All elements are of the arithmetic type, A. The loops are plain; the compiler vectorises them, once for each instruction
// set in HX_CLONES, and the loader picks the best one for the machine. What that needs: duals in registers (dual.h), a
// by-value copy of the prepared values, a promise that the tensors do not overlap (HX_INDEPENDENT), and
// -fassociative-math for the sums.
#pragma once

#include <algorithm>
#include <new>

#include "../elements.h"

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define HX_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define HX_CLONES
#endif
#if defined(__clang__)
#define HX_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define HX_INDEPENDENT _Pragma("GCC ivdep")
#else
#define HX_INDEPENDENT
#endif

namespace hyperopt_ext {
namespace {  // target_clones need internal linkage

// Elements whose products are summed in the arithmetic type before they are added up in double.
constexpr std::int64_t kSumBlock = 1024;
// Elements whose derivatives are kept, in the first cache, before they are added to the traces.
constexpr std::int64_t kTraceBlock = 256;

template <class R, class A, Mask S>
void prepare(const double* hyper, double step, void* out) {
  using P = Prepared<R, A, S>;
  static_assert(
      sizeof(P) <= kPreparedBytes,
      "hyperopt_ext: prepare() returns more values than a kernel can take, which is kPreparedBytes of them and "
      "of their derivatives, in double; leave to the other functions what can be made of fewer");
  new (out) P(to<A>(R::prepare(HypersOf<R, S>{hyper}, step)));
}

// One step. With kDeferred the stored state is that before the last step (if there was one: last_prepared != null): it
// is brought up to date first, and this step's advance is left to the next call.
template <class R, class A, unsigned Keep>
HX_CLONES void update(const Slice& slice, const void* prepared, const void* last_prepared) {
  using P = Prepared<R, A, 0>;
  const Elements<R, A> x(slice);
  const P p = *static_cast<const P*>(prepared);
  if ((Keep & kDeferred) != 0 && last_prepared != nullptr) {
    const P last = *static_cast<const P*>(last_prepared);
    HX_INDEPENDENT
    for (std::int64_t i = 0; i < slice.count; ++i)
      make_step<R, Keep>(p, x, i, advance<R>(last, x.last_grad(i), x.state(i)));
  } else {
    HX_INDEPENDENT
    for (std::int64_t i = 0; i < slice.count; ++i) make_step<R, Keep>(p, x, i, x.state(i));
  }
}

// sums[0] += sum_i (w_new_i - w_i)^2 and sums[1] += sum_i w_i^2 (square_if_small), for the step that update() would make.
template <class R, class A, bool Deferred>
HX_CLONES void norms(const Slice& slice, const void* prepared, const void* last_prepared, double* sums) {
  using P = Prepared<R, A, 0>;
  const Elements<R, A> x(slice);
  const P p = *static_cast<const P*>(prepared);
  const bool advanced = Deferred && last_prepared != nullptr;
  const P last = *static_cast<const P*>(advanced ? last_prepared : prepared);
  for (std::int64_t begin = 0; begin < slice.count; begin += kSumBlock) {
    const std::int64_t end = std::min(begin + kSumBlock, slice.count);
    A changes = A(0), params = A(0);
    const auto add = [&](std::int64_t i, const auto& before) HX_LAMBDA {
      const A delta = coming_change<R>(p, x, i, before);
      changes += delta * delta;
      params += square_if_small(x.w[i]);
    };
    if (advanced) {
      HX_INDEPENDENT
      for (std::int64_t i = begin; i < end; ++i) add(i, advance<R>(last, x.last_grad(i), x.state(i)));
    } else {
      HX_INDEPENDENT
      for (std::int64_t i = begin; i < end; ++i) add(i, x.state(i));
    }
    sums[0] += double(changes);
    sums[1] += double(params);
  }
}

// One step that also adds its derivatives to the traces: z <- keep z + d w_new / d h. There is no record then.
template <class R, class A, Mask S>
HX_CLONES void traced_update(const Slice& slice, const void* prepared) {
  using P = Prepared<R, A, S>;
  const Elements<R, A> x(slice);
  const P p = *static_cast<const P*>(prepared);
  const A keep = A(slice.keep);
  A tangents[count(S)][kTraceBlock];
  for (std::int64_t begin = 0; begin < slice.count; begin += kTraceBlock) {
    const std::int64_t end = std::min(begin + kTraceBlock, slice.count);
    HX_INDEPENDENT
    for (std::int64_t i = begin; i < end; ++i) {
      const auto delta = make_traced_step<R>(p, x, i);
      each_direction<S>([&](auto d) HX_LAMBDA { tangents[position(S, d)][i - begin] = delta.template tangent<d>(); });
    }
    for (int k = 0; k < count(S); ++k) {
      A* const z = static_cast<A*>(slice.trace[direction(S, k)]);
      if (z == nullptr) continue;  // compiled for more than is learned
      HX_INDEPENDENT
      for (std::int64_t i = begin; i < end; ++i) z[i] = next_trace(keep, z[i], tangents[k][i - begin]);
    }
  }
}

// Brings a deferred state up to date, for a parameter that sits out a step.
template <class R, class A>
HX_CLONES void settle(const Slice& slice, const void* last_prepared) {
  using P = Prepared<R, A, 0>;
  const Elements<R, A> x(slice);
  const P last = *static_cast<const P*>(last_prepared);
  HX_INDEPENDENT
  for (std::int64_t i = 0; i < slice.count; ++i) x.set_state(i, advance<R>(last, x.last_grad(i), x.state(i)));
}

// sums[k] += sum_i G_i z_i for the k-th hyperparameter of S, where z_i = d w_new_i / dh for the w_new that the last
// step made. After these, unless Given, sum_i z_i^2 for each of them (if Squares; they cost a quarter of the pass where it
// is not bound by memory), and sum_i G_i^2. Given: as in last_change().
template <class R, class A, Mask S, bool Given, bool Squares>
HX_CLONES void hypergradient(const Slice& slice, const void* prepared, double* sums) {
  using P = Prepared<R, A, S>;
  constexpr int n = count(S);
  const Elements<R, A> x(slice);
  const P p = *static_cast<const P*>(prepared);
  for (std::int64_t begin = 0; begin < slice.count; begin += kSumBlock) {
    const std::int64_t end = std::min(begin + kSumBlock, slice.count);
    A products[n] = {}, square = A(0);
    [[maybe_unused]] A squares[n] = {};
    HX_INDEPENDENT
    for (std::int64_t i = begin; i < end; ++i) {
      const auto delta = last_change<R, S, Given>(p, x, i);
      const A upstream = x.grad(i).value;
      each_direction<S>([&](auto d) HX_LAMBDA {
        const A z = delta.template tangent<d>();
        products[position(S, d)] += upstream * z;
        if constexpr (Squares) squares[position(S, d)] += z * z;
      });
      if constexpr (!Given) square += upstream * upstream;
    }
    for (int k = 0; k < n; ++k) sums[k] += double(products[k]);
    if constexpr (Squares)
      for (int k = 0; k < n; ++k) sums[n + k] += double(squares[k]);
    if constexpr (!Given) sums[2 * n] += double(square);
  }
}

// The whole vector-Jacobian product of a step, from its inputs as they are Given to hypergradient() above: to w, the
// gradient and the state before it in grad_input, and to each hyperparameter in `sums`.
template <class R, class A>
HX_CLONES void vjp(const Slice& slice, const void* prepared, double* sums) {
  constexpr Mask S = kAllHypers<R>;
  constexpr int states = int(R::state.size());
  using P = Prepared<R, A, S>;
  const Elements<R, A> x(slice);
  const P p = *static_cast<const P*>(prepared);
  const A* grad_state[kMaxStates];
  A* grad_input[2 + kMaxStates];
  for (int k = 0; k < states; ++k) grad_state[k] = static_cast<const A*>(slice.grad_state[k]);
  for (int k = 0; k < 2 + states; ++k) grad_input[k] = static_cast<A*>(slice.grad_input[k]);
  for (std::int64_t begin = 0; begin < slice.count; begin += kSumBlock) {
    const std::int64_t end = std::min(begin + kSumBlock, slice.count);
    A sum[count(S)] = {};
    HX_INDEPENDENT
    for (std::int64_t i = begin; i < end; ++i) {
      pull_back<R>(
          p, x, i, [&](int k) HX_LAMBDA { return grad_state[k][i]; },
          [&](int k, A value) HX_LAMBDA { grad_input[k][i] = value; },
          [&](int k, A value) HX_LAMBDA { sum[k] += value; });
    }
    for (int k = 0; k < count(S); ++k) sums[k] += double(sum[k]);
  }
}

}  // namespace
}  // namespace hyperopt_ext
