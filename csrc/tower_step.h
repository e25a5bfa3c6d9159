// One step of a scalar tower, and its cap: the code that tower.cpp runs on the CPU and cuda/tower.cu on a GPU.
//
// The work is divided among the workers of a team, in phases. kLanes workers share a row, with one hyperparameter of a
// level each; where kLanes is 1, a single worker does whole levels. A Team has
//
//   kWorkers, kLanes     the number of workers, and of those that share a row
//   each(f)              calls f(worker) for every worker, and ends with a barrier
//
// and a Call moves coordinates by the rule of a level: see LevelKernel in registry.h.
#pragma once

#include <cmath>
#include <limits>

#include "numerics.h"
#include "tower.h"

namespace hyperopt_ext {
namespace tower {

HX_FN double value_at(Space space, double x) {
  switch (space) {
    case Space::log:
    case Space::multiplicative: return std::exp(x);
    case Space::square: return x * x;
    case Space::softplus: return (x > 0.0 ? x : 0.0) + std::log1p(std::exp(-std::fabs(x)));
    case Space::tanh: return 1.0 / (1.0 + std::exp(-2.0 * x));  // (tanh x + 1) / 2, exact for small values, too
    default: return x;
  }
}

HX_FN double slope_at(Space space, double x, double h) {
  switch (space) {
    case Space::log:
    case Space::multiplicative: return h;
    case Space::square: return 2.0 * x;
    case Space::softplus: return 1.0 / (1.0 + std::exp(-x));
    case Space::tanh: return 2.0 * h * (1.0 - h);
    default: return 1.0;
  }
}

HX_FN double clamp(double x, double low, double high) {
  return x < low ? low : x > high ? high : x;
}

// The coordinate nearest to x that has a value of its own: exp(-700) is about 1e-304, still a normal double.
HX_FN double within(Space space, double x) {
  switch (space) {
    case Space::log:
    case Space::multiplicative:
    case Space::softplus: return clamp(x, -700.0, kInfinity);
    case Space::tanh: return clamp(x, -350.0, 20.0);
    default: return x;
  }
}

// Always finite: an end of the range that no finite coordinate reaches (beta = 0 under tanh) maps to a coordinate where
// the slope vanishes. `h` lies in the range of the coordinate; of two that it has, this is the one on the side of `near`.
HX_FN double coordinate_of(Space space, double h, double near) {
  switch (space) {
    case Space::log:
    case Space::multiplicative: return within(space, std::log(h));
    case Space::square: return near < 0.0 ? -std::sqrt(h) : std::sqrt(h);
    case Space::softplus: return h + within(space, std::log(-std::expm1(-h)));
    case Space::tanh: return within(space, 0.5 * std::log(h / (1.0 - h)));
    default: return h;
  }
}

// Parameters whose root mean square is smaller than this count as if it were this, where an update is measured by them
// (as in Adafactor: Shazeer & Stern, ICML 2018, Algorithm 4).
constexpr double kSmallestRms = 1e-3;

// An lr whose update is a smaller part of the parameters is not lowered any further: in fp32 the update is lost in
// rounding, so that nothing tells this lr from any smaller one, from which it would be long in coming back.
constexpr double kSmallestUpdate = 1e-8;

// One level of one row.
struct Level {
  LevelRow row;
  const std::int64_t* plan;
  const double* bounds;    // [hypers, 2]
  const double* settings;  // [kSettings]
  Mask learn;

  HX_FN Level(const TowerView& tower, std::int64_t at, int k)
      : row(tower.row_of(at, k)),
        plan(tower.level(k)),
        bounds(tower.bounds + 2 * plan[kBounds]),
        settings(tower.settings + k * kSettings),
        learn(Mask(plan[kLearn])) {}
  HX_FN Space space(int i) const { return Space((plan[kCoordinates] >> (kSpaceBits * i)) & ((1 << kSpaceBits) - 1)); }
  HX_FN bool learns(int i) const { return (learn & bit(i)) != 0; }
  HX_FN bool is_lr(int i) const { return i == int(plan[kLr]); }
};

// What is known of the derivative of the loss with respect to one hyperparameter: <G, z>, |z|^2 and |G|^2, where G is
// the gradient of what its level moves and z the derivative of that level's last update.
struct Products {
  double gz, zz, gg;
  HX_FN void add(const Products& other) {
    gz += other.gz;
    zz += other.zz;
    gg += other.gg;
  }
};

// What a step keeps in TowerView::scratch.
struct Scratch {
  std::int64_t learned;
  double *exact, *applied;  // [rows, learned]: d loss / d coordinate; the same, normalised and clipped
  double* finite;           // [rows]
  double* all_finite;       // of the rows that take part
  double* any;              // whether one does
  Products* shared;         // [kRowParts, kMaxHypers]: what the rows have in common

