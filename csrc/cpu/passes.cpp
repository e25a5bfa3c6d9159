#include "passes.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <vector>

#include "../tower.h"
#include "vectors.h"

namespace hyperopt_ext {

at::ScalarType arithmetic(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

namespace {

// Elements of a chunk. The chunks, and so the order of the sums, do not depend on the number of threads.
constexpr std::int64_t kChunk = 16384;
// Elements for which a second thread is worth its start.
constexpr std::int64_t kGrain = 32768;

ScalarType scalar_type(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return kFloat;
    case at::kDouble: return kDouble;
    case at::kHalf: return kHalf;
    case at::kBFloat16: return kBFloat16;
    default: TORCH_CHECK_TYPE(false, "params must be float32, float64, float16 or bfloat16, not ", t.scalar_type());
  }
}

std::int64_t param_bytes(ScalarType type) {
  return type == kDouble ? 8 : type == kFloat ? 4 : 2;
}

std::int64_t arithmetic_bytes(ScalarType type) {
  return type == kDouble ? 8 : 4;
}

void* shift(void* start, std::int64_t bytes) {
  return start == nullptr ? nullptr : static_cast<char*>(start) + bytes;
}

// What the kernels need to know of one tensor: its whole run of elements and the prepared values of its steps.
struct Item {
  Slice slice;
  ScalarType type;
  std::int64_t last_grad_bytes;  // of one element
  const void* prepared;
  const void* last_prepared;
  std::int64_t row;
};

// A list of tensors, cut into chunks of at most kChunk elements that run in parallel.
class Batch {
 public:
  explicit Batch(std::size_t tensors) { items_.reserve(tensors), chunks_.reserve(tensors); }

  // Where the elements of `t` lie in the memory order of `param`: in place, or in a copy if `t` has other strides or
  // `param` has gaps. A copy of something `written` goes back in finish().
  void* elements(const at::Tensor& param, const at::Tensor& t, bool written) {
    const bool dense = param.is_non_overlapping_and_dense();
    if (dense && (t.is_same(param) || t.strides() == param.strides())) return t.data_ptr();
    if (!dense && t.is_contiguous()) return t.data_ptr();
    at::Tensor copy =
        dense ? at::empty_strided(param.sizes(), param.strides(), t.options()) : at::empty(param.sizes(), t.options());
    copy.copy_(t);
    if (written) write_back_.emplace_back(t, copy);
    copies_.push_back(copy);
    return copies_.back().data_ptr();
  }

  // prepare(hyper, step), once for every run of tensors that share them.
  const void* prepared(PrepareKernel prepare, const double* hyper, double step) {
    const std::size_t known = prepared_.size();
    for (std::size_t i = known; i > 0 && i + 4 > known; --i) {
      const Values& values = prepared_[i - 1];
      if (values.prepare == prepare && values.hyper == hyper && values.step == step) return values.bytes;
    }
    Values& values = prepared_.emplace_back();
    values.prepare = prepare, values.hyper = hyper, values.step = step;
    prepare(hyper, step, values.bytes);
    return values.bytes;
  }

  void add(const Item& item) {
    for (std::int64_t begin = 0; begin < item.slice.count; begin += kChunk)
      chunks_.push_back({items_.size(), begin, std::min(kChunk, item.slice.count - begin)});
    items_.push_back(item);
    elements_ += item.slice.count;
  }

  std::size_t chunks() const { return chunks_.size(); }
  const Item& item_of(std::size_t chunk) const { return items_[chunks_[chunk].item]; }

  // kernel(item, slice of the chunk, index of the chunk)
  template <class F>
  void run(F&& kernel) const {
    const auto range = [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t c = first; c < last; ++c) {
        const Chunk& chunk = chunks_[std::size_t(c)];
        const Item& item = items_[chunk.item];
        const std::int64_t values = chunk.begin * param_bytes(item.type);
        Slice slice = item.slice;
        slice.param = shift(slice.param, values);
        slice.grad = shift(slice.grad, values);
        slice.last_param = shift(slice.last_param, values);
        slice.last_grad = shift(slice.last_grad, chunk.begin * item.last_grad_bytes);
        for (void*& state : slice.state) state = shift(state, chunk.begin * arithmetic_bytes(item.type));
        for (void*& trace : slice.trace) trace = shift(trace, chunk.begin * arithmetic_bytes(item.type));
        for (void*& grad : slice.grad_state) grad = shift(grad, chunk.begin * arithmetic_bytes(item.type));
        for (void*& grad : slice.grad_input) grad = shift(grad, chunk.begin * arithmetic_bytes(item.type));
        slice.count = chunk.count;
        kernel(item, slice, std::size_t(c));
      }
    };
    const std::int64_t chunks = std::int64_t(chunks_.size());
    if (elements_ <= kGrain)
      range(0, chunks);
    else
      at::parallel_for(0, chunks, std::max<std::int64_t>(1, chunks * kGrain / elements_), range);
  }

  void finish() {
    for (auto& [tensor, copy] : write_back_) tensor.copy_(copy);
  }

 private:
  struct Chunk {
    std::size_t item;
    std::int64_t begin, count;
  };
  struct Values {
    PrepareKernel prepare;
    const double* hyper;
    double step;
    alignas(64) unsigned char bytes[kPreparedBytes];
  };
  std::vector<Item> items_;
  std::vector<Chunk> chunks_;
  std::deque<Values> prepared_;
  std::vector<at::Tensor> copies_;
  std::vector<std::pair<at::Tensor, at::Tensor>> write_back_;
  std::int64_t elements_ = 0;
};

std::int64_t& counter(const at::Tensor& t) {
  return *t.mutable_data_ptr<std::int64_t>();
}

bool is_traced(const Pass& pass) {
  return (pass.horizon > 1.0 || pass.horizon_growth > 0.0) && pass.learn != 0;
}

// What is kept between steps: a record, or traces.
unsigned record_of(const Rule& rule, const Pass& pass) {
  return is_traced(pass) ? unsigned(kNothing) : rule.set_for(pass.learn).record;
}

std::int64_t row_of(const Pass& pass, std::size_t i) {
  return pass.rows.empty() ? 0 : pass.rows[i];
}

// A row of the tower, as far as the passes need it.
struct Row {
  const double *header, *used, *previous;
  bool ok() const { return header[kOk] != 0.0; }
  double ticks() const { return header[kTicks]; }
};

Row tower_row(const Rule& rule, const Pass& pass, std::size_t i) {
  const double* const start = pass.tower.const_data_ptr<double>() + row_of(pass, i) * pass.tower.size(1);
  return {start, start + kHeader, start + kHeader + rule.hypers.size()};
}

enum Written { kReads, kWrites };

Item item_for(Batch& batch, const Rule& rule, const Pass& pass, std::size_t i, Written written) {
  const at::Tensor& param = pass.params[i];
  const std::size_t n = pass.params.size();
  const unsigned record = record_of(rule, pass);
  const bool writes = written == kWrites;
  Item item{};
  item.type = scalar_type(param);
  item.last_grad_bytes = arithmetic_bytes(item.type);
  item.row = row_of(pass, i);
  item.slice.count = param.numel();
  item.slice.param = batch.elements(param, param, writes);
  if (!pass.grads.empty()) item.slice.grad = batch.elements(param, pass.grads[i], false);
  for (std::size_t k = 0; k < rule.state.size(); ++k)
    item.slice.state[k] = batch.elements(param, pass.state[k * n + i], writes);
  std::size_t next = i;  // in pass.record
  const auto recorded = [&] {
    void* const start = batch.elements(param, pass.record[next], writes);
    next += n;
    return start;
  };
  if (record & kGrad) item.slice.last_grad = recorded();
  if (record & kParam) item.slice.last_param = recorded();
  if (is_traced(pass))
    for (std::size_t h = 0; h < rule.hypers.size(); ++h)
      if (pass.learn & bit(int(h))) item.slice.trace[h] = recorded();
  item.slice.scale = pass.scale;
  item.slice.keep = 1.0 - 1.0 / std::max(pass.horizon, pass.horizon_growth * double(counter(pass.steps[i]) + 1));
  return item;
}

// The prepared values of the last step, if it left a deferred state behind.
const void* deferred(Batch& batch, const Rule& rule, const Pass& pass, const Row& row, std::size_t i,
                     std::int64_t step) {
  const bool pending = (record_of(rule, pass) & kDeferred) && step > 0 && counter(pass.ticks[i]) == row.ticks() - 1;
  return pending ? batch.prepared(rule.cpu[scalar_type(pass.params[i])].prepare, row.previous, double(step)) : nullptr;
}

}  // namespace

