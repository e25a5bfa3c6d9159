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
#include <string>
#include <utility>
#include <vector>

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
  Space space;   // the default coordinate
  bool learned;  // whether it is learned by default, as in the paper
};
constexpr double kInfinity = std::numeric_limits<double>::infinity();

constexpr int kMaxStates = 4;
constexpr int kMaxHypers = 16;
constexpr std::size_t kPreparedBytes = 512;

// The N hyperparameters of a step, those in S as active directions.
template <std::size_t N, Mask S>
struct Hypers {
  static constexpr Mask learned = S;
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

template <class T>
HX_FN bool is_finite(T x) {
  return std::fabs(x) <= std::numeric_limits<T>::max();
}

// What an element adds to the square of a norm: nothing, if it is not finite or so large that a sum might not be.
template <class T>
HX_FN T square_if_small(T x) {
  constexpr T most = std::numeric_limits<T>::max() / T(1 << 20);
  const T square = x * x;
  return square <= most ? square : T(0);
}

// What traces are multiplied by at the `step`-th step, for derivatives of the last `horizon` steps, or, if that is more,
// of this part of all of them.
HX_FN double keep_of(double horizon, double horizon_growth, double step) {
  const double part = horizon_growth * step;
  return 1.0 - 1.0 / (part > horizon ? part : horizon);
}

// A trace after a step. One that is not finite would never be again: it restarts.
template <class T>
HX_FN T next_trace(T keep, T trace, T tangent) {
  const T next = keep * trace + tangent;
  return is_finite(next) ? next : T(0);
}

// A run of elements of one tensor. Parameters, gradients and last_param have the parameter's dtype; state, last_grad and
// traces its arithmetic type (fp32 for half precision). What a CPU kernel is given is all in the latter: see Staged in
// cpu/passes.cpp.
struct Slice {
  void* param;
  void* grad;  // dL/dw, to be multiplied by `scale`; only read
  void* state[kMaxStates];
  void* last_grad;  // for backward and vjp, the gradient of the step, in the parameter's dtype
  void* last_param;
  void* trace[kMaxHypers];  // of the learned hyperparameters, if their horizon is longer than one step; else null
  // For vjp, in the arithmetic type: d loss / d state after the step, and what is made of it and of grad, d loss / d
  // (param, grad, state before it). For an update in the functional form grad_state is the state that it starts from,
  // as last_param is the parameter.
  void* grad_state[kMaxStates];
  void* grad_input[2 + kMaxStates];
  std::int64_t count;
  double scale;
  double keep;  // what a trace is multiplied by at each step
};

enum ScalarType : int { kFloat, kDouble, kHalf, kBFloat16 };
constexpr int kArithmeticTypes = 2;  // the first ones

// The type in which parameters of a type are updated, which is that of their state.
constexpr ScalarType arithmetic(ScalarType type) {
  return type == kDouble ? kDouble : kFloat;
}

// The kernels of a rule for one arithmetic type. `prepare` runs once a step and fills kPreparedBytes. `sums` are added to.
using PrepareKernel = void (*)(const double* hyper, double step, void* prepared);
using SumKernel = void (*)(const Slice&, const void* prepared, double* sums);

struct StepKernels {
  PrepareKernel prepare;
  void (*settle)(const Slice&, const void* last_prepared);
  // From the inputs of the step, with the sums over all hyperparameters; prepared as for the last LearnedSet.
  SumKernel backward;  // through the parameters, to the hyperparameters
  SumKernel vjp;       // through parameters and state, to all inputs
};

struct LearnedKernels {
  void (*update)(const Slice&, const void* prepared, const void* last_prepared);
  // sums [2]: the squared norms of the coming change and of the parameters
  void (*norms)(const Slice&, const void* prepared, const void* last_prepared, double* sums);
  PrepareKernel prepare_dual;  // for the two below
  void (*traced_update)(const Slice&, const void* prepared_dual);
  // sums [2 n + 1] over the n hyperparameters of the set, lowest first: of G z, of z^2 ([1] alone), and of G^2, where G
  // is the gradient and z the derivative of the last update
  SumKernel hypergradient[2];
};

// A set of hyperparameters for which kernels are compiled.
struct LearnedSet {
  Mask mask;
  unsigned record;  // Record bits
  unsigned hidden;  // those that are missing (hidden_inputs() in cpu/register.h): none, or the rule is refused
  LearnedKernels cpu[kArithmeticTypes];

  const LearnedKernels& on_cpu(ScalarType type) const { return cpu[arithmetic(type)]; }
};

// One step of a rule on the coordinates begin to end - 1 of the n that a level moves, and its derivatives:
// x [end - begin], grad [n], state [states, n], tangents [end - begin, hypers] (d x_new / d hyper).
using LevelKernel = void (*)(const double* hyper, double step, int n, int begin, int end, double* x, const double* grad,
                             double* state, double* tangents);

struct Rule {
  const char* name;
  std::vector<Hyperparameter> hypers;
  std::vector<const char*> state;
  std::vector<LearnedSet> sets;  // smallest first, from none to all hyperparameters
  StepKernels cpu[kArithmeticTypes];
  LevelKernel level;
  int lr;  // the index of the hyperparameter of that name; -1: there is none

  const StepKernels& on_cpu(ScalarType type) const { return cpu[arithmetic(type)]; }

  // The smallest compiled set that holds all of `learn`.
  const LearnedSet& set_for(Mask learn) const {
    for (const LearnedSet& set : sets)
      if ((learn & ~set.mask) == 0) return set;
    return sets.back();
  }
};

// The rules, in the order of their registration. The position of a rule is its id in a tower's plan.
std::vector<const Rule*>& rules();
const Rule& find_rule(const std::string& name);

// The place of a rule among those that the CUDA tower is compiled with; -1: it is none of them.
int built_in(const std::string& name);

// The rules that have CUDA kernels, in any order (cuda/launch.h).
namespace cuda {
struct DeviceRule;
}
std::vector<const cuda::DeviceRule*>& device_rules();

// The rules of a shared library, in the form in which it hands them to another one: a library that was compiled outside
// this repository hands its rules to _C. Each has its own rules() and device_rules(), so that none needs a symbol of
// another (library.h).
struct Library {
  const char* headers;     // first, whatever else changes: a digest of the headers that it was compiled with
  std::size_t rule_bytes;  // sizeof(Rule)
  const Rule* const* rules;
  std::size_t count;
  const cuda::DeviceRule* const* device_rules;
  std::size_t device_count;
};
const Library& library();

}  // namespace hyperopt_ext

// What registering a rule means is up to the translation unit: cpu/register.h.
#ifndef HX_REGISTER_RULE
#define HX_REGISTER_RULE(...)
#endif
