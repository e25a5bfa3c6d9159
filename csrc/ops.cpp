// Schemas, autograd, version counters and Meta kernels. For a rule R, with n parameters:
//
//   R_hypergradient  pass A: what the last update's hyperparameters did to today's loss
//   R_norms          how large the coming update and the parameters are
//   R_step_          pass B: one update, in place
//   R_settle_        closes the record of parameters that have no gradient in this step
//   R_check          raises what these would raise
//   R                one update as a differentiable function of its hyperparameters, or of all that it reads
//   R_backward       its backward to the hyperparameters
//   R_vjp            its backward to everything
//
// and, between the two passes, tower_ for any number of towers of any height, and cap_, which bounds their first level
// by what R_norms gave.
#include "ops.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <type_traits>

#include "cpu/passes.h"
#if defined(HX_WITH_CUDA) || defined(HX_EMULATE_CUDA)
#include "cuda/passes.h"
#endif
#include "tower.h"

namespace hyperopt_ext {

#ifdef HX_EMULATE_CUDA  // the tests: the CUDA kernels as loops on the host (cuda/block.h), beside the library
extern const char* const kNamespace;
#else
constexpr const char* kNamespace = "hyperopt_ext";
#endif

namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::variable_list;

torch::Library& torch_library() {
  static auto* const lib = new torch::Library(torch::Library::FRAGMENT, kNamespace, std::nullopt, __FILE__, __LINE__);
  return *lib;
}

template <class F>
void impl(const std::string& name, c10::DispatchKey key, F&& kernel) {
  torch_library().impl(name.c_str(), torch::dispatch(key, torch::CppFunction(std::forward<F>(kernel))));
}

// The devices, each with the keys under which the dispatcher looks for its kernels: one sparse tensor in a list makes
// it look for a sparse kernel, which is the same one and says what is wrong.
struct Device {
  const Backend& backend;
  std::array<c10::DispatchKey, 3> keys;
};

const std::vector<Device>& devices() {
  using Key = c10::DispatchKey;
  static const std::vector<Device> all{
#ifdef HX_EMULATE_CUDA
      {cuda_backend, {Key::CPU, Key::SparseCPU, Key::SparseCsrCPU}},
#else
      {cpu_backend, {Key::CPU, Key::SparseCPU, Key::SparseCsrCPU}},
#endif
#ifdef HX_WITH_CUDA
      {cuda_backend, {Key::CUDA, Key::SparseCUDA, Key::SparseCsrCUDA}},
#endif
  };
  return all;
}

// Registers make(backend) for every device.
template <class F>
void impl_devices(const std::string& name, F&& make) {
  for (const Device& device : devices())
    for (c10::DispatchKey key : device.keys) impl(name, key, make(device.backend));
}

// Registers make(&backend) for every device, and make(nullptr), which checks and allocates, as the Meta kernel.
template <class F>
void impl_devices_and_meta(const std::string& name, F&& make) {
  impl_devices(name, [&](const Backend& backend) { return make(&backend); });
  impl(name, c10::DispatchKey::Meta, make(nullptr));
}

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const std::string& name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string(kNamespace) + "::" + name).c_str(), "")
      .typed<Signature>();
}

// Writes through raw pointers do not show: an ADInplaceOrView kernel that tells autograd of them, in those of the
// operator's arguments that `written` has as bits.
template <class... Arguments>
auto bumping(const c10::TypedOperatorHandle<void(Arguments...)>& op, unsigned written) {
  return [=](Arguments... arguments) {
    {
      at::AutoDispatchBelowADInplaceOrView below;
      op.call(arguments...);
    }
    unsigned rest = written;
    const auto bump = [&](const auto& argument) {
      if constexpr (std::is_same_v<std::decay_t<decltype(argument)>, TensorList>)
        for (const Tensor& t : (rest & 1) != 0 ? argument : TensorList()) t.unsafeGetTensorImpl()->bump_version();
      rest >>= 1;
    };
    (bump(arguments), ...);
  };
}

// The arguments of a pass as its operators take them, with some more before the last.
template <class Result, class... More>
using OfPass = Result(TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, const Tensor&,
                      at::IntArrayRef, std::int64_t, double, double, double, More..., const std::optional<Tensor>&);

