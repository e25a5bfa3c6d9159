"""Whole towers, step by step, against plain autograd and against the package of the paper."""

from __future__ import annotations

import copy
import math

import hypothesis
import pytest
import torch
from cases import CASES, stacks
from gradient_descent_the_ultimate_optimizer import gdtuo as package
from hypothesis import given
from hypothesis import strategies as st
from problems import Regression, assert_same, float64_by_default
from reference import TWINS

import hyperopt_ext as hx
from hyperopt_ext.compat import gdtuo
from hyperopt_ext.testing import ReferenceTower, checks

STEPS = 60


@given(stack=stacks())
def test_equals_a_tower_of_plain_autograd(stack):
    checks.equals_a_tower_of_plain_autograd(stack, TWINS, STEPS)


@given(stack=stacks(min_height=1, max_height=1))
def test_bounds_project_what_is_learned(stack):
    """Tight bounds around the first values, so that they are active."""
    base, above = stack
    hypothesis.assume(base.learn_names)
    values = base.values()
    bounds = {name: (0.999 * min(values[name], 1.0), 1.001 * values[name] + 1e-6) for name in base.learn_names}
    problem = Regression(STEPS)
    stack = hx.Stack((base.replace(bounds=bounds), above.replace(lr=above.values()["lr"] * 100)))
    reference = ReferenceTower(problem.model.parameters(), stack, TWINS)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    for i in range(20):
        reference.step(lambda params, i=i: problem.loss_of(i, params))
        problem.train(opt, range(i, i + 1))
        for name, (low, high) in bounds.items():
            assert low <= opt.hyperparameters()[0][name].item() <= high
    assert_same(problem.model.parameters(), opt.hyperparameters(), reference.params, reference.hyperparameters())


def test_a_bound_leaves_a_coordinate_on_its_side():
    """A square has two coordinates; the one that is moved stays below 0, where the momentum above has pushed it."""
    base = hx.SGD(lr=0.04, learn="lr", space={"lr": "square"}, bounds={"lr": (0.0, 0.25)})
    stack = base / hx.SGD(lr=3.0, momentum=0.5)
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt, reference, tower = hx.HyperOptimizer([w], stack), ReferenceTower([w], stack, TWINS), hx.functional.tower(stack)
    params, state = tower.init([w])
    coordinates = []
    for size in (0.5, -0.5, -0.5, -0.5, -0.5, 0.5, 0.5, -5.0, -5.0, 0.5, 0.5):  # two cross 0 and a bound in one move
        grad = torch.full((2,), size, dtype=torch.float64)
        w.grad = grad.clone()
        opt.step()
        reference.step(lambda params, grad=grad: params[0] @ grad)
        params, state = tower.step(params, [grad], state)
        coordinates.append(state.coordinates[0]["lr"].item())
        for values in (reference.hyperparameters()[0], tower.hyperparameters(state)[0]):
            assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(float(values["lr"]), rel=1e-12)
    assert min(coordinates) == -0.5
    assert opt.bounded_steps()[0]["lr"] > 0


