// A rule at run time: what its kernels are given, and the tables in which a library of rules hands them over.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "rule.h"

namespace hyperopt_ext {

// A run of elements of one tensor. Parameters, gradients and last_param have the parameter's dtype; state, last_grad and
// traces its arithmetic type (fp32 for half precision). What a CPU kernel is given is all in the latter: see Staged in
// cpu/passes.cpp.
struct Slice {
  void* param;
  void* grad;  // dL/dw, to be multiplied by `scale`; only read
  void* state[kMaxStates];
  void* last_grad;  // for backward and vjp, the gradient of the step, in the parameter's dtype
  void* last_param;
  void* trace[kMaxHypers];  // of the learned hyperparameters, if their horizon is longer than one step; else null
  // For vjp, in the arithmetic type: d loss / d state after the step, and what is made of it and of grad, d loss / d
  // (param, grad, state before it). For an update in the functional form grad_state is the state that it starts from,
  // as last_param is the parameter.
  void* grad_state[kMaxStates];
  void* grad_input[2 + kMaxStates];
  std::int64_t count;
  double scale;
  double keep;  // what a trace is multiplied by at each step
};

enum ScalarType : int { kFloat, kDouble, kHalf, kBFloat16 };
constexpr int kArithmeticTypes = 2;  // the first ones

// The type in which parameters of a type are updated, which is that of their state.
constexpr ScalarType arithmetic(ScalarType type) {
  return type == kDouble ? kDouble : kFloat;
}

// The kernels of a rule for one arithmetic type. `prepare` runs once a step and fills kPreparedBytes. `sums` are added to.
using PrepareKernel = void (*)(const double* hyper, double step, void* prepared);
using SumKernel = void (*)(const Slice&, const void* prepared, double* sums);

struct StepKernels {
  PrepareKernel prepare;
  void (*settle)(const Slice&, const void* last_prepared);
  // From the inputs of the step, with the sums over all hyperparameters; prepared as for the last LearnedSet.
  SumKernel backward;  // through the parameters, to the hyperparameters
  SumKernel vjp;       // through parameters and state, to all inputs
};

struct LearnedKernels {
  void (*update)(const Slice&, const void* prepared, const void* last_prepared);
  // sums [2]: the squared norms of the coming change and of the parameters
  void (*norms)(const Slice&, const void* prepared, const void* last_prepared, double* sums);
  PrepareKernel prepare_dual;  // for the two below
  void (*traced_update)(const Slice&, const void* prepared_dual);
  // sums [2 n + 1] over the n hyperparameters of the set, lowest first: of G z, of z^2 (if it is hypergradient[1]; [0]
  // leaves them out), and of G^2, where G is the gradient and z the derivative of the last update
  SumKernel hypergradient[2];
};

// A set of hyperparameters for which kernels are compiled.
struct LearnedSet {
  Mask mask;
  unsigned record;  // Record bits
  unsigned hidden;  // those that are missing (hidden_inputs() in cpu/register.h): none, or the rule is refused
  LearnedKernels cpu[kArithmeticTypes];

  const LearnedKernels& on_cpu(ScalarType type) const { return cpu[arithmetic(type)]; }
};

// One step of a rule on the coordinates begin to end - 1 of the n that a level moves, and its derivatives:
// x [end - begin], grad [n], state [states, n], tangents [end - begin, hypers] (d x_new / d hyper).
using LevelKernel = void (*)(const double* hyper, double step, int n, int begin, int end, double* x, const double* grad,
                             double* state, double* tangents);

struct Rule {
  const char* name;
  std::vector<Hyperparameter> hypers;
  std::vector<const char*> state;
  std::vector<LearnedSet> sets;  // smallest first, from none to all hyperparameters
  StepKernels cpu[kArithmeticTypes];
  LevelKernel level;
  int lr;  // the index of the hyperparameter of that name; -1: there is none

  const StepKernels& on_cpu(ScalarType type) const { return cpu[arithmetic(type)]; }

  // The smallest compiled set that holds all of `learn`.
  const LearnedSet& set_for(Mask learn) const {
    for (const LearnedSet& set : sets)
      if ((learn & ~set.mask) == 0) return set;
    return sets.back();
  }
};

// The rules, in the order of their registration. The position of a rule is its id in a tower's plan.
std::vector<const Rule*>& rules();
const Rule& find_rule(const std::string& name);

// The place of a rule among those that the CUDA tower is compiled with; -1: it is none of them.
int built_in(const std::string& name);

// The rules that have CUDA kernels, in any order (cuda/launch.h).
namespace cuda {
struct DeviceRule;
}
std::vector<const cuda::DeviceRule*>& device_rules();

// The rules of a shared library, in the form in which it hands them to another one: a library that was compiled outside
// this repository hands its rules to _C. Each has its own rules() and device_rules(), so that none needs a symbol of
// another (library.h).
struct Library {
  const char* headers;     // first, whatever else changes: a digest of the headers that it was compiled with
  std::size_t rule_bytes;  // sizeof(Rule)
  const Rule* const* rules;
  std::size_t count;
  const cuda::DeviceRule* const* device_rules;
  std::size_t device_count;
};
const Library& library();

}  // namespace hyperopt_ext
