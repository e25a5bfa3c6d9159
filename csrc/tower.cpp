#include "tower.h"

#include <algorithm>
#include <cmath>
#include <functional>
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
    case Space::log:
    case Space::multiplicative: return std::exp(x);
    case Space::square: return x * x;
    case Space::softplus: return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
    case Space::tanh: return 0.5 * (std::tanh(x) + 1.0);
    default: return x;
  }
}

double slope_at(Space space, double x, double h) {
  switch (space) {
    case Space::log:
    case Space::multiplicative: return h;
    case Space::square: return 2.0 * x;
    case Space::softplus: return 1.0 / (1.0 + std::exp(-x));
    case Space::tanh: return 2.0 * h * (1.0 - h);
    default: return 1.0;
  }
}

// Always finite: the ends of a range that no coordinate reaches (beta = 0 under tanh) map to one where the slope vanishes.
double coordinate_of(Space space, double h) {
  switch (space) {
    case Space::log:
    case Space::multiplicative: return std::max(std::log(h), -700.0);
    case Space::square: return std::sqrt(h);
    case Space::softplus: return h + std::max(std::log(-std::expm1(-h)), -700.0);
    case Space::tanh: return std::min(std::max(0.5 * std::log(h / (1.0 - h)), -20.0), 20.0);
    default: return h;
  }
}

// Parameters whose root mean square is smaller than this count as if it were this, where an update is measured by them (as
// in Adafactor: Shazeer & Stern, ICML 2018, Algorithm 4).
constexpr double kSmallestRms = 1e-3;

struct Level {
  const Rule& rule;
  Mask learn;
  std::int64_t spaces;
  LevelRow row;
  const double* bounds;    // [hypers, 2]
  const double* settings;  // [kSettings]
  std::int64_t gradient;   // where its learned hyperparameters start among those of all levels

  Space space(int i) const { return Space((spaces >> (kSpaceBits * i)) & ((1 << kSpaceBits) - 1)); }
  bool learns(int i) const { return (learn & bit(i)) != 0; }
};

// f(level) for every level, the lowest first. `bounds` and `settings` may be null.
template <class F>
void each_level(double* row, const std::int64_t* plan, const double* bounds, const double* settings, int levels,
                F&& f) {
  double* start = row + kHeader;
  std::int64_t gradient = 0;
  int moved = 0;
  for (int k = 0; k < levels; ++k) {
    const std::int64_t* columns = plan + k * kPlanColumns;
    const Rule& rule = *rules().at(std::size_t(columns[kRule]));
    const LevelRow values(start, int(rule.hypers.size()), int(rule.state.size()), moved);
    const Mask learn = Mask(columns[kLearn]);
    f(Level{rule, learn, columns[kCoordinates], values, bounds, settings, gradient});
    start = values.end();
    moved = count(learn);
    gradient += moved;
    if (bounds != nullptr) bounds += 2 * rule.hypers.size();
    if (settings != nullptr) settings += kSettings;
  }
}

template <class F>
void each_level(const TowerView& tower, std::int64_t row, F&& f) {
  each_level(tower.start + row * tower.width, tower.plan, tower.bounds, tower.settings, tower.levels, f);
}

}  // namespace

std::int64_t tower_width(const std::int64_t* plan, int levels) {
  std::int64_t width = kHeader;
  double* const start = nullptr;
  each_level(start, plan, nullptr, nullptr, levels, [&](const Level& level) { width = level.row.end() - start; });
  return width;
}

std::vector<Offsets> tower_offsets(const std::int64_t* plan, int levels) {
  std::vector<Offsets> offsets;
  double* const start = nullptr;
  each_level(start, plan, nullptr, nullptr, levels, [&](const Level& level) {
    offsets.push_back({level.row.live - start, level.row.bounded - start, level.row.used - start});
  });
  return offsets;
}

void tower_reset(double* row, const std::int64_t* plan, int levels, const double* values, const double* state) {
  std::fill(row, row + tower_width(plan, levels), 0.0);
  row[kOk] = row[kSchedule] = row[kScheduled] = 1.0;
  each_level(row, plan, nullptr, nullptr, levels, [&](const Level& level) {
    const LevelRow& r = level.row;
    for (int i = 0; i < r.hypers; ++i, ++values) {
      r.live[i] = r.seen[i] = r.used[i] = r.previous[i] = *values;
      r.x[i] = coordinate_of(level.space(i), *values);
    }
    for (int k = 0; k < r.states; ++k, ++state) std::fill_n(r.state + k * r.n, r.n, *state);
  });
}

