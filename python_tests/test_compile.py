"""torch.compile takes the optimizer, a whole training step and the functional form as one graph that never changes.

Whole tables go through the backends ``eager`` (tracing alone) and ``aot_eager`` (functionalisation and derivatives,
too): of the default backend they lack only code generation. That has its own, fewer, tests.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES
from problems import Regression, relative_error
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch._dynamo.variables import constant
from torch.func import functional_call

import hyperopt_ext as hx
from hyperopt_ext.stack import RULES
from hyperopt_ext.testing.checks import (
    assert_compiled_equals_eager,
    assert_one_graph,
    the_optimizer_is_one_graph,
)

STEPS = 100
TALL = hx.Stack.of(hx.Adam(lr=1e-4), height=9)
STACKS = {
    **{f"{case}": case.level() / hx.SGD(lr=1e-6) for case in CASES},
    **{f"height {height}": hx.Stack(TALL.levels[: height + 1]) for height in range(9)},
    "traced, capped": hx.Adam(learn="lr", normalize=True, horizon=(10, 0.1), trust=0.01) / hx.SGD(lr=0.1),
    "tensors": hx.Adam(granularity="tensor", horizon=3) / hx.Adam(lr=1e-4) / hx.SGD(lr=1e-6),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    compiled_autograd.reset()
    counters.clear()
    # Where p.grad = None comes before a backward in one graph, dynamo of torch 2.13 marks its one constant None as that
    # gradient, and every function compiled later returns it for None. No reset undoes that.
    constant.CONSTANT_VARIABLE_NONE.source = None


def train(problem, opt, step, steps=STEPS):
    for i in range(steps):
        opt.zero_grad()
        problem.loss(i).backward()
        step()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_the_optimizer_is_one_graph(stack, dynamic):
    the_optimizer_is_one_graph(stack, dynamic=dynamic, backend="eager")


@pytest.mark.parametrize("name", ["adam", "lion", "height 0", "height 8", "traced, capped", "tensors"])
def test_the_optimizer_is_one_graph_of_the_default_backend(name):
    the_optimizer_is_one_graph(STACKS[name])


def test_the_compiled_optimizer_equals_eager_mode_in_fp32():
    the_optimizer_is_one_graph(STACKS["adam"], dtype=torch.float32)


@pytest.mark.parametrize("dynamic", [False, True])
def test_groups_schedules_and_writes_do_not_recompile(dynamic):
    eager, compiled = Regression(STEPS), Regression(STEPS)
    optimizers = []
    for problem in (eager, compiled):
        groups = [
            {"params": problem.model[0].parameters(), "lr": 1e-2},
            {"params": problem.model[2].parameters(), "stack": hx.SGD(momentum=0.9) / hx.Adam(lr=1e-5)},
        ]
        opt = hx.HyperOptimizer(groups, hx.Adam() / hx.SGD(lr=1e-5) / hx.SGD(lr=1e-7))
        optimizers.append(opt)
        step = torch.compile(opt.step, fullgraph=True, dynamic=dynamic) if problem is compiled else opt.step
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.99)
        for i in range(STEPS):
            train(problem, opt, step, steps=1)
            schedule.step()
            opt.hyperparameters()[0]["beta1"].fill_(0.5 + i / 1000)
    assert_one_graph()
    assert_compiled_equals_eager(eager, compiled, optimizers)


def test_a_compiled_optimizer_that_was_loaded_or_copied():
    problem = Regression(20)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACKS["adam"])
    train(problem, opt, torch.compile(opt.step, fullgraph=True), 10)
    other = Regression(20)
    other.model.load_state_dict(problem.model.state_dict())
    resumed = hx.HyperOptimizer(other.model.parameters(), STACKS["adam"])
    resumed.load_state_dict(opt.state_dict())
    train(other, resumed, torch.compile(resumed.step, fullgraph=True), 10)
    train(problem, opt, opt.step, 10)
    assert_compiled_equals_eager(problem, other, [opt, resumed])


def test_a_grad_scaler_is_the_same_graph():
    """Scales that change and steps that are skipped."""
    scaled, plain = Regression(20), Regression(20)
    optimizers = [hx.HyperOptimizer(problem.model.parameters(), STACKS["adam"]) for problem in (scaled, plain)]
    optimizers[0].step = torch.compile(optimizers[0].step, fullgraph=True)  # what GradScaler.step() calls
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for i in [0, 1, 2, -1, *range(3, 20)]:
        optimizers[0].zero_grad()
        scaler.scale(scaled.loss(i) * (float("inf") if i < 0 else 1.0)).backward()
        scaler.step(optimizers[0])
        scaler.update()
        if i >= 0:
            plain.train(optimizers[1], range(i, i + 1))
    assert_one_graph()
    assert optimizers[0].skipped_steps() == 1
    assert_compiled_equals_eager(scaled, plain, optimizers)


def test_a_scheduler_of_a_learned_lr_is_the_same_graph():
    eager, compiled = Regression(20), Regression(20)
    optimizers = [hx.HyperOptimizer(problem.model.parameters(), STACKS["height 1"]) for problem in (eager, compiled)]
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, fullgraph=True)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 5, 2) for opt in optimizers]
    for _ in range(20):
        for problem, opt, step, schedule in zip((eager, compiled), optimizers, steps, schedules, strict=True):
            train(problem, opt, step, steps=1)
            schedule.step()
    assert_one_graph()
    assert_compiled_equals_eager(eager, compiled, optimizers)
    assert optimizers[0].in_use()[0]["lr"] != optimizers[0].hyperparameters()[0]["lr"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_assignments_reach_a_compiled_step(backend):
    problems, optimizers = [Regression(20) for _ in range(2)], []
    for problem in problems:
        groups = [
            {"params": problem.model[0].parameters(), "stack": hx.SGD(lr=0.1)},
            {"params": problem.model[2].parameters()},
        ]
        optimizers.append(hx.HyperOptimizer(groups, hx.Adam(lr=1e-2) / hx.SGD(lr=1e-5)))
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, fullgraph=True, backend=backend)]
    for i, value in enumerate([None, 0.05, torch.tensor(0.02), None]):
        for problem, opt, step in zip(problems, optimizers, steps, strict=True):
            if value is not None:
                opt.param_groups[0]["lr"] = value
                opt.param_groups[1]["betas"] = (0.5 + i / 10, 0.99)
            train(problem, opt, step, steps=3)
    assert_compiled_equals_eager(*problems, optimizers)
    assert abs(optimizers[1].hyperparameters(1)[0]["beta1"].item() - 0.7) < 1e-3


@pytest.mark.parametrize("stack", [hx.SGD(lr=0.1, momentum=0.9) / hx.SGD(lr=1e-6), hx.Adam() / hx.SGD()], ids=str)
def test_a_schedule_of_the_momentum_does_not_recompile(stack):
    problems = [Regression(30) for _ in range(2)]
    optimizers = [hx.HyperOptimizer(problem.model.parameters(), stack) for problem in problems]
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, fullgraph=True)]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(opt, 0.05, total_steps=30) for opt in optimizers]
    for _ in range(29):
        for problem, opt, step, schedule in zip(problems, optimizers, steps, schedules, strict=True):
            train(problem, opt, step, steps=1)
            schedule.step()
    assert_compiled_equals_eager(*problems, optimizers)


def test_a_recorder_in_a_compiled_step_with_graph_breaks():
    problem = Regression(5)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACKS["adam"])
    recorder = hx.Recorder(opt)
    train(problem, opt, torch.compile(opt.step, backend="aot_eager"), steps=3)
    assert len(recorder) == 3
    assert recorder.hyperparameters()[0]["lr"][-1] == opt.hyperparameters()[0]["lr"]


def test_a_compiled_step_cannot_raise_for_a_value():
    problem = Regression(1)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam() / hx.SGD())
    problem.loss(0).backward()
    step = torch.compile(opt.step, fullgraph=True, backend="eager")
    step()
    opt.param_groups[0]["nonfinite"] = "raise"
    with pytest.raises(Exception, match="nonfinite='raise' has to read values"):
        step()


def test_what_a_compiled_step_did_is_recorded_beside_it():
    problem = Regression(5)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACKS["adam"])
    recorder = hx.Recorder(opt, hook=False)
    step = torch.compile(opt.step, fullgraph=True, backend="eager")
    for _ in range(5):
        train(problem, opt, step, steps=1)
        recorder.record()
        assert recorder.hyperparameters()[0]["lr"][-1] == opt.hyperparameters()[0]["lr"]
    hx.Recorder(opt)
    with pytest.raises(Exception, match="a compiled step cannot be recorded"):
        torch.compile(opt.step, fullgraph=True, backend="eager")()


def test_a_wrapped_optimizer_is_not_compiled():
    problem = Regression(1)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Wrap(torch.optim.SGD) / hx.SGD())
    problem.loss(0).backward()
    with pytest.raises(Exception, match="a wrapped optimizer is not for torch"):
        torch.compile(opt.step, fullgraph=True, backend="eager")()


def training_step(problem, opt, way):
    params = list(problem.model.parameters())

    def step(x, y):
        loss = (problem.model(x) - y).square().mean()
        if way == "grad":
            for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = g
        else:
            for p in params:
                p.grad = None
            loss.backward()
        opt.step()
        return loss.detach()

    return step


def is_one_training_step(stack, way, steps, **options):
    eager, compiled = Regression(steps), Regression(steps)
    optimizers = [hx.HyperOptimizer(problem.model.parameters(), stack) for problem in (eager, compiled)]
    functions = [
        training_step(eager, optimizers[0], way),
        torch.compile(training_step(compiled, optimizers[1], way), fullgraph=True, **options),
    ]
    for i in range(steps):
        losses = [step(eager.x[i], eager.y[i]) for step in functions]
        assert relative_error(losses[1], losses[0]) < 1e-10
    assert_one_graph()
    assert_compiled_equals_eager(eager, compiled, optimizers)


@pytest.mark.parametrize("way", ["backward", "grad"])
@pytest.mark.parametrize("name", ["adam", "height 8", "traced, capped"])
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_whole_training_step_is_one_graph(name, way):
    is_one_training_step(STACKS[name], way, STEPS)


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_whole_training_step_is_one_graph_for_every_stack(stack):
    is_one_training_step(stack, "grad", 20, backend="eager")


@torch._dynamo.config.patch(compiled_autograd=True)
def test_a_training_step_with_compiled_autograd():
    """The backward is a graph of its own then, made at the first step and never again."""
    eager, compiled = Regression(20), Regression(20)
    optimizers = [hx.HyperOptimizer(problem.model.parameters(), STACKS["adam"]) for problem in (eager, compiled)]

    def step(x, y):
        (compiled.model(x) - y).square().mean().backward()
        optimizers[1].step()

    step = torch.compile(step)
    train(eager, optimizers[0], optimizers[0].step, 20)
    for i in range(20):
        optimizers[1].zero_grad()
        step(compiled.x[i], compiled.y[i])
    assert counters["compiled_autograd"]["captures"] == 1
    assert_compiled_equals_eager(eager, compiled, optimizers)


def test_version_counters_move_in_a_compiled_step():
    problem = Regression(3)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACKS["adam"])
    step = torch.compile(opt.step, fullgraph=True)
    train(problem, opt, step, 2)
    watched = [*problem.model.parameters(), *(t for state in opt.state.values() for t in state.values())]
    before = [t._version for t in [*watched, opt.param_groups[0]["tower"]]]
    held = problem.model[2].weight.square().sum()  # keeps the weight for its backward
    step()
    after = [t._version for t in [*watched, opt.param_groups[0]["tower"]]]
    assert all(a > b for a, b in zip(after, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


def functional_step(case, detach):
    function = case.function

    def step(params, grads, state, hyper, step):
        return function(params, grads, state, hyper, step, detach=detach)

    return step


def run_functional(case, step, steps, dtype=torch.float64):
    """Parameters and hypergradients of all steps; every hyperparameter is another tensor of another value each time."""
    torch.manual_seed(0)
    params = [torch.randn(3, 2, dtype=dtype), torch.randn(4, dtype=dtype)]
    state = {name: [torch.zeros_like(p) for p in params] for name in RULES[case.rule]["state"]}
    hypergradients = []
    for t in range(1, steps + 1):
        hyper = {k: torch.tensor(v * (1 - 1e-3 * t), dtype=torch.float64) for k, v in case.hyper.items()}
        hyper = {name: value.requires_grad_() for name, value in hyper.items()}
        grads = [torch.randn_like(p) for p in params]
        kept = [t.clone() for t in [*params, *grads, *(s for slot in state.values() for s in slot)]]
        new, after = step(params, grads, state, hyper, torch.tensor(t))
        out = [*new, *(s for slot in after.values() for s in slot if s.requires_grad)]
        hypergradients += torch.autograd.grad(sum(o.square().sum() for o in out), list(hyper.values()))
        # Neither the step nor the buffers that its backward may reuse are those of the caller.
        for a, b in zip([*params, *grads, *(s for slot in state.values() for s in slot)], kept, strict=True):
            assert torch.equal(a, b)
        params = [p.detach() for p in new]
        state = {name: [s.detach() for s in slot] for name, slot in after.items()}
    return params, hypergradients


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_functional_form_is_one_graph(case, detach):
    step = functional_step(case, detach)
    expected = run_functional(case, step, 20)
    got = run_functional(case, torch.compile(step, fullgraph=True, backend="eager" if detach else "aot_eager"), 20)
    assert_one_graph()
    for a, b in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
        assert relative_error(a, b) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("detach", [True, False])
def test_the_functional_form_is_one_graph_of_the_default_backend(detach, dtype):
    case = next(case for case in CASES if case.rule == "adam")
    step = functional_step(case, detach)
    expected = run_functional(case, step, STEPS, dtype)
    got = run_functional(case, torch.compile(step, fullgraph=True), STEPS, dtype)
    assert_one_graph()
    for a, b in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
        assert relative_error(a, b) <= (1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("detach", [True, False])
def test_compiled_autograd_takes_the_backward_of_unrolled_steps(detach):
    def gradients(backward):
        torch.manual_seed(0)
        w, lr = torch.randn(5, requires_grad=True), torch.tensor(0.1, requires_grad=True)
        params, state = [w], None
        for t in range(1, 4):
            grads = [params[0].sin()]
            params, state = hx.functional.adam(params, grads, state, {"lr": lr}, torch.tensor(t), detach=detach)
        backward(params[0].sum())
        return [lr.grad] if detach else [lr.grad, w.grad]

    def compiled(loss):
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            loss.backward()

    for a, b in zip(gradients(compiled), gradients(torch.Tensor.backward), strict=True):
        assert relative_error(a, b) <= 1e-6
    assert counters["compiled_autograd"]["captures"] == 1


@pytest.mark.parametrize("detach", [True, False])
def test_the_functional_form_is_one_graph_over_shapes(detach):
    def step(w, g, lr, t):
        [new], _ = hx.functional.adam([w], [g], None, {"lr": lr}, t, detach=detach)
        return new

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 7, 9, 1000):
        for f in (step, compiled):
            lr = torch.tensor(0.1, requires_grad=True)
            f(torch.ones(n, 3), torch.ones(n, 3), lr, torch.tensor(2)).sum().backward()
            assert lr.grad.item() == pytest.approx(-n * 3 * 0.1 / 0.19 * (0.001999 / 0.001) ** 0.5, rel=1e-4)
    assert_one_graph()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam", {}),
        ("height 2", {"backend": "aot_eager"}),
        *((name, {"backend": "eager"}) for name in ("height 0", "height 4", "sgd_momentum", "adabelief_rectified")),
    ],
)
def test_a_training_step_of_a_tower_of_functions_is_one_graph(name, options):
    tower, problem = hx.functional.tower(STACKS[name]), Regression(STEPS)

    def loss_of(params, x, y):
        return (functional_call(problem.model, params, (x,)) - y).square().mean()

    def step(params, state, x, y):
        return tower.step(params, torch.func.grad(loss_of)(params, x, y), state)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, **options)):
        params, state = tower.init(dict(problem.model.named_parameters()))
        for i in range(STEPS):
            params, state = function(params, state, problem.x[i], problem.y[i])
        results.append([*params.values(), *(h for level in tower.hyperparameters(state) for h in level.values())])
    assert_one_graph()
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= 1e-12


@pytest.mark.cuda
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_training_step_in_a_cuda_graph():
    eager, compiled = Regression(STEPS), Regression(STEPS)
    for problem in (eager, compiled):
        problem.model.cuda()
        problem.x, problem.y = problem.x.cuda(), problem.y.cuda()
    optimizers = [hx.HyperOptimizer(problem.model.parameters(), STACKS["adam"]) for problem in (eager, compiled)]
    functions = [
        training_step(eager, optimizers[0], "grad"),
        torch.compile(training_step(compiled, optimizers[1], "grad"), fullgraph=True, mode="reduce-overhead"),
    ]
    for i in range(STEPS):
        for step in functions:
            torch.compiler.cudagraph_mark_step_begin()
            step(eager.x[i], eager.y[i])
    assert_one_graph()
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert_compiled_equals_eager(eager, compiled, optimizers)


def swap(opt, p):
    opt.param_groups[0]["params"][1] = p


def swap_by_a_list(opt, p):
    opt.param_groups[0]["params"] = [opt.param_groups[0]["params"][0], p]


def reorder_the_state(opt, p):
    first = next(iter(opt.state))
    opt.state[first] = opt.state.pop(first)


def replace_the_group(opt, p):
    opt.param_groups[0] = {**opt.param_groups[0], "lr": torch.tensor(0.1)}


CHANGES = {
    "a group taken out": lambda opt, p: opt.param_groups.pop(),
    "a group put in": lambda opt, p: opt.add_param_group({"params": [p], "lr": 0.1}),
    "another tensor": swap,
    "another list": swap_by_a_list,
    "another order": lambda opt, p: opt.param_groups[0]["params"].reverse(),
    "another order of the state": reorder_the_state,
    "another dict": replace_the_group,
}


@pytest.mark.parametrize(
    ("change", "granularity"),
    [
        (change, how)
        for change in CHANGES
        for how in ("group", "tensor")
        if (change, how) != ("another order", "tensor")
    ],
)
def test_a_compiled_step_heeds_what_was_changed(change, granularity):
    stack = hx.Adam(lr=0.01, granularity=granularity) / hx.SGD(lr=1e-3)
    results = []
    for compiled in (False, True):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 4, dtype=torch.float64) + i) for i in range(4)]
        opt = hx.HyperOptimizer([{"params": params[:2]}, {"params": params[2:3]}], stack)
        step = torch.compile(opt.step, backend="eager") if compiled else opt.step
        for i in range(6):
            if i == 3:
                CHANGES[change](opt, params[3])
            for k, p in enumerate(params):
                p.grad = (k + 1) * p.detach() + i
            step()
        results.append([*params, *(opt.hyperparameters()[0].values())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
