// AdamW (Loshchilov & Hutter, ICLR 2019, Algorithm 2), with the conventions of torch.optim.AdamW: the decay is
// multiplied by lr.
#pragma once

#include "../rule.h"

namespace hyperopt_ext {

struct AdamW {
  static constexpr char name[] = "adamw";
  enum { lr, beta1, beta2, eps, weight_decay };
  static constexpr std::array hypers{
      Hyperparameter{"lr", 1e-3, 0, kInfinity, Space::linear, true},
      Hyperparameter{"beta1", 0.9, 0, 1, Space::tanh, true},
      Hyperparameter{"beta2", 0.999, 0, 1, Space::tanh, true},
      Hyperparameter{"eps", 1e-8, 0, kInfinity, Space::log, false},
      Hyperparameter{"weight_decay", 1e-2, 0, kInfinity, Space::linear, false},
  };
  static constexpr std::array<const char*, 2> state{"exp_avg", "exp_avg_sq"};
  static constexpr std::array sets{bit(lr), bit(lr) | bit(beta1) | bit(beta2)};

  template <class H>
  HX_FN static auto prepare(const H& h, double step) {
    const auto bias1 = 1.0 - pow(get<beta1>(h), step);
    const auto bias2 = 1.0 - pow(get<beta2>(h), step);
    return pack(get<lr>(h) / bias1, get<beta1>(h), 1.0 - get<beta1>(h), get<beta2>(h), 1.0 - get<beta2>(h),
                1.0 / sqrt(bias2), get<eps>(h), get<lr>(h) * get<weight_decay>(h));
  }

  template <class P, class W>
  HX_FN static auto penalty(const P&, const W&) {
    return W{};
  }

  template <class P, class E, class M, class V>
  HX_FN static auto advance(const P& p, const E& e, const M& m, const V& v) {
    const auto& [step_size, keep1, take1, keep2, take2, inverse_root, eps, decay] = p;
    return pack(keep1 * m + take1 * e, keep2 * v + take2 * e * e);
  }

  template <class P, class E, class W, class M, class V>
  HX_FN static auto change(const P& p, const E&, const W& w, const M& m, const V& v) {
    const auto& [step_size, keep1, take1, keep2, take2, inverse_root, eps, decay] = p;
    return -(step_size * m) / (sqrt(v) * inverse_root + eps) - decay * w;
  }
};

HX_REGISTER_RULE(AdamW)

}  // namespace hyperopt_ext
