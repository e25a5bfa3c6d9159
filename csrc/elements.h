// One element of a step, of its hypergradient and of its vector-Jacobian product, for any rule: what the loops of
// cpu/kernels.h and the threads of cuda/kernels.h have in common.
#pragma once

#include "numerics.h"
#include "registry.h"

namespace hyperopt_ext {
namespace {  // functions with target_clones, which inline these, need internal linkage

// The elements of a slice, typed: all in the arithmetic type.
template <class R, class Arithmetic>
struct Elements {
  using A = Arithmetic;
  static constexpr auto kStates = std::make_index_sequence<R::state.size()>{};
  A* w;
  const A* g;
  A* s[kMaxStates];
  A* last_g;
  A* last_w;
  A scale;

  Elements() = default;
  HX_FN explicit Elements(const Slice& x)
      : w(static_cast<A*>(x.param)),
        g(static_cast<const A*>(x.grad)),
        last_g(static_cast<A*>(x.last_grad)),
        last_w(static_cast<A*>(x.last_param)),
        scale(A(x.scale)) {
    for (int k = 0; k < kMaxStates; ++k) s[k] = static_cast<A*>(x.state[k]);
  }

  HX_FN auto param(std::int64_t i) const { return decaying(w[i]); }
  HX_FN auto grad(std::int64_t i) const { return constant(scale * g[i]); }
  HX_FN auto last_param(std::int64_t i) const { return decaying(last_w[i]); }
  HX_FN auto last_grad(std::int64_t i) const { return constant(last_g[i]); }
  HX_FN auto state(std::int64_t i) const { return state(i, kStates); }
  HX_FN auto variable_state(std::int64_t i) const { return variable_state(i, kStates); }
  template <class State>
  HX_FN void set_state(std::int64_t i, const State& values) const {
    set_state(i, values, kStates);
  }

