// Registers the CUDA kernels of the rules included after this one. One translation unit a header, without torch's
// headers, but for the types of half precision (setup.py writes it).
#pragma once

#include "../contract.h"
#include "kernels.h"

namespace hyperopt_ext {
namespace cuda {
namespace {

template <class R, class A, Mask S>
constexpr LearnedLaunches learned_launches() {
  constexpr bool deferred = (RecordOf<R, S> & kDeferred) != 0;
  if constexpr (S == 0)
    return {launch<Update<R, A, kNothing>, Launch>, launch<Norms<R, A, false>, Launch>, nullptr, nullptr};
  else
    return {launch<Update<R, A, RecordOf<R, S>>, Launch>, launch<Norms<R, A, deferred>, Launch>,
            launch<TracedUpdate<R, A, S>, Launch>, launch<Hypergradient<R, A, S, false>, Launch>};
}

template <class R, class A, class I>
struct SetLaunches;
template <class R, class A, std::size_t... I>
struct SetLaunches<R, A, std::index_sequence<I...>> {
  static constexpr LearnedLaunches all[] = {learned_launches<R, A, set_at<R>(I)>()...};
};

template <class R, class A>
constexpr RuleLaunches rule_launches() {
  return {launch<Settle<R, A>, Launch>, launch<Hypergradient<R, A, kAllHypers<R>, true>, Launch>,
          launch<Vjp<R, A>, Launch>, SetLaunches<R, A, std::make_index_sequence<kSets<R>>>::all};
}

template <class R>
void move_level(const TowerLaunch& arguments, void* stream) {
  launch<MoveTowers<CallOne<R>>>(arguments, arguments.towers, stream);
}

template <class R>
DeviceRule device_rule() {
  if constexpr (keeps_contract<R>())
    return {R::name, {rule_launches<R, float>(), rule_launches<R, double>()}, move_level<R>};
  else
    return {};
}

template <class R>
struct DeviceRegistration {
  DeviceRule rule = device_rule<R>();
  DeviceRegistration() { device_rules().push_back(&rule); }
};

}  // namespace
}  // namespace cuda
}  // namespace hyperopt_ext

#define HX_JOIN_(a, b) a##b
#define HX_JOIN(a, b) HX_JOIN_(a, b)
#undef HX_REGISTER_RULE
#define HX_REGISTER_RULE(...) \
  static const ::hyperopt_ext::cuda::DeviceRegistration<__VA_ARGS__> HX_JOIN(registration, __COUNTER__);
