// Prints the value and the slope of functions of csrc/dual.h at points of test_dual.py: "name x value slope" lines.
#include "dual.h"

#include <cstdio>
#include <limits>

using namespace hyperopt_ext;

template <class F>
void print(const char* name, double x, F f) {
  const auto y = f(variable<3>(x));
  const auto plain = f(constant(x));  // the same function without a direction
  std::printf("%s %.17g %.17g %.17g %.17g\n", name, x, y.value, y.template tangent<3>(), plain.value);
}

int main() {
  for (double x : {0.0, 0.25, 0.9, 3.0}) {
    for (double n : {0.0, 0.5, 1.0, 2.0, 7.0}) {
      char name[16];
      std::snprintf(name, sizeof name, "pow%g", n);
      print(name, x, [n](auto a) { return pow(a, n); });
    }
    print("exp2", x, [](auto n) { return pow(2.0, n); });
    print("sqrt", x, [](auto a) { return sqrt(a); });
  }
  for (double x : {-2.0, 0.0, 0.5, 3.0, std::numeric_limits<double>::quiet_NaN()}) {
    print("max", x, [](auto a) { return max(a, 0.5); });
    print("sign", x, [](auto a) { return sign(a); });
    print("ratio", x, [](auto a) { return (1.0 - a * a) / (a + 4.0); });
  }
}
