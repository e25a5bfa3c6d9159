#include "passes.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

#include "../tower.h"

namespace hyperopt_ext {
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

at::ScalarType arithmetic(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
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

// The row of the tower that holds the hyperparameters of tensor i.
std::int64_t row_of(const at::Tensor& tower, std::size_t i) {
  return tower.size(0) == 1 ? 0 : std::int64_t(i);
}

Item item_for(Batch& batch, const Rule& rule, const Lists& lists, const LearnedSet& set, std::size_t i, bool written) {
  const at::Tensor& param = lists.params[i];
  const std::size_t n = lists.params.size();
  Item item{};
  item.type = scalar_type(param);
  item.last_grad_bytes = arithmetic_bytes(item.type);
  item.row = row_of(lists.tower, i);
  item.slice.count = param.numel();
  item.slice.param = batch.elements(param, param, written);
  if (!lists.grads.empty()) item.slice.grad = batch.elements(param, lists.grads[i], false);
  for (std::size_t k = 0; k < rule.state.size(); ++k)
    item.slice.state[k] = batch.elements(param, lists.state[k * n + i], written);
  std::size_t record = i;
  if (set.record & kGrad) {
    item.slice.last_grad = batch.elements(param, lists.record[record], written);
    record += n;
  }
  if (set.record & kParam) item.slice.last_param = batch.elements(param, lists.record[record], written);
  return item;
}

}  // namespace

void check(const Rule& rule, const Lists& lists, Mask learn) {
  const std::size_t n = lists.params.size();
  const unsigned record = rule.set_for(learn).record;
  const std::size_t records = std::size_t(count(record & (kGrad | kParam)));
  const auto length = [&](const char* name, at::TensorList list, std::size_t expected) {
    TORCH_CHECK_VALUE(list.size() == expected, name, " must hold ", expected, " tensors for rule '", rule.name,
                      "' and ", n, " params, not ", list.size());
  };
  length("grads", lists.grads, n);
  length("state", lists.state, n * rule.state.size());
  length("record", lists.record, n * records);
  length("steps", lists.steps, n);
  length("ticks", lists.ticks, n);
  const at::Tensor& tower = lists.tower;
  TORCH_CHECK_VALUE(tower.dim() == 2 && tower.scalar_type() == at::kDouble && tower.is_contiguous() &&
                        (tower.size(0) == 1 || tower.size(0) == std::int64_t(n)) &&
                        tower.size(1) >= kHeader + 4 * std::int64_t(rule.hypers.size()),
                    "tower must be a contiguous float64 tensor [1 or ", n, ", width] that holds rule '", rule.name,
                    "'");
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
    const at::Tensor& param = lists.params[i];
    TORCH_CHECK_VALUE(param.layout() == at::kStrided, "params[", i, "] is ", param.layout(),
                      ", but only dense tensors are supported");
    TORCH_CHECK_VALUE(param.device() == tower.device(), "params[", i, "] is on ", param.device(),
                      ", but the tower of its group is on ", tower.device());
    scalar_type(param);
    const at::ScalarType dtype = param.scalar_type(), wide = arithmetic(dtype);
    fits("grads", i, lists.grads[i], param, dtype);
    for (std::size_t k = 0; k < rule.state.size(); ++k) fits("state", k * n + i, lists.state[k * n + i], param, wide);
    if (record & kGrad) fits("record", i, lists.record[i], param, wide);
    if (record & kParam) fits("record", (records - 1) * n + i, lists.record[(records - 1) * n + i], param, dtype);
    for (const auto& [name, t] : {std::pair("steps", &lists.steps[i]), std::pair("ticks", &lists.ticks[i])})
      TORCH_CHECK_VALUE(t->numel() == 1 && t->scalar_type() == at::kLong, name, "[", i, "] must be one int64");
  }
}

at::Tensor hypergradient_cpu(const Rule& rule, const Lists& lists, Mask learn, double scale) {
  check(rule, lists, learn);
  const std::size_t hypers = rule.hypers.size();
  at::Tensor result = at::zeros({lists.tower.size(0), std::int64_t(hypers) + 1}, lists.tower.options());
  if (learn == 0) return result;
  const LearnedSet& set = rule.set_for(learn);
  const double* tower = lists.tower.const_data_ptr<double>();
  const std::int64_t width = lists.tower.size(1);
  const std::size_t learned = std::size_t(count(set.mask)), columns = learned + 1;
  Batch batch(lists.params.size());
  for (std::size_t i = 0; i < lists.params.size(); ++i) {
    const double* row = tower + row_of(lists.tower, i) * width;
    const std::int64_t step = counter(lists.steps[i]);
    Item item = item_for(batch, rule, lists, set, i, false);
    item.slice.scale = scale;
    if (step > 0 && double(counter(lists.ticks[i])) == row[kTicks])
      item.prepared = batch.prepared(set.cpu[item.type].prepare_dual, row + kHeader, double(step));
    batch.add(item);
  }
  std::vector<double> partial(batch.chunks() * columns, 0.0);
  batch.run([&](const Item& item, const Slice& slice, std::size_t chunk) {
    double* const sums = partial.data() + chunk * columns;
    if (item.prepared != nullptr)
      set.cpu[item.type].hypergradient(slice, item.prepared, sums);
    else
      rule.cpu[item.type].squared_norm(slice, nullptr, sums + learned);
  });
  double* sums = result.mutable_data_ptr<double>();
  for (std::size_t chunk = 0; chunk < batch.chunks(); ++chunk) {
    double* const row = sums + std::size_t(batch.item_of(chunk).row) * (hypers + 1);
    for (std::size_t k = 0; k < learned; ++k) {
      const int hyper = direction(set.mask, int(k));
      if (learn & bit(hyper)) row[hyper] += partial[chunk * columns + k];
    }
    row[hypers] += partial[chunk * columns + learned];
  }
  return result;
}

