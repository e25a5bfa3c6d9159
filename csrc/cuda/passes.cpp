#include "passes.h"

#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "launch.h"

#ifdef HX_EMULATE_CUDA  // the tests: blocks and threads in loops on the host (block.h), on CPU tensors
#define HX_CHECK_LAUNCH()
#else
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define HX_CHECK_LAUNCH() C10_CUDA_KERNEL_LAUNCH_CHECK()
#endif

namespace hyperopt_ext {
namespace cuda {

namespace {

// The device of a tensor is the current one as long as this lives.
class Device {
 public:
#ifdef HX_EMULATE_CUDA
  explicit Device(const at::Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit Device(const at::Tensor& t) : guard_(t.device()) {}
  void* stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
  c10::cuda::CUDAGuard guard_;
#endif
};

const DeviceRule& device_rule(const Rule& rule) {
  for (const DeviceRule* known : device_rules())
    if (std::strcmp(known->name, rule.name) == 0) return *known;
  TORCH_CHECK_NOT_IMPLEMENTED(false, "rule '", rule.name, "' was built without CUDA kernels");
}

const LearnedLaunches& launches_for(const RuleLaunches& launches, const Rule& rule, Mask learn) {
  return launches.sets[&rule.set_for(learn) - rule.sets.data()];
}

// kAligned and kGradAligned.
std::uint64_t alignment_of(const Slice& slice, ScalarType type, std::size_t states) {
  const std::uintptr_t narrow = type == kHalf || type == kBFloat16 ? kVector * 2 : 16;
  const auto at = [](const void* p, std::uintptr_t bytes) { return reinterpret_cast<std::uintptr_t>(p) % bytes == 0; };
  bool aligned = at(slice.param, narrow) && at(slice.last_param, narrow) && at(slice.last_grad, 16);
  for (std::size_t k = 0; k < states; ++k) aligned = aligned && at(slice.state[k], 16) && at(slice.grad_state[k], 16);
  for (const void* trace : slice.trace) aligned = aligned && at(trace, 16);
  for (const void* grad : slice.grad_input) aligned = aligned && at(grad, 16);
  return (aligned ? kAligned : 0) | (at(slice.grad, narrow) ? kGradAligned : 0);
}

std::int64_t elements_of(at::TensorList tensors) {
  std::int64_t elements = 0;
  for (const at::Tensor& t : tensors) elements += t.numel();
  return elements;
}

// The last block of a row adds up as many chunks as fast as another launch would.
constexpr std::int32_t kFewChunks = 2048;

// What the kernels read beyond the states.
enum Extra { kNone, kTraces, kCotangents };

// The tensors of a pass, and what the kernels of all its launches have in common.
class Batch {
 public:
  Batch(const Rule& rule, const at::Tensor& tower, at::TensorList params, Extra extra)
      : chunks_(chunk_of(elements_of(params)), params.size()),
        rule_(rule),
        extra_(extra),
        device_(tower),
        tower_(tower),
        rows_(std::size_t(tower.size(0))) {
    counters_.reserve(params.size());
    first_chunks_.reserve(params.size());
    common_.chunk = std::int32_t(chunks_.size());
    common_.tower = tower.mutable_data_ptr<double>();
    common_.width = tower.size(1);
    common_.horizon = 1.0;
    common_.scale = 1.0;
    const std::size_t states = rule.state.size();
    common_.extra = std::int32_t(extra == kTraces ? rule.hypers.size() : extra == kCotangents ? 2 + 2 * states : 0);
    common_.stride = std::int32_t(kPointers + Pointer::kStates + int(states) + common_.extra);
    static_assert(kPointers + Pointer::kStates + kMaxStates + kMaxHypers <= Launch::kWords, "a tensor must fit");
    static_assert(kPointers + Pointer::kStates + 2 * kMaxStates + 2 + kMaxStates <= Launch::kWords,
                  "a tensor must fit");
  }

