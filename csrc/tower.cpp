#include "tower.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

namespace hyperopt_ext {

std::vector<const Rule*>& rules() {
  static std::vector<const Rule*> all;
  return all;
}

const Rule& find_rule(const std::string& name) {
  for (const Rule* rule : rules())
    if (name == rule->name) return *rule;
  throw std::invalid_argument("no rule is called '" + name + "'");
}

namespace {

double value_at(Space space, double x) {
  switch (space) {
    case Space::log: return std::exp(x);
    case Space::square: return x * x;
    case Space::softplus: return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
    case Space::tanh: return 0.5 * (std::tanh(x) + 1.0);
    default: return x;
  }
}

double slope_at(Space space, double x, double h) {
  switch (space) {
    case Space::log: return h;
    case Space::square: return 2.0 * x;
    case Space::softplus: return 1.0 / (1.0 + std::exp(-x));
    case Space::tanh: return 2.0 * h * (1.0 - h);
    default: return 1.0;
  }
}

// Always finite: the ends of a range that no coordinate reaches (beta = 0 under tanh) map to one where the slope vanishes.
double coordinate_of(Space space, double h) {
  switch (space) {
    case Space::log: return std::max(std::log(h), -700.0);
    case Space::square: return std::sqrt(h);
    case Space::softplus: return h + std::max(std::log(-std::expm1(-h)), -700.0);
    case Space::tanh: return std::min(std::max(0.5 * std::log(h / (1.0 - h)), -20.0), 20.0);
    default: return h;
  }
}

struct Level {
  const Rule& rule;
  Mask learn;
  std::int64_t spaces;
  LevelRow row;

  Space space(int i) const { return Space((spaces >> (kSpaceBits * i)) & ((1 << kSpaceBits) - 1)); }
  bool learns(int i) const { return (learn & bit(i)) != 0; }
};

template <class F>
void each_level(double* row, const std::int64_t* plan, int levels, F&& f) {
  double* start = row + kHeader;
  int moved = 0;
  for (int k = 0; k < levels; ++k) {
    const std::int64_t* columns = plan + k * kPlanColumns;
    const Rule& rule = *rules().at(std::size_t(columns[kRule]));
    const LevelRow values(start, int(rule.hypers.size()), int(rule.state.size()), moved);
    f(Level{rule, Mask(columns[kLearn]), columns[kCoordinates], values});
    start = values.end();
    moved = count(Mask(columns[kLearn]));
  }
}

}  // namespace

std::int64_t tower_width(const std::int64_t* plan, int levels) {
  std::int64_t width = kHeader;
  double* const start = nullptr;
  each_level(start, plan, levels, [&](const Level& level) { width = level.row.end() - start; });
  return width;
}

std::vector<std::int64_t> tower_live(const std::int64_t* plan, int levels) {
  std::vector<std::int64_t> offsets;
  double* const start = nullptr;
  each_level(start, plan, levels, [&](const Level& level) { offsets.push_back(level.row.live - start); });
  return offsets;
}

void tower_reset(double* row, const std::int64_t* plan, int levels, const double* values, const double* state) {
  std::fill(row, row + tower_width(plan, levels), 0.0);
  row[kOk] = 1.0;
  each_level(row, plan, levels, [&](const Level& level) {
    for (int i = 0; i < level.row.hypers; ++i, ++values) {
      level.row.live[i] = level.row.used[i] = level.row.previous[i] = *values;
      level.row.x[i] = coordinate_of(level.space(i), *values);
    }
    for (int k = 0; k < level.row.states; ++k, ++state)
      std::fill_n(level.row.state + k * level.row.n, level.row.n, *state);
  });
}

namespace {

// G of the learned coordinates of every level, lowest level first; false if one of them is not finite.
bool hypergradients(const std::vector<Level>& tower, const double* sums, std::vector<double>& gradients) {
  gradients.clear();
  bool finite = true;
  std::size_t below = 0;  // where the gradients of the level below start
  for (const Level& level : tower) {
    const std::size_t start = gradients.size();
    for (int i = 0; i < level.row.hypers; ++i) {
      if (!level.learns(i)) continue;
      double g = 0.0;
      if (&level != tower.data()) {
        for (int j = 0; j < level.row.n; ++j) g += gradients[below + j] * level.row.tangents[j * level.row.hypers + i];
      } else {
        g = sums[i];
      }
      g *= slope_at(level.space(i), level.row.x[i], level.row.used[i]);
      finite = finite && std::isfinite(g);
      gradients.push_back(g);
    }
    below = start;
  }
  return finite;
}

// Values that the user wrote since the last step, projected to their bounds, become the coordinates that are moved from
// here on. What is not finite is not taken.
void adopt_writes(const Level& level, const double* bounds) {
  for (int i = 0; i < level.row.hypers; ++i) {
    double& live = level.row.live[i];
    if (live == level.row.used[i]) continue;
    live = std::isfinite(live) ? std::min(std::max(live, bounds[2 * i]), bounds[2 * i + 1]) : level.row.used[i];
    level.row.x[i] = coordinate_of(level.space(i), live);
  }
}

// Moves the learned coordinates of `level` by the rule of the level above.
void move(const Level& level, const Level& above, double step, const double* gradients, const double* bounds) {
  double x[kMaxHypers];
  int n = 0;
  for (int i = 0; i < level.row.hypers; ++i)
    if (level.learns(i)) x[n++] = level.row.x[i];
  above.rule.level(above.row.used, step, n, x, gradients, above.row.state, above.row.tangents);
  for (int i = 0, j = 0; i < level.row.hypers; ++i) {
    if (!level.learns(i)) continue;
    const double moved = x[j++], low = bounds[2 * i], high = bounds[2 * i + 1];
    const double value = value_at(level.space(i), moved), projected = std::min(std::max(value, low), high);
    if (!std::isfinite(moved) || !std::isfinite(projected)) continue;
    level.row.x[i] = projected == value ? moved : coordinate_of(level.space(i), projected);
    level.row.live[i] = projected;
  }
}

}  // namespace

void tower_step(double* row, const std::int64_t* plan, const double* bounds, int levels, const double* sums) {
  thread_local std::vector<Level> tower;
  thread_local std::vector<double> gradients;
  tower.clear();
  each_level(row, plan, levels, [&](const Level& level) { tower.push_back(level); });

  const double squared_norm = sums[tower[0].row.hypers];
  row[kOk] = std::isfinite(squared_norm) ? 1.0 : 0.0;
  if (row[kOk] == 0.0) {
    row[kSkipped] += 1.0;
    return;
  }
  const bool finite = hypergradients(tower, sums, gradients);
  row[kTicks] += 1.0;
  row[finite ? kMoves : kHeld] += 1.0;

  const double* bound = bounds;
  for (const Level& level : tower) bound += 2 * level.row.hypers;
  std::size_t gradient = gradients.size();
  for (int k = levels - 1; k >= 0; --k) {
    const Level& level = tower[std::size_t(k)];
    bound -= 2 * level.row.hypers;
    gradient -= std::size_t(count(level.learn));
    adopt_writes(level, bound);
    if (k + 1 < levels && level.learn != 0) {
      const Level& above = tower[std::size_t(k) + 1];
      if (finite)
        move(level, above, row[kMoves], gradients.data() + gradient, bound);
      else  // no update was made: nothing to differentiate at the next step
        std::fill(above.row.tangents, above.row.end(), 0.0);
    }
    std::copy_n(level.row.used, level.row.hypers, level.row.previous);
    std::copy_n(level.row.live, level.row.hypers, level.row.used);
  }
}

}  // namespace hyperopt_ext