void check(const Rule& rule, const Pass& pass) {
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
  const at::Tensor& tower = pass.tower;
  TORCH_CHECK_VALUE(tower.dim() == 2 && tower.scalar_type() == at::kDouble && tower.is_contiguous() &&
                        tower.size(0) >= 1 && tower.size(1) >= kHeader + kValues * std::int64_t(rule.hypers.size()),
                    "tower must be a contiguous float64 tensor [rows, width] that holds rule '", rule.name, "'");
  for (std::int64_t row : pass.rows)
    TORCH_CHECK_VALUE(0 <= row && row < tower.size(0), "rows names row ", row, " of a tower of ", tower.size(0));
  const auto fits = [](const char* name, std::size_t i, const at::Tensor& t, const at::Tensor& param,
                       at::ScalarType type) {
    TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, "[", i, "] is ", t.layout(),
                      ", but only dense tensors are supported; for an embedding, use sparse=False");
    TORCH_CHECK_VALUE(t.scalar_type() == type, name, "[", i, "] must be ", type, ", not ", t.scalar_type());
    TORCH_CHECK_VALUE(t.sizes() == param.sizes(), name, "[", i, "] must have the shape of its parameter, ",
                      param.sizes(), ", not ", t.sizes());
    TORCH_CHECK_VALUE(t.device() == param.device(), name, "[", i, "] must be on the device of its parameter, ",
                      param.device(), ", not ", t.device());
  };
  for (std::size_t i = 0; i < n; ++i) {
    const at::Tensor& param = pass.params[i];
    TORCH_CHECK_VALUE(param.layout() == at::kStrided, "params[", i, "] is ", param.layout(),
                      ", but only dense tensors are supported");
    TORCH_CHECK_VALUE(param.device() == tower.device(), "params[", i, "] is on ", param.device(),
                      ", but the tower of its group is on ", tower.device());
    scalar_type(param);
    const at::ScalarType dtype = param.scalar_type(), wide = arithmetic(dtype);
    fits("grads", i, pass.grads[i], param, dtype);
    for (std::size_t k = 0; k < rule.state.size(); ++k) fits("state", k * n + i, pass.state[k * n + i], param, wide);
    for (std::size_t k = 0; k < records; ++k) {
      const bool is_param = (record & kParam) && k + 1 == records;
      fits("record", k * n + i, pass.record[k * n + i], param, is_param ? dtype : wide);
    }
    for (const auto& [name, t] : {std::pair("steps", &pass.steps[i]), std::pair("ticks", &pass.ticks[i])})
      TORCH_CHECK_VALUE(t->numel() == 1 && t->scalar_type() == at::kLong, name, "[", i, "] must be one int64");
  }
}