// A kernel with these arguments, from a function of a Pass.
template <class... More, class F>
auto of_pass(F f) {
  return [f](TensorList params, TensorList grads, TensorList state, TensorList record, TensorList steps,
             TensorList ticks, const Tensor& tower, at::IntArrayRef rows, std::int64_t learn, double horizon,
             double horizon_growth, double scale, More... more, const std::optional<Tensor>& grad_scale) {
    TORCH_CHECK_VALUE(learn >= 0 && learn >> kMaxHypers == 0, "learn must be a set of hyperparameters, not ", learn);
    return f(Pass{params, grads, state, record, steps, ticks, tower, rows, Mask(learn), horizon, horizon_growth, scale,
                  grad_scale},
             more...);
  };
}

using TowerOp = void(TensorList, TensorList, TensorList, TensorList, TensorList, at::IntArrayRef);
using Update = std::vector<Tensor>(TensorList, TensorList, TensorList, TensorList, const Tensor&, bool);
using Backward = Tensor(TensorList, TensorList, TensorList, TensorList, TensorList, const Tensor&);
using Vjp = std::vector<Tensor>(TensorList, TensorList, TensorList, TensorList, TensorList, TensorList, const Tensor&,
                                std::int64_t);

// `slots` lists of tensors that are like the parameters, in their type or, if `wide`, in that of their state.
void check_like(const char* name, TensorList tensors, std::size_t slots, TensorList params, bool wide = false) {
  const std::size_t n = params.size();
  TORCH_CHECK_VALUE(tensors.size() == n * slots, name, " must have the length ", n * slots, ", ", slots,
                    " for each of the params, not ", tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Tensor &param = params[i % n], &t = tensors[i];
    const at::ScalarType type = wide ? arithmetic(param.scalar_type()) : param.scalar_type();
    const c10::SymIntArrayRef sizes = param.sym_sizes();  // a graph of dynamic shapes stays one
    TORCH_CHECK_VALUE(t.layout() == at::kStrided && t.scalar_type() == type && t.sym_sizes() == sizes, name,
                      " of params[", i % n, "] must be a dense ", type, " tensor of shape ", sizes);
    TORCH_CHECK_VALUE(t.device() == params[0].device(), name, " of params[", i % n, "] is on ", t.device(),
                      ", but params[0] is on ", params[0].device());
  }
}

// The inputs of a step in the functional form.
void check_inputs(const Rule& rule, TensorList params, TensorList grads, TensorList state, TensorList hyper,
                  const Tensor& step) {
  TORCH_CHECK_VALUE(hyper.size() == rule.hypers.size(), "hyper must hold the ", rule.hypers.size(),
                    " hyperparameters of rule '", rule.name, "', not ", hyper.size());
  // One tensor of the meta device alone would call the Meta kernel, which computes nothing.
  const auto fits = [&](const Tensor& t) {
    return t.numel() == 1 && (params.empty() || t.is_meta() == params[0].is_meta());
  };
  TORCH_CHECK_VALUE(fits(step), "step must be a tensor of one number that has a value");
  for (std::size_t i = 0; i < hyper.size(); ++i)
    TORCH_CHECK_VALUE(fits(hyper[i]) && hyper[i].is_floating_point(), "hyper: ", rule.hypers[i].name,
                      " must be a tensor of one floating-point number that has a value");
  for (std::size_t i = 0; i < params.size(); ++i) {
    const at::ScalarType type = params[i].scalar_type();
    TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, "params[",
                     i, "] must be float32, float64, float16 or bfloat16, not ", type);
  }
  check_like("value", params, 1, params);
  check_like("grads", grads, 1, params);
  check_like("state", state, rule.state.size(), params, true);
}

// What must hold of the arguments of tower_ and cap_ even where they have no memory: one tensor of the meta device would
// make the operator do nothing.
void check_tower_devices(TensorList towers, const char* name, TensorList sums, TensorList plans, TensorList bounds,
                         TensorList settings) {
  const std::pair<const char*, TensorList> lists[] = {
      {"towers", towers}, {name, sums}, {"plans", plans}, {"bounds", bounds}, {"settings", settings}};
  for (const auto& [list, tensors] : lists) {
    TORCH_CHECK_VALUE(tensors.size() == towers.size(), list, " must hold one tensor for each of the ", towers.size(),
                      " towers");
    for (std::size_t i = 0; i < tensors.size(); ++i)
      TORCH_CHECK_VALUE(tensors[i].device() == towers[0].device(), list, "[", i, "] is on ", tensors[i].device(),
                        ", but the first tower is on ", towers[0].device());
  }
}

