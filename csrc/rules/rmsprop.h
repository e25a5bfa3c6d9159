// RMSprop (Tieleman & Hinton, lecture 6.5 of "Neural Networks for Machine Learning", 2012), with the conventions of
// torch.optim.RMSprop: plain, with momentum, centered (Graves, arXiv:1308.0850, eq. 38 to 45), or both; and a second
// epsilon inside the root.
#pragma once

#include "../rule.h"

namespace hyperopt_ext {

template <bool Centered, bool Momentum>
struct RMSprop {
  static constexpr const char* name = Centered ? (Momentum ? "rmsprop_centered_momentum" : "rmsprop_centered")
                                               : (Momentum ? "rmsprop_momentum" : "rmsprop");
  enum { lr, alpha, eps, weight_decay, eps_root, momentum };
  static constexpr auto hypers = [] {
    constexpr std::array all{
        Hyperparameter{"lr", 1e-2, 0, kInfinity, Space::linear, true},
        Hyperparameter{"alpha", 0.99, 0, 1, Space::tanh, true},
        Hyperparameter{"eps", 1e-8, 0, kInfinity, Space::log, false},
        Hyperparameter{"weight_decay", 0, 0, kInfinity, Space::linear, false},
        Hyperparameter{"eps_root", 0, 0, kInfinity, Space::log, false},
        Hyperparameter{"momentum", 0, 0, 1, Space::linear, false},
    };
    std::array<Hyperparameter, Momentum ? 6 : 5> used{};
    for (std::size_t i = 0; i < used.size(); ++i) used[i] = all[i];
    return used;
  }();
  static constexpr auto state = [] {
    std::array<const char*, 1 + Centered + Momentum> names{"square_avg"};
    if (Centered) names[1] = "grad_avg";
    if (Momentum) names[names.size() - 1] = "momentum_buffer";
    return names;
  }();
  static constexpr std::array sets{bit(lr), bit(lr) | bit(alpha)};

  template <class H>
  HX_FN static auto prepare(const H& h, double) {
    const auto momentum_or_none = [&] {
      if constexpr (Momentum)
        return get<momentum>(h);
      else
        return constant(0.0);
    }();
    return pack(get<lr>(h), get<alpha>(h), 1.0 - get<alpha>(h), get<eps>(h), get<weight_decay>(h), get<eps_root>(h),
                momentum_or_none);
  }

  template <class P, class W>
  HX_FN static auto penalty(const P& p, const W& w) {
    const auto& [lr, keep, take, eps, weight_decay, eps_root, momentum] = p;
    return weight_decay * w;
  }

  template <class P, class E, class V, class... S>
  HX_FN static auto advance(const P& p, const E& e, const V& square_avg, const S&... rest) {
    const auto& [lr, keep, take, eps, weight_decay, eps_root, momentum] = p;
    [[maybe_unused]] const auto before = pack(rest...);
    const auto square = keep * square_avg + take * e * e;
    if constexpr (Centered) {
      const auto mean = keep * get<0>(before) + take * e;
      if constexpr (Momentum)
        return pack(square, mean, momentum * get<1>(before) + e / denominator(p, square, mean));
      else
        return pack(square, mean);
    } else if constexpr (Momentum) {
      return pack(square, momentum * get<0>(before) + e / denominator(p, square));
    } else {
      return pack(square);
    }
  }

  template <class P, class E, class W, class... S>
  HX_FN static auto change(const P& p, const E& e, const W&, const S&... after) {
    const auto& [lr, keep, take, eps, weight_decay, eps_root, momentum] = p;
    if constexpr (Momentum)
      return -(lr * get<sizeof...(S) - 1>(pack(after...)));
    else
      return -(lr * e) / denominator(p, after...);
  }

 private:
  template <class P, class V>
  HX_FN static auto denominator(const P& p, const V& square) {
    const auto& [lr, keep, take, eps, weight_decay, eps_root, momentum] = p;
    return sqrt(square + eps_root) + eps;
  }

  // The estimated variance can come out below 0 by rounding, where torch has a NaN.
  template <class P, class V, class M>
  HX_FN static auto denominator(const P& p, const V& square, const M& mean) {
    const auto& [lr, keep, take, eps, weight_decay, eps_root, momentum] = p;
    return sqrt(max(square - mean * mean + eps_root, 0.0)) + eps;
  }
};

HX_REGISTER_RULE(RMSprop<false, false>)
HX_REGISTER_RULE(RMSprop<false, true>)
HX_REGISTER_RULE(RMSprop<true, false>)
HX_REGISTER_RULE(RMSprop<true, true>)

}  // namespace hyperopt_ext
