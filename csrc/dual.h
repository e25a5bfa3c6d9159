// Forward-mode dual numbers whose set of active directions is part of the type.
//
// Dual<T, M> is a value and one tangent for every bit of M. A binary operator returns Dual<T, A | B>, and its loop over
// the directions is unrolled at compile time, so a structural zero costs neither a register nor an instruction, and
// `decltype(f(...))::mask` tells which inputs reach an output.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

// HX_FN: a function that disappears into its caller, on the host and on a device; a loop that calls one is vectorised.
// HX_LAMBDA: the same for a lambda, after its parameters.
#if defined(__CUDACC__)
#define HX_FN __host__ __device__ __forceinline__
#define HX_LAMBDA
#elif defined(__GNUC__)
#define HX_FN inline __attribute__((always_inline))
#define HX_LAMBDA __attribute__((always_inline))
#else
#define HX_FN inline
#define HX_LAMBDA
#endif

namespace hyperopt_ext {

using Mask = std::uint32_t;

HX_FN constexpr Mask bit(int direction) {
  return Mask(1) << direction;
}

// Directions of a step's inputs, those of its hyperparameters being lower (rule.h).
constexpr int kFirstInput = 20;
constexpr Mask kInputs = ~(bit(kFirstInput) - 1);

HX_FN constexpr int count(Mask mask) {
  int n = 0;
  for (; mask; mask &= mask - 1) ++n;
  return n;
}

// Where the tangent of a direction is kept: the number of lower directions in the set.
HX_FN constexpr int position(Mask mask, int direction) {
  return count(mask & (bit(direction) - 1));
}

// The direction kept at a position.
HX_FN constexpr int direction(Mask mask, int position) {
  for (; position; --position) mask &= mask - 1;
  return count((mask & (~mask + 1)) - 1);
}

namespace detail {

template <Mask M, class F, int... I>
HX_FN void each(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, direction(M, I)>{}), ...);
}

}  // namespace detail

// Calls f(integral_constant<int, D>) for every direction D of M, lowest first.
template <Mask M, class F>
HX_FN void each_direction(F&& f) {
  detail::each<M>(static_cast<F&&>(f), std::make_integer_sequence<int, count(M)>{});
}

// Copied member by member: gcc does not vectorise a loop that still copies a struct as a whole.
template <class T, Mask M>
struct Dual {
  static constexpr Mask mask = M;
  T value;
  T tangents[count(M)];

  Dual() = default;
  HX_FN Dual(const Dual& other) : value(other.value) {
    each_direction<M>([&](auto d) HX_LAMBDA { set_tangent<d>(other.template tangent<d>()); });
  }
  HX_FN Dual& operator=(const Dual& other) {
    value = other.value;
    each_direction<M>([&](auto d) HX_LAMBDA { set_tangent<d>(other.template tangent<d>()); });
    return *this;
  }

  template <int D>
  HX_FN T tangent() const {
    if constexpr ((M & bit(D)) != 0)
      return tangents[position(M, D)];
    else
      return T(0);
  }
  template <int D>
  HX_FN void set_tangent(T tangent) {
    tangents[position(M, D)] = tangent;
  }
};

template <class T>
struct Dual<T, 0> {
  static constexpr Mask mask = 0;
  T value;

  Dual() = default;
  HX_FN explicit Dual(T value) : value(value) {}
  HX_FN Dual(const Dual& other) : value(other.value) {}
  HX_FN Dual& operator=(const Dual& other) {
    value = other.value;
    return *this;
  }

  template <int D>
  HX_FN T tangent() const {
    return T(0);
  }
  template <int D>
  HX_FN void set_tangent(T) {}  // never called, but nvcc looks for it where a loop over no direction would
};

template <class T>
HX_FN Dual<T, 0> constant(T value) {
  return Dual<T, 0>(value);
}

template <int D, class T>
HX_FN Dual<T, bit(D)> variable(T value) {
  Dual<T, bit(D)> result;
  result.value = value;
  result.template set_tangent<D>(T(1));
  return result;
}

// The chain rule for y = f(a) with df/da = slope.
template <class T, Mask A>
HX_FN Dual<T, A> chain(T value, const Dual<T, A>& a, T slope) {
  Dual<T, A> result;
  result.value = value;
  each_direction<A>([&](auto d) HX_LAMBDA { result.template set_tangent<d>(slope * a.template tangent<d>()); });
  return result;
}

// The chain rule for y = f(a, b) with df/da = slope_a, df/db = slope_b.
template <class T, Mask A, Mask B>
HX_FN Dual<T, A | B> chain(T value, const Dual<T, A>& a, T slope_a, const Dual<T, B>& b, T slope_b) {
  Dual<T, A | B> result;
  result.value = value;
  each_direction<(A | B)>([&](auto d) HX_LAMBDA {
    constexpr bool in_a = (A & bit(d)) != 0, in_b = (B & bit(d)) != 0;
    if constexpr (in_a && in_b)
      result.template set_tangent<d>(slope_a * a.template tangent<d>() + slope_b * b.template tangent<d>());
    else if constexpr (in_a)
      result.template set_tangent<d>(slope_a * a.template tangent<d>());
    else
      result.template set_tangent<d>(slope_b * b.template tangent<d>());
  });
  return result;
}

template <class T, Mask A, Mask B>
HX_FN auto operator+(const Dual<T, A>& a, const Dual<T, B>& b) {
  return chain(a.value + b.value, a, T(1), b, T(1));
}

template <class T, Mask A, Mask B>
HX_FN auto operator-(const Dual<T, A>& a, const Dual<T, B>& b) {
  return chain(a.value - b.value, a, T(1), b, T(-1));
}