// The arguments of tower_ and cap_, whose `sums` have a certain number of columns for a first rule with `hypers`
// hyperparameters. What a plan says is checked where the host can read it.
template <class F>
std::vector<TowerView> check_towers(TensorList towers, const char* name, TensorList sums, F&& columns_for,
                                    TensorList plans, TensorList bounds, TensorList settings) {
  check_tower_devices(towers, name, sums, plans, bounds, settings);
  std::vector<TowerView> views;
  for (std::size_t i = 0; i < towers.size(); ++i) {
    const auto matrix = [&](const char* name, const Tensor& t, at::ScalarType type, std::int64_t rows,
                            std::int64_t columns) {
      TORCH_CHECK_VALUE(
          t.dim() == 2 && t.is_contiguous() && t.scalar_type() == type && t.size(0) == rows && t.size(1) == columns,
          name, "[", i, "] must be a contiguous ", type, " tensor [", rows, ", ", columns, "]");
    };
    const Tensor &tower = towers[i], &plan = plans[i];
    TORCH_CHECK_VALUE(tower.dim() == 2 && tower.size(0) > 0, "towers[", i, "] must be a matrix with a row or more");
    TORCH_CHECK_VALUE(plan.dim() == 2 && plan.size(0) > 0, "plans[", i, "] must hold a row for each level");
    const std::int64_t levels = plan.size(0), rows = tower.size(0);
    std::int64_t width = tower.size(1), hypers = bounds[i].numel() / 2, base = (sums[i].numel() / rows - 1) / 2;
    matrix("plans", plan, at::kLong, levels, kPlanColumns);
    const std::int64_t* columns = plan.const_data_ptr<std::int64_t>();
    if (plan.is_cpu()) {
      TORCH_CHECK_VALUE(is_plan(columns, int(levels)), "plans[", i, "] is not a plan of rules that are loaded");
      const std::int64_t* const last = columns + (levels - 1) * kPlanColumns;
      width = tower_width(columns, int(levels)), hypers = last[kBounds] + last[kHypers], base = columns[kHypers];
    }
    matrix("towers", tower, at::kDouble, rows, width);
    matrix(name, sums[i], at::kDouble, rows, columns_for(base));
    matrix("bounds", bounds[i], at::kDouble, hypers, 2);
    matrix("settings", settings[i], at::kDouble, levels, kSettings);
    views.push_back({tower.mutable_data_ptr<double>(), rows, width, columns, bounds[i].const_data_ptr<double>(),
                     settings[i].const_data_ptr<double>(), int(levels), sums[i].const_data_ptr<double>(), nullptr});
  }
  return views;
}

// The values of the functional form in one tensor, on the device of the parameters.
Tensor values_of(TensorList tensors, const Tensor& like) {
  const at::TensorOptions options = like.options().dtype(at::kDouble);
  if (like.is_cpu()) {
    Tensor values = at::empty({std::int64_t(tensors.size())}, options);
    for (std::size_t i = 0; i < tensors.size(); ++i)
      values.mutable_data_ptr<double>()[i] = tensors[i].item().toDouble();
    return values;
  }
  std::vector<Tensor> values;
  for (const Tensor& t : tensors) values.push_back(t.reshape({}).to(options));
  return at::stack(values);
}

Inputs inputs_of(TensorList params, TensorList grads, TensorList state, TensorList hyper, const Tensor& step) {
  return {params, grads, state, values_of(hyper, params[0]), values_of(step, params[0])};
}

// d loss / d hyper before it is known: zeros, on the device of the parameters.
Tensor new_sums(TensorList params, TensorList hyper) {
  return at::zeros({std::int64_t(hyper.size())}, (params.empty() ? hyper : params)[0].options().dtype(at::kDouble));
}

// What R_vjp returns, not yet filled: a tensor for each parameter, gradient and state, and one for the hyperparameters.
// `needs` has a bit for the parameters, one for the gradients and one for each state; without it, these tensors are
// empty.
std::vector<Tensor> new_vjp(const Rule& rule, TensorList params, TensorList hyper, std::int64_t needs) {
  std::vector<Tensor> outputs;
  for (std::size_t k = 0; k < 2 + rule.state.size(); ++k)
    for (const Tensor& p : params) {
      const at::TensorOptions options = p.options().dtype(arithmetic(p.scalar_type()));
      outputs.push_back(needs & bit(int(k)) ? at::empty_like(p, options) : at::empty({0}, options));
    }
  outputs.push_back(new_sums(params, hyper));
  return outputs;
}

