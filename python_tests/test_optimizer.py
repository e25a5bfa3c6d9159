"""HyperOptimizer as the torch.optim.Optimizer that a training loop takes it for."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import Regression
from stacks import STACK, every_stack, same, values

import hyperopt_ext as hx


def test_it_learns():
    problem = Regression(300)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam(lr=1e-5) / hx.SGD(lr=1e-4))
    problem.train(opt, range(300))
    fixed = Regression(300)
    fixed.train(torch.optim.Adam(fixed.model.parameters(), lr=1e-5), range(300))
    assert opt.hyperparameters()[0]["lr"] > 1e-3
    assert problem.loss(0) < 0.5 * fixed.loss(0)


def test_parameters_stay_leaves_and_gradients_stay_as_they_were():
    problem = Regression(2)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    for i in range(2):
        opt.zero_grad()
        problem.loss(i).backward()
        grads = [p.grad.clone() for p in problem.model.parameters()]
        opt.step()
        for p, g in zip(problem.model.parameters(), grads, strict=True):
            assert isinstance(p, torch.nn.Parameter)
            assert p.is_leaf
            assert p.grad_fn is None
            assert torch.equal(p.grad, g)


@every_stack
def test_reused_gradient_buffers_do_not_corrupt_the_hypergradient(stack):
    a, b = Regression(20), Regression(20)
    opt = hx.HyperOptimizer(a.model.parameters(), stack)
    reuse = hx.HyperOptimizer(b.model.parameters(), stack)
    a.train(opt, range(20))
    for i in range(20):
        reuse.zero_grad(set_to_none=False)
        b.loss(i).backward()
        reuse.step()
        for p in b.model.parameters():
            p.grad.fill_(float("nan"))  # the caller's own use of the buffer
            p.grad.zero_()
    assert same(a, b)
    assert values(opt) == values(reuse)


def test_closure():
    a, b = Regression(10), Regression(10)
    opt, closed = (hx.HyperOptimizer(p.model.parameters(), STACK) for p in (a, b))
    for i in range(10):

        def closure(i=i):
            closed.zero_grad()
            loss = b.loss(i)
            loss.backward()
            return loss

        expected = a.loss(i)
        a.train(opt, range(i, i + 1))
        assert closed.step(closure) == expected
    assert same(a, b)


def test_hooks():
    problem = Regression(3)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    opt.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "extra": 1})
    opt.register_load_state_dict_pre_hook(lambda _, state_dict: {k: v for k, v in state_dict.items() if k != "extra"})
    problem.train(opt, range(1))
    assert seen == ["before", "after"]
    state_dict = opt.state_dict()
    assert state_dict["extra"] == 1
    opt.load_state_dict(state_dict)


def test_named_parameters():
    problem = Regression(3)
    opt = hx.HyperOptimizer(problem.model.named_parameters(), STACK)
    problem.train(opt, range(3))
    assert opt.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_the_default_device_does_not_matter():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with torch.device("meta"):
        opt = hx.HyperOptimizer([p], STACK)
        recorder = hx.Recorder(opt)
        opt.param_groups[0]["lr"] = 0.25
        opt.step()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.step()
        assert recorder.steps.tolist() == [1, 2]
    assert opt.hyperparameters()[0]["lr"].device == p.device
    assert bool((p < 0.6).all())


def test_a_first_step_of_an_lr_of_0_is_a_step():
    """Though torch.distributed.checkpoint lets an optimizer create its state by a step of such an lr."""
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    opt = hx.HyperOptimizer([p], hx.SGD(lr=0.1, momentum=0.9) / hx.SGD(lr=0.0))
    plain = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for lr in (0.0, 0.1, 0.1):
        p.grad, q.grad = p.detach().clone(), q.detach().clone()
        for o in (opt, plain):
            o.param_groups[0]["lr"] = torch.tensor(lr)
            o.step()
    torch.testing.assert_close(p, q)


def test_schedulers_write_through():
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam(lr=0.1, learn=()) / hx.SGD())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for i in range(3):
        problem.train(opt, range(i, i + 1))
        scheduler.step()
    assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(0.1 * 0.5**3)


@every_stack
def test_parameters_without_a_gradient_are_skipped(stack):
    """The hypergradient is that of the parameters that moved in the last step and have a gradient in this one."""
    problem = Regression(12)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    expected = Regression(12)
    separate = [
        hx.HyperOptimizer([p], stack.levels[0] if isinstance(stack, hx.Stack) else stack)
        for p in expected.model.parameters()
    ]
    idle = {3: [0], 4: [0, 1], 5: [], 8: [2, 3], 9: [2]}
    for i in range(12):
        opt.zero_grad()
        problem.loss(i).backward()
        params = list(problem.model.parameters())
        before = [p.detach().clone() for p in params]
        for j in idle.get(i, []):
            params[j].grad = None
        opt.step()
        # the same updates by optimizers that learn nothing, at the values just used
        for j, (q, other) in enumerate(zip(expected.model.parameters(), separate, strict=True)):
            q.grad = params[j].grad
            for name, value in opt.hyperparameters()[0].items():
                other.param_groups[0][name].copy_(value[j] if value.dim() else value)
            other.step()
            if j in idle.get(i, []):
                assert torch.equal(params[j], before[j])
            torch.testing.assert_close(params[j], q, rtol=1e-10, atol=1e-12)
    assert opt.state[params[0]]["step"] == 10
    assert opt.state[params[2]]["step"] == 10


def test_a_returning_parameter_adds_nothing_to_the_hypergradient():
    w, u = (torch.nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (1.0, 2.0))
    opt = hx.HyperOptimizer([w, u], hx.SGD(lr=0.1) / hx.SGD(lr=0.01))
    script = [(1.0, 10.0), (2.0, None), (3.0, 20.0), (4.0, 30.0)]
    expected, lr = [], 0.1
    previous = (None, None)
    for g in script:
        lr += 0.01 * sum(a * b for a, b in zip(previous, g, strict=True) if a is not None and b is not None)
        expected.append(lr)
        previous = g
    for g, value in zip(script, expected, strict=True):
        w.grad, u.grad = (None if x is None else torch.tensor([x], dtype=torch.float64) for x in g)
        opt.step()
        assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(value, rel=1e-14)


def test_frozen_parameters_never_move():
    problem = Regression(6)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    problem.train(opt, range(3))
    problem.loss(3).backward()
    frozen = problem.model[0].weight
    frozen.requires_grad_(False)  # with a gradient still there
    before = frozen.detach().clone()
    opt.step()
    problem.train(opt, range(4, 6))
    assert torch.equal(frozen, before)


def test_tied_weights():
    linear = torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.Sequential(linear, torch.nn.Tanh(), linear)
    opt = hx.HyperOptimizer(model.parameters(), STACK)
    assert len(opt.param_groups[0]["params"]) == 1
    for _ in range(3):
        opt.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        opt.step()
    assert model[0].weight is model[2].weight


def test_no_gradients_at_all():
    problem = Regression(1)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    opt.step()
    assert not opt.state
    assert values(opt)[0]["lr"] == 1e-2


def test_state_that_was_looked_at_and_entries_of_others_are_no_state_of_ours():
    """A read of ``opt.state[p]`` leaves an empty dict there, and wrappers (Lookahead) keep tensors of their own."""
    problem, plain = Regression(4), Regression(4)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), STACK) for p in (problem, plain))
    first, second = list(problem.model.parameters())[:2]
    assert opt.state[first] == {}
    opt.load_state_dict(opt.state_dict())
    opt.state[second]["slow"] = torch.ones(2)
    problem.train(opt, range(2))
    plain.train(expected, range(2))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(opt.state[second]["slow"], torch.ones(2))
    opt.state[first] = {}  # starts anew
    problem.train(opt, range(2, 4))
    assert opt.state[first]["step"] == 2
    assert opt.state[second]["step"] == 4


def test_frozen_parameters_may_have_any_dtype():
    frozen = torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    problem, alone = Regression(5), Regression(5)
    opt = hx.HyperOptimizer([frozen, *problem.model.parameters()], hx.Adam() / hx.SGD(lr=1e-5))
    expected = hx.HyperOptimizer(alone.model.parameters(), hx.Adam() / hx.SGD(lr=1e-5))
    problem.train(opt, range(5))
    alone.train(expected, range(5))
    assert same(problem, alone)
