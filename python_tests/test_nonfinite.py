"""Numbers that are not finite: they do not spread."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import Regression
from stacks import STACK, every_learning_stack, same, values

import hyperopt_ext as hx
from hyperopt_ext import _C


@every_learning_stack
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing_but_a_count(stack, bad):
    problem, clean = Regression(10), Regression(10)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), stack) for p in (problem, clean))
    for i in range(10):
        if i == 5:
            before = copy.deepcopy(opt.state_dict())
            opt.zero_grad()
            (problem.loss(i) * bad).backward()
            opt.step()
            after = opt.state_dict()
            for a, b in zip(before["state"].values(), after["state"].values(), strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))
            assert (opt.skipped_steps() == 1).all()
        problem.train(opt, range(i, i + 1))
        clean.train(expected, range(i, i + 1))
    assert same(problem, clean)
    assert values(opt) == values(expected)


def test_a_non_finite_first_gradient_is_skipped_too():
    problem, clean = Regression(5), Regression(5)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), STACK) for p in (problem, clean))
    (problem.loss(0) * float("nan")).backward()
    opt.step()
    assert opt.skipped_steps() == 1
    problem.train(opt, range(5))
    clean.train(expected, range(5))
    assert same(problem, clean)
    assert values(opt) == values(expected)


@pytest.mark.parametrize("stack", [hx.Adam(), hx.Adam(learn="lr") / hx.SGD(), hx.Adam() / hx.SGD()], ids=repr)
def test_a_second_moment_that_overflows_is_as_harmless_as_in_torch(stack):
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizers = [hx.HyperOptimizer(params[:1], stack), torch.optim.Adam(params[1:])]
    for size in (1.0, 1e30, 1.0, 1.0):
        for p, opt in zip(params, optimizers, strict=True):
            p.grad = torch.full_like(p, size)
            opt.step()
    assert torch.isfinite(params[0]).all()
    assert all(torch.isfinite(value) for level in optimizers[0].hyperparameters() for value in level.values())
    if len(optimizers[0].stack) == 1:
        torch.testing.assert_close(*params)


def test_an_overflow_in_the_tower_holds_it_and_passes():
    """Once a level has run away, its hypergradient may overflow; the parameters still train, and the tower recovers."""
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    problem.train(opt, range(4))
    top = _C.tower_offsets(STACK.plan())[2][0] - 2 * len(values(opt)[2])  # where the block of level 2 starts
    opt.param_groups[0]["tower"][0, top - len(values(opt)[1])] = float("inf")  # before it: d beta2 / d lr of level 1
    before = values(opt)
    weight = problem.model[2].weight.detach().clone()
    problem.train(opt, range(4, 5))
    assert opt.held_steps() == 1
    assert opt.skipped_steps() == 0
    assert values(opt) == before
    assert not torch.equal(problem.model[2].weight, weight)
    problem.train(opt, range(5, 10))
    assert opt.held_steps() == 1
    assert values(opt) != before
