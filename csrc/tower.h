// The scalar tower: how a set of levels is laid out in one row of doubles, and the call that moves all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "registry.h"

namespace hyperopt_ext {

// A tower is a float64 tensor [rows, width], one row for all parameters of a group or one for each tensor of it:
//
//   header    ticks     steps made so far by level 0
//             moves     steps in which the levels above it were free to move
//             ticking   0 if level 0 does not move in this step
//             skipped   steps in which nothing moved, because a number was not finite
//             held      steps in which the parameters moved, but not the levels above, because a hypergradient was not
//                       finite
//             moving    0 if the levels above level 0 do not move in this step
//             schedule  what the lr of level 0 is multiplied by in the coming update; written from outside
//             scheduled what it was multiplied by in the last one
//             least     the size below which the lr of level 0 is not lowered
//             arrived   on a GPU, the blocks of a pass that are through with the row, an unsigned int; 0 between passes
//   level k   used      [hypers]             the values of the most recent update
//             previous  [hypers]             those of the update before it
//             live      [hypers]             what the user sees and may write to
//             seen      [hypers]             the live values after the last step: what differs was written by the user
//             x         [hypers]             the raw coordinates
//             bounded   [hypers]             how many moves were cut by bounds, growth or trust
//             state     [states, n]          of the n hyperparameters of level k-1 that this level moves
//             tangents  [n, hypers]          d x_{k-1} / d h_k of the most recent update, or their traces
//
// with level 0, which moves the parameters, first (n = 0).
enum Header : int {
  kTicks,
  kMoves,
  kTicking,
  kSkipped,
  kHeld,
  kMoving,
  kSchedule,
  kScheduled,
  kLeast,
  kArrived,
  kHeader
};
constexpr int kValues = 6;  // numbers of a level for each of its hyperparameters

struct LevelRow {
  double *used, *previous, *live, *seen, *x, *bounded, *state, *tangents;
  int hypers, states, n;

  HX_FN LevelRow(double* start, int hypers, int states, int n)
      : used(start),
        previous(used + hypers),
        live(previous + hypers),
        seen(live + hypers),
        x(seen + hypers),
        bounded(x + hypers),
        state(bounded + hypers),
        tangents(state + states * n),
        hypers(hypers),
        states(states),
        n(n) {}
};

// One row of the plan, an int64 tensor [levels, kPlanColumns]: what a stack is made of, and where its numbers lie.
enum PlanColumn : int {
  kRule,         // the id of the level's rule
  kLearn,        // the learned hyperparameters
  kCoordinates,  // kSpaceBits for each hyperparameter
  // The rest follows from these (tower_plan).
  kHypers,    // of the rule
  kStates,    // of the rule
  kLr,        // the index of lr; -1: there is none
  kBuiltIn,   // its place among the rules that the CUDA tower is compiled with; -1: it is not one of them
  kMoved,     // how many coordinates the level moves
  kStart,     // where the level starts in a row
  kGradient,  // where its learned hyperparameters start among those of all levels
  kBounds,    // where its rows of `bounds`, a float64 tensor [sum of hypers, 2], start
  kPlanColumns
};
constexpr std::array<const char*, kPlanColumns> kPlanNames{
    "rule", "learn", "coordinates", "hypers", "states", "lr", "built_in", "moved", "start", "gradient", "bounds"};
constexpr int kSpaceBits = 4;

// One row of the settings, a float64 tensor [levels, kSettings]: how the hyperparameters of a level are moved.
enum Setting : int {
  kClip,           // the largest norm of the hypergradient; infinite: any
  kNormalize,      // 1: the hypergradient is the cosine between the gradient and the derivative of the update
  kGrowth,         // the largest factor by which lr grows in a step; infinite: any
  kBurnIn,         // first moves that are left out
  kHorizon,        // steps whose derivatives make the hypergradient: at least this many,
  kHorizonGrowth,  // and this part of all steps
  kLimit,          // what lr converges to,
  kLimitSteps,     // and in about how many steps; infinite: it does not
  kTrust,          // of level 0: the largest norm of an update, as a part of the norm of the parameters; infinite: any
  kPerTensor,      // 1: each row has values of its own; 0: the rows of a tower share this level's
  kSkip,           // of level 0: 1: a hypergradient that is not finite skips the step, too, not the move alone
  kSettings
};
constexpr std::array<const char*, kSettings> kSettingNames{"clip",    "normalize",      "growth", "burn_in",
                                                           "horizon", "horizon_growth", "limit",  "limit_steps",
                                                           "trust",   "per_tensor",     "skip"};

// The plan of levels of which the first three columns are given, [levels, 3]; both flattened.
std::vector<std::int64_t> tower_plan(const std::vector<std::int64_t>& levels);

// Whether this is a plan of rules that are loaded.
bool is_plan(const std::int64_t* plan, int levels);

// A tower, what it was built from, and what a step of it needs beside that.
struct TowerView {
  double* start;  // [rows, width]
  std::int64_t rows, width;
  const std::int64_t* plan;  // [levels, kPlanColumns]
  const double* bounds;      // [sum of hypers, 2]
  const double* settings;    // [levels, kSettings]
  int levels;
  const double* sums;  // [rows, 2 hypers + 1], what pass A gave (see pass.h), or, for the cap, [rows, 3]
  double* scratch;     // of tower_scratch() doubles

  HX_FN const std::int64_t* level(int k) const { return plan + k * kPlanColumns; }
  HX_FN double* header(std::int64_t row) const { return start + row * width; }
  HX_FN LevelRow row_of(std::int64_t row, int k) const {
    const std::int64_t* const p = level(k);
    return {header(row) + p[kStart], int(p[kHypers]), int(p[kStates]), int(p[kMoved])};
  }
  // The coordinates that all levels learn; nothing is learned of the last one.
  HX_FN std::int64_t learned() const { return level(levels - 1)[kGradient]; }
};

// The number of doubles in a row.
std::int64_t tower_width(const std::int64_t* plan, int levels);

// Sums over rows are made in at most so many parts.
constexpr int kRowParts = 8;

// The doubles that a step of a tower needs for itself, whatever it learns.
inline std::int64_t tower_scratch(std::int64_t rows, std::int64_t learned) {
  return rows * (2 * learned + 1) + 2 + 3 * kRowParts * kMaxHypers;
}

// Sets a row up: live values and coordinates from `values` [sum of hypers], accumulators from `state`, one value for
// each state of each level.
void tower_reset(double* row, const std::int64_t* plan, int levels, const double* values, const double* state);

// One step of all rows. `scratch` is not read.
void tower_step(const TowerView& tower);

// Lowers the lr of level 0 where the coming update is larger than `trust` allows, and finds what the next move may
// lower it to.
void tower_cap(const TowerView& tower);

}  // namespace hyperopt_ext
