// What the two passes over the parameters work on, for any device: the lists of one call, and the chunks that they are cut
// into.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "tower.h"

namespace hyperopt_ext {

// The type in which parameters of a type are updated, which is that of their state.
at::ScalarType arithmetic(at::ScalarType type);

// Bytes of an element of the parameter, and of its state.
inline std::int64_t param_bytes(ScalarType type) {
  return type == kDouble ? 8 : type == kFloat ? 4 : 2;
}
inline std::int64_t arithmetic_bytes(ScalarType type) {
  return param_bytes(arithmetic(type));
}

// What one pass works on; every list is in the order of `params`.
struct Pass {
  at::TensorList params;  // n tensors, any strides, fp32, fp64, fp16 or bf16
  at::TensorList grads;   // n, as params
  at::TensorList state;   // states * n, slot after slot; the parameter's shape, in its arithmetic type
  // records * n: last_grad (as state) and last_param (as params) where the rule keeps them, or, if the horizon is
  // longer than one step, a trace (as state) of each learned hyperparameter
  at::TensorList record;
  at::TensorList steps;     // n, int64 [], updates made
  at::TensorList ticks;     // n, int64 [], the tower's tick at which the last update was made; -1: none is on record
  const at::Tensor& tower;  // float64 [rows, width], see tower.h
  at::IntArrayRef rows;     // n: the row of the tower that holds the hyperparameters of each; empty: row 0 for all
  Mask learn;               // the learned hyperparameters
  double horizon;           // in steps, >= 1: max(horizon, horizon_growth * the number of the step)
  double horizon_growth;    // >= 0
  double scale;             // what gradients are multiplied by
  // float32, one number, on the device of the tower: what they are divided by (torch.amp.GradScaler); none: 1
  const std::optional<at::Tensor>& grad_scale;
};

// Throws a ValueError that names the argument if a list does not fit the rule. Nothing is read or written. The operators
// call it before they call the device.
void check(const Rule& rule, const Pass& pass);

// The part of it that does not need the tensors' memory: one of them on the meta device would make the operator do
// nothing.
void check_devices(const Pass& pass);

// The inputs of one step in the functional form: as Pass, but with given values, on the device of the parameters.
struct Inputs {
  at::TensorList params, grads, state;
  at::Tensor hyper;  // float64 [hypers], in the rule's order
  at::Tensor step;   // float64 [1], the number of the step
};

// What a device does for the operators (ops.cpp).
struct Backend {
  // float64 [rows of the tower, 2 hypers + 1]. For each hyperparameter in `learn`, with z = d w / dh through the last
  // update (horizon 1; a parameter that took no part in the tower's last tick adds nothing) or its trace: the products
  // <G, z>, which are the hypergradients, then the squared norms of the z, which may be 0 unless `squares` asks for them.
  // The last column is the squared norm of the gradient, or -1 for a row without parameters in this pass. If nothing is
  // learned, all columns are 0, but for the last one if `norm` asks for it.
  at::Tensor (*hypergradient)(const Rule&, const Pass&, bool norm, bool squares);

  // float64 [rows, 3]: the squared norms of the update that `step` would make if lr were 1, and of the parameters, and
  // their number.
  at::Tensor (*norms)(const Rule&, const Pass&);

  // One step: parameters, state, record, steps and ticks are written. Does nothing where the tower's `ticking` is 0.
  void (*step)(const Rule&, const Pass&);

  // Takes parameters without a gradient out of the tower's present tick (after tower_): a deferred state is brought up
  // to date, the last update is no longer on record, and traces fade by one step. `grads` is not read.
  void (*settle)(const Rule&, const Pass&);

  // One step with given values: the new parameters and the new state go to `outputs`, in this order.
  void (*update)(const Rule&, const Inputs&, at::TensorList outputs);

  // sums, float64 [hypers], which are zeros: d <grad_params, updated params> / d hyper.
  void (*backward)(const Rule&, at::TensorList grad_params, const Inputs&, const at::Tensor& sums);

  // The same for <grad_params, updated params> + <grad_state, updated state>, with its derivatives with respect to each
  // parameter, gradient and state. These go to grad_inputs, in this order, in the arithmetic type of the parameters;
  // where a tensor there is empty, its derivative is not wanted.
  void (*vjp)(const Rule&, at::TensorList grad_params, at::TensorList grad_state, const Inputs&,
              at::TensorList grad_inputs, const at::Tensor& sums);

  // One step of all towers. `foreign` holds three numbers for each level that is moved by a rule which the CUDA tower
  // is not compiled with: the tower, the level, and the rule's id.
  void (*tower)(at::TensorList towers, const std::vector<TowerView>& views, at::IntArrayRef foreign);

  // Lowers the lr of the first levels where the coming update is larger than `trust` allows, and finds what the next
  // move may lower it to, from what norms() gave.
  void (*cap)(at::TensorList towers, const std::vector<TowerView>& views);
};

// Elements of one tensor and what has to be done with them: pointers to the whole run, in the memory order of the
// parameter.
struct Item {
  Slice slice;
  ScalarType type;
  std::int64_t last_grad_bytes;  // of one element
  std::int64_t row;
};

// `count` of them, from the `begin`-th on.
Slice slice_of(const Item& item, std::int64_t begin, std::int64_t count);

// A list of tensors that are worked on in chunks of at most `size` elements.
class Chunks {
 public:
  Chunks(std::int64_t size, std::size_t tensors) : size_(size) { items_.reserve(tensors); }

  // Where the elements of `t` lie in the memory order of `param`: in place, or in a copy if `t` has other strides or
  // `param` has gaps. A copy of something `written` goes back in finish().
  void* elements(const at::Tensor& param, const at::Tensor& t, bool written);

  void add(const Item& item) { items_.push_back(item); }

  std::int64_t size() const { return size_; }
  const std::vector<Item>& items() const { return items_; }
  // The chunks of an item: one, which is empty, for a tensor without elements.
  std::int64_t count(const Item& item) const {
    return std::max<std::int64_t>(1, (item.slice.count + size_ - 1) / size_);
  }

  void finish() {
    for (auto& [tensor, copy] : write_back_) tensor.copy_(copy);
  }

 private:
  std::int64_t size_;
  std::vector<Item> items_;
  std::vector<at::Tensor> copies_;
  std::vector<std::pair<at::Tensor, at::Tensor>> write_back_;
};

// Whether the hypergradients of a pass are those of traces.
bool is_traced(const Pass& pass);

// What is kept between steps: a record, or traces.
unsigned record_of(const Rule& rule, const Pass& pass);

// The row of the tower that holds the hyperparameters of the i-th parameter.
std::int64_t row_of(const Pass& pass, std::size_t i);

enum Written { kReads, kWritesState, kWritesAll };

// The elements of the i-th parameter of a pass; for what writes the state alone, without param and grad. `scale` and
// `keep` are left to the device, which knows grad_scale and the step.
Item item_for(Chunks& chunks, const Rule& rule, const Pass& pass, std::size_t i, Written written);

// Those of a step in the functional form: what it writes to, and, in last_param and grad_state, what that starts from.
Item item_for(Chunks& chunks, const Rule& rule, const Inputs& inputs, at::TensorList outputs, std::size_t i);

// Those of its derivatives: parameters and gradients are in last_param and last_grad, and what comes down from above in
// grad and grad_state.
Item item_for(Chunks& chunks, const Rule& rule, at::TensorList grad_params, at::TensorList grad_state,
              const Inputs& inputs, at::TensorList grad_inputs, std::size_t i);

}  // namespace hyperopt_ext