  HX_FN explicit Scratch(const TowerView& tower) : learned(tower.learned()) {
    exact = tower.scratch;
    applied = exact + tower.rows * learned;
    finite = applied + tower.rows * learned;
    all_finite = finite + tower.rows;
    any = all_finite + 1;
    shared = reinterpret_cast<Products*>(any + 1);
  }
};

// What the traces of a level are multiplied by at its `step`-th move.
HX_FN double keep_of(const Level& level, double step) {
  return hyperopt_ext::keep_of(level.settings[kHorizon], level.settings[kHorizonGrowth], step);
}

// d(t) of the convergent step size gamma_t = d(t) alpha_t + (1 - d(t)) alpha_inf, with t d(t) -> 0 (Baydin et al., ICLR
// 2018, section 5), where alpha_t is the learned one.
HX_FN double learned_part(const Level& level, double t) {
  const double times = t / level.settings[kLimitSteps];
  return 1.0 / (1.0 + times * times);
}

// A value that the user wrote since the last step is projected to its bounds and becomes the coordinate that is moved
// from here on. One that is not finite is ignored.
HX_FN void adopt_write(const Level& level, int i) {
  double& live = level.row.live[i];
  if (live == level.row.seen[i]) return;
  live = is_finite(live) ? clamp(live, level.bounds[2 * i], level.bounds[2 * i + 1]) : level.row.seen[i];
  level.row.x[i] = coordinate_of(level.space(i), live, level.row.x[i]);
}

// Without an update there is nothing to differentiate, and traces fade: those of the coordinates begin to end - 1.
HX_FN void fade(const Level& above, double step, int begin, int end) {
  const double keep = keep_of(above, step);
  for (int k = begin * above.row.hypers; k < end * above.row.hypers; ++k) {
    double& t = above.row.tangents[k];
    t = next_trace(keep, t, 0.0);
  }
}

// Moves the learned ones of the hyperparameters first to last - 1 of `level` by the rule of the level above; lr is not
// lowered below `least`.
template <class Call>
HX_FN void move(const Call& call, const Level& level, const Level& above, double step, const double* gradients,
                int first, int last, double least) {
  const LevelRow& r = level.row;
  const int columns = above.row.hypers, n = above.row.n;
  const int begin = position(level.learn, first), end = position(level.learn, last);
  if (begin == end) return;
  double x[Call::kCapacity], fresh[Call::kCapacity * kMaxHypers];
  for (int i = first, j = 0; i < last; ++i)
    if (level.learns(i)) x[j++] = r.x[i];
  call(above.plan, above.row.used, step, n, begin, end, x, gradients, above.row.state, fresh);

  const double keep = keep_of(above, step);
  for (int i = first, j = 0; i < last; ++i) {
    if (!level.learns(i)) continue;
    double moved = x[j], slope = 1.0;
    if (level.space(i) == Space::multiplicative) {
      const double factor = 1.0 + (moved - r.x[i]);
      moved = factor > 0.0 ? r.x[i] + std::log(factor) : std::numeric_limits<double>::lowest();
      slope = factor > 0.0 ? 1.0 / factor : 0.0;
    }
    double* const tangents = above.row.tangents + (begin + j) * columns;
    for (int k = 0; k < columns; ++k) tangents[k] = next_trace(keep, tangents[k], slope * fresh[j * columns + k]);
    ++j;
    if (moved == r.x[i] || !is_finite(moved)) continue;
    const double reached = within(level.space(i), moved), value = value_at(level.space(i), reached);
    double kept = clamp(value, level.bounds[2 * i], level.bounds[2 * i + 1]);
    if (level.is_lr(i)) {
      const double size = std::fabs(r.live[i]);  // with wide bounds it may be negative
      const double most = level.settings[kGrowth] * size, low = size < least ? size : least;
      if (is_finite(level.settings[kGrowth])) kept = clamp(kept, -most, most);
      if (std::fabs(kept) < low) kept = r.live[i] < 0.0 ? -low : low;
    }
    if (!is_finite(kept)) continue;
    r.x[i] = kept == value ? reached : coordinate_of(level.space(i), kept, moved);
    r.bounded[i] += kept == value && reached == moved ? 0.0 : 1.0;
    r.live[i] = kept;
  }
}

// Makes the live value that of the next update, the `t`-th, with `schedule` times the lr.
HX_FN void use(const Level& level, int i, double t, double schedule) {
  const LevelRow& r = level.row;
  r.previous[i] = r.used[i];
  r.used[i] = r.live[i];
  r.seen[i] = r.live[i];
  if (level.is_lr(i) && is_finite(level.settings[kLimitSteps])) {
    const double part = learned_part(level, t);
    r.used[i] = part * r.live[i] + (1.0 - part) * level.settings[kLimit];
  }
  if (level.is_lr(i)) r.used[i] *= schedule;
}

HX_FN bool is_shared(const TowerView& tower, int k) {
  return tower.rows > 1 && tower.settings[k * kSettings + kPerTensor] == 0.0;
}

// The square of the gradient's norm in a row; -1: it has no parameters in this step.
HX_FN double squared_norm(const TowerView& tower, std::int64_t row) {
  return tower.sums[(row + 1) * (2 * tower.level(0)[kHypers] + 1) - 1];
}

HX_FN Products products_of(const TowerView& tower, const Scratch& scratch, int k, int hyper, std::int64_t row) {
  if (k == 0) {
    const std::int64_t hypers = tower.level(0)[kHypers];
    const double* const own = tower.sums + row * (2 * hypers + 1);
    const double gg = own[2 * hypers];
    if (!is_finite(gg) || gg < 0.0) return {};  // a row that sits the step out
    return {own[hyper], own[hypers + hyper], gg};
  }
  const LevelRow r = tower.row_of(row, k);
  const double* const below = scratch.exact + row * scratch.learned + tower.level(k - 1)[kGradient];
  Products p{};
  for (int j = 0; j < r.n; ++j) {
    const double g = below[j], z = r.tangents[j * r.hypers + hyper];
    p.add({g * z, z * z, g * g});
  }
  return p;
}

// A worker's share of level k: every kEvery-th of the rows, and in each the hyperparameters from `first` up to, and without,
// `last`.
template <class Team>
struct Share {
  static constexpr int kEvery = Team::kWorkers / Team::kLanes;
  static_assert(kEvery <= kRowParts);
  int part, first, last;