namespace {

// What traces are multiplied by at the `step`-th move by this level.
double keep_of(const Level& level, double step) {
  return 1.0 - 1.0 / std::max(level.settings[kHorizon], level.settings[kHorizonGrowth] * step);
}

// d(t) of the convergent step size gamma_t = d(t) alpha_t + (1 - d(t)) alpha_inf, with t d(t) -> 0 (Baydin et al., ICLR
// 2018, section 5), where alpha_t is the learned one.
double learned_part(const Level& level, double t) {
  const double times = t / level.settings[kLimitSteps];
  return 1.0 / (1.0 + times * times);
}

// Values that the user wrote since the last step, projected to their bounds, become the coordinates that are moved from
// here on. What is not finite is not taken.
void adopt_writes(const Level& level) {
  for (int i = 0; i < level.row.hypers; ++i) {
    double& live = level.row.live[i];
    if (live == level.row.seen[i]) continue;
    const double low = level.bounds[2 * i], high = level.bounds[2 * i + 1];
    live = std::isfinite(live) ? std::min(std::max(live, low), high) : level.row.seen[i];
    level.row.x[i] = coordinate_of(level.space(i), live);
  }
}

// Without an update there is nothing to differentiate, and traces fade.
void fade(const Level& level, double step) {
  const double keep = keep_of(level, step);
  for (double* t = level.row.tangents; t != level.row.end(); ++t) *t = keep == 0.0 ? 0.0 : keep * *t;
}

// Moves the learned coordinates of `level` by the rule of the level above.
void move(const Level& level, const Level& above, double step, const double* gradients) {
  const LevelRow& r = level.row;
  const int columns = above.row.hypers;
  double x[kMaxHypers], faded[kMaxHypers * kMaxHypers];
  int n = 0;
  for (int i = 0; i < r.hypers; ++i)
    if (level.learns(i)) x[n++] = r.x[i];
  const double keep = keep_of(above, step);
  if (keep != 0.0) std::transform(above.row.tangents, above.row.end(), faded, [&](double t) { return keep * t; });
  above.rule.level(above.row.used, step, n, x, gradients, above.row.state, above.row.tangents);

  for (int i = 0, j = 0; i < r.hypers; ++i) {
    if (!level.learns(i)) continue;
    double moved = x[j];
    if (level.space(i) == Space::multiplicative) {
      const double factor = std::max(1.0 + (moved - r.x[i]), 0.0);
      moved = factor > 0.0 ? r.x[i] + std::log(factor) : coordinate_of(Space::log, 0.0);
      for (int k = 0; k < columns; ++k) above.row.tangents[j * columns + k] *= factor > 0.0 ? 1.0 / factor : 0.0;
    }
    ++j;
    if (moved == r.x[i] || !std::isfinite(moved)) continue;
    const double value = value_at(level.space(i), moved);
    double kept = std::min(std::max(value, level.bounds[2 * i]), level.bounds[2 * i + 1]);
    if (i == level.rule.lr && std::isfinite(level.settings[kGrowth]))
      kept = std::min(kept, level.settings[kGrowth] * r.live[i]);
    if (!std::isfinite(kept)) continue;
    r.x[i] = kept == value ? moved : coordinate_of(level.space(i), kept);
    r.bounded[i] += kept == value ? 0.0 : 1.0;
    r.live[i] = kept;
  }
  if (keep != 0.0) std::transform(above.row.tangents, above.row.end(), faded, above.row.tangents, std::plus<double>());
}

// Makes the live values those of the next update, the `t`-th, with `schedule` times the lr.
void use(const Level& level, double t, double schedule) {
  const LevelRow& r = level.row;
  std::copy_n(r.used, r.hypers, r.previous);
  std::copy_n(r.live, r.hypers, r.used);
  std::copy_n(r.live, r.hypers, r.seen);
  const int lr = level.rule.lr;
  if (lr >= 0 && std::isfinite(level.settings[kLimitSteps])) {
    const double part = learned_part(level, t);
    r.used[lr] = part * r.live[lr] + (1.0 - part) * level.settings[kLimit];
  }
  if (lr >= 0) r.used[lr] *= schedule;
}

// What is known of the derivative of the loss with respect to one hyperparameter: <G, z>, |z|^2 and |G|^2, where G is the
// gradient of what its level moves and z the derivative of that level's last update.
struct Products {
  double gz = 0.0, zz = 0.0, gg = 0.0;
  void add(const Products& other) {
    gz += other.gz;
    zz += other.zz;
    gg += other.gg;
  }
};

// One step of a tower. An object is kept for its buffers.
class TowerStep {
 public:
  void run(const TowerView& tower, const double* sums);

