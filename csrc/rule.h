// What an update rule is, and what the library derives from it.
//
// A rule states one step of an optimizer as scalar code over dual numbers, in four functions:
//
//   prepare(h, step) -> pack          once a step, in double: bias corrections, powers, whatever no element changes, and
//                                     1 - beta, which loses digits in fp32
//   penalty(p, w) -> term             what the rule adds to the gradient (coupled weight decay): e = g + term
//   advance(p, e, s...) -> pack      the state after the step, and what else change() needs to know of the state before
//   change(p, e, w, s...) -> delta    w_new - w_old, from all that advance() returned
//
// What advance() returns beyond the state is not stored (Lion's direction, Adadelta's step: they are made of a state
// that the same step replaces). It does not see w: no state can follow the parameters (an average of them, say).
//
// They are templates with a parameter for each argument, since each may carry other directions, and they are made of
// what dual.h has: + - * / between duals and numbers, sqrt, pow(dual, number) and pow(number, dual), max, sign, and
// where(condition, a, b), of duals and numbers, instead of `if`. A condition is one of `a.value`; a rule whose change()
// depends on e, or on w, by a condition alone adds 0.0 * e, or 0.0 * w (loading it tries that, with random numbers). prepare() counts
// steps from 1, those of the parameter, in a double, and may branch on them; constant(number) makes one of its values.
// Sums may be regrouped (-fassociative-math), so a term that only rounding makes is lost.
//
// Every function is an HX_FN: one that is not is an error of nvcc. Entries of `hypers` are named by an enum of the same
// order. A state starts from 0, or from what Level's `initial_state` says; a level of a tower sees a gradient of 0 first.
//
// From these four the library instantiates the update, the hypergradient and the scalar tower. `sets` names the learned
// sets to specialise, smallest first (none and all come by themselves; any other set uses the smallest that holds it).
// Which hyperparameters reach the state, and what of the last step has to be kept for the next hypergradient, is read
// off the types (RecordOf below), so a rule declares neither. If a hyperparameter is called lr, every change is
// proportional to it. See rules/adam.h for a complete rule; contract.h checks that nothing is missing.
#pragma once

#include <array>
#include <cstddef>
#include <limits>
#include <utility>

#include "dual.h"

namespace hyperopt_ext {
template <class... D>
struct Pack;
}

// For structured bindings.
template <class... D>
struct std::tuple_size<hyperopt_ext::Pack<D...>> : std::integral_constant<std::size_t, sizeof...(D)> {};
template <std::size_t I, class First, class... Rest>
struct std::tuple_element<I, hyperopt_ext::Pack<First, Rest...>>
    : std::tuple_element<I - 1, hyperopt_ext::Pack<Rest...>> {};
template <class First, class... Rest>
struct std::tuple_element<0, hyperopt_ext::Pack<First, Rest...>> {
  using type = const First;
};

