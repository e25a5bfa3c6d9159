#include "passes.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <vector>

#include "../numerics.h"
#include "vectors.h"

namespace hyperopt_ext {
namespace {

// Elements of a chunk. The chunks, and so the order of the sums, do not depend on the number of threads.
constexpr std::int64_t kChunk = 16384;
// Elements for which a second thread is worth its start.
constexpr std::int64_t kGrain = 32768;

// Elements of half precision that are brought to fp32 at once: what kernels add up before they do in double.
constexpr std::int64_t kStaged = 1024;

// What a kernel writes that has the parameter's dtype.
enum Halves : unsigned { kWritesParam = 1, kWritesLastParam = 2 };

// A slice of a tensor of half precision, in fp32, for a kernel that writes to `parts`. None reads a last_param that it
// writes to.
class Staged {
 public:
  Staged(const Item& item, const Slice& slice, unsigned parts)
      : half_(halves[item.type - kHalf]), from_(slice), slice_(slice), parts_(parts) {
    widen(slice_.param, param_);
    widen(slice_.grad, grad_);
    if (parts & kWritesLastParam)
      slice_.last_param = last_param_;
    else
      widen(slice_.last_param, last_param_);
    if (item.last_grad_bytes == param_bytes(item.type)) widen(slice_.last_grad, last_grad_);
  }
  Staged(const Staged&) = delete;

  const Slice& slice() const { return slice_; }

  void store() const {
    if (parts_ & kWritesParam) half_.narrow(param_, from_.count, from_.param);
    if (parts_ & kWritesLastParam) half_.narrow(last_param_, from_.count, from_.last_param);
  }

 private:
  void widen(void*& start, float* to) const {
    if (start == nullptr) return;
    half_.widen(start, from_.count, to);
    start = to;
  }

  const HalfKernels& half_;
  const Slice from_;
  Slice slice_;
  const unsigned parts_;
  alignas(64) float param_[kStaged], grad_[kStaged], last_param_[kStaged], last_grad_[kStaged];
};

// The prepared values of the steps of a tensor.
struct Steps {
  const void* now = nullptr;
  const void* last = nullptr;  // of the step whose state is deferred to this one; null: there is none
};

// A list of tensors whose chunks run in parallel.
class Batch {
 public:
  explicit Batch(std::size_t tensors) : chunks_(kChunk, tensors) { steps_.reserve(tensors), table_.reserve(tensors); }

  Chunks& chunks() { return chunks_; }
  std::size_t size() const { return table_.size(); }
  const Item& item_of(std::size_t chunk) const { return chunks_.items()[table_[chunk].item]; }

  // prepare(hyper, step), once for every run of tensors that share them.
  const void* prepared(PrepareKernel prepare, const double* hyper, double step) {
    constexpr std::size_t kRecent = 4;  // the values of this step and of the last one, in two types
    const std::size_t known = prepared_.size();
    for (std::size_t i = known; i > 0 && i + kRecent > known; --i) {
      const Values& values = prepared_[i - 1];
      if (values.prepare == prepare && values.hyper == hyper && values.step == step) return values.bytes;
    }
    Values& values = prepared_.emplace_back();
    values.prepare = prepare, values.hyper = hyper, values.step = step;
    prepare(hyper, step, values.bytes);
    return values.bytes;
  }

  void add(const Item& item, const Steps& steps) {
    for (std::int64_t k = 0; k < chunks_.count(item); ++k) table_.push_back({steps_.size(), k});
    elements_ += item.slice.count;
    chunks_.add(item);
    steps_.push_back(steps);
  }

  // kernel(arithmetic type, steps, slice, index of the chunk), for each chunk, or for one part of it after the other, so that
  // sums are added to what is there. It writes to `parts`, and to whatever has the arithmetic type.
  template <class F>
  void run(unsigned parts, F&& kernel) const {
    const auto range = [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t c = first; c < last; ++c) {
        const auto [i, k] = table_[std::size_t(c)];
        const Item& item = chunks_.items()[i];
        const std::int64_t begin = k * kChunk, end = std::min(begin + kChunk, item.slice.count);
        if (item.type == arithmetic(item.type)) {
          if (begin < end) kernel(item.type, steps_[i], slice_of(item, begin, end - begin), std::size_t(c));
          continue;
        }
        for (std::int64_t part = begin; part < end; part += kStaged) {
          const Staged staged(item, slice_of(item, part, std::min(kStaged, end - part)), parts);
          kernel(kFloat, steps_[i], staged.slice(), std::size_t(c));
          staged.store();
        }
      }
    };
    const std::int64_t chunks = std::int64_t(size()), elements = std::max<std::int64_t>(1, elements_);
    at::parallel_for(0, chunks, std::max<std::int64_t>(1, chunks * kGrain / elements), range);
  }