 private:
  Products products_of(std::size_t level, int hyper, std::int64_t row) const;
  void differentiate();
  void clip(const Level& level);
  void move_row(const std::vector<Level>& levels, double* header, const double* gradients, bool moving, bool moves);

  double* header(std::int64_t row) const { return tower_.start + row * tower_.width; }
  // The square of the gradient's norm in a row; -1: it has no parameters in this step.
  double squared_norm(std::int64_t row) const { return sums_[(row + 1) * columns_ - 1]; }
  bool is_shared(const Level& level) const { return tower_.rows > 1 && level.settings[kPerTensor] == 0.0; }

  TowerView tower_{};
  const double* sums_ = nullptr;  // [rows, columns]
  std::int64_t columns_ = 0;
  std::int64_t learned_ = 0;         // coordinates of all levels
  std::vector<Level> levels_, row_;  // of the first row, and of the one that is being moved
  std::vector<double> exact_;        // [rows, learned]: d loss / d coordinate
  std::vector<double> applied_;      // [rows, learned]: the same, normalised and clipped
  std::vector<char> finite_;         // [rows]
};

Products TowerStep::products_of(std::size_t k, int hyper, std::int64_t row) const {
  const LevelRow& r = levels_[k].row;
  if (k == 0) {
    const double* const own = sums_ + row * columns_;
    return {own[hyper], own[r.hypers + hyper], std::max(own[2 * r.hypers], 0.0)};
  }
  const double* const below = exact_.data() + row * learned_ + levels_[k - 1].gradient;
  const double* const tangents = r.tangents + row * tower_.width + hyper;
  Products p;
  for (int j = 0; j < r.n; ++j) {
    const double g = below[j], z = tangents[j * r.hypers];
    p.add({g * z, z * z, g * g});
  }
  return p;
}

// The hypergradients, from the lowest level up. Where the rows begin to share a level, they are summed over the rows.
void TowerStep::differentiate() {
  exact_.assign(std::size_t(tower_.rows * learned_), 0.0);
  applied_.assign(exact_.size(), 0.0);
  finite_.assign(std::size_t(tower_.rows), 1);
  for (std::size_t k = 0; k + 1 < levels_.size(); ++k) {
    const Level& level = levels_[k];
    const bool summed = is_shared(level) && (k == 0 || !is_shared(levels_[k - 1]));
    std::int64_t at = level.gradient;
    for (int i = 0; i < level.row.hypers; ++i) {
      if (!level.learns(i)) continue;
      Products shared;
      if (summed)
        for (std::int64_t row = 0; row < tower_.rows; ++row) shared.add(products_of(k, i, row));
      for (std::int64_t row = 0; row < tower_.rows; ++row) {
        const Products p = summed ? shared : products_of(k, i, row);
        const std::int64_t shift = row * tower_.width;
        double slope = slope_at(level.space(i), level.row.x[shift + i], level.row.seen[shift + i]);
        const double schedule = k == 0 && i == level.rule.lr ? header(row)[kScheduled] : 1.0;
        if (i == level.rule.lr) slope *= learned_part(level, header(row)[k == 0 ? kTicks : kMoves]) * schedule;
        const double g = slope * p.gz;
        const double cosine = p.gz == 0.0 || schedule == 0.0 ? 0.0 : p.gz / (std::sqrt(p.zz) * std::sqrt(p.gg));
        const double a = level.settings[kNormalize] != 0.0 ? cosine : g;
        exact_[std::size_t(row * learned_ + at)] = g;
        applied_[std::size_t(row * learned_ + at)] = a;
        if (!std::isfinite(g) || !std::isfinite(a)) finite_[std::size_t(row)] = 0;
      }
      ++at;
    }
    clip(level);
  }
}

void TowerStep::clip(const Level& level) {
  const double most = level.settings[kClip];
  if (!std::isfinite(most)) return;
  for (std::int64_t row = 0; row < tower_.rows; ++row) {
    double* const g = applied_.data() + row * learned_ + level.gradient;
    double square = 0.0;
    for (int j = 0; j < count(level.learn); ++j) square += g[j] * g[j];
    if (std::sqrt(square) > most)
      for (int j = 0; j < count(level.learn); ++j) g[j] *= most / std::sqrt(square);
  }
}

void TowerStep::move_row(const std::vector<Level>& levels, double* header, const double* gradients, bool moving,
                         bool moves) {
  for (std::size_t k = levels.size(); k-- > 0;) {
    const Level& level = levels[k];
    const double step = header[kMoves] - level.settings[kBurnIn];
    if (k == 0 && !moving) {
      if (level.learn != 0) fade(levels[1], step);
      continue;
    }
    adopt_writes(level);
    if (level.learn != 0) {
      if (moves && step > 0.0)
        move(level, levels[k + 1], step, gradients + level.gradient);
      else
        fade(levels[k + 1], step);
    }
    use(level, header[k == 0 ? kTicks : kMoves], k == 0 ? header[kSchedule] : 1.0);
    if (k == 0) header[kScheduled] = header[kSchedule];
  }
}

void TowerStep::run(const TowerView& tower, const double* sums) {
  tower_ = tower;
  sums_ = sums;
  levels_.clear();
  each_level(tower, 0, [&](const Level& level) { levels_.push_back(level); });
  columns_ = 2 * levels_[0].row.hypers + 1;
  learned_ = levels_.back().gradient;  // nothing is learned of the last one
  differentiate();

  // Rows that share a level above the first stay in step: they move, or not, together.
  bool coupled = false, any = false, all_finite = true;
  for (const Level& level : levels_) coupled = coupled || (level.gradient > 0 && level.learn != 0 && is_shared(level));
  for (std::int64_t row = 0; row < tower.rows; ++row) {
    if (!std::isfinite(squared_norm(row)) || squared_norm(row) < 0.0) continue;
    any = true;
    all_finite = all_finite && finite_[std::size_t(row)] != 0;
  }
  for (const Level& level : levels_)  // what the user wrote to a shared level stands in the first row
    if (is_shared(level))
      for (std::int64_t row = 1; row < tower.rows; ++row)
        std::copy_n(level.row.live, level.row.hypers, level.row.live + row * tower.width);

  for (std::int64_t row = 0; row < tower.rows; ++row) {
    double* const head = header(row);
    const bool finite = coupled ? all_finite : finite_[std::size_t(row)] != 0, takes_part = squared_norm(row) != -1.0;
    const bool skips =
        takes_part && (!std::isfinite(squared_norm(row)) || (!finite && levels_[0].settings[kSkip] != 0.0));
    const bool moving = takes_part && !skips;
    const bool moves = finite && (moving || (coupled && any));
    head[kOk] = moving ? 1.0 : 0.0;
    head[kTicks] += moving ? 1.0 : 0.0;
    head[kMoves] += moves ? 1.0 : 0.0;
    head[kSkipped] += skips ? 1.0 : 0.0;
    head[kHeld] += moving && !finite ? 1.0 : 0.0;
    if (!moving && !moves) continue;
    row_.clear();
    if (row > 0) each_level(tower, row, [&](const Level& level) { row_.push_back(level); });
    move_row(row > 0 ? row_ : levels_, head, applied_.data() + row * learned_, moving, moves);
  }
}

}  // namespace

void tower_step(const TowerView& tower, const double* sums) {
  thread_local TowerStep step;
  step.run(tower, sums);
}

void tower_cap(const TowerView& tower, const double* norms) {
  for (std::int64_t row = 0; row < tower.rows; ++row) {
    double* const start = tower.start + row * tower.width;
    if (start[kOk] == 0.0) continue;
    each_level(start, tower.plan, tower.bounds, tower.settings, 1, [&](const Level& level) {
      const int lr = level.rule.lr;
      if (lr < 0) return;
      const double update = level.row.used[lr] * std::sqrt(norms[3 * row]), elements = norms[3 * row + 2];
      const double params = std::max(std::sqrt(norms[3 * row + 1]), kSmallestRms * std::sqrt(elements));
      const double most = level.settings[kTrust] * params;
      if (!(update > most)) return;
      const LevelRow& r = level.row;
      r.used[lr] *= most / update;
      r.bounded[lr] += 1.0;
      const double allowed = r.used[lr] / start[kScheduled];
      if (!level.learns(lr) || r.live[lr] <= allowed) return;
      r.live[lr] = r.seen[lr] = allowed;
      r.x[lr] = coordinate_of(level.space(lr), allowed);
    });
  }
}

}  // namespace hyperopt_ext
