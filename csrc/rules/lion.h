// Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, Algorithm 2). The direction is a
// sign, whose slope is 0 everywhere, so no hypergradient reaches the betas.
#pragma once

#include "../rule.h"

namespace hyperopt_ext {

struct Lion {
  static constexpr char name[] = "lion";
  enum { lr, beta1, beta2, weight_decay };
  static constexpr std::array hypers{
      Hyperparameter{"lr", 1e-4, 0, kInfinity, Space::linear, true},
      Hyperparameter{"beta1", 0.9, 0, 1, Space::tanh, false},
      Hyperparameter{"beta2", 0.99, 0, 1, Space::tanh, false},
      Hyperparameter{"weight_decay", 0, 0, kInfinity, Space::linear, false},
  };
  static constexpr std::array<const char*, 1> state{"exp_avg"};
  static constexpr std::array sets{bit(lr)};

  template <class H>
  HX_FN static auto prepare(const H& h, double) {
    return pack(get<lr>(h), get<beta1>(h), 1.0 - get<beta1>(h), get<beta2>(h), 1.0 - get<beta2>(h),
                get<lr>(h) * get<weight_decay>(h));
  }

  template <class P, class W>
  HX_FN static auto penalty(const P&, const W&) {
    return W{};
  }

  // The direction is made of the average before it is updated.
  template <class P, class E, class M>
  HX_FN static auto advance(const P& p, const E& e, const M& m) {
    const auto& [lr, keep1, take1, keep2, take2, decay] = p;
    return pack(keep2 * m + take2 * e, sign(keep1 * m + take1 * e));
  }

  template <class P, class E, class W, class M, class D>
  HX_FN static auto change(const P& p, const E&, const W& w, const M&, const D& direction) {
    const auto& [lr, keep1, take1, keep2, take2, decay] = p;
    return -(lr * direction) - decay * w;
  }
};

HX_REGISTER_RULE(Lion)

}  // namespace hyperopt_ext
