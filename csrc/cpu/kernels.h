// The CPU kernels of a rule: one pass over a run of elements, for the update and for the hypergradient.
//
// The loops are plain; the compiler vectorises them, once for each instruction set in HX_CLONES, and the loader picks the
// best one for the machine. What that needs: duals in registers (dual.h), a by-value copy of the prepared values, a
// promise that the tensors do not overlap (HX_INDEPENDENT), and -fassociative-math for the sums.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <new>

#include "../rule.h"

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

// Arithmetic and state of half-precision parameters are fp32.
template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements whose products are summed in the arithmetic type before they are added up in double.
constexpr std::int64_t kSumBlock = 1024;
// Elements whose derivatives are kept, in the first cache, before they are added to the traces.
constexpr std::int64_t kTraceBlock = 256;

// The elements of a slice, typed. G: the type behind last_grad.
template <class R, class T, class G = Arithmetic<T>>
struct Elements {
  using A = Arithmetic<T>;
  static constexpr auto kStates = std::make_index_sequence<R::state.size()>{};
  T* w;
  const T* g;
  A* s[kMaxStates];
  G* last_g;
  T* last_w;
  A scale;

  HX_FN explicit Elements(const Slice& x)
      : w(static_cast<T*>(x.param)),
        g(static_cast<const T*>(x.grad)),
        last_g(static_cast<G*>(x.last_grad)),
        last_w(static_cast<T*>(x.last_param)),
        scale(A(x.scale)) {
    for (int k = 0; k < kMaxStates; ++k) s[k] = static_cast<A*>(x.state[k]);
  }

  HX_FN auto param(std::int64_t i) const { return constant(A(w[i])); }
  HX_FN auto grad(std::int64_t i) const { return constant(scale * A(g[i])); }
  HX_FN auto last_param(std::int64_t i) const { return constant(A(last_w[i])); }
  HX_FN auto last_grad(std::int64_t i) const { return constant(A(last_g[i])); }
  // To the bit, and not as a struct: see Dual.
  HX_FN void keep_param(std::int64_t i) const {
    if constexpr (sizeof(T) == 2)
      last_w[i].x = w[i].x;
    else
      last_w[i] = w[i];
  }
  HX_FN auto state(std::int64_t i) const { return state(i, kStates); }
  HX_FN auto variable_state(std::int64_t i) const { return variable_state(i, kStates); }
  template <class State>
  HX_FN void set_state(std::int64_t i, const State& values) const {
    set_state(i, values, kStates);
  }

 private:
  template <std::size_t... I>
  HX_FN auto state([[maybe_unused]] std::int64_t i, std::index_sequence<I...>) const {
    return pack(constant(s[I][i])...);
  }
  template <std::size_t... I>
  HX_FN auto variable_state([[maybe_unused]] std::int64_t i, std::index_sequence<I...>) const {
    return pack(variable<kOfState + int(I)>(s[I][i])...);
  }
  template <class State, std::size_t... I>
  HX_FN void set_state([[maybe_unused]] std::int64_t i, const State& values, std::index_sequence<I...>) const {
    ((s[I][i] = std::get<I>(values).value), ...);
  }
};

// The rule's functions over what advance() returns. advance() itself reads the state at the front of that.
template <class R, class P, class E, class State, std::size_t... I>
HX_FN auto advance(const P& p, const E& e, const State& state, std::index_sequence<I...>) {
  return R::advance(p, e, std::get<I>(state)...);
}
template <class R, class P, class E, class State>
HX_FN auto advance(const P& p, const E& e, const State& state) {
  return advance<R>(p, e, state, std::make_index_sequence<R::state.size()>{});
}
template <class R, class P, class E, class W, class... S, std::size_t... I>
HX_FN auto change(const P& p, const E& e, const W& w, const std::tuple<S...>& state, std::index_sequence<I...>) {
  return R::change(p, e, w, std::get<I>(state)...);
}
template <class R, class P, class E, class W, class... S>
HX_FN auto change(const P& p, const E& e, const W& w, const std::tuple<S...>& state) {
  return change<R>(p, e, w, state, std::index_sequence_for<S...>{});
}

