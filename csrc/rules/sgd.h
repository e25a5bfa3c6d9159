// Stochastic gradient descent with the conventions of torch.optim.SGD: plain, with momentum, and with Nesterov's
// momentum (Sutskever et al., ICML 2013, in torch's form). At the first step the momentum buffer is the gradient.
#pragma once

#include "../rule.h"

namespace hyperopt_ext {

struct SGD {
  static constexpr char name[] = "sgd";
  enum { lr, weight_decay };
  static constexpr std::array hypers{
      Hyperparameter{"lr", 1e-3, 0, kInfinity, Space::linear, true},
      Hyperparameter{"weight_decay", 0, 0, kInfinity, Space::linear, false},
  };
  static constexpr std::array<const char*, 0> state{};
  static constexpr std::array sets{bit(lr)};

  template <class H>
  HX_FN static auto prepare(const H& h, double) {
    return pack(get<lr>(h), get<weight_decay>(h));
  }

  template <class P, class W>
  HX_FN static auto penalty(const P& p, const W& w) {
    const auto& [lr, weight_decay] = p;
    return weight_decay * w;
  }

  template <class P, class E>
  HX_FN static auto advance(const P&, const E&) {
    return pack();
  }

  template <class P, class E, class W>
  HX_FN static auto change(const P& p, const E& e, const W&) {
    const auto& [lr, weight_decay] = p;
    return -(lr * e);
  }
};

template <bool Nesterov>
struct MomentumSGD {
  static constexpr const char* name = Nesterov ? "sgd_nesterov" : "sgd_momentum";
  enum { lr, momentum, dampening, weight_decay };
  static constexpr std::array hypers{
      Hyperparameter{"lr", 1e-3, 0, kInfinity, Space::linear, true},
      Hyperparameter{"momentum", 0, 0, 1, Space::linear, true},
      Hyperparameter{"dampening", 0, -kInfinity, kInfinity, Space::linear, false},
      Hyperparameter{"weight_decay", 0, 0, kInfinity, Space::linear, false},
  };
  static constexpr std::array<const char*, 1> state{"momentum_buffer"};
  static constexpr std::array sets{bit(lr), bit(lr) | bit(momentum)};

  template <class H>
  HX_FN static auto prepare(const H& h, double step) {
    const bool first = step <= 1.0;
    return pack(get<lr>(h), where(first, constant(0.0), get<momentum>(h)),
                where(first, constant(1.0), 1.0 - get<dampening>(h)), get<momentum>(h), get<weight_decay>(h));
  }

  template <class P, class W>
  HX_FN static auto penalty(const P& p, const W& w) {
    const auto& [lr, keep, take, momentum, weight_decay] = p;
    return weight_decay * w;
  }

  template <class P, class E, class B>
  HX_FN static auto advance(const P& p, const E& e, const B& buffer) {
    const auto& [lr, keep, take, momentum, weight_decay] = p;
    return pack(keep * buffer + take * e);
  }

  template <class P, class E, class W, class B>
  HX_FN static auto change(const P& p, const E& e, const W&, const B& buffer) {
    const auto& [lr, keep, take, momentum, weight_decay] = p;
    if constexpr (Nesterov)
      return -(lr * (e + momentum * buffer));
    else
      return -(lr * buffer);
  }
};

HX_REGISTER_RULE(SGD)
HX_REGISTER_RULE(MomentumSGD<false>)
HX_REGISTER_RULE(MomentumSGD<true>)

}  // namespace hyperopt_ext
