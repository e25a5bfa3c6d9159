// Adadelta (Zeiler, arXiv:1212.5701, Algorithm 1), with the conventions of torch.optim.Adadelta.
#pragma once

#include "../rule.h"

namespace hyperopt_ext {

struct Adadelta {
  static constexpr char name[] = "adadelta";
  enum { lr, rho, eps, weight_decay };
  static constexpr std::array hypers{
      Hyperparameter{"lr", 1, 0, kInfinity, Space::linear, true},
      Hyperparameter{"rho", 0.9, 0, 1, Space::tanh, true},
      Hyperparameter{"eps", 1e-6, 0, kInfinity, Space::log, false},
      Hyperparameter{"weight_decay", 0, 0, kInfinity, Space::linear, false},
  };
  static constexpr std::array<const char*, 2> state{"square_avg", "acc_delta"};
  static constexpr std::array sets{bit(lr), bit(lr) | bit(rho)};

  template <class H>
  HX_FN static auto prepare(const H& h, double) {
    return pack(get<lr>(h), get<rho>(h), 1.0 - get<rho>(h), get<eps>(h), get<weight_decay>(h));
  }

  template <class P, class W>
  HX_FN static auto penalty(const P& p, const W& w) {
    const auto& [lr, keep, take, eps, weight_decay] = p;
    return weight_decay * w;
  }

  // The step is made of the accumulator before it is updated with the step.
  template <class P, class E, class V, class D>
  HX_FN static auto advance(const P& p, const E& e, const V& square_avg, const D& acc_delta) {
    const auto& [lr, keep, take, eps, weight_decay] = p;
    const auto square = keep * square_avg + take * e * e;
    const auto delta = sqrt(acc_delta + eps) / sqrt(square + eps) * e;
    return pack(square, keep * acc_delta + take * delta * delta, delta);
  }

  template <class P, class E, class W, class V, class D, class S>
  HX_FN static auto change(const P& p, const E&, const W&, const V&, const D&, const S& delta) {
    const auto& [lr, keep, take, eps, weight_decay] = p;
    return -(lr * delta);
  }
};

HX_REGISTER_RULE(Adadelta)

}  // namespace hyperopt_ext