template <class R, class T, Mask S>
void prepare(const double* hyper, double step, void* out) {
  using P = Prepared<R, Arithmetic<T>, S>;
  static_assert(sizeof(P) <= kPreparedBytes, "prepare() returns more values than a kernel can take");
  new (out) P(to<Arithmetic<T>>(R::prepare(Hypers<S>{hyper}, step)));
}

// One step. With kDeferred the stored state is that before the last step (if there was one: last_prepared != null): it is
// brought up to date first, and this step's advance is left to the next call.
template <class R, class T, unsigned Keep>
HX_CLONES void update(const Slice& slice, const void* prepared, const void* last_prepared) {
  using P = Prepared<R, Arithmetic<T>, 0>;
  const Elements<R, T> x(slice);
  const P p = *static_cast<const P*>(prepared);
  const auto step = [&](std::int64_t i, const auto& before) HX_LAMBDA {
    const auto w = x.param(i);
    const auto e = x.grad(i) + R::penalty(p, w);
    const auto after = advance<R>(p, e, before);
    if constexpr ((Keep & kDeferred) != 0)
      x.set_state(i, before);
    else
      x.set_state(i, after);
    if constexpr ((Keep & kGrad) != 0) x.last_g[i] = e.value;
    if constexpr ((Keep & kParam) != 0) x.keep_param(i);
    x.w[i] = T((w + change<R>(p, e, w, after)).value);
  };
  if ((Keep & kDeferred) != 0 && last_prepared != nullptr) {
    const P last = *static_cast<const P*>(last_prepared);
    HX_INDEPENDENT
    for (std::int64_t i = 0; i < slice.count; ++i) step(i, advance<R>(last, x.last_grad(i), x.state(i)));
  } else {
    HX_INDEPENDENT
    for (std::int64_t i = 0; i < slice.count; ++i) step(i, x.state(i));
  }
}

