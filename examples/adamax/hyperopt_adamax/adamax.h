// AdaMax (Kingma & Ba, ICLR 2015, Algorithm 2), with the conventions of torch.optim.Adamax.
#pragma once

#include "rule.h"

namespace hyperopt_ext {

struct Adamax {
  static constexpr char name[] = "adamax";
  enum { lr, beta1, beta2, eps, weight_decay };
  static constexpr std::array hypers{
      Hyperparameter{"lr", 2e-3, 0, kInfinity, Space::linear, true},
      Hyperparameter{"beta1", 0.9, 0, 1, Space::tanh, true},
      Hyperparameter{"beta2", 0.999, 0, 1, Space::tanh, true},
      Hyperparameter{"eps", 1e-8, 0, kInfinity, Space::log, false},
      Hyperparameter{"weight_decay", 0, 0, kInfinity, Space::linear, false},
  };
  static constexpr std::array<const char*, 2> state{"exp_avg", "exp_inf"};
  static constexpr std::array sets{bit(lr), bit(lr) | bit(beta1) | bit(beta2)};

  template <class H>
  HX_FN static auto prepare(const H& h, double step) {
    return pack(get<lr>(h) / (1.0 - pow(get<beta1>(h), step)), get<beta1>(h), 1.0 - get<beta1>(h), get<beta2>(h),
                get<eps>(h), get<weight_decay>(h));
  }
  template <class P, class W>
  HX_FN static auto penalty(const P& p, const W& w) {
    const auto& [step_size, beta1, take1, beta2, eps, weight_decay] = p;
    return weight_decay * w;
  }
  template <class P, class E, class M, class U>
  HX_FN static auto advance(const P& p, const E& e, const M& m, const U& u) {
    const auto& [step_size, beta1, take1, beta2, eps, weight_decay] = p;
    return pack(beta1 * m + take1 * e, max(beta2 * u, sign(e) * e + eps));
  }
  template <class P, class E, class W, class M, class U>
  HX_FN static auto change(const P& p, const E&, const W&, const M& m, const U& u) {
    const auto& [step_size, beta1, take1, beta2, eps, weight_decay] = p;
    return -(step_size * m) / u;
  }
};

HX_REGISTER_RULE(Adamax)

}  // namespace hyperopt_ext
