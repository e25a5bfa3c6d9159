#include "tower.h"

#include <algorithm>
#include <stdexcept>

#include "tower_step.h"

namespace hyperopt_ext {

const Rule& find_rule(const std::string& name) {
  for (const Rule* rule : rules())
    if (name == rule->name) return *rule;
  throw std::invalid_argument("no rule is called '" + name + "'");
}

namespace {

// Lays levels out one after the other.
struct Layout {
  std::int64_t moved = 0, start = kHeader, gradient = 0, bounds = 0;

  // Writes the columns that follow from the first three.
  void add(const Rule& rule, std::int64_t* level) {
    const std::int64_t hypers = std::int64_t(rule.hypers.size()), states = std::int64_t(rule.state.size());
    level[kHypers] = hypers, level[kStates] = states, level[kLr] = rule.lr;
    level[kMoved] = moved, level[kStart] = start, level[kGradient] = gradient, level[kBounds] = bounds;
    start += kValues * hypers + (states + hypers) * moved;
    moved = count(Mask(level[kLearn]));
    gradient += moved;
    bounds += hypers;
  }
};

}  // namespace

std::vector<std::int64_t> tower_plan(const std::vector<std::int64_t>& levels) {
  std::vector<std::int64_t> plan(levels.size() / 3 * kPlanColumns);
  Layout layout;
  for (std::size_t k = 0; k < levels.size() / 3; ++k) {
    std::int64_t* const level = plan.data() + k * kPlanColumns;
    std::copy_n(levels.data() + 3 * k, 3, level);
    const Rule& rule = *rules().at(std::size_t(level[kRule]));
    level[kBuiltIn] = built_in(rule.name);
    layout.add(rule, level);
  }
  return plan;
}

bool is_plan(const std::int64_t* plan, int levels) {
  Layout layout;
  for (int k = 0; k < levels; ++k, plan += kPlanColumns) {
    if (std::size_t(plan[kRule]) >= rules().size()) return false;
    const Rule& rule = *rules()[std::size_t(plan[kRule])];
    const Mask learnable = k + 1 < levels ? rule.sets.back().mask : 0;  // nothing stands above the last level
    if ((plan[kLearn] & ~std::int64_t(learnable)) != 0) return false;
    std::int64_t level[kPlanColumns];
    std::copy_n(plan, kPlanColumns, level);
    layout.add(rule, level);
    if (!std::equal(level, level + kPlanColumns, plan)) return false;
  }
  return true;
}

std::int64_t tower_width(const std::int64_t* plan, int levels) {
  const std::int64_t* const last = plan + (levels - 1) * kPlanColumns;
  return last[kStart] + kValues * last[kHypers] + (last[kStates] + last[kHypers]) * last[kMoved];
}

void tower_reset(double* row, const std::int64_t* plan, int levels, const double* values, const double* state) {
  std::fill(row, row + tower_width(plan, levels), 0.0);
  row[kTicking] = row[kSchedule] = row[kScheduled] = 1.0;
  for (int k = 0; k < levels; ++k, plan += kPlanColumns) {
    const LevelRow r(row + plan[kStart], int(plan[kHypers]), int(plan[kStates]), int(plan[kMoved]));
    for (int i = 0; i < r.hypers; ++i, ++values) {
      const Space space = Space((plan[kCoordinates] >> (kSpaceBits * i)) & ((1 << kSpaceBits) - 1));
      r.live[i] = r.seen[i] = r.used[i] = r.previous[i] = *values;
      r.x[i] = tower::coordinate_of(space, *values, 1.0);
    }
    for (int s = 0; s < r.states; ++s, ++state) std::fill_n(r.state + s * r.n, r.n, *state);
  }
}

#if !defined(HX_WITH_CUDA) && !defined(HX_EMULATE_CUDA)  // no CUDA tower: no rule is foreign to it
int built_in(const std::string&) {
  return 0;
}
#endif

namespace {

// One worker does it all.
struct Alone {
  static constexpr int kWorkers = 1, kLanes = 1;
  template <class F>
  HX_FN void each(F&& f) const {
    f(0);
  }
};

struct CallRule {
  static constexpr int kCapacity = kMaxHypers;
  template <class... Arguments>
  HX_FN void operator()(const std::int64_t* plan, Arguments... arguments) const {
    rules()[std::size_t(plan[kRule])]->level(arguments...);
  }
};

}  // namespace

void tower_step(const TowerView& tower) {
  tower::step(Alone{}, CallRule{}, tower);
}

void tower_cap(const TowerView& tower) {
  for (std::int64_t row = 0; row < tower.rows; ++row) tower::cap(tower, row);
}

}  // namespace hyperopt_ext
