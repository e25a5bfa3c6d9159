"""torch.compile takes the optimizer, and a whole training step, as one graph that never changes."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, level_of
from problems import Regression, relative_error
from torch._dynamo.utils import counters

import hyperopt_ext as hx
from hyperopt_ext.testing import checks
from hyperopt_ext.testing.checks import assert_compiled_equals_eager, assert_one_graph

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


def train(problem, opt, step, steps=STEPS):
    for i in range(steps):
        opt.zero_grad()
        problem.loss(i).backward()
        step()


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_the_optimizer_is_one_graph(stack):
    checks.the_optimizer_is_one_graph(stack, STEPS)


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
    assert_compiled_equals_eager(eager, compiled, optimizers)
