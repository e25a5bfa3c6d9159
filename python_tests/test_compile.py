"""torch.compile takes the optimizer, and a whole training step, as one graph that never changes."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, level_of
from problems import Regression, relative_error
from torch._dynamo.utils import counters

import hyperopt_ext as hx

STEPS = 100
TALL = hx.Stack.of(hx.Adam(lr=1e-4), height=9)
STACKS = {
    **{f"{case}": level_of(case.rule, case.hyper) / hx.SGD(lr=1e-6) for case in CASES},
    **{f"height {height}": hx.Stack(TALL.levels[: height + 1]) for height in (0, 1, 2, 4, 8)},
    "traced, capped": hx.Adam(learn="lr", normalize=True, horizon=(10, 0.1), trust=0.01) / hx.SGD(lr=0.1),
    "tensors": hx.Adam(granularity="tensor", horizon=3) / hx.Adam(lr=1e-4) / hx.SGD(lr=1e-6),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def assert_one_graph():
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def assert_same(a, b, optimizers):
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert relative_error(p.detach(), q.detach()) <= 1e-12
    for x, y in zip(*(opt.hyperparameters() for opt in optimizers), strict=True):
        for name in x:
            assert relative_error(x[name], y[name]) <= 1e-12


def train(problem, opt, step, steps=STEPS):
    for i in range(steps):
        opt.zero_grad()
        problem.loss(i).backward()
        step()


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_the_optimizer_is_one_graph(stack):
    eager, compiled = Regression(STEPS), Regression(STEPS)
    optimizers = [hx.HyperOptimizer(problem.model.parameters(), stack) for problem in (eager, compiled)]
    train(eager, optimizers[0], optimizers[0].step)
    train(compiled, optimizers[1], torch.compile(optimizers[1].step, fullgraph=True))
    assert_one_graph()
    assert_same(eager, compiled, optimizers)


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
    assert_same(eager, compiled, optimizers)


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
    assert_same(problem, other, [opt, resumed])


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
    assert_same(scaled, plain, optimizers)


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
    assert_same(eager, compiled, optimizers)
    assert optimizers[0].in_use()[0]["lr"] != optimizers[0].hyperparameters()[0]["lr"]


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


# Last: after it, dynamo of torch 2.13 takes a None that a function returns for a gradient of this one.
@pytest.mark.parametrize("way", ["backward", "grad"])
@pytest.mark.parametrize(
    "stack", [STACKS["adam"], STACKS["height 8"], STACKS["traced, capped"]], ids=["adam", "height 8", "traced"]
)
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_whole_training_step_is_one_graph(stack, way):
    eager, compiled = Regression(STEPS), Regression(STEPS)
    optimizers = [hx.HyperOptimizer(problem.model.parameters(), stack) for problem in (eager, compiled)]

    def step_of(problem, opt):
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

    steps = [step_of(eager, optimizers[0]), torch.compile(step_of(compiled, optimizers[1]), fullgraph=True)]
    for i in range(STEPS):
        losses = [step(eager.x[i], eager.y[i]) for step in steps]
        assert relative_error(losses[1], losses[0]) < 1e-10
    assert_one_graph()
    assert_same(eager, compiled, optimizers)