// sums[0] += sum_i (w_new_i - w_i)^2 and sums[1] += sum_i w_i^2, for the step that update() would make.
template <class R, class T, bool Deferred>
HX_CLONES void norms(const Slice& slice, const void* prepared, const void* last_prepared, double* sums) {
  using A = Arithmetic<T>;
  using P = Prepared<R, A, 0>;
  const Elements<R, T> x(slice);
  const P p = *static_cast<const P*>(prepared);
  const bool advanced = Deferred && last_prepared != nullptr;
  const P last = *static_cast<const P*>(advanced ? last_prepared : prepared);
  for (std::int64_t begin = 0; begin < slice.count; begin += kSumBlock) {
    const std::int64_t end = std::min(begin + kSumBlock, slice.count);
    A changes = A(0), params = A(0);
    const auto add = [&](std::int64_t i, const auto& before) HX_LAMBDA {
      const auto w = x.param(i);
      const auto e = x.grad(i) + R::penalty(p, w);
      const A delta = change<R>(p, e, w, advance<R>(p, e, before)).value;
      changes += delta * delta;
      params += w.value * w.value;
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
template <class R, class T, Mask S>
HX_CLONES void traced_update(const Slice& slice, const void* prepared) {
  using A = Arithmetic<T>;
  using P = Prepared<R, A, S>;
  const Elements<R, T> x(slice);
  const P p = *static_cast<const P*>(prepared);
  const A keep = A(slice.keep);
  A tangents[count(S)][kTraceBlock];
  for (std::int64_t begin = 0; begin < slice.count; begin += kTraceBlock) {
    const std::int64_t end = std::min(begin + kTraceBlock, slice.count);
    HX_INDEPENDENT
    for (std::int64_t i = begin; i < end; ++i) {
      const auto w = x.param(i);
      const auto e = x.grad(i) + R::penalty(p, w);
      const auto after = advance<R>(p, e, x.state(i));
      const auto delta = change<R>(p, e, w, after);
      x.set_state(i, after);
      x.w[i] = T(w.value + delta.value);
      each_direction<S>([&](auto d) HX_LAMBDA { tangents[position(S, d)][i - begin] = delta.template tangent<d>(); });
    }
    for (int k = 0; k < count(S); ++k) {
      A* const z = static_cast<A*>(slice.trace[direction(S, k)]);
      if (z == nullptr) continue;  // compiled for more than is learned
      HX_INDEPENDENT
      for (std::int64_t i = begin; i < end; ++i) z[i] = keep * z[i] + tangents[k][i - begin];
    }
  }
}

// Brings a deferred state up to date, for a parameter that sits out a step.
template <class R, class T>
HX_CLONES void settle(const Slice& slice, const void* last_prepared) {
  using P = Prepared<R, Arithmetic<T>, 0>;
  const Elements<R, T> x(slice);
  const P last = *static_cast<const P*>(last_prepared);
  HX_INDEPENDENT
  for (std::int64_t i = 0; i < slice.count; ++i) x.set_state(i, advance<R>(last, x.last_grad(i), x.state(i)));
}

// The state after the last step, from the stored one.
template <class R, bool Before, class P, class E, class State>
HX_FN auto state_after(const P& p, const E& e, const State& stored) {
  if constexpr (Before)
    return advance<R>(p, e, stored);
  else
    return stored;
}

// The parameter before the last step and its effective gradient, the latter with its tangents.
template <class R, Mask S, bool Given, bool Before, class P, class X, class State>
HX_FN auto last_inputs(const P& p, const X& x, std::int64_t i, const State& stored) {
  using A = typename X::A;
  constexpr unsigned kept = RecordOf<R, S>;
  if constexpr (Given) {
    const auto w = x.last_param(i);
    return pack(w, x.last_grad(i) + R::penalty(p, w));
  } else if constexpr ((kept & kGrad) == 0) {
    if constexpr ((kept & kParam) != 0)
      return pack(x.last_param(i), constant(A(0)));
    else
      return pack(constant(A(0)), constant(A(0)));
  } else if constexpr (!PenaltyIsLearned<R, S>) {
    if constexpr ((kept & kParam) != 0)
      return pack(x.last_param(i), x.last_grad(i));
    else
      return pack(constant(A(0)), x.last_grad(i));
  } else {
    const auto e = x.last_grad(i);
    const auto w = [&]() HX_LAMBDA {
      if constexpr ((kept & kParam) != 0)
        return x.last_param(i);
      else  // change() does not read w, or kParam would be set
        return constant(A(x.w[i]) - change<R>(p, e, constant(A(0)), state_after<R, Before>(p, e, stored)).value);
    }();
    auto with_tangents = R::penalty(p, w);
    with_tangents.value = e.value;
    return pack(w, with_tangents);
  }
}

// sums[k] += sum_i G_i z_i for the k-th hyperparameter of S, where z_i = d w_new_i / dh for the w_new that the last step
// made. After these, unless Given, sum_i z_i^2 for each of them, and sum_i G_i^2.
//
// Given = false: the last step as its record tells it (RecordOf). Given = true: as its inputs tell it, w in last_param,
// the gradient in last_grad, both of the parameter's dtype, and the state before the step.
template <class R, class T, Mask S, bool Given>
HX_CLONES void hypergradient(const Slice& slice, const void* prepared, double* sums) {
  using A = Arithmetic<T>;
  using P = Prepared<R, A, S>;
  constexpr int n = count(S);
  constexpr bool before = Given || (RecordOf<R, S> & kDeferred) != 0;
  const Elements<R, T, std::conditional_t<Given, T, A>> x(slice);
  const P p = *static_cast<const P*>(prepared);
  for (std::int64_t begin = 0; begin < slice.count; begin += kSumBlock) {
    const std::int64_t end = std::min(begin + kSumBlock, slice.count);
    A products[n] = {}, squares[n] = {}, square = A(0);
    HX_INDEPENDENT
    for (std::int64_t i = begin; i < end; ++i) {
      const auto stored = x.state(i);
      const auto [w, e] = last_inputs<R, S, Given, before>(p, x, i, stored);
      const auto delta = change<R>(p, e, w, state_after<R, before>(p, e, stored));
      const A upstream = x.grad(i).value;
      each_direction<S>([&](auto d) HX_LAMBDA {
        const A z = delta.template tangent<d>();
        products[position(S, d)] += upstream * z;
        if constexpr (!Given) squares[position(S, d)] += z * z;
      });
      if constexpr (!Given) square += upstream * upstream;
    }
    for (int k = 0; k < n; ++k) sums[k] += double(products[k]);
    if constexpr (!Given) {
      for (int k = 0; k < n; ++k) sums[n + k] += double(squares[k]);
      sums[2 * n] += double(square);
    }
  }
}

// The whole vector-Jacobian product of a step, from its inputs as they are Given to hypergradient() above: to w, the
// gradient and the state before it in grad_input, and to each hyperparameter in `sums`.
template <class R, class T>
HX_CLONES void vjp(const Slice& slice, const void* prepared, double* sums) {
  using A = Arithmetic<T>;
  constexpr Mask S = kAllHypers<R>;
  constexpr int states = int(R::state.size());
  using P = Prepared<R, A, S>;
  const Elements<R, T, T> x(slice);
  const P p = *static_cast<const P*>(prepared);
  const A* grad_state[kMaxStates];
  A* grad_input[2 + kMaxStates];
  for (int k = 0; k < kMaxStates; ++k) grad_state[k] = static_cast<const A*>(slice.grad_state[k]);
  for (int k = 0; k < 2 + kMaxStates; ++k) grad_input[k] = static_cast<A*>(slice.grad_input[k]);
  constexpr Mask state_mask = ((Mask(1) << states) - 1) << kOfState;
  for (std::int64_t begin = 0; begin < slice.count; begin += kSumBlock) {
    const std::int64_t end = std::min(begin + kSumBlock, slice.count);
    A sum[count(S)] = {};
    HX_INDEPENDENT
    for (std::int64_t i = begin; i < end; ++i) {
      const auto w = variable<kOfParam>(A(x.last_w[i]));
      const auto e = variable<kOfGrad>(A(x.last_g[i])) + R::penalty(p, w);
      const auto after = advance<R>(p, e, x.variable_state(i));
      const auto updated = w + change<R>(p, e, w, after);
      const A upstream = x.grad(i).value;
      const auto pull = [&](auto d) HX_LAMBDA {
        A total = upstream * updated.template tangent<d>();
        each_direction<state_mask>([&](auto s) HX_LAMBDA {
          total += grad_state[s - kOfState][i] * std::get<s - kOfState>(after).template tangent<d>();
        });
        return total;
      };
      each_direction<S>([&](auto d) HX_LAMBDA { sum[position(S, d)] += pull(d); });
      grad_input[0][i] = pull(std::integral_constant<int, kOfParam>{});
      grad_input[1][i] = pull(std::integral_constant<int, kOfGrad>{});
      each_direction<state_mask>([&](auto d) HX_LAMBDA { grad_input[2 + d - kOfState][i] = pull(d); });
    }
    for (int k = 0; k < count(S); ++k) sums[k] += double(sum[k]);
  }
}

// One level of a scalar tower (LevelKernel in rule.h).
template <class R>
void level(const double* hyper, double step, int n, double* x, const double* grad, double* state, double* tangents) {
  constexpr Mask all = kAllHypers<R>;
  constexpr int hypers = int(R::hypers.size());
  const auto p = R::prepare(Hypers<all>{hyper}, step);
  Slice slice{};
  for (int k = 0; k < int(R::state.size()); ++k) slice.state[k] = state + k * n;
  const Elements<R, double> s(slice);
  for (int j = 0; j < n; ++j) {
    const auto w = constant(x[j]);
    const auto e = constant(grad[j]) + R::penalty(p, w);
    const auto after = advance<R>(p, e, s.state(j));
    const auto delta = change<R>(p, e, w, after);
    s.set_state(j, after);
    x[j] += delta.value;
    each_direction<all>([&](auto d) HX_LAMBDA { tangents[j * hypers + d] = delta.template tangent<d>(); });
  }
}

}  // namespace
}  // namespace hyperopt_ext
