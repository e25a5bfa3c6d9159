// hyperopt_ext._C: defines the operators, and tells Python what rules there are, so that the two sides cannot drift.
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>

#include "ops.h"
#include "tower.h"

namespace hyperopt_ext {
namespace {

namespace py = pybind11;

// As tower.h lays it out, flattened.
using Plan = std::vector<std::int64_t>;

int levels(const Plan& plan) {
  return int(plan.size()) / kPlanColumns;
}

py::dict describe(const Rule& rule, int id) {
  py::list hypers, state;
  for (const Hyperparameter& h : rule.hypers) {
    py::dict entry;
    entry["name"] = h.name;
    entry["initial"] = h.initial;
    entry["low"] = h.low;
    entry["high"] = h.high;
    entry["space"] = kSpaces[std::size_t(h.space)];
    entry["learned"] = h.learned;
    hypers.append(entry);
  }
  for (const char* name : rule.state) state.append(name);
  py::dict result;
  result["id"] = id;
  result["name"] = rule.name;
  result["hypers"] = hypers;
  result["state"] = state;
  return result;
}

// Takes over the rules of another library, all or none; those that are here already stay. Returns their names.
std::vector<std::string> add_rules(const Library& from) {
  const Library& own = library();
  if (std::strcmp(from.headers, own.headers) != 0 || from.rule_bytes != own.rule_bytes)
    throw std::runtime_error(
        "was compiled with the headers of another version of hyperopt_ext than the one that is running; build it "
        "again");
  std::vector<std::string> names;
  std::vector<const Rule*> added;
  for (std::size_t i = 0; i < from.count; ++i) {
    const Rule* const rule = from.rules[i];
    const bool twice = std::find(names.begin(), names.end(), rule->name) != names.end();
    names.emplace_back(rule->name);
    if (std::find(rules().begin(), rules().end(), rule) != rules().end()) continue;
    if (twice || is_defined(rule->name))
      throw std::invalid_argument("has a rule called '" + names.back() + "', but this name is taken" +
                                  (twice ? "" : "; to load a rule that was changed, start a new process"));
    for (const LearnedSet& set : rule->sets)
      if (const char* const input = set.hidden & kGrad ? "e" : set.hidden & kParam ? "w" : nullptr)
        throw std::invalid_argument("has a rule called '" + names.back() + "' whose change() depends on " + input +
                                    " by a condition alone, which its type does not show, so that " + input +
                                    " would not be kept for the hypergradient; add 0.0 * " + input +
                                    " to what it returns");
    added.push_back(rule);
  }
  if (!added.empty())
    device_rules().insert(device_rules().end(), from.device_rules, from.device_rules + from.device_count);
  for (const Rule* rule : added) {
    define_ops(*rule);
    rules().push_back(rule);
  }
  return names;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  define_tower_ops();
  for (const Rule* rule : rules()) define_ops(*rule);

  m.attr("TICKS") = int(kTicks);
  m.attr("TICKING") = int(kTicking);
  m.attr("SKIPPED") = int(kSkipped);
  m.attr("HELD") = int(kHeld);
  m.attr("SCHEDULE") = int(kSchedule);
  m.attr("ARRIVED") = int(kArrived);
  m.attr("SPACE_BITS") = kSpaceBits;
  m.def("spaces", [] { return std::vector<std::string>(kSpaces.begin(), kSpaces.end()); });
  m.def("rules", [] {
    py::list result;
    for (std::size_t i = 0; i < rules().size(); ++i) result.append(describe(*rules()[i], int(i)));
    return result;
  });
  m.def(
      "add_rules", [](std::uintptr_t address) { return add_rules(*reinterpret_cast<const Library*>(address)); },
      "Adds the rules of another shared library, from what its hyperopt_ext_library() returns, and gives their names.");
  m.def(
      "library", [] { return reinterpret_cast<std::uintptr_t>(&library()); },
      "The address of the rules of this library, for another one that makes operators of them.");
  m.attr("SETTINGS") = std::vector<std::string>(kSettingNames.begin(), kSettingNames.end());
  m.def(
      "record",
      [](const std::string& name, Mask learn, bool traced) {
        const Rule& rule = find_rule(name);
        std::vector<std::string> names;
        if (traced) {
          for (std::size_t i = 0; i < rule.hypers.size(); ++i)
            if (learn & bit(int(i))) names.push_back(std::string("trace_") + rule.hypers[i].name);
          return names;
        }
        const unsigned kept = rule.set_for(learn).record;
        if (kept & kGrad) names.emplace_back("last_grad");
        if (kept & kParam) names.emplace_back("last_param");
        return names;
      },
      "The per-parameter tensors that a rule keeps of its last steps, in the order of the operators' `record`.");
  m.attr("PLAN") = std::vector<std::string>(kPlanNames.begin(), kPlanNames.end());
  m.def(
      "tower_plan", tower_plan,
      "The plan of a tower, kPlanColumns numbers a level, from the rule, the learned set and the coordinates of each.");
  m.def(
      "tower_row",
      [](const Plan& plan, const std::vector<double>& values, const std::vector<double>& state) {
        const auto sum = [&](PlanColumn column) {
          std::size_t total = 0;
          for (int k = 0; k < levels(plan); ++k) total += std::size_t(plan[std::size_t(k * kPlanColumns + column)]);
          return total;
        };
        TORCH_CHECK_VALUE(levels(plan) > 0 && values.size() == sum(kHypers) && state.size() == sum(kStates),
                          "values and state must be those of the plan's levels");
        std::vector<double> row(std::size_t(tower_width(plan.data(), levels(plan))));
        tower_reset(row.data(), plan.data(), levels(plan), values.data(), state.data());
        return row;
      },
      "A fresh row of a tower, from the value of every hyperparameter and the start value of every state.");
  m.def(
      "tower_offsets",
      [](const Plan& plan) {
        std::vector<double> numbers(std::size_t(tower_width(plan.data(), levels(plan))));
        std::vector<std::array<std::int64_t, 3>> offsets;
        for (int k = 0; k < levels(plan); ++k) {
          const std::int64_t* const level = plan.data() + k * kPlanColumns;
          double* const start = numbers.data();
          const LevelRow row(start + level[kStart], int(level[kHypers]), 0, 0);
          offsets.push_back({row.live - start, row.bounded - start, row.used - start});
        }
        return offsets;
      },
      "Where in a row the live, the bounded and the used values of each level start.");
}

}  // namespace
}  // namespace hyperopt_ext