  // Those of a pass.
  Batch(const Rule& rule, const Pass& pass, Written written)
      : Batch(rule, pass.tower, pass.params, is_traced(pass) ? kTraces : kNone) {
    common_.horizon = pass.horizon, common_.horizon_growth = pass.horizon_growth;
    common_.scale = pass.scale, common_.learn = pass.learn;
    common_.grad_scale = pass.grad_scale ? pass.grad_scale->const_data_ptr<float>() : nullptr;
    for (std::size_t i : by_row(pass)) add(item_for(chunks_, rule, pass, i, written), pass.steps[i], pass.ticks[i]);
  }

  Chunks& chunks() { return chunks_; }
  void finish() { chunks_.finish(); }

  void add(const Item& item, const at::Tensor& step, const at::Tensor& tick) {
    Row& row = rows_[std::size_t(item.row)];
    if (row.end == 0) row.begin = chunk_count_;
    first_chunks_.push_back(chunk_count_);
    chunk_count_ += std::int32_t(chunks_.count(item));
    row.end = chunk_count_;
    chunks_.add(item);
    counters_.push_back({step.mutable_data_ptr<std::int64_t>(), tick.mutable_data_ptr<std::int64_t>()});
  }

  // Runs kernel(arithmetic) over all tensors.
  template <class F>
  void run(F&& kernel) {
    each_launch(
        [&](const Launch& launch, int arithmetic) { kernel(arithmetic)(launch, launch.blocks, device_.stream()); });
  }

  // The same for an update, which counts the steps of the tensors.
  template <class F>
  void run_and_count(F&& kernel) {
    common_.counts = true;
    run(kernel);
  }

  // float64 [rows of the tower, width] for sum(). A row without tensors is 0, but for its last number.
  at::Tensor new_result(int width, double absent) const {
    const bool all = std::all_of(rows_.begin(), rows_.end(), [](const Row& row) { return row.end > 0; });
    if (all) return at::empty({tower_.size(0), width}, tower_.options());
    at::Tensor result = at::zeros({tower_.size(0), width}, tower_.options());
    result.select(1, width - 1).fill_(absent);
    return result;
  }

  // The same for kernels that leave `columns` sums of each chunk, which are added up to `result`. hypers, set: see Sums.
  template <class F>
  void sum(int columns, const at::Tensor& result, int hypers, Mask set, F&& kernel) {
    const at::Tensor partial = at::empty({columns, chunk_count_}, tower_.options());
    common_.sums = {partial.mutable_data_ptr<double>(),
                    chunk_count_,
                    result.mutable_data_ptr<double>(),
                    std::int32_t(result.size(-1)),
                    columns,
                    hypers,
                    set,
                    common_.learn};
    common_.adds_up = rows_.size() > 1 || chunk_count_ <= kFewChunks;
    run(kernel);
    if (common_.adds_up) return;
    sum_chunks(common_.sums, device_.stream());
    HX_CHECK_LAUNCH();
  }

  void forget() {
    each_launch([&](const Launch& launch, int) { forget_steps(launch, device_.stream()); });
  }

 private:
  struct Counters {
    std::int64_t *step, *tick;
  };
  struct Row {
    std::int32_t begin = 0, end = 0;  // its chunks; none: 0, 0
  };

  // The parameters of a row follow each other.
  static std::vector<std::size_t> by_row(const Pass& pass) {
    std::vector<std::size_t> order(pass.params.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t i, std::size_t j) { return row_of(pass, i) < row_of(pass, j); });
    return order;
  }