  void finish() { chunks_.finish(); }

 private:
  struct Values {
    PrepareKernel prepare;
    const double* hyper;
    double step;
    alignas(64) unsigned char bytes[kPreparedBytes];
  };
  struct Chunk {
    std::size_t item;
    std::int64_t number;  // among those of the item
  };
  Chunks chunks_;
  std::vector<Steps> steps_;  // of each item
  std::vector<Chunk> table_;
  std::int64_t elements_ = 0;
  std::deque<Values> prepared_;
};

std::int64_t& counter(const at::Tensor& t) {
  return *t.mutable_data_ptr<std::int64_t>();
}

// A row of the tower, as far as the passes need it.
struct Row {
  const double *header, *used, *previous;
  bool ticking() const { return header[kTicking] != 0.0; }
  double ticks() const { return header[kTicks]; }
};

Row tower_row(const Rule& rule, const Pass& pass, std::size_t i) {
  const double* const start = pass.tower.const_data_ptr<double>() + row_of(pass, i) * pass.tower.size(1);
  return {start, start + kHeader, start + kHeader + rule.hypers.size()};
}

Item item_of(Batch& batch, const Rule& rule, const Pass& pass, std::size_t i, Written written) {
  Item item = item_for(batch.chunks(), rule, pass, i, written);
  item.slice.scale = pass.grad_scale ? pass.scale / double(*pass.grad_scale->const_data_ptr<float>()) : pass.scale;
  item.slice.keep = keep_of(pass.horizon, pass.horizon_growth, double(counter(pass.steps[i]) + 1));
  return item;
}

// The prepared values of the last step, if it left a deferred state behind.
const void* deferred(Batch& batch, const Rule& rule, const Pass& pass, const Row& row, std::size_t i, ScalarType type) {
  const std::int64_t step = counter(pass.steps[i]);
  const bool pending = (record_of(rule, pass) & kDeferred) && step > 0 && counter(pass.ticks[i]) == row.ticks() - 1;
  return pending ? batch.prepared(rule.on_cpu(type).prepare, row.previous, double(step)) : nullptr;
}

at::Tensor hypergradient(const Rule& rule, const Pass& pass, bool norm, bool squares) {
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
    const Item item = item_of(batch, rule, pass, i, kReads);
    const bool recorded = step > 0 && double(counter(pass.ticks[i])) == row.ticks();
    Steps steps;
    if (!traced && pass.learn != 0 && recorded)
      steps.now = batch.prepared(set.on_cpu(item.type).prepare_dual, row.used, double(step));
    batch.add(item, steps);
  }
  std::vector<double> partial(batch.size() * columns, 0.0);
  batch.run(0, [&](ScalarType type, const Steps& steps, const Slice& slice, std::size_t chunk) {
    double* const sums = partial.data() + chunk * columns;
    if (traced) {
      for (std::size_t k = 0; k < learned; ++k) {
        double products[3] = {};
        vectors[type].products(slice, direction(mask, int(k)), products);
        sums[k] += products[0], sums[learned + k] += products[1];
        if (k == 0) sums[2 * learned] += products[2];
      }
    } else if (steps.now != nullptr) {
      set.on_cpu(type).hypergradient[squares](slice, steps.now, sums);
    } else {
      vectors[type].squared_norm(slice, sums + 2 * learned);
    }
  });
  double* const sums = result.mutable_data_ptr<double>();
  for (std::int64_t row = 0; row < result.size(0); ++row) sums[std::size_t(row) * width + 2 * hypers] = -1.0;
  for (std::size_t i = 0; i < pass.params.size(); ++i) sums[std::size_t(row_of(pass, i)) * width + 2 * hypers] = 0.0;
  for (std::size_t chunk = 0; chunk < batch.size(); ++chunk) {
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

at::Tensor norms(const Rule& rule, const Pass& pass) {
  at::Tensor result = at::zeros({pass.tower.size(0), 3}, pass.tower.options());
  double* const sums = result.mutable_data_ptr<double>();
  const LearnedSet& set = rule.set_for(is_traced(pass) ? 0 : pass.learn);
  // The values in use, but an lr of 1: one so large that the update would overflow can be lowered, too.
  std::vector<std::array<double, kMaxHypers>> values(std::size_t(pass.tower.size(0)));
  Batch batch(pass.params.size());
  for (std::size_t i = 0; i < pass.params.size(); ++i) {
    const Row row = tower_row(rule, pass, i);
    if (!row.ticking()) continue;
    const Item item = item_of(batch, rule, pass, i, kReads);
    double* const unit = values[std::size_t(item.row)].data();
    std::copy_n(row.used, rule.hypers.size(), unit);
    if (rule.lr >= 0) unit[rule.lr] = 1.0;
    Steps steps;
    steps.last = deferred(batch, rule, pass, row, i, item.type);
    steps.now = batch.prepared(rule.on_cpu(item.type).prepare, unit, double(counter(pass.steps[i]) + 1));
    sums[3 * item.row + 2] += double(item.slice.count);
    batch.add(item, steps);
  }
  std::vector<double> partial(batch.size() * 2, 0.0);
  batch.run(0, [&](ScalarType type, const Steps& steps, const Slice& slice, std::size_t chunk) {
    set.on_cpu(type).norms(slice, steps.now, steps.last, partial.data() + 2 * chunk);
  });
  for (std::size_t chunk = 0; chunk < batch.size(); ++chunk)
    for (std::size_t k = 0; k < 2; ++k) sums[3 * batch.item_of(chunk).row + std::int64_t(k)] += partial[2 * chunk + k];
  return result;
}

void step(const Rule& rule, const Pass& pass) {
  const LearnedSet& set = rule.set_for(pass.learn);
  const bool traced = is_traced(pass);
  Batch batch(pass.params.size());
  for (std::size_t i = 0; i < pass.params.size(); ++i) {
    const Row row = tower_row(rule, pass, i);
    if (!row.ticking()) continue;
    const Item item = item_of(batch, rule, pass, i, kWritesAll);
    Steps steps;
    steps.last = deferred(batch, rule, pass, row, i, item.type);
    const PrepareKernel prepare = traced ? set.on_cpu(item.type).prepare_dual : rule.on_cpu(item.type).prepare;
    steps.now = batch.prepared(prepare, row.used, double(counter(pass.steps[i]) + 1));
    batch.add(item, steps);
  }
  for (std::size_t i = 0; i < pass.params.size(); ++i) {
    const Row row = tower_row(rule, pass, i);
    if (!row.ticking()) continue;
    ++counter(pass.steps[i]);
    counter(pass.ticks[i]) = std::int64_t(row.ticks());
  }
  const unsigned written = kWritesParam | (record_of(rule, pass) & kParam ? kWritesLastParam : 0u);
  batch.run(written, [&](ScalarType type, const Steps& steps, const Slice& slice, std::size_t) {
    if (traced)
      set.on_cpu(type).traced_update(slice, steps.now);
    else
      set.on_cpu(type).update(slice, steps.now, steps.last);
  });
  batch.finish();
}

void settle(const Rule& rule, const Pass& pass) {
  Batch batch(pass.params.size());
  for (std::size_t i = 0; i < pass.params.size(); ++i) {
    const Row row = tower_row(rule, pass, i);
    std::int64_t& tick = counter(pass.ticks[i]);
    if (!row.ticking() || tick < 0) continue;
    const Item item = item_of(batch, rule, pass, i, kWritesState);
    Steps steps;
    steps.last = deferred(batch, rule, pass, row, i, item.type);
    if (is_traced(pass) || steps.last != nullptr) batch.add(item, steps);
    if (!is_traced(pass)) tick = -1;
  }
  batch.run(0, [&](ScalarType type, const Steps& steps, const Slice& slice, std::size_t) {
    if (steps.last != nullptr)
      rule.on_cpu(type).settle(slice, steps.last);
    else
      vectors[type].decay(slice);
  });
  batch.finish();
}

// The number of a step in the functional form.
double step_of(const Inputs& inputs) {
  const double step = *inputs.step.const_data_ptr<double>();
  TORCH_CHECK_VALUE(step >= 1, "step is ", step, ", but steps are counted from 1");
  return std::floor(step);
}

void update(const Rule& rule, const Inputs& inputs, at::TensorList outputs) {
  const double step = step_of(inputs);
  const LearnedSet& set = rule.set_for(0);
  Batch batch(inputs.params.size());
  for (std::size_t i = 0; i < inputs.params.size(); ++i) {
    const Item item = item_for(batch.chunks(), rule, inputs, outputs, i);
    Steps steps;
    steps.now = batch.prepared(rule.on_cpu(item.type).prepare, inputs.hyper.const_data_ptr<double>(), step);
    batch.add(item, steps);
  }
  // The kernel works in place, on a copy of the inputs that has just come into the cache.
  batch.run(kWritesParam, [&](ScalarType type, const Steps& steps, const Slice& slice, std::size_t) {
    const auto copy = [&](void* to, const void* from, std::int64_t bytes) {
      std::memcpy(to, from, std::size_t(slice.count * bytes));
    };
    copy(slice.param, slice.last_param, param_bytes(type));
    for (std::size_t k = 0; k < rule.state.size(); ++k)
      copy(slice.state[k], slice.grad_state[k], arithmetic_bytes(type));
    set.on_cpu(type).update(slice, steps.now, nullptr);
  });
  batch.finish();
}

// d loss / d hyper of one step by `kernel`, which may write to `grad_inputs`, too.
void differentiate(const Rule& rule, SumKernel StepKernels::* kernel, at::TensorList grad_params,
                   at::TensorList grad_state, const Inputs& inputs, at::TensorList grad_inputs, double* sums) {
  const LearnedSet& all = rule.sets.back();
  const std::size_t hypers = rule.hypers.size();
  const double step = step_of(inputs);
  Batch batch(inputs.params.size());
  for (std::size_t i = 0; i < inputs.params.size(); ++i) {
    const Item item = item_for(batch.chunks(), rule, grad_params, grad_state, inputs, grad_inputs, i);
    Steps steps;
    steps.now = batch.prepared(all.on_cpu(item.type).prepare_dual, inputs.hyper.const_data_ptr<double>(), step);
    batch.add(item, steps);
  }
  std::vector<double> partial(batch.size() * hypers, 0.0);
  batch.run(0, [&](ScalarType type, const Steps& steps, Slice slice, std::size_t chunk) {
    thread_local std::vector<double> unwanted(kChunk);
    for (void*& grad : slice.grad_input)
      if (grad == nullptr) grad = unwanted.data();
    (rule.on_cpu(type).*kernel)(slice, steps.now, partial.data() + chunk * hypers);
  });
  batch.finish();
  for (std::size_t chunk = 0; chunk < batch.size(); ++chunk)
    for (std::size_t k = 0; k < hypers; ++k) sums[k] += partial[chunk * hypers + k];
}

void backward(const Rule& rule, at::TensorList grad_params, const Inputs& inputs, const at::Tensor& sums) {
  differentiate(rule, &StepKernels::backward, grad_params, {}, inputs, {}, sums.mutable_data_ptr<double>());
}

void vjp(const Rule& rule, at::TensorList grad_params, at::TensorList grad_state, const Inputs& inputs,
         at::TensorList grad_inputs, const at::Tensor& sums) {
  differentiate(rule, &StepKernels::vjp, grad_params, grad_state, inputs, grad_inputs, sums.mutable_data_ptr<double>());
}

void tower(at::TensorList, const std::vector<TowerView>& views, at::IntArrayRef) {
  thread_local std::vector<double> scratch;
  for (TowerView view : views) {
    scratch.resize(std::max(scratch.size(), std::size_t(tower_scratch(view.rows, view.learned()))));
    view.scratch = scratch.data();
    tower_step(view);
  }
}

void cap(at::TensorList, const std::vector<TowerView>& views) {
  for (const TowerView& view : views) tower_cap(view);
}

}  // namespace

const Backend cpu_backend{hypergradient, norms, step, settle, update, backward, vjp, tower, cap};

}  // namespace hyperopt_ext