at::Tensor hypergradient_cpu(const Rule& rule, const Pass& pass, bool norm) {
  check(rule, pass);
  const std::size_t hypers = rule.hypers.size(), width = 2 * hypers + 1;
  at::Tensor result = at::zeros({pass.tower.size(0), std::int64_t(width)}, pass.tower.options());
  if (pass.learn == 0 && !norm) return result;
  const LearnedSet& set = rule.set_for(pass.learn);
  const bool traced = is_traced(pass);
  const Mask mask = traced ? pass.learn : set.mask;
  const std::size_t learned = std::size_t(count(mask)), columns = 2 * learned + 1;
  Batch batch(pass.params.size());
  for (std::size_t i = 0; i < pass.params.size(); ++i) {
    const Row row = tower_row(rule, pass, i);
    const std::int64_t step = counter(pass.steps[i]);
    Item item = item_for(batch, rule, pass, i, kReads);
    const bool recorded = step > 0 && double(counter(pass.ticks[i])) == row.ticks();
    if (!traced && pass.learn != 0 && recorded)
      item.prepared = batch.prepared(set.cpu[item.type].prepare_dual, row.used, double(step));
    batch.add(item);
  }
  std::vector<double> partial(batch.chunks() * columns, 0.0);
  batch.run([&](const Item& item, const Slice& slice, std::size_t chunk) {
    double* const sums = partial.data() + chunk * columns;
    if (traced) {
      for (std::size_t k = 0; k < learned; ++k) {
        double products[3] = {};
        vectors[item.type].products(slice, direction(mask, int(k)), products);
        sums[k] = products[0], sums[learned + k] = products[1], sums[2 * learned] = products[2];
      }
    } else if (item.prepared != nullptr) {
      set.cpu[item.type].hypergradient(slice, item.prepared, sums);
    } else {
      vectors[item.type].squared_norm(slice, sums + 2 * learned);
    }
  });
  double* const sums = result.mutable_data_ptr<double>();
  for (std::int64_t row = 0; row < result.size(0); ++row) sums[std::size_t(row) * width + 2 * hypers] = -1.0;
  for (std::size_t i = 0; i < pass.params.size(); ++i) sums[std::size_t(row_of(pass, i)) * width + 2 * hypers] = 0.0;
  for (std::size_t chunk = 0; chunk < batch.chunks(); ++chunk) {
    double* const row = sums + std::size_t(batch.item_of(chunk).row) * width;
    const double* const own = partial.data() + chunk * columns;
    for (std::size_t k = 0; k < learned; ++k) {
      const int hyper = direction(mask, int(k));
      if ((pass.learn & bit(hyper)) == 0) continue;
      row[hyper] += own[k];
      row[hypers + std::size_t(hyper)] += own[learned + k];
    }
    row[2 * hypers] += own[2 * learned];
  }
  return result;
}