  // f(launch, arithmetic): as many tensors at once as fit, those of one arithmetic at a time.
  template <class F>
  void each_launch(F&& f) {
    const int most = Launch::kWords / common_.stride;
    Launch& launch = common_;  // not a copy: it is large
    for (const ScalarType type : {kFloat, kDouble}) {
      const auto flush = [&] {
        if (launch.tensors == 0) return;
        f(launch, type);
        HX_CHECK_LAUNCH();
        launch.tensors = launch.blocks = 0;
      };
      for (std::size_t i = 0; i < chunks_.items().size(); ++i) {
        const Item& item = chunks_.items()[i];
        if (arithmetic(item.type) != type) continue;
        if (launch.tensors == most || launch.first_chunk + launch.blocks != first_chunks_[i]) flush();
        if (launch.tensors == 0) launch.first_chunk = first_chunks_[i];
        write(launch.words + launch.tensors * launch.stride, item, counters_[i], std::uint64_t(launch.blocks));
        launch.tensors += 1;
        launch.blocks += std::int32_t(chunks_.count(item));
      }
      flush();
    }
  }

  // One tensor in the layout of launch.h.
  void write(std::uint64_t* words, const Item& item, const Counters& counters, std::uint64_t first_block) const {
    const auto word = [](const void* p) { return std::uint64_t(reinterpret_cast<std::uintptr_t>(p)); };
    const Slice& slice = item.slice;
    const std::size_t states = rule_.state.size();
    words[kCount] = std::uint64_t(slice.count);
    words[kPlace] = first_block | std::uint64_t(item.row) << 32;
    words[kFormat] = std::uint64_t(item.type) | alignment_of(slice, item.type, states);
    const Row& row = rows_[std::size_t(item.row)];
    words[kSpan] = std::uint64_t(row.begin) | std::uint64_t(row.end) << 32;
    words[kStep] = word(counters.step);
    words[kTick] = word(counters.tick);
    std::uint64_t* const pointers = words + kPointers;
    pointers[Pointer::kParam] = word(slice.param);
    pointers[Pointer::kGrad] = word(slice.grad);
    pointers[Pointer::kLastGrad] = word(slice.last_grad);
    pointers[Pointer::kLastParam] = word(slice.last_param);
    std::uint64_t* next = pointers + Pointer::kStates;
    for (std::size_t k = 0; k < states; ++k) *next++ = word(slice.state[k]);
    if (extra_ == kTraces)
      for (std::size_t k = 0; k < rule_.hypers.size(); ++k) *next++ = word(slice.trace[k]);
    if (extra_ == kCotangents) {
      for (std::size_t k = 0; k < states; ++k) *next++ = word(slice.grad_state[k]);
      for (std::size_t k = 0; k < 2 + states; ++k) *next++ = word(slice.grad_input[k]);
    }
  }

