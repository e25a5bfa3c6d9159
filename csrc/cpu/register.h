// Registers the rules of the headers included after this one, with their CPU kernels. One translation unit a header,
// without any of torch's headers (setup.py writes it).
#pragma once

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

template <class R, Mask S>
LearnedSet learned_set() {
  return {S, RecordOf<R, S>, {learned_kernels<R, float, S>(), learned_kernels<R, double, S>()}};
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