template <class T, Mask A, Mask B>
HX_FN auto operator*(const Dual<T, A>& a, const Dual<T, B>& b) {
  return chain(a.value * b.value, a, b.value, b, a.value);
}

template <class T, Mask A, Mask B>
HX_FN auto operator/(const Dual<T, A>& a, const Dual<T, B>& b) {
  const T inverse = T(1) / b.value;
  const T quotient = a.value * inverse;
  return chain(quotient, a, inverse, b, -quotient * inverse);
}

template <class T>
HX_FN Dual<T, 0> operator/(const Dual<T, 0>& a, const Dual<T, 0>& b) {
  return constant(a.value / b.value);
}

template <class T, Mask A>
HX_FN Dual<T, A> operator-(const Dual<T, A>& a) {
  return chain(-a.value, a, T(-1));
}

// A literal stands for a constant of the other operand's type: 1.0 - x.
template <class T, Mask A>
HX_FN auto operator+(const Dual<T, A>& a, double b) {
  return a + constant(T(b));
}
template <class T, Mask A>
HX_FN auto operator+(double a, const Dual<T, A>& b) {
  return constant(T(a)) + b;
}
template <class T, Mask A>
HX_FN auto operator-(const Dual<T, A>& a, double b) {
  return a - constant(T(b));
}
template <class T, Mask A>
HX_FN auto operator-(double a, const Dual<T, A>& b) {
  return constant(T(a)) - b;
}
template <class T, Mask A>
HX_FN auto operator*(const Dual<T, A>& a, double b) {
  return a * constant(T(b));
}
template <class T, Mask A>
HX_FN auto operator*(double a, const Dual<T, A>& b) {
  return constant(T(a)) * b;
}
template <class T, Mask A>
HX_FN auto operator/(const Dual<T, A>& a, double b) {
  return a / constant(T(b));
}
template <class T, Mask A>
HX_FN auto operator/(double a, const Dual<T, A>& b) {
  return constant(T(a)) / b;
}

// The slope at 0 is infinite; it is defined as 0 there, so that a second moment that never saw a gradient stays inert.
template <class T, Mask A>
HX_FN Dual<T, A> sqrt(const Dual<T, A>& a) {
  const T root = std::sqrt(a.value);
  if constexpr (A == 0)
    return constant(root);
  else
    return chain(root, a, root > T(0) ? T(0.5) / root : T(0));
}

// a^n for a constant n, as bias corrections need it. At a = 0 the slope of a^n with 0 < n < 1 is infinite; as that of
// the square root, it is defined as 0 there.
template <class T, Mask A>
HX_FN Dual<T, A> pow(const Dual<T, A>& a, double n) {
  const T power = std::pow(a.value, T(n));
  if constexpr (A == 0) {
    return constant(power);
  } else {
    if (a.value != T(0)) return chain(power, a, T(n) * power / a.value);
    const bool is_flat = n == 0.0 || (0.0 < n && n < 1.0);
    return chain(power, a, is_flat ? T(0) : T(n) * std::pow(a.value, T(n - 1)));
  }
}

// a^n for a constant a > 0.
template <class T, Mask N>
HX_FN Dual<T, N> pow(double a, const Dual<T, N>& n) {
  const T power = std::pow(T(a), n.value);
  return chain(power, n, T(std::log(a)) * power);
}

// condition ? a : b, with the tangents of the branch that was taken; of a number, none.
template <class T, Mask A, Mask B>
HX_FN Dual<T, A | B> where(bool condition, const Dual<T, A>& a, const Dual<T, B>& b) {
  Dual<T, A | B> result;
  result.value = condition ? a.value : b.value;
  each_direction<(A | B)>([&](auto d) HX_LAMBDA {
    result.template set_tangent<d>(condition ? a.template tangent<d>() : b.template tangent<d>());
  });
  return result;
}

template <class T, Mask A>
HX_FN Dual<T, A> where(bool condition, const Dual<T, A>& a, double b) {
  return where(condition, a, constant(T(b)));
}
template <class T, Mask A>
HX_FN Dual<T, A> where(bool condition, double a, const Dual<T, A>& b) {
  return where(condition, constant(T(a)), b);
}

// The larger one, with its tangents; of equal ones, a with a's. A NaN in either is the result.
template <class T, Mask A, Mask B>
HX_FN Dual<T, A | B> max(const Dual<T, A>& a, const Dual<T, B>& b) {
  const auto larger = where(a.value >= b.value, a, b);
  return where(a.value == a.value, larger, a);  // two selects: gcc makes branches of one with a compound condition
}
template <class T, Mask A>
HX_FN Dual<T, A> max(const Dual<T, A>& a, double b) {
  return max(a, constant(T(b)));
}

// -1, 0 or 1, or NaN of a NaN. The slope is 0 everywhere, at the jump, too. Directions of inputs stay in the type, since it
// shows what a function reads.
template <class T, Mask A>
HX_FN Dual<T, A & kInputs> sign(const Dual<T, A>& a) {
  Dual<T, A & kInputs> result;
  result.value = a.value > T(0) ? T(1) : a.value < T(0) ? T(-1) : a.value;
  each_direction<(A & kInputs)>([&](auto d) HX_LAMBDA { result.template set_tangent<d>(T(0)); });
  return result;
}

// The same number in another precision.
template <class To, class From, Mask A>
HX_FN Dual<To, A> to(const Dual<From, A>& a) {
  Dual<To, A> result;
  result.value = To(a.value);
  each_direction<A>([&](auto d) HX_LAMBDA { result.template set_tangent<d>(To(a.template tangent<d>())); });
  return result;
}

}  // namespace hyperopt_ext