  Chunks chunks_;
  const Rule& rule_;
  Extra extra_;
  Device device_;
  at::Tensor tower_;
  std::vector<Counters> counters_;          // of each item
  std::vector<std::int32_t> first_chunks_;  // of each item
  std::int32_t chunk_count_ = 0;
  std::vector<Row> rows_;  // of the tower, where sums are made
  Launch common_{};
};

at::Tensor hypergradient(const Rule& rule, const Pass& pass, bool norm, bool /* squares: always */) {
  const int hypers = int(rule.hypers.size());
  if (pass.learn == 0 && !norm) return at::zeros({pass.tower.size(0), 2 * hypers + 1}, pass.tower.options());
  const bool traced = is_traced(pass);
  const Mask set = pass.learn == 0 || traced ? pass.learn : rule.set_for(pass.learn).mask;
  const DeviceRule& kernels = device_rule(rule);
  Batch batch(rule, pass, kReads);
  at::Tensor result = batch.new_result(2 * hypers + 1, -1.0);
  batch.sum(2 * count(set) + 1, result, hypers, set, [&](int arithmetic) {
    if (pass.learn == 0) return vector_launches[arithmetic].squared_norm;
    if (traced) return vector_launches[arithmetic].products;
    return launches_for(kernels.arithmetic[arithmetic], rule, pass.learn).hypergradient;
  });
  return result;
}

at::Tensor norms(const Rule& rule, const Pass& pass) {
  const DeviceRule& kernels = device_rule(rule);
  Batch batch(rule, pass, kReads);
  at::Tensor result = batch.new_result(3, 0.0);
  batch.sum(3, result, -1, 0, [&](int arithmetic) {
    return launches_for(kernels.arithmetic[arithmetic], rule, is_traced(pass) ? 0 : pass.learn).norms;
  });
  return result;
}

void step(const Rule& rule, const Pass& pass) {
  const DeviceRule& kernels = device_rule(rule);
  Batch batch(rule, pass, kWritesAll);
  batch.run_and_count([&](int arithmetic) {
    const LearnedLaunches& launches = launches_for(kernels.arithmetic[arithmetic], rule, pass.learn);
    return is_traced(pass) ? launches.traced_update : launches.update;
  });
  batch.finish();
}

void settle(const Rule& rule, const Pass& pass) {
  const bool traced = is_traced(pass);
  const DeviceRule& kernels = device_rule(rule);
  Batch batch(rule, pass, kWritesState);
  if (traced || (record_of(rule, pass) & kDeferred) != 0)
    batch.run([&](int arithmetic) {
      return traced ? vector_launches[arithmetic].decay : kernels.arithmetic[arithmetic].settle;
    });
  if (!traced) batch.forget();
  batch.finish();
}

// The functional form: a tower of one row that holds the given values, and counters at the given step.
struct FunctionalTower {
  at::Tensor tower, step, tick;

