// AMSGrad (Reddi, Kale & Kumar, ICLR 2018, Algorithm 2), with the conventions of torch.optim.Adam(amsgrad=True): with
// bias corrections, that of the second moment applied after the maximum.
#pragma once

#include "../rule.h"

namespace hyperopt_ext {

struct AMSGrad {
  static constexpr char name[] = "amsgrad";
  enum { lr, beta1, beta2, eps, weight_decay };
  static constexpr std::array hypers{
      Hyperparameter{"lr", 1e-3, 0, kInfinity, Space::linear, true},
      Hyperparameter{"beta1", 0.9, 0, 1, Space::tanh, true},
      Hyperparameter{"beta2", 0.999, 0, 1, Space::tanh, true},
      Hyperparameter{"eps", 1e-8, 0, kInfinity, Space::log, false},
      Hyperparameter{"weight_decay", 0, 0, kInfinity, Space::linear, false},
  };
  static constexpr std::array<const char*, 3> state{"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr std::array sets{bit(lr), bit(lr) | bit(beta1) | bit(beta2)};

  template <class H>
  HX_FN static auto prepare(const H& h, double step) {
    const auto bias1 = 1.0 - pow(get<beta1>(h), step);
    const auto bias2 = 1.0 - pow(get<beta2>(h), step);
    return pack(get<lr>(h) / bias1, get<beta1>(h), 1.0 - get<beta1>(h), get<beta2>(h), 1.0 - get<beta2>(h),
                1.0 / sqrt(bias2), get<eps>(h), get<weight_decay>(h));
  }

  template <class P, class W>
  HX_FN static auto penalty(const P& p, const W& w) {
    const auto& [step_size, keep1, take1, keep2, take2, inverse_root, eps, weight_decay] = p;
    return weight_decay * w;
  }

  // Of two equal ones the maximum is the older one, a constant of this step.
  template <class P, class E, class M, class V, class X>
  HX_FN static auto advance(const P& p, const E& e, const M& m, const V& v, const X& largest) {
    const auto& [step_size, keep1, take1, keep2, take2, inverse_root, eps, weight_decay] = p;
    const auto second = keep2 * v + take2 * e * e;
    return pack(keep1 * m + take1 * e, second, max(largest, second));
  }

  template <class P, class E, class W, class M, class V, class X>
  HX_FN static auto change(const P& p, const E&, const W&, const M& m, const V&, const X& largest) {
    const auto& [step_size, keep1, take1, keep2, take2, inverse_root, eps, weight_decay] = p;
    return -(step_size * m) / (sqrt(largest) * inverse_root + eps);
  }
};

HX_REGISTER_RULE(AMSGrad)

}  // namespace hyperopt_ext