at::Tensor norms_cpu(const Rule& rule, const Pass& pass) {
  check(rule, pass);
  at::Tensor result = at::zeros({pass.tower.size(0), 3}, pass.tower.options());
  double* const norms = result.mutable_data_ptr<double>();
  const LearnedSet& set = rule.set_for(is_traced(pass) ? 0 : pass.learn);
  // The values in use, but an lr of 1: one so large that the update would overflow can be lowered, too.
  std::vector<std::array<double, kMaxHypers>> values(std::size_t(pass.tower.size(0)));
  Batch batch(pass.params.size());
  for (std::size_t i = 0; i < pass.params.size(); ++i) {
    const Row row = tower_row(rule, pass, i);
    if (!row.ok()) continue;
    const std::int64_t step = counter(pass.steps[i]);
    Item item = item_for(batch, rule, pass, i, kReads);
    double* const unit = values[std::size_t(item.row)].data();
    std::copy_n(row.used, rule.hypers.size(), unit);
    if (rule.lr >= 0) unit[rule.lr] = 1.0;
    item.last_prepared = deferred(batch, rule, pass, row, i, step);
    item.prepared = batch.prepared(rule.cpu[item.type].prepare, unit, double(step + 1));
    norms[3 * item.row + 2] += double(item.slice.count);
    batch.add(item);
  }
  std::vector<double> partial(batch.chunks() * 2, 0.0);
  batch.run([&](const Item& item, const Slice& slice, std::size_t chunk) {
    set.cpu[item.type].norms(slice, item.prepared, item.last_prepared, partial.data() + 2 * chunk);
  });
  for (std::size_t chunk = 0; chunk < batch.chunks(); ++chunk)
    for (std::size_t k = 0; k < 2; ++k) norms[3 * batch.item_of(chunk).row + std::int64_t(k)] += partial[2 * chunk + k];
  return result;
}

void step_cpu(const Rule& rule, const Pass& pass) {
  check(rule, pass);
  const LearnedSet& set = rule.set_for(pass.learn);
  const bool traced = is_traced(pass);
  Batch batch(pass.params.size());
  for (std::size_t i = 0; i < pass.params.size(); ++i) {
    const Row row = tower_row(rule, pass, i);
    if (!row.ok()) continue;
    std::int64_t& step = counter(pass.steps[i]);
    Item item = item_for(batch, rule, pass, i, kWrites);
    item.last_prepared = deferred(batch, rule, pass, row, i, step);
    step += 1;
    counter(pass.ticks[i]) = std::int64_t(row.ticks());
    const PrepareKernel prepare = traced ? set.cpu[item.type].prepare_dual : rule.cpu[item.type].prepare;
    item.prepared = batch.prepared(prepare, row.used, double(step));
    batch.add(item);
  }
  batch.run([&](const Item& item, const Slice& slice, std::size_t) {
    if (traced)
      set.cpu[item.type].traced_update(slice, item.prepared);
    else
      set.cpu[item.type].update(slice, item.prepared, item.last_prepared);
  });
  batch.finish();
}

void settle_cpu(const Rule& rule, const Pass& pass) {
  Batch batch(pass.params.size());
  for (std::size_t i = 0; i < pass.params.size(); ++i) {
    const Row row = tower_row(rule, pass, i);
    std::int64_t& tick = counter(pass.ticks[i]);
    if (!row.ok() || tick < 0) continue;
    const void* last_prepared = deferred(batch, rule, pass, row, i, counter(pass.steps[i]));
    if (is_traced(pass) || last_prepared != nullptr) {
      Item item = item_for(batch, rule, pass, i, kWrites);
      item.last_prepared = last_prepared;
      batch.add(item);
    }
    if (!is_traced(pass)) tick = -1;
  }
  batch.run([&](const Item& item, const Slice& slice, std::size_t) {
    if (item.last_prepared != nullptr)
      rule.cpu[item.type].settle(slice, item.last_prepared);
    else
      vectors[item.type].decay(slice);
  });
  batch.finish();
}