  HX_FN Share(const TowerView& tower, int k, int worker) {
    const int hypers = int(tower.level(k)[kHypers]), lane = worker % Team::kLanes;
    part = worker / Team::kLanes;
    first = Team::kLanes == 1 ? 0 : lane;
    last = Team::kLanes == 1 ? hypers : lane < hypers ? lane + 1 : lane;
  }
};

// Calls f(row, first, last) for the rows of a worker's share, if it has one.
template <class Team, class F>
HX_FN void each_share(const TowerView& tower, int k, int worker, F&& f) {
  const Share<Team> share(tower, k, worker);
  if (share.first == share.last) return;
  for (std::int64_t row = share.part; row < tower.rows; row += Share<Team>::kEvery) f(row, share.first, share.last);
}

// Adds the products of level k up over the rows, into scratch.shared: each part of the rows, then the parts.
template <class Team>
HX_FN void sum_rows(const Team& team, const TowerView& tower, const Scratch& scratch, int k) {
  const Mask learn = Mask(tower.level(k)[kLearn]);
  team.each([&](int worker) {
    const Share<Team> share(tower, k, worker);
    for (int i = share.first; i < share.last; ++i) {
      if ((learn & bit(i)) == 0) continue;
      Products sum{};
      for (std::int64_t row = share.part; row < tower.rows; row += Share<Team>::kEvery)
        sum.add(products_of(tower, scratch, k, i, row));
      scratch.shared[share.part * kMaxHypers + i] = sum;
    }
  });
  if (Share<Team>::kEvery == 1) return;
  team.each([&](int worker) {
    const Share<Team> share(tower, k, worker);
    for (int i = share.first; i < share.last && share.part == 0; ++i)
      for (int part = 1; part < Share<Team>::kEvery && (learn & bit(i)) != 0; ++part)
        scratch.shared[i].add(scratch.shared[part * kMaxHypers + i]);
  });
}

// The hypergradients, from the lowest level up. Where the rows begin to share a level, they are summed over the rows.
template <class Team>
HX_FN void differentiate(const Team& team, const TowerView& tower, const Scratch& scratch) {
  team.each([&](int worker) {
    for (std::int64_t row = worker; row < tower.rows; row += Team::kWorkers) scratch.finite[row] = 1.0;
  });
  for (int k = 0; k + 1 < tower.levels; ++k) {
    const Mask learn = Mask(tower.level(k)[kLearn]);
    const bool summed = is_shared(tower, k) && (k == 0 || !is_shared(tower, k - 1));
    if (summed) sum_rows(team, tower, scratch, k);
    team.each([&](int worker) {
      each_share<Team>(tower, k, worker, [&](std::int64_t row, int first, int last) {
        const Level level(tower, row, k);
        for (int i = first; i < last; ++i) {
          if (!level.learns(i)) continue;
          const Products p = summed ? scratch.shared[i] : products_of(tower, scratch, k, i, row);
          double slope = slope_at(level.space(i), level.row.x[i], level.row.seen[i]);
          const double* const head = tower.header(row);
          const double schedule = k == 0 && level.is_lr(i) ? head[kScheduled] : 1.0;
          if (level.is_lr(i)) slope *= learned_part(level, head[k == 0 ? kTicks : kMoves]) * schedule;
          const double g = slope * p.gz;
          // Squares may underflow where products do not.
          const double norm = schedule == 0.0 ? 0.0 : std::sqrt(p.zz) * std::sqrt(p.gg);
          const double cosine = norm == 0.0 ? 0.0 : clamp(p.gz / norm, -1.0, 1.0);
          const double a = level.settings[kNormalize] == 0.0 ? g : slope < 0.0 ? -cosine : cosine;
          const std::int64_t at = row * scratch.learned + level.plan[kGradient] + position(learn, i);
          scratch.exact[at] = g;
          scratch.applied[at] = a;
          if (!is_finite(g) || !is_finite(a)) scratch.finite[row] = 0.0;
        }
      });
    });
    const double most = tower.settings[k * kSettings + kClip];
    if (!is_finite(most)) continue;
    team.each([&](int worker) {
      for (std::int64_t row = worker; row < tower.rows; row += Team::kWorkers) {
        double* const g = scratch.applied + row * scratch.learned + tower.level(k)[kGradient];
        double largest = 0.0, square = 0.0;
        for (int j = 0; j < count(learn); ++j) largest = std::fabs(g[j]) > largest ? std::fabs(g[j]) : largest;
        if (largest == 0.0 || !is_finite(largest)) continue;
        for (int j = 0; j < count(learn); ++j) square += (g[j] / largest) * (g[j] / largest);
        const double norm = std::sqrt(square);  // in units of the largest, so that no square overflows
        if (largest > most / norm)
          for (int j = 0; j < count(learn); ++j) g[j] = g[j] / largest * (most / norm);
      }
    });
  }
}

// What each row does in this step, and its counters.
template <class Team>
HX_FN void decide(const Team& team, const TowerView& tower, const Scratch& scratch) {
  // Rows that share a level above the first stay in step: they move, or not, together.
  bool coupled = false;
  for (int k = 1; k < tower.levels; ++k) coupled = coupled || (tower.level(k)[kLearn] != 0 && is_shared(tower, k));
  if (tower.rows > 1) {
    team.each([&](int worker) {
      if (worker == 0) *scratch.any = 0.0, *scratch.all_finite = 1.0;
    });
    team.each([&](int worker) {  // who writes, writes the same
      for (std::int64_t row = worker; row < tower.rows; row += Team::kWorkers) {
        if (!is_finite(squared_norm(tower, row)) || squared_norm(tower, row) < 0.0) continue;
        *scratch.any = 1.0;
        if (scratch.finite[row] == 0.0) *scratch.all_finite = 0.0;
      }
    });
  }
  team.each([&](int worker) {
    for (std::int64_t row = worker; row < tower.rows; row += Team::kWorkers) {
      double* const head = tower.header(row);
      const bool finite = coupled ? *scratch.all_finite != 0.0 : scratch.finite[row] != 0.0;
      const bool takes_part = squared_norm(tower, row) != -1.0;
      const bool skips =
          takes_part && (!is_finite(squared_norm(tower, row)) || (!finite && tower.settings[kSkip] != 0.0));
      const bool ticking = takes_part && !skips;
      const bool moving = finite && (ticking || (coupled && *scratch.any != 0.0));
      head[kTicking] = ticking ? 1.0 : 0.0;
      head[kMoving] = moving ? 1.0 : 0.0;
      head[kTicks] += ticking ? 1.0 : 0.0;
      head[kMoves] += moving ? 1.0 : 0.0;
      head[kSkipped] += skips ? 1.0 : 0.0;
      head[kHeld] += ticking && !finite ? 1.0 : 0.0;
      head[kArrived] = 0.0;  // nothing, unless a pass broke off, or a copy was made in the middle of one
      if (row == 0) continue;
      for (int k = 0; k < tower.levels; ++k) {  // what the user wrote to a shared level stands in the first row
        if (!is_shared(tower, k)) continue;
        const LevelRow first = tower.row_of(0, k), own = tower.row_of(row, k);
        for (int i = 0; i < own.hypers; ++i) own.live[i] = first.live[i];
      }
    }
  });
}

// Moves level k of every row, and makes its values those of the next update.
template <class Team, class Call>
HX_FN void move_level(const Team& team, const Call& call, const TowerView& tower, const Scratch& scratch, int k) {
  team.each([&](int worker) {
    each_share<Team>(tower, k, worker, [&](std::int64_t row, int first, int last) {
      const double* const head = tower.header(row);
      const bool ticking = head[kTicking] != 0.0, moving = head[kMoving] != 0.0;
      if (!ticking && !moving) return;
      const Level level(tower, row, k);
      const double step = head[kMoves] - level.settings[kBurnIn];
      const bool updates = k > 0 || ticking;
      if (updates)
        for (int i = first; i < last; ++i) adopt_write(level, i);
      if (level.learn != 0) {
        const Level above(tower, row, k + 1);
        const double* const gradients = scratch.applied + row * scratch.learned + level.plan[kGradient];
        if (updates && moving && step > 0.0)
          move(call, level, above, step, gradients, first, last, k == 0 ? head[kLeast] : 0.0);
        else
          fade(above, step, position(level.learn, first), position(level.learn, last));
      }
      if (updates)
        for (int i = first; i < last; ++i)
          use(level, i, head[k == 0 ? kTicks : kMoves], k == 0 ? head[kSchedule] : 1.0);
      if (updates && k == 0 && first == 0) tower.header(row)[kScheduled] = head[kSchedule];
    });
  });
}

// A whole step.
template <class Team, class Call>
HX_FN void step(const Team& team, const Call& call, const TowerView& tower) {
  const Scratch scratch(tower);
  differentiate(team, tower, scratch);
  decide(team, tower, scratch);
  for (int k = tower.levels; k-- > 0;) move_level(team, call, tower, scratch, k);
}

// Lowers the lr of level 0 of one row where the coming update is larger than `trust` allows, and finds what the next
// move may lower it to.
HX_FN void cap(const TowerView& tower, std::int64_t row) {
  const Level level(tower, row, 0);
  const int lr = int(level.plan[kLr]);
  if (tower.header(row)[kTicking] == 0.0 || lr < 0) return;
  const double* const norms = tower.sums + 3 * row;
  const LevelRow& r = level.row;
  const double direction = std::sqrt(norms[0]), update = std::fabs(r.used[lr]) * direction;
  const double norm = std::sqrt(norms[1]), smallest = kSmallestRms * std::sqrt(norms[2]);
  const double size = norm < smallest ? smallest : norm, least = kSmallestUpdate * size / direction;
  tower.header(row)[kLeast] = is_finite(least) ? least : 0.0;
  // Without this factor, the learned lr would grow until it cancels that of a warm-up.
  const double schedule = tower.header(row)[kScheduled], factor = std::fabs(schedule) < 1.0 ? std::fabs(schedule) : 1.0;
  const double most = level.settings[kTrust] * factor * size;
  if (!(update > most)) return;
  r.used[lr] *= most / update;
  r.bounded[lr] += 1.0;
  const double allowed = r.used[lr] / schedule;
  // An update whose norm overflows is not made, and says nothing about the lr to learn.
  if (!is_finite(update) || !level.learns(lr) || std::fabs(r.live[lr]) <= std::fabs(allowed)) return;
  r.live[lr] = r.seen[lr] = allowed;
  r.x[lr] = coordinate_of(level.space(lr), allowed, r.x[lr]);
}

}  // namespace tower
}  // namespace hyperopt_ext
