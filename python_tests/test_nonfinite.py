"""Numbers that are not finite: they do not spread."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES
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


@every_learning_stack
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_non_finite_number_anywhere_is_enough(stack, dtype):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 20_000).to(dtype))
    opt = hx.HyperOptimizer([p], stack)
    for i, at in enumerate([0, 1023, 1024, 16_383, 16_384, 19_999]):
        p.grad = torch.full_like(p, 1e-3)
        opt.step()
        before = p.detach().clone()
        p.grad[at] = torch.nan
        opt.step()
        assert (opt.skipped_steps() == i + 1).all()
        assert torch.equal(p, before)


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


def steps(opt, p, gradients):
    for g in gradients:
        p.grad = torch.full_like(p, g)
        opt.step()


def test_an_update_whose_norm_overflows_is_not_made_and_leaves_the_learned_lr():
    p = torch.nn.Parameter(torch.ones(1024))
    opt = hx.auto([p], "sgd")
    steps(opt, p, [1.0] * 30)
    before, lr = p.detach().clone(), opt.hyperparameters()[0]["lr"].item()
    steps(opt, p, [4e17])  # finite, as its norm is, but not that of the update with Nesterov's momentum
    assert torch.equal(p, before)
    assert opt.hyperparameters()[0]["lr"] > lr / 2


def test_a_cosine_of_squares_that_underflow_is_0_and_none_is_above_1():
    p = torch.nn.Parameter(torch.ones(10))
    opt = hx.HyperOptimizer([p], hx.SGD(lr=0.1, normalize=True) / hx.SGD(lr=1e-3))
    steps(opt, p, [1e-24] * 5)
    assert opt.held_steps() == 0
    assert opt.hyperparameters()[0]["lr"] == 0.1
    steps(opt, p, [4.5e-23] * 5)
    assert opt.hyperparameters()[0]["lr"] <= 0.1 + 5e-3 * (1 + 1e-12)


@pytest.mark.parametrize("nonfinite", ["hold", "skip"])
@pytest.mark.parametrize("horizon", [1, 10])
def test_a_derivative_that_is_not_finite_is_forgotten(nonfinite, horizon):
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    above = hx.Adam(lr=1e-3, eps=0.0, horizon=horizon)  # its first gradient is 0, and 0 / 0 its first derivative
    opt = hx.HyperOptimizer([p], hx.SGD(lr=0.01) / above / hx.SGD(lr=1e-4), nonfinite=nonfinite)
    steps(opt, p, [1.0] * 20)
    assert opt.held_steps() + opt.skipped_steps() <= 1
    assert p.isfinite().all()


def test_a_trace_that_is_not_finite_starts_again():
    p = torch.nn.Parameter(torch.ones(4))
    opt = hx.HyperOptimizer([p], hx.SGD(lr=0.01, horizon=10) / hx.SGD(lr=1e-5))
    steps(opt, p, [1.0] * 3)
    opt.state[p]["trace_lr"].fill_(float("inf"))
    steps(opt, p, [1.0] * 10)
    assert opt.held_steps() == 1
    assert opt.state[p]["trace_lr"].isfinite().all()


def test_a_gradient_that_is_not_finite_holds_no_tower_but_its_own():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    opt = hx.HyperOptimizer(params, hx.Adam(granularity="tensor") / hx.SGD(lr=1e-3, learn="lr") / hx.SGD(lr=1e-5))
    for bad in (1.0, 1.0, float("nan"), 1.0):
        params[0].grad, params[1].grad = torch.ones_like(params[0]), torch.full_like(params[1], bad)
        opt.step()
    assert opt.skipped_steps().tolist() == [0, 1]
    assert opt.held_steps().tolist() == [0, 0]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_infinite_weight_stays_and_disturbs_no_other(case, dtype, decay):
    """As a bias that masks: it has no gradient, and no decay makes it NaN."""
    options = {**case.options[0], "lr": 0.1, "weight_decay": decay}
    if "weight_decay" not in case.names:
        options.pop("weight_decay")
    results = []
    for start in ([1.0, -0.5], [1.0, -0.5, -torch.inf, torch.inf]):
        for stack in (
            case.make(**options),
            case.make(**options) / hx.SGD(lr=1e-4),
            case.make(**options, learn="lr", space={"lr": "log"}, horizon=3, trust=0.1) / hx.SGD(lr=1e-3),
        ):
            p = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
            opt = hx.HyperOptimizer([p], stack)
            for _ in range(4):
                p.grad = torch.tensor([0.3, 0.2, 0.0, 0.0][: len(start)], dtype=dtype)
                opt.step()
            assert opt.skipped_steps() == opt.held_steps() == 0
            results.append((p.detach(), values(opt)))
    half = len(results) // 2
    for (alone, expected), (beside, got) in zip(results[:half], results[half:], strict=True):
        assert beside[2:].tolist() == [-torch.inf, torch.inf]
        torch.testing.assert_close(beside[:2], alone, rtol=1e-6, atol=1e-12)
        for a, b in zip(expected, got, strict=True):
            assert b == pytest.approx(a, rel=1e-6)


@pytest.mark.parametrize("size", [1e15, 1e17, 1e18, 1.8e19, 1e20, 3e38])
def test_weights_that_are_too_large_for_a_norm_do_not_lift_the_cap(size):
    p = torch.nn.Parameter(torch.ones(5000))
    p.data[::2] = size
    before = p.detach().double()
    opt = hx.auto([p])
    p.grad = torch.zeros(5000)
    p.grad[1::2] = 1.0
    opt.step()
    counted = before if size < 1e16 else before[1::2]
    update = (p.detach() - before)[1::2].norm()
    assert 0 < update <= 1.01 * opt.stack[0].trust * counted.norm()
    assert opt.bounded_steps()[0]["lr"] == 1


def test_the_cap_leaves_a_step_alone_that_is_nan_anyway():
    """A stack of one level does what torch.optim does."""
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt, expected = hx.HyperOptimizer([p], hx.SGD(lr=0.01, trust=0.5)), torch.optim.SGD([q], lr=0.01)
    for w, each in ((p, opt), (q, expected)):
        for bad in (1.0, torch.nan):
            w.grad = torch.tensor([bad, 1.0, 1.0])
            each.step()
    torch.testing.assert_close(p, q, equal_nan=True)


def test_a_mask_of_the_least_number_leaves_the_others():
    q = torch.nn.Parameter(torch.tensor([1.0, torch.finfo(torch.float32).min]))
    opt = hx.auto([q])
    q.grad = torch.tensor([1.0, 0.0])
    opt.step()
    assert 0.5 < q[0] < 1