  FunctionalTower(const Rule& rule, const Inputs& inputs, std::int64_t steps_made) {
    const std::int64_t hypers = std::int64_t(rule.hypers.size());
    tower = at::zeros({1, kHeader + kValues * hypers}, inputs.hyper.options());
    tower.select(1, kTicking).fill_(1.0);
    tower.slice(1, kHeader, kHeader + hypers).copy_(inputs.hyper.view({1, hypers}));
    step = inputs.step.to(at::kLong).sub_(1 - steps_made);
    tick = at::zeros({1}, step.options()).sub_(2);  // at no tick that is of interest
  }
};

void update(const Rule& rule, const Inputs& inputs, at::TensorList outputs) {
  const DeviceRule& kernels = device_rule(rule);
  const FunctionalTower given(rule, inputs, 0);
  std::vector<at::Tensor> sources(inputs.params.begin(), inputs.params.end());
  sources.insert(sources.end(), inputs.state.begin(), inputs.state.end());
  at::_foreach_copy_(outputs, sources);  // the kernel works in place
  Batch batch(rule, given.tower, inputs.params, kNone);
  for (std::size_t i = 0; i < inputs.params.size(); ++i)
    batch.add(item_for(batch.chunks(), rule, inputs, outputs, i), given.step, given.tick);
  batch.run([&](int arithmetic) { return kernels.arithmetic[arithmetic].sets[0].update; });
  batch.finish();
}

// d loss / d hyper of one step by `kernel`, which may write to `grad_inputs`, too.
void differentiate(const Rule& rule, LaunchFunction RuleLaunches::* kernel, at::TensorList grad_params,
                   at::TensorList grad_state, const Inputs& inputs, at::TensorList grad_inputs,
                   const at::Tensor& sums) {
  const DeviceRule& kernels = device_rule(rule);
  const FunctionalTower given(rule, inputs, 1);
  Batch batch(rule, given.tower, inputs.params, grad_inputs.empty() ? kNone : kCotangents);
  for (std::size_t i = 0; i < inputs.params.size(); ++i)
    batch.add(item_for(batch.chunks(), rule, grad_params, grad_state, inputs, grad_inputs, i), given.step, given.tick);
  batch.sum(int(rule.hypers.size()), sums, -1, 0,
            [&](int arithmetic) { return kernels.arithmetic[arithmetic].*kernel; });
  batch.finish();
}

void backward(const Rule& rule, at::TensorList grad_params, const Inputs& inputs, const at::Tensor& sums) {
  differentiate(rule, &RuleLaunches::backward, grad_params, {}, inputs, {}, sums);
}

void vjp(const Rule& rule, at::TensorList grad_params, at::TensorList grad_state, const Inputs& inputs,
         at::TensorList grad_inputs, const at::Tensor& sums) {
  differentiate(rule, &RuleLaunches::vjp, grad_params, grad_state, inputs, grad_inputs, sums);
}

// f(launch) over the towers, as many at once as fit.
template <class F>
void each_launch(const std::vector<TowerView>& views, F&& f) {
  for (std::size_t begin = 0; begin < views.size(); begin += TowerLaunch::kTowers) {
    TowerLaunch launch{};
    launch.towers = std::int32_t(std::min<std::size_t>(TowerLaunch::kTowers, views.size() - begin));
    std::copy_n(views.begin() + std::ptrdiff_t(begin), launch.towers, launch.views);
    f(launch);
    HX_CHECK_LAUNCH();
  }
}

// The levels from `from` down to `to` of all towers.
void move_levels(const std::vector<TowerView>& views, int from, int to, bool differentiates, void* stream) {
  each_launch(views, [&](TowerLaunch& launch) {
    launch.from = from, launch.to = to, launch.differentiates = differentiates;
    move_towers(launch, stream);
  });
}

void tower(at::TensorList towers, const std::vector<TowerView>& given, at::IntArrayRef foreign) {
  if (given.empty()) return;
  const Device device(towers[0]);
  void* const stream = device.stream();
  std::vector<TowerView> views = given;
  // The host does not know what is learned: a row is wider than that.
  const auto needed = [](const TowerView& view) { return tower_scratch(view.rows, view.width); };
  std::int64_t doubles = 0;
  for (const TowerView& view : views) doubles += needed(view);
  const at::Tensor scratch = at::empty({doubles}, towers[0].options());
  double* next = scratch.mutable_data_ptr<double>();
  int top = 0;
  for (TowerView& view : views) {
    view.scratch = next;
    next += needed(view);
    top = std::max(top, view.levels - 1);
  }
  if (foreign.empty()) return move_levels(views, top, 0, true, stream);

  // A level that is moved by a rule from elsewhere has a launch of its own, and towers are moved one by one.
  for (std::size_t i = 0; i < views.size(); ++i) {
    const std::vector<TowerView> one{views[i]};
    int from = views[i].levels - 1;
    bool differentiates = true;
    std::vector<std::pair<int, std::size_t>> levels;
    for (std::size_t k = 0; k + 2 < foreign.size(); k += 3)
      if (foreign[k] == std::int64_t(i)) levels.emplace_back(int(foreign[k + 1]), std::size_t(foreign[k + 2]));
    std::sort(levels.rbegin(), levels.rend());
    for (const auto& [level, rule] : levels) {
      if (differentiates || from > level) move_levels(one, from, level + 1, differentiates, stream);
      differentiates = false;
      each_launch(one, [&, level = level, rule = rule](TowerLaunch& launch) {
        launch.from = launch.to = level;
        device_rule(*rules().at(rule)).level(launch, stream);
      });
      from = level - 1;
    }
    if (from >= 0) move_levels(one, from, 0, differentiates, stream);
  }
}

void cap(at::TensorList towers, const std::vector<TowerView>& views) {
  if (views.empty()) return;
  const Device device(towers[0]);
  each_launch(views, [&](TowerLaunch& launch) { cap_towers(launch, device.stream()); });
}

}  // namespace
}  // namespace cuda

const Backend cuda_backend{cuda::hypergradient, cuda::norms, cuda::step,  cuda::settle, cuda::update,
                           cuda::backward,      cuda::vjp,   cuda::tower, cuda::cap};

}  // namespace hyperopt_ext
