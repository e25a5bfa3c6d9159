// The scalar tower on a GPU: one launch for all levels of all towers.
#include "kernels.h"

// Each rule of the library, by its place among them.
namespace hyperopt_ext {
template <int I>
struct BuiltIn;
}
#undef HX_REGISTER_RULE
#define HX_REGISTER_RULE(...)                  \
  template <>                                  \
  struct BuiltIn<__COUNTER__ - kCounter - 1> { \
    using type = __VA_ARGS__;                  \
  };
namespace hyperopt_ext {
constexpr int kCounter = __COUNTER__;
}
#include "built_in_rules.h"
namespace hyperopt_ext {
constexpr int kBuiltInRules = __COUNTER__ - kCounter - 1;
}

namespace hyperopt_ext {
namespace cuda {

using Indices = std::make_integer_sequence<int, kBuiltInRules>;

struct CallBuiltIn {
  static constexpr int kCapacity = 1;

  template <int... I, class... Arguments>
  HX_FN static void call(int rule, std::integer_sequence<int, I...>, Arguments... arguments) {
    ((rule == I ? move_coordinates<typename BuiltIn<I>::type>(arguments...) : void()), ...);
  }
  template <class... Arguments>
  HX_FN void operator()(const std::int64_t* plan, Arguments... arguments) const {
    call(int(plan[kBuiltIn]), Indices{}, arguments...);
  }
};

template <int... I>
int find(const std::string& name, std::integer_sequence<int, I...>) {
  int found = -1;
  ((found = name == BuiltIn<I>::type::name ? I : found), ...);
  return found;
}

struct CapTowers {
  static constexpr int kThreads = 128;
  struct Shared {};

  template <class Team>
  HX_FN static void block(const TowerLaunch& launch, int block, Shared&, const Team& team) {
    const TowerView tower = launch.views[block];
    team.each([&](int thread) {
      for (std::int64_t row = thread; row < tower.rows; row += kThreads) tower::cap(tower, row);
    });
  }
};

void move_towers(const TowerLaunch& arguments, void* stream) {
  launch<MoveTowers<CallBuiltIn>>(arguments, arguments.towers, stream);
}

void cap_towers(const TowerLaunch& arguments, void* stream) {
  launch<CapTowers>(arguments, arguments.towers, stream);
}

}  // namespace cuda

int built_in(const std::string& name) {
  return cuda::find(name, cuda::Indices{});
}

}  // namespace hyperopt_ext
