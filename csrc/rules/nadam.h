// NAdam (Dozat, "Incorporating Nesterov Momentum into Adam", ICLR 2016 workshop), with the conventions of
// torch.optim.NAdam. Its product of all momentum coefficients so far is that of the present beta1, as in Adam's bias
// correction; as long as beta1 stays what it is, the two are the same.
#pragma once

#include "../rule.h"

namespace hyperopt_ext {

template <bool Decoupled>
struct NAdam {
  static constexpr const char* name = Decoupled ? "nadam_decoupled" : "nadam";
  enum { lr, beta1, beta2, eps, weight_decay, momentum_decay };
  static constexpr std::array hypers{
      Hyperparameter{"lr", 2e-3, 0, kInfinity, Space::linear, true},
      Hyperparameter{"beta1", 0.9, 0, 1, Space::tanh, true},
      Hyperparameter{"beta2", 0.999, 0, 1, Space::tanh, true},
      Hyperparameter{"eps", 1e-8, 0, kInfinity, Space::log, false},
      Hyperparameter{"weight_decay", 0, 0, kInfinity, Space::linear, false},
      Hyperparameter{"momentum_decay", 4e-3, 0, kInfinity, Space::linear, false},
  };
  static constexpr std::array<const char*, 2> state{"exp_avg", "exp_avg_sq"};
  static constexpr std::array sets{bit(lr), bit(lr) | bit(beta1) | bit(beta2)};

  // The momentum coefficient of a step t, from 0.96^(t momentum_decay).
  template <class H, class D>
  HX_FN static auto momentum(const H& h, const D& decay) {
    return get<beta1>(h) * (1.0 - 0.5 * decay);
  }

  template <class H>
  HX_FN static auto prepare(const H& h, double step) {
    const auto now = momentum(h, pow(0.96, step * get<momentum_decay>(h))),
               next = momentum(h, pow(0.96, (step + 1.0) * get<momentum_decay>(h)));
    const auto per_step = pow(0.96, get<momentum_decay>(h));
    auto decay = per_step;
    auto factor = momentum(h, decay), product = factor;
    // Until the product is negligible, or its factors have grown to beta1.
    double i = 2.0;
    for (; i <= step && product.value > 1e-30 && factor.value < get<beta1>(h).value; i += 1.0) {
      decay = decay * per_step;
      factor = momentum(h, decay);
      product = product * factor;
    }
    if (i <= step) product = product * pow(get<beta1>(h), step - i + 1.0);
    return pack(get<lr>(h) * (1.0 - now) / (1.0 - product), get<lr>(h) * next / (1.0 - product * next), get<beta1>(h),
                1.0 - get<beta1>(h), get<beta2>(h), 1.0 - get<beta2>(h), 1.0 / sqrt(1.0 - pow(get<beta2>(h), step)),
                get<eps>(h), get<weight_decay>(h), get<lr>(h) * get<weight_decay>(h));
  }

  template <class P, class W>
  HX_FN static auto penalty(const P& p, const W& w) {
    const auto& [grad_step, average_step, keep1, take1, keep2, take2, inverse_root, eps, weight_decay, decay] = p;
    if constexpr (Decoupled)
      return W{};
    else
      return weight_decay * w;
  }

  template <class P, class E, class M, class V>
  HX_FN static auto advance(const P& p, const E& e, const M& m, const V& v) {
    const auto& [grad_step, average_step, keep1, take1, keep2, take2, inverse_root, eps, weight_decay, decay] = p;
    return pack(keep1 * m + take1 * e, keep2 * v + take2 * e * e);
  }

  template <class P, class E, class W, class M, class V>
  HX_FN static auto change(const P& p, const E& e, const W& w, const M& m, const V& v) {
    const auto& [grad_step, average_step, keep1, take1, keep2, take2, inverse_root, eps, weight_decay, decay] = p;
    const auto update = -(grad_step * e + average_step * m) / (sqrt(v) * inverse_root + eps);
    if constexpr (Decoupled)
      return update - decay * w;
    else
      return update;
  }
};

HX_REGISTER_RULE(NAdam<false>)
HX_REGISTER_RULE(NAdam<true>)

}  // namespace hyperopt_ext
