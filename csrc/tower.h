// The scalar tower: how a set of levels is laid out in one row of doubles, and the call that moves all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "rule.h"

namespace hyperopt_ext {

// A tower is one row of a float64 tensor [towers, width]:
//
//   header    ticks     steps made so far by level 0
//             moves     steps made so far by the levels above it
//             ok        0 if the last gradient was not finite: then nothing moves in this step
//             skipped   how often that happened
//             held      how often a hypergradient was not finite: then the parameters move, and the levels above do not
//             (free)
//   level k   used      [hypers]             the values of the most recent update
//             previous  [hypers]             those of the update before it
//             live      [hypers]             what the user sees and may write to
//             x         [hypers]             the raw coordinates
//             state     [states, n]          of the n hyperparameters of level k-1 that this level moves
//             tangents  [n, hypers]          d x_{k-1} / d h_k of the most recent update
//
// with level 0, which moves the parameters, first (n = 0).
constexpr int kHeader = 8;
enum Header : int { kTicks, kMoves, kOk, kSkipped, kHeld };

struct LevelRow {
  double *used, *previous, *live, *x, *state, *tangents;
  int hypers, states, n;

  LevelRow(double* start, int hypers, int states, int n)
      : used(start),
        previous(used + hypers),
        live(previous + hypers),
        x(live + hypers),
        state(x + hypers),
        tangents(state + states * n),
        hypers(hypers),
        states(states),
        n(n) {}
  double* end() const { return tangents + n * hypers; }
};

// One row of the plan, an int64 tensor [levels, kPlanColumns]; its bounds are a float64 tensor [sum of hypers, 2].
enum PlanColumn : int { kRule, kLearn, kCoordinates, kPlanColumns };
constexpr int kSpaceBits = 4;  // of kCoordinates, for each hyperparameter

// The number of doubles in a row, and where in it the live values of each level start.
std::int64_t tower_width(const std::int64_t* plan, int levels);
std::vector<std::int64_t> tower_live(const std::int64_t* plan, int levels);

// Sets a row up: live values and coordinates from `values` [sum of hypers], accumulators from `state`, one value for each
// state of each level.
void tower_reset(double* row, const std::int64_t* plan, int levels, const double* values, const double* state);

// One step of a tower, from the sums of pass A [hypers + 1]: the hypergradient of level 0 (0 if there was no update yet)
// and the square of the gradient's norm.
void tower_step(double* row, const std::int64_t* plan, const double* bounds, int levels, const double* sums);

}  // namespace hyperopt_ext