namespace hyperopt_ext {

// The coordinate x in which the level above moves a hyperparameter h = T(x).
enum class Space : int {
  linear,          // h = x
  log,             // h = exp(x)
  square,          // h = x^2
  softplus,        // h = log(1 + exp(x))
  tanh,            // h = (tanh(x) + 1) / 2
  multiplicative,  // h = exp(x), where a move by d multiplies h by 1 + d
};
constexpr std::array<const char*, 6> kSpaces{"linear", "log", "square", "softplus", "tanh", "multiplicative"};

// One hyperparameter: its valid range is low <= h < high.
struct Hyperparameter {
  const char* name;
  double initial;
  double low;
  double high;
  Space space;   // the default coordinate; what has tanh stays below `high`, others may be given wider bounds
  bool learned;  // whether it is learned by default, as in the paper
};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

constexpr int kMaxStates = 4;
constexpr int kMaxHypers = 16;
constexpr std::size_t kPreparedBytes = 512;

// The N hyperparameters of a step, those in S as active directions.
template <std::size_t N, Mask S>
struct Hypers {
  const double* values;
};
template <class R, Mask S>
using HypersOf = Hypers<R::hypers.size(), S>;

template <int I, std::size_t N, Mask S>
HX_FN Dual<double, S & bit(I)> get(const Hypers<N, S>& h) {
  static_assert(0 <= I && std::size_t(I) < N,
                "hyperopt_ext: prepare() takes a hyperparameter that 'hypers' does not have");
  Dual<double, S & bit(I)> result;
  result.value = h.values[I];
  if constexpr ((S & bit(I)) != 0) result.tangents[0] = 1.0;
  return result;
}

// What prepare() and advance() return. Where it is used, a structured binding gives the values their names. Not
// std::tuple: its constructors are host functions, and nvcc silently drops such calls from device code.
template <class... D>
struct Pack {};
template <class First, class... Rest>
struct Pack<First, Rest...> {
  First first;
  Pack<Rest...> rest;
};

HX_FN Pack<> pack() {
  return {};
}
template <class First, class... Rest>
HX_FN Pack<First, Rest...> pack(const First& first, const Rest&... rest) {
  return {first, pack(rest...)};
}

template <std::size_t I, class... D>
HX_FN const auto& get(const Pack<D...>& values) {
  if constexpr (I == 0)
    return values.first;
  else
    return get<I - 1>(values.rest);
}

// The prepared values of a step in the arithmetic type of the elements.
template <class T, class... D, std::size_t... I>
HX_FN auto to(const Pack<D...>& values, std::index_sequence<I...>) {
  return pack(to<T>(get<I>(values))...);
}
template <class T, class... D>
HX_FN auto to(const Pack<D...>& values) {
  return to<T>(values, std::index_sequence_for<D...>{});
}
template <class R, class T, Mask S>
using Prepared = decltype(to<T>(R::prepare(std::declval<HypersOf<R, S>>(), 1.0)));

// What a step leaves behind so that its hypergradient can be taken at the next one.
enum Record : unsigned {
  kNothing = 0,
  kGrad = 1,      // last_grad: the effective gradient e of the step
  kDeferred = 2,  // the state stays as it was *before* the step, and is advanced from last_grad at the next one
  kParam = 4,     // last_param: the parameter before the step
};

// Directions beyond the hyperparameters: the other inputs of a step. kOfState is that of the first state.
constexpr int kOfState = kFirstInput, kOfParam = 29, kOfGrad = 30;
static_assert(kMaxHypers <= kOfState && kOfState + kMaxStates <= kOfParam, "directions overlap");

namespace detail {

// Directions that show, by type, whether a function depends on the gradient or on the parameter.
constexpr Mask kProbeGrad = bit(kOfGrad), kProbeParam = bit(kOfParam);

template <class Tuple>
struct MaskOf;
template <class... S>
struct MaskOf<Pack<S...>> {
  static constexpr Mask value = (Mask(0) | ... | S::mask);
};

// A constant, for each of a list of indices.
template <std::size_t>
struct ConstantAt {  // a class: nvcc drops the unused parameter of an alias template
  using type = Dual<double, 0>;
};

// The type of change() where gradient and parameter carry the directions above, and all that advance() returns is
// constant.
template <class R, class P, class Returned>
struct ProbeChange;
template <class R, class P, std::size_t... I>
struct ProbeChange<R, P, std::index_sequence<I...>> {
  using type =
      decltype(R::change(std::declval<P>(), std::declval<Dual<double, kProbeGrad>>(),
                         std::declval<Dual<double, kProbeParam>>(), std::declval<typename ConstantAt<I>::type>()...));
};

template <class R, std::size_t... I>
constexpr std::size_t returned(std::index_sequence<I...>) {
  using P = decltype(R::prepare(std::declval<HypersOf<R, 0>>(), 1.0));
  return std::tuple_size<decltype(R::advance(std::declval<P>(), std::declval<Dual<double, 0>>(),
                                             std::declval<typename ConstantAt<I>::type>()...))>::value;
}

template <class R, Mask S, std::size_t... I>
constexpr unsigned record_of(std::index_sequence<I...>) {
  using T = double;
  using P = decltype(R::prepare(std::declval<HypersOf<R, S>>(), 1.0));
  using C = Dual<T, 0>;
  using Penalty = decltype(R::penalty(std::declval<P>(), std::declval<C>()));
  using E = Dual<T, Penalty::mask & S>;
  using State =
      decltype(R::advance(std::declval<P>(), std::declval<E>(), std::declval<typename ConstantAt<I>::type>()...));
  constexpr std::size_t returned = std::tuple_size<State>::value;
  using Change = typename ProbeChange<R, P, std::make_index_sequence<returned>>::type;
  const bool deferred = (MaskOf<State>::value & S) != 0 || returned > R::state.size();
  const bool grad = deferred || (Change::mask & kProbeGrad) != 0 || (Penalty::mask & S) != 0;
  const bool param = (Change::mask & kProbeParam) != 0 || (Penalty::mask & S) != 0;
  return S == 0 ? kNothing : (grad ? kGrad : 0u) | (deferred ? kDeferred : 0u) | (param ? kParam : 0u);
}

}  // namespace detail

template <class R>
constexpr Mask kAllHypers = (Mask(1) << R::hypers.size()) - 1;

// The compiled sets of a rule: none, those that it names, all.
template <class R>
constexpr std::size_t kSets = R::sets.size() + 2;

template <class R>
constexpr Mask set_at(std::size_t i) {
  return i == 0 ? 0 : i + 1 < kSets<R> ? R::sets[i - 1] : kAllHypers<R>;
}

// How many values advance() returns.
template <class R>
constexpr std::size_t kReturned = detail::returned<R>(std::make_index_sequence<R::state.size()>{});

// What has to be kept between steps when the hyperparameters S of rule R are learned.
template <class R, Mask S>
constexpr unsigned RecordOf = detail::record_of<R, S>(std::make_index_sequence<R::state.size()>{});

namespace detail {

constexpr bool same(const char* a, const char* b) {
  for (; *a == *b; ++a, ++b)
    if (*a == 0) return true;
  return false;
}

}  // namespace detail

// The index of a hyperparameter; -1: the rule has none of that name.
template <class R>
constexpr int index_of(const char* name) {
  for (std::size_t i = 0; i < R::hypers.size(); ++i)
    if (detail::same(R::hypers[i].name, name)) return int(i);
  return -1;
}

}  // namespace hyperopt_ext

// What registering a rule means is up to the translation unit: cpu/register.h.
#ifndef HX_REGISTER_RULE
#define HX_REGISTER_RULE(...)
#endif
