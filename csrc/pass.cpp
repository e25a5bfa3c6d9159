#include "pass.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/InferenceMode.h>

namespace hyperopt_ext {

at::ScalarType arithmetic(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

namespace {

ScalarType scalar_type(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return kFloat;
    case at::kDouble: return kDouble;
    case at::kHalf: return kHalf;
    case at::kBFloat16: return kBFloat16;
    default: TORCH_CHECK_TYPE(false, "params must be float32, float64, float16 or bfloat16, not ", t.scalar_type());
  }
}

void* shift(void* start, std::int64_t bytes) {
  return start == nullptr ? nullptr : static_cast<char*>(start) + bytes;
}

Item new_item(const at::Tensor& param) {
  Item item{};
  item.type = scalar_type(param);
  item.last_grad_bytes = arithmetic_bytes(item.type);
  item.slice.count = param.numel();
  item.slice.scale = 1.0;
  return item;
}

}  // namespace

void check_devices(const Pass& pass) {
  const at::Device device = pass.tower.device();
  for (std::size_t i = 0; i < pass.params.size(); ++i)
    TORCH_CHECK_VALUE(pass.params[i].device() == device, "params[", i, "] is on ", pass.params[i].device(),
                      ", but the tower of its group is on ", device,
                      "; make the optimizer when the model is where it will be trained");
  const std::pair<const char*, at::TensorList> others[] = {{"grads", pass.grads},
                                                           {"state", pass.state},
                                                           {"record", pass.record},
                                                           {"steps", pass.steps},
                                                           {"ticks", pass.ticks}};
  for (const auto& [name, tensors] : others)
    for (std::size_t i = 0; i < tensors.size(); ++i)
      TORCH_CHECK_VALUE(tensors[i].device() == device, name, "[", i, "] must be on the device of its parameter, ",
                        device, ", not ", tensors[i].device());
}

void check(const Rule& rule, const Pass& pass) {
  TORCH_CHECK_VALUE((pass.learn & ~rule.sets.back().mask) == 0, "learn names hyperparameters that rule '", rule.name,
                    "' does not have: it has ", rule.hypers.size(), ", and learn is ", std::int64_t(pass.learn));
  const std::size_t n = pass.params.size();
  const unsigned record = record_of(rule, pass);
  const std::size_t traces = is_traced(pass) ? std::size_t(count(pass.learn)) : 0;
  const std::size_t records = std::size_t(count(record & (kGrad | kParam))) + traces;
  const auto length = [&](const char* name, std::size_t size, std::size_t expected) {
    TORCH_CHECK_VALUE(size == expected, name, " must hold ", expected, " entries for rule '", rule.name, "' and ", n,
                      " params, not ", size);
  };
  length("grads", pass.grads.size(), n);
  length("state", pass.state.size(), n * rule.state.size());
  length("record", pass.record.size(), n * records);
  length("steps", pass.steps.size(), n);
  length("ticks", pass.ticks.size(), n);
  if (!pass.rows.empty()) length("rows", pass.rows.size(), n);
  TORCH_CHECK_VALUE(pass.horizon >= 1.0, "horizon must be at least 1, not ", pass.horizon);
  check_devices(pass);
  const at::Tensor& tower = pass.tower;
  const bool in_inference_mode = c10::InferenceMode::is_enabled();
  TORCH_CHECK_VALUE(in_inference_mode || !tower.is_inference(),
                    "the tower was made in torch.inference_mode(): make the optimizer outside of it");
  TORCH_CHECK_VALUE(tower.dim() == 2 && tower.scalar_type() == at::kDouble && tower.is_contiguous() &&
                        tower.size(0) >= 1 && tower.size(1) >= kHeader + kValues * std::int64_t(rule.hypers.size()),
                    "tower must be a contiguous float64 tensor [rows, width] that holds rule '", rule.name, "'");
  if (pass.grad_scale)
    TORCH_CHECK_VALUE(pass.grad_scale->numel() == 1 && pass.grad_scale->scalar_type() == at::kFloat &&
                          pass.grad_scale->device() == tower.device(),
                      "grad_scale must be one float32 on the device of the tower");
  for (std::int64_t row : pass.rows)
    TORCH_CHECK_VALUE(0 <= row && row < tower.size(0), "rows names row ", row, " of a tower of ", tower.size(0));
  constexpr char converted[] = "; after a change of the parameter's dtype, load_state_dict(state_dict()) converts it";
  const auto fits = [](const char* name, std::size_t i, const at::Tensor& t, const at::Tensor& param,
                       at::ScalarType type, const char* fix = "") {
    TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, "[", i, "] is ", t.layout(),
                      ", but only dense tensors are supported; for an embedding, use sparse=False");
    TORCH_CHECK_VALUE(t.scalar_type() == type, name, "[", i, "] must be ", type, ", not ", t.scalar_type(), fix);
    TORCH_CHECK_VALUE(t.sizes() == param.sizes(), name, "[", i, "] must have the shape of its parameter, ",
                      param.sizes(), ", not ", t.sizes());
  };
  const auto can_be_written = [&](const char* name, std::size_t i, const at::Tensor& t) {
    TORCH_CHECK_VALUE(in_inference_mode || !t.is_inference(), name, "[", i,
                      "] was made in torch.inference_mode() and cannot be written to outside of it; load_state_dict("
                      "state_dict()) copies all that the optimizer holds, and clone() a parameter");
    TORCH_CHECK_VALUE(at::has_internal_overlap(t) != at::MemOverlap::Yes, name, "[", i,
                      "] holds several elements in one place (expand?) and cannot be written to; use its clone()");
  };
  for (std::size_t i = 0; i < n; ++i) {
    const at::Tensor& param = pass.params[i];
    TORCH_CHECK_VALUE(param.layout() == at::kStrided, "params[", i, "] is ", param.layout(),
                      ", but only dense tensors are supported");
    can_be_written("params", i, param);
    scalar_type(param);
    const at::ScalarType dtype = param.scalar_type(), wide = arithmetic(dtype);
    fits("grads", i, pass.grads[i], param, dtype);
    for (std::size_t k = i; k < pass.state.size(); k += n) {
      fits("state", k, pass.state[k], param, wide, converted);
      can_be_written("state", k, pass.state[k]);
    }
    for (std::size_t k = i; k < pass.record.size(); k += n) {
      const bool is_param = (record & kParam) && k / n + 1 == records;
      fits("record", k, pass.record[k], param, is_param ? dtype : wide, converted);
      can_be_written("record", k, pass.record[k]);
    }
    for (const auto& [name, t] : {std::pair("steps", &pass.steps[i]), std::pair("ticks", &pass.ticks[i])}) {
      TORCH_CHECK_VALUE(t->numel() == 1 && t->scalar_type() == at::kLong, name, "[", i, "] must be one int64");
      can_be_written(name, i, *t);
    }
  }
}

