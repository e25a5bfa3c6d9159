"""hx.auto: no first guess, and no scale, decides how it trains."""

from __future__ import annotations

import pytest
import torch
from problems import Regression, relative_error

import hyperopt_ext as hx

BASES = ["adam", "adamw", "sgd"]
every_base = pytest.mark.parametrize("base", BASES)


def final_loss(make, steps=600):
    """The mean loss over fresh batches, after training on `steps` others."""
    problem = Regression(steps + 50)
    problem.train(make(problem.model.parameters()), range(steps))
    with torch.no_grad():
        return torch.stack([problem.loss(i) for i in range(steps, steps + 50)]).mean().item()


@every_base
def test_any_first_lr_ends_near_the_best_constant_one(base):
    constant = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[base]
    options = {"momentum": 0.9, "nesterov": True} if base == "sgd" else {}
    losses = [final_loss(lambda p, lr=lr: constant(p, lr=lr, **options)) for lr in (1e-3, 3e-3, 1e-2, 3e-2, 0.1)]
    best, spread = min(losses), max(losses)
    for lr in (None, 1e-6, 1e-4, 1e-2, 1.0, 100.0):
        loss = final_loss(lambda p, lr=lr: hx.auto(p, base, lr))
        assert loss < best + 0.2 * (spread - best), lr


@every_base
def test_the_scale_of_the_loss_does_not_matter(base):
    """All that lr is made of are cosines and ratios of norms; eps is all that has a scale."""
    results = []
    for scale in (1.0, 1e4, 1e-4):
        problem = Regression(60)
        opt = hx.auto(problem.model.parameters(), base, **({} if base == "sgd" else {"eps": 0.0}))
        for i in range(60):
            opt.zero_grad()
            (scale * problem.loss(i)).backward()
            opt.step()
        results.append(torch.cat([p.detach().flatten() for p in problem.model.parameters()]))
    assert relative_error(results[1], results[0]) < 1e-7
    assert relative_error(results[2], results[0]) < 1e-7


@every_base
@pytest.mark.parametrize("seed", [0, 2])
def test_lr_comes_back_from_a_minimum(base, seed):
    """Where the updates of 1500 steps have come to nothing, a new problem is on its way within 200."""
    generator = torch.Generator().manual_seed(seed)
    x, targets = torch.randn(256, 10, generator=generator), torch.randn(2, 10, 1, generator=generator)
    w = torch.nn.Parameter(torch.zeros(10, 1))
    opt = hx.auto([w], base)
    for target, steps in zip(targets, (1500, 200), strict=True):
        distance = (w.detach() - target).norm()
        for _ in range(steps):
            opt.zero_grad()
            batch = x[torch.randint(256, (32,), generator=generator)]
            (batch @ (w - target)).square().mean().backward()
            opt.step()
            assert opt.param_groups[0]["lr"] > 1e-9
        assert (w.detach() - target).norm() < 0.1 * distance


@every_base
def test_nothing_happens_where_there_is_nothing_to_learn(base):
    """A loss that is flat, and parameters that are 0."""
    p = torch.nn.Parameter(torch.zeros(10))
    opt = hx.auto([p], base)
    for g in (0.0, 0.0, 1.0, 0.0):
        p.grad = torch.full_like(p, g)
        opt.step()
        assert torch.isfinite(p).all()
        assert (p.abs() < 1e-3).all()
    assert (p < 0).all()
    assert opt.skipped_steps() == opt.held_steps() == 0


def test_bounds_hold_for_the_first_lr():
    opt = hx.auto([torch.nn.Parameter(torch.ones(2))], "AdamW", bounds={"lr": (1e-5, 1e-2)})
    assert opt.param_groups[0]["lr"] == 1e-2
    opt = hx.auto([torch.nn.Parameter(torch.ones(2))], bounds={"lr": (1e-5, float("inf"))})
    assert opt.param_groups[0]["lr"] == 1e20


def test_the_first_step_sets_lr():
    problem = Regression(3)
    opt = hx.auto(problem.model.parameters(), "sgd", weight_decay=0.1)
    assert opt.stack[0].weight_decay == 0.1
    problem.train(opt, range(1))
    assert 0 < opt.param_groups[0]["lr"] < 1
    assert opt.bounded_steps()[0]["lr"] == 1


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: hx.auto(p, "rprop"), ValueError, "auto: base is 'rprop', but the bases are 'adam', 'adamw', 'sgd'"),
        (lambda p: hx.auto(p, 1e-3), TypeError, "auto: base must be one of .*; write lr=0.001"),
        (lambda p: hx.auto(p, hx.AdamW(lr=1e-3)), TypeError, "auto: base must be one of"),
        (lambda p: hx.auto(p, trust=None), ValueError, "auto: without trust, nothing sets the first lr; give one"),
        (lambda p: hx.auto(p, lr=0.0), ValueError, "auto: lr must be greater than 0"),
        (lambda p: hx.auto(p, lr=-1.0), ValueError, "auto: lr must be greater than 0"),
        (lambda p: hx.auto(p, lr="fast"), TypeError, "auto: lr must be a number"),
        (lambda p: hx.auto(p, bounds=[1e-3]), TypeError, "Adam: bounds must be a dict such as"),
        (lambda p: hx.auto(p, bounds={"lr": 5}), ValueError, r"Adam: bounds\['lr'\] must be two numbers"),
        (lambda p: hx.auto(p, momentum=0.9), TypeError, "Adam has no argument 'momentum'; its arguments are lr, betas"),
    ],
)
def test_clear_errors(make, error, words):
    with pytest.raises(error, match=words):
        make([torch.nn.Parameter(torch.zeros(2))])