@pytest.mark.parametrize("learn", ["lr", ("lr", "beta1", "beta2")])
@pytest.mark.parametrize("space", ["tanh", "linear"])
def test_no_bounds_let_a_beta_reach_1(space, learn):
    wide = {"beta1": (0.0, 2.0), "beta2": (-1.0, math.inf)}
    base = hx.Adam(lr=0.1, learn=learn, space=dict.fromkeys(wide, space), bounds=wide)
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = hx.HyperOptimizer([p], base / hx.SGD(lr=1e3, momentum=0.9), nonfinite="hold")
    for i in range(8):
        if i == 4:
            opt.param_groups[0]["betas"] = (1.0, 1.5)
        p.grad = torch.full_like(p, (-1.0) ** (i // 2))
        opt.step()
        values = opt.hyperparameters()[0]
        assert values["beta1"] < 1.0
        assert values["beta2"] < 1.0
        assert p.isfinite().all()


def test_a_momentum_above_1_follows_the_package():
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = hx.HyperOptimizer([w], gdtuo.SGD(alpha=0.001, mu=0.99) / gdtuo.SGD(alpha=0.05))
    with float64_by_default():
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        wrapper = package.ModuleWrapper(model, optimizer=package.SGD(0.001, mu=0.99, optimizer=package.SGD(0.05)))
        wrapper.initialize()
        for _ in range(5):
            w.grad = torch.ones_like(w)
            opt.step()
            wrapper.begin()
            loss = wrapper.forward(torch.ones(1, 1)).sum()
            wrapper.zero_grad()
            loss.backward()
            wrapper.step()
        theirs = wrapper.optimizer.parameters
    assert opt.hyperparameters()[0]["momentum"].item() == pytest.approx(theirs["mu"].item(), rel=1e-12)
    assert opt.hyperparameters()[0]["momentum"] > 1.0
    assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(theirs["alpha"].item(), rel=1e-12)


# A value moved by 1/4 in its coordinate, and the slope there, in forms that lose no digits.
QUARTER = math.exp(0.25)
MOVED = {
    "log": (lambda h: h * QUARTER, lambda h: h),
    "softplus": (lambda h: math.log1p(math.expm1(h) * QUARTER), lambda h: -math.expm1(-h)),
    "tanh": (lambda h: h * QUARTER**2 / (1 - h + h * QUARTER**2), lambda h: 2 * h * (1 - h)),
}


@pytest.mark.parametrize("h", [1e-15, 1e-9, 1e-3, 0.5, 0.999])
@pytest.mark.parametrize("space", MOVED)
def test_coordinates_are_exact_over_their_whole_range(space, h):
    expected, slope = (f(h) for f in MOVED[space])
    stack = hx.SGD(lr=h, learn="lr", space={"lr": space}) / hx.SGD(lr=0.25 / slope)
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt, tower = hx.HyperOptimizer([w], stack), hx.functional.tower(stack)
    params, state = tower.init([w])
    for _ in range(2):
        w.grad = torch.ones_like(w)
        opt.step()
        params, state = tower.step(params, [torch.ones_like(w)], state)
    assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(expected, rel=1e-12, abs=0)
    assert tower.hyperparameters(state)[0]["lr"].item() == pytest.approx(expected, rel=1e-12, abs=0)


def package_levels(alpha: float):
    """Levels with a step size up to `alpha`; small enough that a tower does not diverge and amplify rounding."""
    kinds = {
        "SGD": {"alpha": st.floats(alpha / 10, alpha), "mu": st.sampled_from([0.0, 0.5])},
        "Adam": {"alpha": st.floats(alpha / 10, alpha), "beta1": st.floats(0.5, 0.95), "beta2": st.floats(0.8, 0.999)},
        "AdamBaydin": {"alpha": st.floats(alpha / 10, alpha), "log_eps": st.sampled_from([-8.0, -4.0])},
        "AdaGrad": {"alpha": st.floats(alpha / 10, alpha)},
        "RMSProp": {"alpha": st.floats(alpha / 10, alpha), "gamma": st.floats(0.5, 0.99)},
        "RMSPropAlpha": {"alpha": st.floats(alpha / 10, alpha), "gamma": st.floats(0.5, 0.99)},
    }
    return st.one_of([st.tuples(st.just(name), st.fixed_dictionaries(kw)) for name, kw in kinds.items()])


@given(base=package_levels(1e-2), above=st.lists(package_levels(1e-4), max_size=4))
def test_equals_the_package_of_the_paper(base, above):
    specs = [base, *above]
    problem = Regression(STEPS)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Stack([getattr(gdtuo, name)(**kw) for name, kw in specs]))

    with float64_by_default():  # of the package's hyperparameters
        theirs = package.NoOpOptimizer()
        for name, kw in reversed(specs):
            theirs = getattr(package, name)(**kw, optimizer=theirs)
        wrapper = package.ModuleWrapper(copy.deepcopy(problem.model), optimizer=theirs)
        wrapper.initialize()
        for i in range(STEPS):
            problem.train(opt, range(i, i + 1))
            wrapper.begin()
            loss = problem.loss(i, wrapper.forward)
            wrapper.zero_grad()
            loss.backward()
            wrapper.step()
    hypothesis.assume(loss.item() < 10.0)  # a few towers of five levels diverge, which amplifies rounding, too

    expected, level = [], wrapper.optimizer
    while hasattr(level, "parameters"):
        values = {"lr": level.parameters["alpha"].item()}
        if "mu" in level.parameters and level.mu != 0:
            values["momentum"] = level.parameters["mu"].item()
        if isinstance(level, package.RMSProp | package.RMSPropAlpha):
            values["lr"] **= 2
        for theirs, ours in [("beta1", "beta1"), ("beta2", "beta2"), ("gamma", "alpha")]:
            if theirs in level.parameters:
                values[ours] = package.Adam.clamp(level.parameters[theirs]).item()
        expected.append(values)
        level = level.optimizer
    names = [name for name, _ in problem.model.named_parameters()]
    assert_same(problem.model.parameters(), opt.hyperparameters(), [wrapper.parameters[n] for n in names], expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_published_optimizer_if_nothing_is_learned(case):
    checks.equals_the_published_optimizer(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_state_dict_resumes_to_the_bit(case):
    checks.a_state_dict_resumes_to_the_bit(case)


def test_maximize_is_minimising_the_negative_objective():
    a, b = Regression(30), Regression(30)
    stack = hx.Adam(lr=1e-2) / hx.SGD(lr=1e-3, momentum=0.5) / hx.SGD(lr=1e-4)
    up = hx.HyperOptimizer(a.model.parameters(), stack, maximize=True)
    down = hx.HyperOptimizer(b.model.parameters(), stack)
    for i in range(30):
        up.zero_grad()
        (-a.loss(i)).backward()
        up.step()
        b.train(down, range(i, i + 1))
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert up.hyperparameters() == down.hyperparameters()


def test_a_tower_of_a_thousand_levels_trains():
    problem = Regression(20)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Stack.of(hx.Adam(lr=1e-3), height=1000))
    problem.train(opt, range(20))
    values = [level["lr"].item() for level in opt.hyperparameters()]
    assert len(values) == 1000
    assert values[-1] == 1e-3
    assert len({round(value, 12) for value in values}) > 10  # they did move, each in its own way