 private:
  // A weight as the rules read it, which is for its decay: 0 if it is infinite, so that it stays what it is and none becomes
  // NaN because of a decay of 0.
  HX_FN static auto decaying(A weight) { return constant(is_finite(weight) ? weight : A(0)); }
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
    ((s[I][i] = get<I>(values).value), ...);
  }
};

// The rule's functions, given all that advance() returned as one tuple. The next advance() reads the state alone, which
// stands at the front of it.
template <class R, class P, class E, class State, std::size_t... I>
HX_FN auto advance(const P& p, const E& e, const State& state, std::index_sequence<I...>) {
  return R::advance(p, e, get<I>(state)...);
}
template <class R, class P, class E, class State>
HX_FN auto advance(const P& p, const E& e, const State& state) {
  return advance<R>(p, e, state, std::make_index_sequence<R::state.size()>{});
}
template <class R, class P, class E, class W, class... S, std::size_t... I>
HX_FN auto change(const P& p, const E& e, const W& w, const Pack<S...>& state, std::index_sequence<I...>) {
  return R::change(p, e, w, get<I>(state)...);
}
template <class R, class P, class E, class W, class... S>
HX_FN auto change(const P& p, const E& e, const W& w, const Pack<S...>& state) {
  return change<R>(p, e, w, state, std::index_sequence_for<S...>{});
}

// One step of an element from the state before it, which is what is stored if the rule defers its state.
template <class R, unsigned Keep, class P, class X, class Before>
HX_FN void make_step(const P& p, const X& x, std::int64_t i, const Before& before) {
  const auto start = x.w[i];
  const auto w = x.param(i);
  const auto e = x.grad(i) + R::penalty(p, w);
  const auto after = advance<R>(p, e, before);
  if constexpr ((Keep & kDeferred) != 0)
    x.set_state(i, before);
  else
    x.set_state(i, after);
  if constexpr ((Keep & kGrad) != 0) x.last_g[i] = e.value;
  if constexpr ((Keep & kParam) != 0) x.last_w[i] = start;
  x.w[i] = start + change<R>(p, e, w, after).value;
}

// The change that make_step() would make.
template <class R, class P, class X, class Before>
HX_FN auto coming_change(const P& p, const X& x, std::int64_t i, const Before& before) {
  const auto w = x.param(i);
  const auto e = x.grad(i) + R::penalty(p, w);
  return change<R>(p, e, w, advance<R>(p, e, before)).value;
}

// One step of an element without a record; its change, with the derivatives that go into the traces.
template <class R, class P, class X>
HX_FN auto make_traced_step(const P& p, const X& x, std::int64_t i) {
  const auto start = x.w[i];
  const auto w = x.param(i);
  const auto e = x.grad(i) + R::penalty(p, w);
  const auto after = advance<R>(p, e, x.state(i));
  const auto delta = change<R>(p, e, w, after);
  x.set_state(i, after);
  x.w[i] = start + delta.value;
  return delta;
}

// The state after the last step, from the stored one.
template <class R, bool Before, class P, class E, class State>
HX_FN auto state_after(const P& p, const E& e, const State& stored) {
  if constexpr (Before)
    return advance<R>(p, e, stored);
  else
    return stored;
}

// The parameter before the last step and its effective gradient, the latter with its tangents. What is not on record is
// not needed, and 0.
template <class R, Mask S, bool Given, class P, class X>
HX_FN auto last_inputs(const P& p, const X& x, std::int64_t i) {
  using A = typename X::A;
  constexpr bool has_param = Given || (RecordOf<R, S> & kParam) != 0, has_grad = Given || (RecordOf<R, S> & kGrad) != 0;
  const auto w = [&]() HX_LAMBDA {
    if constexpr (has_param)
      return x.last_param(i);
    else
      return constant(A(0));
  }();
  auto e = R::penalty(p, w);
  if constexpr (Given)
    e.value += x.last_grad(i).value;
  else if constexpr (has_grad)  // the penalty is in it
    e.value = x.last_grad(i).value;
  return pack(w, e);
}

// The last change of an element, with its derivatives with respect to the hyperparameters S.
//
// Given = false: the last step as its record tells it (RecordOf). Given = true: as its inputs tell it, w in last_param,
// the gradient in last_grad, and the state before the step.
template <class R, Mask S, bool Given, class P, class X>
HX_FN auto last_change(const P& p, const X& x, std::int64_t i) {
  constexpr bool before = Given || (RecordOf<R, S> & kDeferred) != 0;
  const auto [w, e] = last_inputs<R, S, Given>(p, x, i);
  return change<R>(p, e, w, state_after<R, before>(p, e, x.state(i)));
}

// The vector-Jacobian product of a step whose inputs are stored as for last_change() with Given = true. x.grad() is
// dL/d(w after the step), and above(k) is dL/d(k-th state after it). The results are passed on: dL/dw to below(0, ...),
// dL/d(gradient) to below(1, ...), dL/d(k-th state before the step) to below(2 + k, ...), and dL/d(k-th hyperparameter)
// to sum(k, ...).
template <class R, class P, class X, class Above, class Below, class Sum>
HX_FN void pull_back(const P& p, const X& x, std::int64_t i, Above&& above, Below&& below, Sum&& sum) {
  using A = typename X::A;
  constexpr Mask states = ((Mask(1) << R::state.size()) - 1) << kOfState;
  const auto w = variable<kOfParam>(x.last_param(i).value);
  const auto e = variable<kOfGrad>(x.last_grad(i).value) + R::penalty(p, w);
  const auto after = advance<R>(p, e, x.variable_state(i));
  const auto updated = w + change<R>(p, e, w, after);
  const A upstream = x.grad(i).value;
  const auto pull = [&](auto d) HX_LAMBDA {
    A total = upstream * updated.template tangent<d>();
    each_direction<states>(
        [&](auto s) HX_LAMBDA { total += above(s - kOfState) * get<s - kOfState>(after).template tangent<d>(); });
    return total;
  };
  each_direction<kAllHypers<R>>([&](auto d) HX_LAMBDA { sum(int(d), pull(d)); });
  below(0, pull(std::integral_constant<int, kOfParam>{}));
  below(1, pull(std::integral_constant<int, kOfGrad>{}));
  each_direction<states>([&](auto d) HX_LAMBDA { below(2 + d - kOfState, pull(d)); });
}

// One level of a scalar tower (LevelKernel in registry.h).
template <class R>
HX_FN void move_coordinates(const double* hyper, double step, int n, int begin, int end, double* x, const double* grad,
                            double* state, double* tangents) {
  constexpr Mask all = kAllHypers<R>;
  constexpr int hypers = int(R::hypers.size());
  const auto p = R::prepare(HypersOf<R, all>{hyper}, step);
  Elements<R, double> s;
  for (int k = 0; k < int(R::state.size()); ++k) s.s[k] = state + k * n;
  for (int j = begin; j < end; ++j) {
    const auto w = constant(x[j - begin]);
    const auto e = constant(grad[j]) + R::penalty(p, w);
    const auto after = advance<R>(p, e, s.state(j));
    const auto delta = change<R>(p, e, w, after);
    s.set_state(j, after);
    x[j - begin] += delta.value;
    each_direction<all>([&](auto d) HX_LAMBDA { tangents[(j - begin) * hypers + d] = delta.template tangent<d>(); });
  }
}

}  // namespace
}  // namespace hyperopt_ext
