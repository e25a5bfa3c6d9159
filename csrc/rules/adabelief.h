// AdaBelief (Zhuang et al., NeurIPS 2020, Algorithm 2), with the conventions of the authors' package adabelief-pytorch
// 0.2: eps is added to the second moment itself, at every step, and once more outside the root. With decoupled weight
// decay (as in AdamW) or coupled, and with or without the rectification of RAdam (Liu et al., ICLR 2020).
#pragma once

#include "../rule.h"

namespace hyperopt_ext {

template <bool Rectified, bool Decoupled>
struct AdaBelief {
  static constexpr const char* name = Rectified ? (Decoupled ? "adabelief_rectified" : "adabelief_rectified_coupled")
                                                : (Decoupled ? "adabelief" : "adabelief_coupled");
  enum { lr, beta1, beta2, eps, weight_decay };
  static constexpr std::array hypers{
      Hyperparameter{"lr", 1e-3, 0, kInfinity, Space::linear, true},
      Hyperparameter{"beta1", 0.9, 0, 1, Space::tanh, true},
      Hyperparameter{"beta2", 0.999, 0, 1, Space::tanh, true},
      Hyperparameter{"eps", 1e-16, 0, kInfinity, Space::log, false},
      Hyperparameter{"weight_decay", 0, 0, kInfinity, Space::linear, false},
  };
  static constexpr std::array<const char*, 2> state{"exp_avg", "exp_avg_var"};
  static constexpr std::array sets{bit(lr), bit(lr) | bit(beta1) | bit(beta2)};

  // The denominator is sqrt(v) * factor + offset. Before there are enough samples to rectify, it is 1: SGD with
  // momentum.
  template <class H>
  HX_FN static auto prepare(const H& h, double step) {
    const auto power = pow(get<beta2>(h), step);
    const auto bias2 = 1.0 - power;
    const auto step_size = get<lr>(h) / (1.0 - pow(get<beta1>(h), step));
    const auto decay = [&] {
      if constexpr (Decoupled)
        return get<lr>(h) * get<weight_decay>(h);
      else
        return get<weight_decay>(h);
    }();
    const auto with = [&](const auto& step_size, const auto& factor, const auto& offset) {
      return pack(step_size, get<beta1>(h), 1.0 - get<beta1>(h), get<beta2>(h), 1.0 - get<beta2>(h), get<eps>(h),
                  factor, offset, decay);
    };
    if constexpr (Rectified) {
      const auto limit = 2.0 / (1.0 - get<beta2>(h)) - 1.0;
      const auto samples = limit - 2.0 * step * power / bias2;
      const bool enough = samples.value >= 5.0;
      const auto rectified =
          sqrt(bias2 * ((samples - 4.0) / (limit - 4.0)) * ((samples - 2.0) / samples) * (limit / (limit - 2.0)));
      return with(step_size * where(enough, rectified, constant(1.0)), constant(enough ? 1.0 : 0.0),
                  where(enough, get<eps>(h), constant(1.0)));
    } else {
      return with(step_size, 1.0 / sqrt(bias2), get<eps>(h));
    }
  }

  template <class P, class W>
  HX_FN static auto penalty(const P& p, const W& w) {
    const auto& [step_size, keep1, take1, keep2, take2, eps, factor, offset, decay] = p;
    if constexpr (Decoupled)
      return W{};
    else
      return decay * w;
  }

  template <class P, class E, class M, class V>
  HX_FN static auto advance(const P& p, const E& e, const M& m, const V& v) {
    const auto& [step_size, keep1, take1, keep2, take2, eps, factor, offset, decay] = p;
    const auto mean = keep1 * m + take1 * e;
    const auto surprise = e - mean;
    return pack(mean, keep2 * v + take2 * surprise * surprise + eps);
  }

  template <class P, class E, class W, class M, class V>
  HX_FN static auto change(const P& p, const E&, const W& w, const M& m, const V& v) {
    const auto& [step_size, keep1, take1, keep2, take2, eps, factor, offset, decay] = p;
    const auto delta = -(step_size * m) / (sqrt(v) * factor + offset);
    if constexpr (Decoupled)
      return delta - decay * w;
    else
      return delta;
  }
};

HX_REGISTER_RULE(AdaBelief<false, false>)
HX_REGISTER_RULE(AdaBelief<false, true>)
HX_REGISTER_RULE(AdaBelief<true, false>)
HX_REGISTER_RULE(AdaBelief<true, true>)

}  // namespace hyperopt_ext