// R as an autograd function. With `detach` its detach points are the paper's: parameters, gradients and state are
// constants, the new state is not differentiated, and a backward reaches the hyperparameters alone.
struct UpdateFunction : torch::autograd::Function<UpdateFunction> {
  static constexpr bool is_traceable = true;  // without it, compiled autograd breaks the graph here

  static variable_list forward(torch::autograd::AutogradContext* ctx, TensorList params, TensorList grads,
                               TensorList state, TensorList hyper, const Tensor& step, bool detach,
                               const std::string& rule, variable_list* constant_outputs) {
    at::AutoDispatchBelowADInplaceOrView below;
    variable_list outputs = op<Update>(rule).call(params, grads, state, hyper, step, detach);
    variable_list inputs;
    for (TensorList list : {params, grads, state, hyper}) inputs.insert(inputs.end(), list.begin(), list.end());
    inputs.push_back(step);
    ctx->save_for_backward(inputs);
    ctx->saved_data["rule"] = rule;
    ctx->saved_data["detach"] = detach;
    ctx->saved_data["params"] = std::int64_t(params.size());
    ctx->saved_data["hypers"] = std::int64_t(hyper.size());
    if (detach) {  // not by mark_non_differentiable, which compiled autograd does not take
      constant_outputs->assign(outputs.begin() + std::ptrdiff_t(params.size()), outputs.end());
      outputs.resize(params.size());
    }
    return outputs;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grad_outputs) {
    const variable_list inputs = ctx->get_saved_variables();
    const std::string rule = ctx->saved_data["rule"].toStringRef();
    const bool detach = ctx->saved_data["detach"].toBool();
    const std::size_t n = std::size_t(ctx->saved_data["params"].toInt());
    const std::size_t hypers = std::size_t(ctx->saved_data["hypers"].toInt());
    const std::size_t states = inputs.size() - 1 - 2 * n - hypers;
    const TensorList all(inputs);
    const TensorList params = all.slice(0, n), grads = all.slice(n, n), state = all.slice(2 * n, states),
                     hyper = all.slice(2 * n + states, hypers);
    const auto upstream = [&](std::size_t output, const Tensor& like) {
      const Tensor& grad = grad_outputs[output];
      return grad.defined() ? grad.to(like.scalar_type()) : at::zeros_like(like);
    };
    variable_list grad_params, grad_state;
    for (std::size_t i = 0; i < n; ++i) grad_params.push_back(upstream(i, params[i]));
    variable_list result(inputs.size() + 3);  // three for what follows `step`
    Tensor sums;
    if (detach) {
      sums = op<Backward>(rule + "_backward").call(grad_params, params, grads, state, hyper, all.back());
    } else {
      for (std::size_t i = 0; i < states; ++i) grad_state.push_back(upstream(n + i, state[i]));
      std::int64_t needs = 0;
      for (std::size_t i = 0; i < 2 * n + states; ++i)
        if (ctx->needs_input_grad(i)) needs |= bit(int(i / n));
      const variable_list pulled =
          op<Vjp>(rule + "_vjp").call(grad_params, grad_state, params, grads, state, hyper, all.back(), needs);
      for (std::size_t i = 0; i < 2 * n + states; ++i)
        if (needs & bit(int(i / n))) result[i] = pulled[i].to(inputs[i].scalar_type());
      sums = pulled.back();
    }
    for (std::size_t i = 0; i < hypers; ++i)
      result[2 * n + states + i] = sums.select(0, std::int64_t(i)).to(hyper[i].options()).view_as(hyper[i]);
    return result;
  }
};

void define(const std::string& schema) {
  torch_library().def(schema.c_str(), {at::Tag::pt2_compliant_tag});
}

void not_differentiable(const std::string& name) {
  torch_library().impl(name.c_str(),
                       torch::dispatch(c10::DispatchKey::Autograd, torch::autograd::autogradNotImplementedFallback()));
}

// The lists of a pass, as bits: its first arguments.
enum List : unsigned { kParamList = 1, kGradList = 2, kStateList = 4, kRecordList = 8, kStepList = 16, kTickList = 32 };