namespace {

// Whether the elements of two tensors of one shape lie in the same order. Along a dimension of size 1 there is none.
bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  if (a.strides() == b.strides()) return true;
  for (std::int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

}  // namespace

void* Chunks::elements(const at::Tensor& param, const at::Tensor& t, bool written) {
  const bool dense = param.is_non_overlapping_and_dense();
  if (dense && (t.is_same(param) || same_strides(t, param))) return t.data_ptr();
  if (!dense && t.is_contiguous()) return t.data_ptr();
  at::Tensor copy =
      dense ? at::empty_strided(param.sizes(), param.strides(), t.options()) : at::empty(param.sizes(), t.options());
  copy.copy_(t);
  if (written) write_back_.emplace_back(t, copy);
  copies_.push_back(copy);
  return copies_.back().data_ptr();
}

Slice slice_of(const Item& item, std::int64_t begin, std::int64_t count) {
  const std::int64_t values = begin * param_bytes(item.type), wide = begin * arithmetic_bytes(item.type);
  Slice slice = item.slice;
  slice.param = shift(slice.param, values);
  slice.grad = shift(slice.grad, values);
  slice.last_param = shift(slice.last_param, values);
  slice.last_grad = shift(slice.last_grad, begin * item.last_grad_bytes);
  for (void*& state : slice.state) state = shift(state, wide);
  for (void*& trace : slice.trace) trace = shift(trace, wide);
  for (void*& grad : slice.grad_state) grad = shift(grad, wide);
  for (void*& grad : slice.grad_input) grad = shift(grad, wide);
  slice.count = count;
  return slice;
}

bool is_traced(const Pass& pass) {
  return (pass.horizon > 1.0 || pass.horizon_growth > 0.0) && pass.learn != 0;
}

unsigned record_of(const Rule& rule, const Pass& pass) {
  return is_traced(pass) ? unsigned(kNothing) : rule.set_for(pass.learn).record;
}

std::int64_t row_of(const Pass& pass, std::size_t i) {
  return pass.rows.empty() ? 0 : pass.rows[i];
}

Item item_for(Chunks& chunks, const Rule& rule, const Pass& pass, std::size_t i, Written written) {
  const at::Tensor& param = pass.params[i];
  const std::size_t n = pass.params.size();
  const unsigned record = record_of(rule, pass);
  const bool writes = written != kReads;
  Item item = new_item(param);
  item.row = row_of(pass, i);
  if (written != kWritesState) {
    item.slice.param = chunks.elements(param, param, writes);
    item.slice.grad = chunks.elements(param, pass.grads[i], false);
  }
  for (std::size_t k = 0; k < rule.state.size(); ++k)
    item.slice.state[k] = chunks.elements(param, pass.state[k * n + i], writes);
  std::size_t next = i;  // in pass.record
  const auto recorded = [&] {
    void* const start = chunks.elements(param, pass.record[next], writes);
    next += n;
    return start;
  };
  if (record & kGrad) item.slice.last_grad = recorded();
  if (record & kParam) item.slice.last_param = recorded();
  if (is_traced(pass))
    for (std::size_t h = 0; h < rule.hypers.size(); ++h)
      if (pass.learn & bit(int(h))) item.slice.trace[h] = recorded();
  return item;
}

Item item_for(Chunks& chunks, const Rule& rule, const Inputs& inputs, at::TensorList outputs, std::size_t i) {
  const std::size_t n = inputs.params.size();
  const at::Tensor& param = inputs.params[i];
  Item item = new_item(param);
  item.slice.last_param = chunks.elements(param, param, false);
  item.slice.param = chunks.elements(param, outputs[i], true);
  item.slice.grad = chunks.elements(param, inputs.grads[i], false);
  for (std::size_t k = 0; k < rule.state.size(); ++k) {
    item.slice.grad_state[k] = chunks.elements(param, inputs.state[k * n + i], false);
    item.slice.state[k] = chunks.elements(param, outputs[(k + 1) * n + i], true);
  }
  return item;
}

Item item_for(Chunks& chunks, const Rule& rule, at::TensorList grad_params, at::TensorList grad_state,
              const Inputs& inputs, at::TensorList grad_inputs, std::size_t i) {
  const std::size_t n = inputs.params.size(), states = rule.state.size();
  const at::Tensor& param = inputs.params[i];
  Item item = new_item(param);
  item.last_grad_bytes = param_bytes(item.type);
  item.slice.last_param = chunks.elements(param, param, false);
  item.slice.last_grad = chunks.elements(param, inputs.grads[i], false);
  item.slice.grad = chunks.elements(param, grad_params[i], false);
  for (std::size_t k = 0; k < states; ++k) {
    item.slice.state[k] = chunks.elements(param, inputs.state[k * n + i], false);
    if (!grad_state.empty()) item.slice.grad_state[k] = chunks.elements(param, grad_state[k * n + i], false);
  }
  if (!grad_inputs.empty())
    for (std::size_t k = 0; k < 2 + states; ++k)
      if (const at::Tensor& grad = grad_inputs[k * n + i]; grad.sizes() == param.sizes())
        item.slice.grad_input[k] = chunks.elements(param, grad, true);
  return item;
}

}  // namespace hyperopt_ext
