"""What training jobs do around an optimizer: each with the real thing of torch."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import Regression, assert_same, relative_error
from reference import TWINS
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import hyperopt_ext as hx
from hyperopt_ext.testing import ReferenceTower

STACK = hx.Adam(lr=1e-2) / hx.SGD(lr=1e-4, momentum=0.5) / hx.SGD(lr=1e-6)
STEPS = 20


@pytest.mark.parametrize(
    "clip", [lambda params: clip_grad_norm_(params, 0.05), lambda params: clip_grad_value_(params, 0.01)]
)
def test_hypergradients_are_made_of_clipped_gradients(clip):
    """lr moves by the product of the clipped gradient and the update that the last clipped gradient made."""
    problem = Regression(STEPS)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.SGD(lr=0.1, learn="lr") / hx.SGD(lr=0.5))
    lr, last = 0.1, None
    for i in range(STEPS):
        opt.zero_grad()
        problem.loss(i).backward()
        raw = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
        clip(problem.model.parameters())
        g = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
        assert not torch.equal(g, raw)
        lr += 0.5 * (g @ last).item() if last is not None else 0.0
        last = g
        opt.step()
        assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(lr, rel=1e-12)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    parts, whole = Regression(STEPS), Regression(STEPS)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), STACK) for p in (parts, whole))
    for i in range(STEPS):
        opt.zero_grad()
        for x, y in zip(parts.x[i].chunk(4), parts.y[i].chunk(4), strict=True):
            ((parts.model(x) - y).square().mean() / 4).backward()
        opt.step()
        whole.train(expected, range(i, i + 1))
    assert_same(parts.model.parameters(), opt.hyperparameters(), whole.model.parameters(), values(expected))


def values(opt, group=0):
    return [{k: v.tolist() for k, v in level.items()} for level in opt.hyperparameters(group)]


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
def test_averaged_models(average):
    problem = Regression(STEPS)
    problem.model.insert(1, torch.nn.BatchNorm1d(5, dtype=torch.float64))
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    averaged = AveragedModel(problem.model, multi_avg_fn=average)
    expected, n = None, 0
    for i in range(STEPS):
        problem.train(opt, range(i, i + 1))
        if i >= 5:
            averaged.update_parameters(problem.model)
            now = [p.detach().clone() for p in problem.model.parameters()]
            weight = 1 / (n + 1) if average is None or n == 0 else 0.1
            expected = now if n == 0 else [e + weight * (p - e) for e, p in zip(expected, now, strict=True)]
            n += 1
    for p, e in zip(averaged.module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-14)
    update_bn([(problem.x[i],) for i in range(3)], averaged)
    assert torch.isfinite(averaged(problem.x[0])).all()


@pytest.mark.parametrize(
    "parametrize", [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm]
)
def test_parametrized_weights(parametrize):
    """Against plain autograd through the parametrization."""
    problem = Regression(STEPS)
    parametrize(problem.model[0].eval())  # spectral_norm: no power iterations, so that the loss is a function
    reference = ReferenceTower(problem.model.parameters(), STACK, TWINS)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    for i in range(STEPS):
        reference.step(lambda params, i=i: problem.loss_of(i, params))
        problem.train(opt, range(i, i + 1))
    assert_same(problem.model.parameters(), opt.hyperparameters(), reference.params, reference.hyperparameters())


def test_tied_weights_are_one_parameter():
    """Against plain autograd through both uses."""
    problem = Regression(STEPS)
    problem.model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, dtype=torch.float64) for _ in range(2)))
    problem.model[1].weight = problem.model[0].weight
    assert len(list(problem.model.parameters())) == 3
    reference = ReferenceTower(problem.model.parameters(), STACK, TWINS)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    for i in range(STEPS):
        reference.step(lambda params, i=i: problem.loss_of(i, params))
        problem.train(opt, range(i, i + 1))
    assert problem.model[0].weight is problem.model[1].weight
    assert_same(problem.model.parameters(), opt.hyperparameters(), reference.params, reference.hyperparameters())


def test_layers_that_are_unfrozen_later():
    """A frozen parameter has no state; the step after the first that moves it is the first to count it."""
    problem = Regression(STEPS)
    params = list(problem.model.parameters())
    problem.model[0].requires_grad_(False)
    opt = hx.HyperOptimizer(params, hx.SGD(lr=0.05) / hx.SGD(lr=0.1))
    lr, last = 0.05, {}
    for i in range(STEPS):
        if i == 8:
            assert len(opt.state) == 2
            problem.model[0].requires_grad_(True)
        opt.zero_grad()
        problem.loss(i).backward()
        grads = {p: p.grad.clone() for p in params if p.grad is not None}
        lr += 0.1 * sum((g * last[p]).sum().item() for p, g in grads.items() if p in last)
        last = grads
        opt.step()
        assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(lr, rel=1e-12)
    assert len(opt.state) == 4


def test_a_parameter_that_is_taken_out_of_its_group():
    problem = Regression(STEPS)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    problem.train(opt, range(5))
    gone = opt.param_groups[0]["params"].pop(0)
    del opt.state[gone]
    before = gone.detach().clone()
    problem.train(opt, range(5, 10))
    assert torch.equal(gone, before)
    other = copy.deepcopy(problem)
    resumed = hx.HyperOptimizer(list(other.model.parameters())[1:], STACK)
    resumed.load_state_dict(opt.state_dict())
    problem.train(opt, range(10, 15))
    other.train(resumed, range(10, 15))
    assert values(opt) == values(resumed)


@pytest.mark.parametrize("granularity", ["group", "tensor"])
def test_thousands_of_tensors_are_as_good_as_one(granularity):
    """Slices of one vector, as many as a large model has tensors, against the vector itself."""
    whole = torch.nn.Parameter(torch.linspace(-1, 1, 3000, dtype=torch.float64))
    slices = [torch.nn.Parameter(part.detach().clone()) for part in whole.split(1)]
    stack = hx.Adam(lr=1e-2, learn="lr", granularity=granularity) / hx.SGD(lr=0.0)
    optimizers = [hx.HyperOptimizer([whole], stack), hx.HyperOptimizer(slices, stack)]
    for i in range(5):
        whole.grad = (whole.detach() - 0.1 * i).sin()
        for p, g in zip(slices, whole.grad.split(1), strict=True):
            p.grad = g.clone()
        for opt in optimizers:
            opt.step()
    assert relative_error(torch.cat([p.detach() for p in slices]), whole.detach()) <= 1e-14


def test_a_hook_may_change_gradients_and_sees_what_the_step_made():
    problem, plain = Regression(5), Regression(5)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), STACK) for p in (problem, plain))
    lrs = []

    def halve(opt, *_):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)

    opt.register_step_pre_hook(halve)
    opt.register_step_post_hook(lambda opt, *_: lrs.append(opt.param_groups[0]["lr"].item()))
    for i in range(5):
        problem.train(opt, range(i, i + 1))
        expected.zero_grad()
        (plain.loss(i) / 2).backward()
        expected.step()
        assert lrs[-1] == pytest.approx(expected.hyperparameters()[0]["lr"].item(), rel=1e-12)