void update_cpu(const Rule& rule, const Inputs& inputs, at::TensorList outputs) {
  const LearnedSet& set = rule.set_for(0);
  const std::size_t n = inputs.params.size(), states = rule.state.size();
  Batch batch(n);
  for (std::size_t i = 0; i < n; ++i) {
    const at::Tensor& param = inputs.params[i];
    Item item{};
    item.type = scalar_type(param);
    item.last_grad_bytes = arithmetic_bytes(item.type);
    item.slice.count = param.numel();
    item.slice.last_param = batch.elements(param, param, false);
    item.slice.param = batch.elements(param, outputs[i], true);
    item.slice.grad = batch.elements(param, inputs.grads[i], false);
    for (std::size_t k = 0; k < states; ++k) {
      item.slice.grad_state[k] = batch.elements(param, inputs.state[k * n + i], false);
      item.slice.state[k] = batch.elements(param, outputs[(k + 1) * n + i], true);
    }
    item.slice.scale = 1.0;
    item.prepared = batch.prepared(rule.cpu[item.type].prepare, inputs.hyper, inputs.step);
    batch.add(item);
  }
  // The kernel works in place, on a copy of the inputs (in last_param and grad_state) that has just come into the cache.
  batch.run([&](const Item& item, const Slice& slice, std::size_t) {
    const auto copy = [&](void* to, const void* from, std::int64_t bytes) {
      std::memcpy(to, from, std::size_t(slice.count * bytes));
    };
    copy(slice.param, slice.last_param, param_bytes(item.type));
    for (std::size_t k = 0; k < states; ++k) copy(slice.state[k], slice.grad_state[k], arithmetic_bytes(item.type));
    set.cpu[item.type].update(slice, item.prepared, nullptr);
  });
  batch.finish();
}

namespace {

// d loss / d hyper of one step by `kernel`, which may write to `grad_inputs`, too.
void differentiate(const Rule& rule, SumKernel StepKernels::* kernel, at::TensorList grad_params,
                   at::TensorList grad_state, const Inputs& inputs, at::TensorList grad_inputs, double* sums) {
  const LearnedSet& all = rule.sets.back();
  const std::size_t n = inputs.params.size(), states = rule.state.size(), hypers = rule.hypers.size();
  Batch batch(n);
  for (std::size_t i = 0; i < n; ++i) {
    const at::Tensor& param = inputs.params[i];
    Item item{};
    item.type = scalar_type(param);
    item.last_grad_bytes = param_bytes(item.type);
    item.slice.count = param.numel();
    item.slice.last_param = batch.elements(param, param, false);
    item.slice.last_grad = batch.elements(param, inputs.grads[i], false);
    item.slice.grad = batch.elements(param, grad_params[i], false);
    for (std::size_t k = 0; k < states; ++k) {
      item.slice.state[k] = batch.elements(param, inputs.state[k * n + i], false);
      if (!grad_state.empty()) item.slice.grad_state[k] = batch.elements(param, grad_state[k * n + i], false);
    }
    if (!grad_inputs.empty())
      for (std::size_t k = 0; k < 2 + states; ++k)
        if (const at::Tensor& grad = grad_inputs[k * n + i]; grad.numel() == param.numel())
          item.slice.grad_input[k] = batch.elements(param, grad, true);
    item.slice.scale = 1.0;
    item.prepared = batch.prepared(all.cpu[item.type].prepare_dual, inputs.hyper, inputs.step);
    batch.add(item);
  }
  std::vector<double> partial(batch.chunks() * hypers, 0.0);
  batch.run([&](const Item& item, Slice slice, std::size_t chunk) {
    thread_local std::vector<double> unwanted(kChunk);
    for (void*& grad : slice.grad_input)
      if (grad == nullptr) grad = unwanted.data();
    (rule.cpu[item.type].*kernel)(slice, item.prepared, partial.data() + chunk * hypers);
  });
  batch.finish();
  for (std::size_t chunk = 0; chunk < batch.chunks(); ++chunk)
    for (std::size_t k = 0; k < hypers; ++k) sums[k] += partial[chunk * hypers + k];
}

}  // namespace

void backward_cpu(const Rule& rule, at::TensorList grad_params, const Inputs& inputs, double* sums) {
  differentiate(rule, &StepKernels::backward, grad_params, {}, inputs, {}, sums);
}

void vjp_cpu(const Rule& rule, at::TensorList grad_params, at::TensorList grad_state, const Inputs& inputs,
             at::TensorList grad_inputs, double* sums) {
  differentiate(rule, &StepKernels::vjp, grad_params, grad_state, inputs, grad_inputs, sums);
}

}  // namespace hyperopt_ext
