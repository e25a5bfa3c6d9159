// hyperopt_ext._C: defines the operators, and tells Python what rules there are, so that the two sides cannot drift.
#include <torch/csrc/utils/pybind.h>

#include <array>

#include "ops.h"
#include "tower.h"

namespace hyperopt_ext {
namespace {

namespace py = pybind11;

// [levels][kPlanColumns], flattened.
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

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  define_tower_ops();
  for (const Rule* rule : rules()) define_ops(*rule);

  m.attr("OK") = int(kOk);
  m.attr("SKIPPED") = int(kSkipped);
  m.attr("HELD") = int(kHeld);
  m.attr("SCHEDULE") = int(kSchedule);
  m.attr("SPACE_BITS") = kSpaceBits;
  m.def("spaces", [] { return std::vector<std::string>(kSpaces.begin(), kSpaces.end()); });
  m.def("rules", [] {
    py::list result;
    for (std::size_t i = 0; i < rules().size(); ++i) result.append(describe(*rules()[i], int(i)));
    return result;
  });
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
  m.def(
      "tower_row",
      [](const Plan& plan, const std::vector<double>& values, const std::vector<double>& state) {
        std::vector<double> row(std::size_t(tower_width(plan.data(), levels(plan))));
        tower_reset(row.data(), plan.data(), levels(plan), values.data(), state.data());
        return row;
      },
      "A fresh row of a tower, from the value of every hyperparameter and the start value of every state.");
  m.def(
      "tower_offsets",
      [](const Plan& plan) {
        std::vector<std::array<std::int64_t, 3>> offsets;
        for (const Offsets& level : tower_offsets(plan.data(), levels(plan)))
          offsets.push_back({level.live, level.bounded, level.used});
        return offsets;
      },
      "Where in a row the live, the bounded and the used values of each level start.");
}

}  // namespace
}  // namespace hyperopt_ext
