// The two passes over the parameters, for any rule and a whole list of tensors in one call.
#pragma once

#include <ATen/core/Tensor.h>

#include "../rule.h"

namespace hyperopt_ext {

// The type in which parameters of a type are updated, which is that of their state.
at::ScalarType arithmetic(at::ScalarType type);

// What one pass works on; every list is in the order of `params`.
struct Pass {
  at::TensorList params;  // n tensors, any strides, fp32, fp64, fp16 or bf16
  at::TensorList grads;   // n, as params
  at::TensorList state;   // states * n, slot after slot; the parameter's shape, in its arithmetic type
  // records * n: last_grad (as state) and last_param (as params) where the rule keeps them, or, if the horizon is longer
  // than one step, a trace (as state) of each learned hyperparameter
  at::TensorList record;
  at::TensorList steps;     // n, int64 [], updates made
  at::TensorList ticks;     // n, int64 [], the tower's tick at which the last update was made; -1: none is on record
  const at::Tensor& tower;  // float64 [rows, width], see tower.h
  at::IntArrayRef rows;     // n: the row of the tower that holds the hyperparameters of each; empty: row 0 for all
  Mask learn;               // the learned hyperparameters
  double horizon;           // in steps, >= 1: max(horizon, horizon_growth * the number of the step)
  double horizon_growth;    // >= 0
  double scale;             // what gradients are multiplied by
};

// Throws a ValueError that names the argument if a list does not fit the rule. Nothing is read or written.
void check(const Rule& rule, const Pass& pass);

// float64 [rows of the tower, 2 hypers + 1]. For each hyperparameter in `learn`, with z = d w / dh through the last update
// (horizon 1; a parameter that took no part in the tower's last tick adds nothing) or its trace: the products <G, z>, which
// are the hypergradients, then the squared norms of the z. Last the square of the gradient's norm, -1 for a row without
// parameters in this pass. If nothing is learned, all is 0, unless `norm` asks for the last column.
at::Tensor hypergradient_cpu(const Rule& rule, const Pass& pass, bool norm);

// float64 [rows, 3]: the squared norms of the update that step_cpu would make if lr were 1, and of the parameters, and
// their number.
at::Tensor norms_cpu(const Rule& rule, const Pass& pass);

// One step: parameters, state, record, steps and ticks are written. Does nothing where the tower's `ok` is 0.
void step_cpu(const Rule& rule, const Pass& pass);

// Takes parameters without a gradient out of the tower's present tick (after tower_): a deferred state is brought up to
// date, the last update is no longer on record, and traces fade by one step. `grads` is not read.
void settle_cpu(const Rule& rule, const Pass& pass);

// The inputs of one step with given values.
struct Inputs {
  at::TensorList params, grads, state;
  const double* hyper;
  double step;
};

// One step: the new parameters and the new state go to `outputs`, in this order.
void update_cpu(const Rule& rule, const Inputs& inputs, at::TensorList outputs);

// sums [hypers] += d <grad_params, updated params> / d hyper.
void backward_cpu(const Rule& rule, at::TensorList grad_params, const Inputs& inputs, double* sums);

// The same for <grad_params, updated params> + <grad_state, updated state>, and what it is with respect to each
// parameter, gradient and state: grad_inputs, in this order, in the arithmetic type of the parameters. Those that are empty
// are not wanted.
void vjp_cpu(const Rule& rule, at::TensorList grad_params, at::TensorList grad_state, const Inputs& inputs,
             at::TensorList grad_inputs, double* sums);

}  // namespace hyperopt_ext
