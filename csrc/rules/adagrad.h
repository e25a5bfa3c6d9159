// Adagrad (Duchi, Hazan & Singer, JMLR 2011), with the conventions of torch.optim.Adagrad, and a second epsilon inside
// the root.
#pragma once

#include "../rule.h"

namespace hyperopt_ext {

struct Adagrad {
  static constexpr char name[] = "adagrad";
  enum { lr, lr_decay, weight_decay, eps, eps_root };
  static constexpr std::array hypers{
      Hyperparameter{"lr", 1e-2, 0, kInfinity, Space::linear, true},
      Hyperparameter{"lr_decay", 0, 0, kInfinity, Space::linear, false},
      Hyperparameter{"weight_decay", 0, 0, kInfinity, Space::linear, false},
      Hyperparameter{"eps", 1e-10, 0, kInfinity, Space::log, false},
      Hyperparameter{"eps_root", 0, 0, kInfinity, Space::log, false},
  };
  static constexpr std::array<const char*, 1> state{"sum"};
  static constexpr std::array sets{bit(lr)};

  template <class H>
  HX_FN static auto prepare(const H& h, double step) {
    return pack(get<lr>(h) / (1.0 + (step - 1.0) * get<lr_decay>(h)), get<weight_decay>(h), get<eps>(h),
                get<eps_root>(h));
  }

  template <class P, class W>
  HX_FN static auto penalty(const P& p, const W& w) {
    const auto& [step_size, weight_decay, eps, eps_root] = p;
    return weight_decay * w;
  }

  template <class P, class E, class V>
  HX_FN static auto advance(const P&, const E& e, const V& sum) {
    return pack(sum + e * e);
  }

  template <class P, class E, class W, class V>
  HX_FN static auto change(const P& p, const E& e, const W&, const V& sum) {
    const auto& [step_size, weight_decay, eps, eps_root] = p;
    return -(step_size * e) / (sqrt(sum + eps_root) + eps);
  }
};

HX_REGISTER_RULE(Adagrad)

}  // namespace hyperopt_ext