void step_cpu(const Rule& rule, const Lists& lists, Mask learn, double scale) {
  check(rule, lists, learn);
  const LearnedSet& set = rule.set_for(learn);
  const double* tower = lists.tower.const_data_ptr<double>();
  const std::int64_t width = lists.tower.size(1), hypers = std::int64_t(rule.hypers.size());
  Batch batch(lists.params.size());
  for (std::size_t i = 0; i < lists.params.size(); ++i) {
    const double* row = tower + row_of(lists.tower, i) * width;
    if (row[kOk] == 0.0) continue;
    std::int64_t& step = counter(lists.steps[i]);
    std::int64_t& tick = counter(lists.ticks[i]);
    Item item = item_for(batch, rule, lists, set, i, true);
    item.slice.scale = scale;
    const PrepareKernel prepare = rule.cpu[item.type].prepare;
    const double *used = row + kHeader, *previous = used + hypers;
    if ((set.record & kDeferred) && step > 0 && double(tick) == row[kTicks] - 1)
      item.last_prepared = batch.prepared(prepare, previous, double(step));
    step += 1;
    tick = std::int64_t(row[kTicks]);
    item.prepared = batch.prepared(prepare, used, double(step));
    batch.add(item);
  }
  batch.run([&](const Item& item, const Slice& slice, std::size_t) {
    set.cpu[item.type].update(slice, item.prepared, item.last_prepared);
  });
  batch.finish();
}

void settle_cpu(const Rule& rule, const Lists& lists, Mask learn) {
  const LearnedSet& set = rule.set_for(learn);
  const double* tower = lists.tower.const_data_ptr<double>();
  const std::int64_t width = lists.tower.size(1), hypers = std::int64_t(rule.hypers.size());
  Batch batch(lists.params.size());
  for (std::size_t i = 0; i < lists.params.size(); ++i) {
    const double* row = tower + row_of(lists.tower, i) * width;
    std::int64_t& tick = counter(lists.ticks[i]);
    if (row[kOk] == 0.0 || tick < 0) continue;
    if ((set.record & kDeferred) && double(tick) == row[kTicks] - 1) {
      Item item = item_for(batch, rule, lists, set, i, true);
      const PrepareKernel prepare = rule.cpu[item.type].prepare;
      item.last_prepared = batch.prepared(prepare, row + kHeader + hypers, double(counter(lists.steps[i])));
      batch.add(item);
    }
    tick = -1;
  }
  batch.run([&](const Item& item, const Slice& slice, std::size_t) {
    rule.cpu[item.type].settle(slice, item.last_prepared);
  });
  batch.finish();
}

void update_cpu(const Rule& rule, at::TensorList params, at::TensorList grads, at::TensorList state,
                const double* hyper, double step) {
  const LearnedSet& set = rule.set_for(0);
  const std::size_t n = params.size();
  Batch batch(n);
  for (std::size_t i = 0; i < n; ++i) {
    Item item{};
    item.type = scalar_type(params[i]);
    item.slice.count = params[i].numel();
    item.slice.param = batch.elements(params[i], params[i], true);
    item.slice.grad = batch.elements(params[i], grads[i], false);
    for (std::size_t k = 0; k < rule.state.size(); ++k)
      item.slice.state[k] = batch.elements(params[i], state[k * n + i], true);
    item.slice.scale = 1.0;
    item.prepared = batch.prepared(rule.cpu[item.type].prepare, hyper, step);
    batch.add(item);
  }
  batch.run([&](const Item& item, const Slice& slice, std::size_t) {
    set.cpu[item.type].update(slice, item.prepared, nullptr);
  });
  batch.finish();
}

void backward_cpu(const Rule& rule, at::TensorList grad_params, at::TensorList params, at::TensorList grads,
                  at::TensorList state, const double* hyper, double step, double* sums) {
  const LearnedSet& all = rule.sets.back();
  const std::size_t n = params.size(), hypers = rule.hypers.size();
  Batch batch(n);
  for (std::size_t i = 0; i < n; ++i) {
    Item item{};
    item.type = scalar_type(params[i]);
    item.last_grad_bytes = param_bytes(item.type);
    item.slice.count = params[i].numel();
    item.slice.last_param = batch.elements(params[i], params[i], false);
    item.slice.last_grad = batch.elements(params[i], grads[i], false);
    item.slice.grad = batch.elements(params[i], grad_params[i], false);
    for (std::size_t k = 0; k < rule.state.size(); ++k)
      item.slice.state[k] = batch.elements(params[i], state[k * n + i], false);
    item.slice.scale = 1.0;
    item.prepared = batch.prepared(all.cpu[item.type].prepare_dual, hyper, step);
    batch.add(item);
  }
  std::vector<double> partial(batch.chunks() * hypers, 0.0);
  batch.run([&](const Item& item, const Slice& slice, std::size_t chunk) {
    rule.cpu[item.type].backward(slice, item.prepared, partial.data() + chunk * hypers);
  });
  for (std::size_t chunk = 0; chunk < batch.chunks(); ++chunk)
    for (std::size_t k = 0; k < hypers; ++k) sums[k] += partial[chunk * hypers + k];
}

}  // namespace hyperopt_ext