// The schema of a pass that writes to some of its lists, and takes `more` before the last argument.
std::string pass_schema(const std::string& name, unsigned written, const std::string& more) {
  std::string lists;
  char alias = 'a';
  for (const char* list : {"params", "grads", "state", "record", "steps", "ticks"}) {
    lists += ((written & 1) != 0 ? std::string("Tensor(") + alias++ + "!)[] " : "Tensor[] ") + list + ", ";
    written >>= 1;
  }
  return name + "(" + lists + "Tensor tower, int[] rows, int learn, float horizon, float horizon_growth, float scale" +
         more + ", Tensor? grad_scale=None)";
}

// An operator that reads a pass and gives a matrix with a row for each row of the tower.
template <class... More>
void define_reading(const Rule& rule, const std::string& suffix, const std::string& more, std::size_t columns,
                    Tensor (*Backend::*run)(const Rule&, const Pass&, More...)) {
  const std::string name = rule.name + suffix;
  define(pass_schema(name, 0, more) + " -> Tensor");
  impl_devices(name, [&](const Backend& device) {
    return of_pass<More...>([&rule, &device, run](const Pass& pass, More... arguments) {
      check(rule, pass);
      return (device.*run)(rule, pass, arguments...);
    });
  });
  impl(name, c10::DispatchKey::Meta, of_pass<More...>([columns](const Pass& pass, More...) {
         check_devices(pass);
         return at::empty_symint({pass.tower.sym_size(0), std::int64_t(columns)}, pass.tower.options());
       }));
  not_differentiable(name);
}

// An operator that writes to these lists of a pass.
void define_writing(const Rule& rule, const std::string& suffix, unsigned written,
                    void (*Backend::*run)(const Rule&, const Pass&)) {
  const std::string name = rule.name + suffix;
  define(pass_schema(name, written, "") + " -> ()");
  impl_devices(name, [&](const Backend& device) {
    return of_pass([&rule, &device, run](const Pass& pass) {
      check(rule, pass);
      (device.*run)(rule, pass);
    });
  });
  impl(name, c10::DispatchKey::ADInplaceOrView, bumping(op<OfPass<void>>(name), written));
  impl(name, c10::DispatchKey::Meta, of_pass([](const Pass& pass) { check_devices(pass); }));
}

void define_check(const Rule& rule) {
  const std::string name = std::string(rule.name) + "_check";
  define(pass_schema(name, 0, "") + " -> ()");
  impl_devices(name, [&rule](const Backend&) { return of_pass([&rule](const Pass& pass) { check(rule, pass); }); });
  impl(name, c10::DispatchKey::Meta, of_pass([](const Pass& pass) { check_devices(pass); }));
}

// R, the functional form.
void define_update(const Rule& rule) {
  const std::string name = rule.name;
  define(name +
         "(Tensor[] params, Tensor[] grads, Tensor[] state, Tensor[] hyper, Tensor step, bool detach) -> Tensor[]");
  impl_devices_and_meta(name, [&rule](const Backend* device) {
    return [&rule, device](TensorList params, TensorList grads, TensorList state, TensorList hyper, const Tensor& step,
                           bool) {
      check_inputs(rule, params, grads, state, hyper, step);
      std::vector<Tensor> outputs;
      for (TensorList list : {params, state})
        for (const Tensor& t : list) outputs.push_back(at::empty_like(t));
      if (device != nullptr && !params.empty())
        device->update(rule, inputs_of(params, grads, state, hyper, step), outputs);
      return outputs;
    };
  });
  impl(
      name, c10::DispatchKey::Autograd,
      [name](TensorList params, TensorList grads, TensorList state, TensorList hyper, const Tensor& step, bool detach) {
        if (!detach) return UpdateFunction::apply(params, grads, state, hyper, step, detach, name, nullptr);
        // No edge where no gradient goes: compiled autograd takes none that is undefined.
        const auto constants = [](TensorList list) {
          variable_list result(list.begin(), list.end());
          for (Tensor& t : result)
            if (t.requires_grad()) t = t.detach();
          return result;
        };
        const variable_list p = constants(params), g = constants(grads), s = constants(state);
        variable_list new_state;
        variable_list outputs =
            UpdateFunction::apply(TensorList(p), TensorList(g), TensorList(s), hyper, step, detach, name, &new_state);
        outputs.insert(outputs.end(), new_state.begin(), new_state.end());
        return outputs;
      });
}

