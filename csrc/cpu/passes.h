// The two passes over the parameters, for any rule and a whole list of tensors in one call.
#pragma once

#include <ATen/core/Tensor.h>

#include "../rule.h"

namespace hyperopt_ext {

// The tensors of one pass; every list is in the order of `params`.
struct Lists {
  at::TensorList params;    // n tensors, any strides, fp32, fp64, fp16 or bf16
  at::TensorList grads;     // n, as params
  at::TensorList state;     // states * n, slot after slot; the parameter's shape, in its arithmetic type
  at::TensorList record;    // records * n: last_grad (as state), then last_param (as params), where the rule keeps them
  at::TensorList steps;     // n, int64 [], updates made
  at::TensorList ticks;     // n, int64 [], the tower's tick at which the last update was made; -1: none is on record
  const at::Tensor& tower;  // float64 [1 or n, width], see tower.h
};

// Throws a ValueError that names the argument if a list does not fit the rule. Nothing is read or written.
void check(const Rule& rule, const Lists& lists, Mask learn);

// float64 [rows of the tower, hypers + 1]: d loss / d (value of each hyperparameter in `learn`) through the last update,
// to which a parameter that took no part in the tower's last tick adds nothing; and the square of the gradient's norm.
// Gradients are multiplied by `scale`. All 0 if nothing is learned.
at::Tensor hypergradient_cpu(const Rule& rule, const Lists& lists, Mask learn, double scale);

// One step: parameters, state, record, steps and ticks are written. Does nothing where the tower's `ok` is 0.
void step_cpu(const Rule& rule, const Lists& lists, Mask learn, double scale);

// Takes parameters without a gradient out of the tower's present tick (after tower_): a deferred state is brought up to
// date, and the last update is no longer on record. `lists.grads` is not read.
void settle_cpu(const Rule& rule, const Lists& lists, Mask learn);

// One step on tensors of its own, with given values: params and state are written.
void update_cpu(const Rule& rule, at::TensorList params, at::TensorList grads, at::TensorList state,
                const double* hyper, double step);

// sums [hypers] += d <grad_params, updated params> / d hyper, from the inputs of a step.
void backward_cpu(const Rule& rule, at::TensorList grad_params, at::TensorList params, at::TensorList grads,
                  at::TensorList state, const double* hyper, double step, double* sums);

}  // namespace hyperopt_ext
