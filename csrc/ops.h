// The operators of the library, in the namespace torch.ops.hyperopt_ext.
#pragma once

#include <string>

#include "registry.h"

namespace hyperopt_ext {

// Defines the operators of a rule; ops.cpp lists them.
void define_ops(const Rule& rule);

// Whether one of the operators of a rule of this name is there.
bool is_defined(const std::string& rule);

// Defines tower_ and cap_, which all rules share.
void define_tower_ops();

}  // namespace hyperopt_ext