// Its backward, where only the hyperparameters want a gradient.
void define_backward(const Rule& rule) {
  const std::string name = std::string(rule.name) + "_backward";
  define(name +
         "(Tensor[] grad_params, Tensor[] params, Tensor[] grads, Tensor[] state, Tensor[] hyper, Tensor step) "
         "-> Tensor");
  impl_devices_and_meta(name, [&rule](const Backend* device) {
    return [&rule, device](TensorList grad_params, TensorList params, TensorList grads, TensorList state,
                           TensorList hyper, const Tensor& step) {
      check_inputs(rule, params, grads, state, hyper, step);
      check_like("grad_params", grad_params, 1, params);
      Tensor sums = new_sums(params, hyper);
      if (device != nullptr && !params.empty())
        device->backward(rule, grad_params, inputs_of(params, grads, state, hyper, step), sums);
      return sums;
    };
  });
  not_differentiable(name);
}

// Its backward to all inputs.
void define_vjp(const Rule& rule) {
  const std::string name = std::string(rule.name) + "_vjp";
  define(name +
         "(Tensor[] grad_params, Tensor[] grad_state, Tensor[] params, Tensor[] grads, Tensor[] state, "
         "Tensor[] hyper, Tensor step, int needs=-1) -> Tensor[]");
  impl_devices_and_meta(name, [&rule](const Backend* device) {
    return [&rule, device](TensorList grad_params, TensorList grad_state, TensorList params, TensorList grads,
                           TensorList state, TensorList hyper, const Tensor& step, std::int64_t needs) {
      check_inputs(rule, params, grads, state, hyper, step);
      check_like("grad_params", grad_params, 1, params);
      check_like("grad_state", grad_state, rule.state.size(), params, true);
      std::vector<Tensor> outputs = new_vjp(rule, params, hyper, needs);
      if (device != nullptr && !params.empty())
        device->vjp(rule, grad_params, grad_state, inputs_of(params, grads, state, hyper, step),
                    TensorList(outputs).slice(0, outputs.size() - 1), outputs.back());
      return outputs;
    };
  });
  not_differentiable(name);
}

}  // namespace

bool is_defined(const std::string& rule) {
  for (const char* suffix : {"", "_hypergradient", "_norms", "_step_", "_settle_", "_check", "_backward", "_vjp"})
    if (c10::Dispatcher::singleton().findSchema({std::string(kNamespace) + "::" + rule + suffix, ""}).has_value())
      return true;
  return false;
}

void define_ops(const Rule& rule) {
  define_reading(rule, "_hypergradient", ", bool norm, bool squares", 2 * rule.hypers.size() + 1,
                 &Backend::hypergradient);
  define_reading(rule, "_norms", "", 3, &Backend::norms);
  define_writing(rule, "_step_", kParamList | kStateList | kRecordList | kStepList | kTickList, &Backend::step);
  define_writing(rule, "_settle_", kStateList | kRecordList | kTickList, &Backend::settle);
  define_check(rule);
  define_update(rule);
  define_backward(rule);
  define_vjp(rule);
}

void define_tower_ops() {
  using Views = std::vector<TowerView>;
  const auto define_op = [](const std::string& name, const std::string& sums, auto columns, auto run) {
    define(name + "(Tensor(a!)[] towers, Tensor[] " + sums +
           ", Tensor[] plans, Tensor[] bounds, Tensor[] settings, int[] foreign=[]) -> ()");
    impl_devices(name, [=](const Backend& device) {
      return [=, &device](TensorList towers, TensorList of, TensorList plans, TensorList bounds, TensorList settings,
                          at::IntArrayRef foreign) {
        run(device, towers, check_towers(towers, sums.c_str(), of, columns, plans, bounds, settings), foreign);
      };
    });
    impl(name, c10::DispatchKey::ADInplaceOrView, bumping(op<TowerOp>(name), 1));
    impl(name, c10::DispatchKey::Meta,
         [sums](TensorList towers, TensorList of, TensorList plans, TensorList bounds, TensorList settings,
                at::IntArrayRef) { check_tower_devices(towers, sums.c_str(), of, plans, bounds, settings); });
  };
  define_op(
      "tower_", "hypergradients", [](std::int64_t hypers) { return 2 * hypers + 1; },
      [](const Backend& device, TensorList towers, const Views& views, at::IntArrayRef foreign) {
        device.tower(towers, views, foreign);
      });
  define_op(
      "cap_", "norms", [](std::int64_t) { return std::int64_t(3); },
      [](const Backend& device, TensorList towers, const Views& views, at::IntArrayRef) { device.cap(towers, views); });
}

}  // namespace hyperopt_ext
