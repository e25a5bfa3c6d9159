// What every shared library of rules has once: its list of them, and the function that hands it out. The one unit that
// includes this defines HX_HEADERS, the digest of the headers (hyperopt_ext/_build.py writes it).
#pragma once

#include "registry.h"

namespace hyperopt_ext {

std::vector<const Rule*>& rules() {
  static std::vector<const Rule*> all;
  return all;
}

std::vector<const cuda::DeviceRule*>& device_rules() {
  static std::vector<const cuda::DeviceRule*> all;
  return all;
}

// What it has now: the lists grow.
const Library& library() {
  static Library own;
  own = {HX_HEADERS, sizeof(Rule), rules().data(), rules().size(), device_rules().data(), device_rules().size()};
  return own;
}

}  // namespace hyperopt_ext

#define HX_EXPORT __attribute__((visibility("default")))

extern "C" HX_EXPORT const void* hyperopt_ext_library() {
  return &hyperopt_ext::library();
}
