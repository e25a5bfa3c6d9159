// Registers the rules of the headers included after this one, with their CPU kernels. One translation unit a header,
// without any of torch's headers (setup.py writes it).
#pragma once

#include <random>

#include "../contract.h"
#include "kernels.h"

namespace hyperopt_ext {
namespace {

template <class R, class A>
constexpr StepKernels step_kernels() {
  return {prepare<R, A, 0>, settle<R, A>, hypergradient<R, A, kAllHypers<R>, true, false>, vjp<R, A>};
}

template <class R, class A, Mask S>
constexpr LearnedKernels learned_kernels() {
  if constexpr (S == 0)
    return {update<R, A, kNothing>, norms<R, A, false>, nullptr, nullptr, {}};
  else
    return {update<R, A, RecordOf<R, S>>,
            norms<R, A, (RecordOf<R, S> & kDeferred) != 0>,
            prepare<R, A, S>,
            traced_update<R, A, S>,
            {hypergradient<R, A, S, false, false>, hypergradient<R, A, S, false, true>}};
}

// The inputs of change() that its derivatives depend on by a condition alone, which its type does not show: kGrad, kParam.
// Found with random numbers.
template <class R, Mask S, std::size_t... I>
unsigned hidden_inputs(std::index_sequence<I...>) {
  std::minstd_rand bits;
  const auto random = [&](double low, double high) { return std::uniform_real_distribution<>(low, high)(bits); };
  unsigned inputs = 0;
  const auto sized = [&] { return random(-1.0, 1.0) * std::pow(10.0, random(-9.0, 9.0)); };
  for (int trial = 0; trial < 400; ++trial) {
    double hypers[kMaxHypers];
    for (std::size_t i = 0; i < R::hypers.size(); ++i) {
      const Hyperparameter& h = R::hypers[i];
      const double value = h.initial + random(-1.0, 1.0);
      hypers[i] = h.low <= value && value < h.high ? value : h.initial;
    }
    const auto p = R::prepare(HypersOf<R, S>{hypers}, 1.0 + trial);
    const double size = std::fabs(sized()), lowest = trial % 2 == 0 ? -size : 0.0;
    const double state[] = {random(lowest, size), (static_cast<void>(I), random(lowest, size))...};
    const auto derivatives = [&](double e, double w) {
      const auto delta = R::change(p, constant(e), constant(w), constant(state[I])...);
      std::array<double, std::size_t(count(S))> result{};
      each_direction<S>([&](auto d) { result[std::size_t(position(S, d))] = delta.template tangent<d>(); });
      return result;
    };
    const double e = trial % 10 == 0 ? 0.0 : sized(), w = trial % 10 == 1 ? 0.0 : sized();
    const auto differ = [&](double other_e, double other_w) {
      const auto a = derivatives(e, w), b = derivatives(other_e, other_w);
      for (std::size_t k = 0; k < a.size(); ++k)
        if (std::fabs(a[k] - b[k]) > 1e-9 * std::fmax(std::fabs(a[k]), std::fabs(b[k]))) return true;
      return false;
    };
    if (differ(sized(), w)) inputs |= kGrad;
    if (differ(e, sized())) inputs |= kParam;
  }
  return inputs;
}

template <class R, Mask S>
unsigned hidden_inputs() {
  if constexpr (S == 0)
    return kNothing;
  else
    return hidden_inputs<R, S>(std::make_index_sequence<kReturned<R>>{}) & ~RecordOf<R, S>;
}

template <class R, Mask S>
LearnedSet learned_set() {
  return {S, RecordOf<R, S>, hidden_inputs<R, S>(), {learned_kernels<R, float, S>(), learned_kernels<R, double, S>()}};
}

template <class R>
void level(const double* hyper, double step, int n, int begin, int end, double* x, const double* grad, double* state,
           double* tangents) {
  move_coordinates<R>(hyper, step, n, begin, end, x, grad, state, tangents);
}

template <class R, std::size_t... I>
Rule make_rule(std::index_sequence<I...>) {
  return {R::name,
          {R::hypers.begin(), R::hypers.end()},
          {R::state.begin(), R::state.end()},
          {learned_set<R, set_at<R>(I)>()...},
          {step_kernels<R, float>(), step_kernels<R, double>()},
          level<R>,
          index_of<R>("lr")};
}

template <class R>
Rule checked_rule() {
  if constexpr (keeps_contract<R>())
    return make_rule<R>(std::make_index_sequence<kSets<R>>{});
  else
    return {};
}

template <class R>
struct Registration {
  Rule rule = checked_rule<R>();
  Registration() { rules().push_back(&rule); }
};

}  // namespace
}  // namespace hyperopt_ext

#define HX_JOIN_(a, b) a##b
#define HX_JOIN(a, b) HX_JOIN_(a, b)
#undef HX_REGISTER_RULE
#define HX_REGISTER_RULE(...) static const ::hyperopt_ext::Registration<__VA_ARGS__> HX_JOIN(registration, __COUNTER__);
