"""The values of hyperparameters: live, written to, assigned and printed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from problems import Regression
from stacks import STACK, same, values

import hyperopt_ext as hx


def test_live_values():
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    lr = opt.param_groups[0]["lr"]
    assert lr.shape == ()
    assert lr.dtype == torch.float64
    problem.train(opt, range(3))
    assert lr == opt.hyperparameters()[0]["lr"] != 1e-2
    assert [list(level) for level in opt.hyperparameters()] == [
        ["lr", "beta1", "beta2", "eps", "weight_decay"],
        ["lr", "momentum", "dampening", "weight_decay"],
        ["lr", "weight_decay"],
    ]


def test_the_next_step_starts_from_what_the_user_wrote():
    """The last update is still differentiated at the values that it used."""
    a, b = Regression(10), Regression(10)
    opt = hx.HyperOptimizer(a.model.parameters(), hx.SGD(lr=1e-2, momentum=0.5) / hx.SGD(lr=0.0))
    fixed = torch.optim.SGD(b.model.parameters(), lr=1e-2, momentum=0.5)
    for i in range(10):
        opt.param_groups[0]["lr"].fill_(0.01 * (i + 1))
        opt.hyperparameters()[0]["momentum"].fill_(0.05 * i)
        fixed.param_groups[0].update(lr=0.01 * (i + 1), momentum=0.05 * i or 1e-300)
        a.train(opt, range(i, i + 1))
        b.train(fixed, range(i, i + 1))
        for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_assigning_to_a_group_is_writing():
    problem = Regression(6)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.SGD(lr=1e-2, momentum=0.5) / hx.SGD(lr=0.0))
    problem.train(opt, range(2))
    live = opt.hyperparameters()[0]["lr"]
    for value in (0.1, 1, torch.tensor(0.2), torch.tensor([0.3])):
        opt.param_groups[0]["lr"] = value
        problem.train(opt, range(2, 3))
        assert live == opt.param_groups[0]["lr"] == pytest.approx(float(value), rel=1e-6)
    opt.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="param group: lr must be a number"):
        opt.step()


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.int64(1), 1])
def test_numbers_of_numpy_are_numbers(number):
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(2))], hx.SGD(lr=number, bounds={"lr": (number, 2 * number)}))
    assert opt.hyperparameters()[0]["lr"] == float(number)
    opt.param_groups[0]["weight_decay"] = number
    opt.step()
    assert opt.hyperparameters()[0]["weight_decay"] == float(number)


def test_betas_are_beta1_and_beta2():
    problem = Regression(6)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam(lr=1e-2) / hx.SGD(lr=0.0))
    assert opt.defaults["betas"] == (0.9, 0.999)
    opt.param_groups[0]["betas"] = (0.5, torch.tensor(0.75))
    problem.train(opt, range(1))
    assert values(opt)[0]["beta1"] == pytest.approx(0.5, rel=1e-12)
    assert values(opt)[0]["beta2"] == pytest.approx(0.75, rel=1e-12)
    assert opt.param_groups[0]["betas"][0] is opt.param_groups[0]["beta1"]
    opt.param_groups[0]["betas"] = 0.9
    with pytest.raises(TypeError, match="param group: betas must be two numbers"):
        opt.step()


@pytest.mark.parametrize("space", ["linear", "log", "square"])
@pytest.mark.parametrize("learn", ["lr", ()])
def test_what_is_written_is_projected(space, learn):
    problem = Regression(4)
    stack = hx.Adam(lr=0.1, learn=learn, space={"lr": space}, bounds={"lr": (0.01, 1.0)}) / hx.SGD(lr=0.0)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    lr, beta1 = opt.hyperparameters()[0]["lr"], opt.hyperparameters()[0]["beta1"]
    for written, taken in [(-1.0, 0.01), (5.0, 1.0), (float("nan"), 1.0), (0.5, 0.5)]:
        lr.fill_(written)
        beta1.fill_(1.5)
        problem.train(opt, range(1))
        assert lr.item() == pytest.approx(taken, rel=1e-12)
        assert 0.999 < beta1 < 1


def test_printing():
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(1))], STACK)
    text = repr(opt)
    assert text.startswith("HyperOptimizer")
    assert "Parameter Group 0" in text
    assert "Adam/SGD/SGD" in text
    assert "tower" not in text


@pytest.mark.parametrize("alias", [lambda t: t.detach(), lambda t: t.data, lambda t: t.view(1), lambda t: t[None][0]])
def test_another_view_of_a_live_value_may_be_assigned(alias):
    problem, plain = Regression(4), Regression(4)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), STACK) for p in (problem, plain))
    for i in range(4):
        opt.param_groups[0]["lr"] = alias(opt.param_groups[0]["lr"])
        problem.train(opt, range(i, i + 1))
        plain.train(expected, range(i, i + 1))
    assert same(problem, plain)


def test_an_assigned_tensor_is_a_constant():
    opt = hx.HyperOptimizer(Regression(1).model.parameters(), STACK)
    opt.param_groups[0]["lr"] = torch.tensor(0.1, requires_grad=True)
    assert not opt.hyperparameters()[0]["lr"].requires_grad
    copy.deepcopy(opt)


@pytest.mark.parametrize("high", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_no_bound_lets_a_beta_reach_1(name, high):
    p = torch.nn.Parameter(torch.randn(20))
    opt = hx.HyperOptimizer([p], hx.Adam(learn=name, bounds={name: (0.5, high)}) / hx.SGD(lr=1e4))
    for _ in range(50):
        p.grad = 2 * p.detach()
        opt.step()
    opt.param_groups[0][name] = 5.0
    opt.step()
    assert opt.hyperparameters()[0][name] < 1
    assert p.isfinite().all()


def test_all_levels_are_printed():
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(2))], hx.SGD(lr=0.1) / hx.Adam(lr=0.5) / hx.SGD(lr=0.25))
    assert "    1/Adam/lr: 0.5\n" in repr(opt)
    assert "    2/SGD/lr: 0.25\n" in repr(opt)
    tall = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(2))], hx.Stack.of(hx.Adam(), 100))
    assert "    and 91 levels more\n" in repr(tall)
    assert len(repr(tall)) < 2500
    opt.param_groups[0]["lr"] = "high"  # an error for step() to raise
    assert "    lr: high\n" in repr(opt)


def test_whole_numbers_of_numpy():
    level = hx.Adam(horizon=np.int64(3), burn_in=np.int32(2))
    assert level.horizons() == (3.0, 0.0)


def test_values_may_change_places():
    """Each is a view of what the other one is written to."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = hx.HyperOptimizer(
        [{"params": [p], "lr": lr} for p, lr in zip(params, (0.1, 0.3), strict=True)],
        hx.Adam(betas=(0.5, 0.9)) / hx.SGD(lr=0.0),
    )
    first, second = opt.param_groups
    first["betas"] = first["betas"][::-1]
    first["lr"], second["lr"] = second["lr"], first["lr"]
    assert [opt.hyperparameters(i)[0]["lr"].item() for i in (0, 1)] == [0.3, 0.1]
    assert [opt.hyperparameters()[0][name].item() for name in ("beta1", "beta2")] == [0.9, 0.5]
    first["lr"], second["lr"] = second["lr"], first["lr"]
    for p in params:
        p.grad = torch.ones(2)
    opt.step()
    assert [group["lr"].item() for group in opt.param_groups] == [0.1, 0.3]
    first["beta1"] = first["beta2"]  # and the other stays
    opt.step()
    assert [value.item() for value in first["betas"]] == [0.5, 0.5]


def test_a_learned_eps_does_not_reach_0():
    """Where nothing ever happened, the update would be 0 / 0."""
    p = torch.nn.Parameter(torch.ones(2))
    opt = hx.HyperOptimizer([p], hx.Adam(lr=1e-2, eps=1e-4, learn="eps", space={"eps": "linear"}) / hx.SGD(lr=1.0))
    for _ in range(4):
        p.grad = torch.tensor([1.0, 0.0])
        opt.step()
    assert opt.bounded_steps()[0]["eps"] > 0
    assert 0 < opt.in_use()[0]["eps"] < 1e-12
    assert p[0] < 1
    assert p[1] == 1
