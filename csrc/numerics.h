// What elements of parameters and hyperparameters in a tower have in common: numbers that are not finite, and traces.
#pragma once

#include <cmath>
#include <limits>

#include "dual.h"

namespace hyperopt_ext {

template <class T>
HX_FN bool is_finite(T x) {
  return std::fabs(x) <= std::numeric_limits<T>::max();
}

// What an element adds to the square of a norm: nothing, if it is not finite or so large that a sum might not be.
template <class T>
HX_FN T square_if_small(T x) {
  constexpr T most = std::numeric_limits<T>::max() / T(1 << 20);
  const T square = x * x;
  return square <= most ? square : T(0);
}

// What traces are multiplied by at the `step`-th step, for derivatives of the last `horizon` steps, or, if that is more,
// of this part of all of them.
HX_FN double keep_of(double horizon, double horizon_growth, double step) {
  const double part = horizon_growth * step;
  return 1.0 - 1.0 / (part > horizon ? part : horizon);
}

// A trace after a step. One that is not finite would never be again: it restarts.
template <class T>
HX_FN T next_trace(T keep, T trace, T tangent) {
  const T next = keep * trace + tangent;
  return is_finite(next) ? next : T(0);
}

}  // namespace hyperopt_ext
