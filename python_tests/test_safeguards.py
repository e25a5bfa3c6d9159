"""What goes beyond the paper, against a transcription whose derivatives come from autograd."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import CASES, safeguarded_stacks
from gradient_descent_the_ultimate_optimizer import gdtuo as package
from hypothesis import given
from problems import Regression, assert_same, float64_by_default, relative_error
from reference import TranscribedTower

import hyperopt_ext as hx
from hyperopt_ext import _C
from hyperopt_ext.compat import gdtuo
from hyperopt_ext.testing import checks

STEPS = 15


def assert_equals_transcription(stack, steps=STEPS):
    problem = Regression(steps)
    reference = TranscribedTower(problem.model.parameters(), stack)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    for i in range(steps):
        reference.step(lambda params, i=i: problem.loss_of(i, params))
        problem.train(opt, range(i, i + 1))
    expected, first = reference.hyperparameters(), [level.values() for level in stack]
    assert_same(problem.model.parameters(), opt.hyperparameters(), reference.params, expected, first=first)
    assert [{k: v.tolist() for k, v in level.items()} for level in opt.bounded_steps()] == reference.bounded()


@given(stack=safeguarded_stacks())
def test_equals_the_transcription(stack):
    assert_equals_transcription(stack)


@pytest.mark.parametrize(
    ("stack", "direction"),
    [
        (hx.sgd_hd(0.05, 1e-3), lambda s, g, t: -g),
        (hx.sgdn_hd(0.02, 1e-3), lambda *state: nesterov_direction(*state)),
        (hx.adam_hd(1e-2, 1e-5), lambda *state: adam_direction(*state)),
    ],
    ids=["sgd_hd", "sgdn_hd", "adam_hd"],
)
def test_algorithms_2_4_and_6_of_baydin(stack, direction):
    """The boxes, line by line: one global dot product of the gradient with the last direction."""
    problem = Regression(30)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    params = [p.detach().clone() for p in problem.model.parameters()]
    alpha, beta = stack[0].lr, stack[1].lr
    state, last = [{} for _ in params], [torch.zeros_like(p) for p in params]
    for t in range(1, 31):
        leaves = [p.clone().requires_grad_() for p in params]
        grads = torch.autograd.grad(problem.loss_of(t - 1, leaves), leaves)
        h = sum((g * u).sum() for g, u in zip(grads, last, strict=True))
        alpha = alpha - beta * h.item()
        last = [direction(s, g, t) for s, g in zip(state, grads, strict=True)]
        params = [p + alpha * u for p, u in zip(params, last, strict=True)]
        problem.train(opt, range(t - 1, t))
        assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(alpha, rel=1e-12)
    assert alpha > 1.01 * stack[0].lr
    for p, q in zip(problem.model.parameters(), params, strict=True):
        assert relative_error(p.detach(), q) < 1e-10


def nesterov_direction(s, g, t):
    return -(g + 0.9 * s.setdefault("v", torch.zeros_like(g)).mul_(0.9).add_(g))


def adam_direction(s, g, t):
    m = s.setdefault("m", torch.zeros_like(g)).mul_(0.9).add_(0.1 * g)
    v = s.setdefault("v", torch.zeros_like(g)).mul_(0.999).add_(0.001 * g * g)
    return -(m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def test_the_multiplicative_rule_of_baydin():
    """alpha_t = alpha_{t-1} (1 + beta cos(g_t, g_{t-1})) for SGD."""
    problem = Regression(30)
    stack = hx.SGD(lr=1e-2, learn="lr", space={"lr": "multiplicative"}, normalize=True) / hx.SGD(lr=0.1)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    alpha, last = 1e-2, None
    for t in range(30):
        opt.zero_grad()
        problem.loss(t).backward()
        g = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
        if last is not None:
            alpha *= 1 + 0.1 * torch.cosine_similarity(g, last, dim=0, eps=0.0).item()
        opt.step()
        last = g
        assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(alpha, rel=1e-12)


@pytest.mark.parametrize(
    "base", [hx.SGD, hx.Adam, hx.AdamW, hx.Lion, hx.RMSprop, hx.Adadelta], ids=lambda c: c.__name__
)
@pytest.mark.parametrize("learn", ["lr", None, ()], ids=["lr", "default", "nothing"])
@pytest.mark.parametrize("granularity", ["group", "tensor"])
@pytest.mark.parametrize("lr", [1e-4, 10.0])
def test_trust_holds_at_every_step(base, learn, granularity, lr):
    """Also at the first one, and for what starts at zero."""
    tau, problem = 0.01, Regression(12)
    level = base(lr=lr, learn=learn, space={"lr": "log"}, trust=tau, granularity=granularity)
    opt = hx.HyperOptimizer(problem.model.parameters(), level / hx.SGD(lr=1e-4))
    params = list(problem.model.parameters())
    with torch.no_grad():
        params[-1].zero_()
    for i in range(12):
        before = [p.detach().clone() for p in params]
        problem.train(opt, range(i, i + 1))
        changes = [p.detach() - q for p, q in zip(params, before, strict=True)]
        if granularity == "group":
            before, changes = ([torch.cat([t.flatten() for t in ts])] for ts in (before, changes))
        for change, old in zip(changes, before, strict=True):
            assert change.norm() <= tau * max(old.norm(), 1e-3 * old.numel() ** 0.5) * (1 + 1e-9)
            assert change.norm() > 0
    bounded = opt.bounded_steps()[0]["lr"]
    assert (bounded > 0).all() or lr < 10.0


ANY = {"lr": (-float("inf"), float("inf"))}


@pytest.mark.parametrize("lr", [100.0, -100.0])
def test_trust_holds_for_a_negative_lr(lr):
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = hx.HyperOptimizer([p], hx.SGD(learn="lr", bounds=ANY, trust=0.03) / hx.SGD(lr=1e-9))
    opt.param_groups[0]["lr"].fill_(lr)
    p.grad = torch.ones_like(p)
    opt.step()
    assert p.tolist() == pytest.approx([1 - math.copysign(0.03, lr)] * 4, rel=1e-12)
    assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(math.copysign(0.03, lr), rel=1e-12)
    assert opt.bounded_steps()[0]["lr"] == 1


@pytest.mark.parametrize(
    ("space", "lr"), [("log", 0.01), ("multiplicative", 0.01), ("linear", 0.01), ("linear", -0.01)]
)
@pytest.mark.parametrize("start", [1.0, 1e-9], ids=["above", "below"])
def test_trust_keeps_an_lr_from_where_its_updates_are_lost(space, lr, start):
    """It falls until an update is 1e-8 of the parameters, on both sides of 0, not from below that, and grows again."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    bounds = {"lr": (0.0, math.inf) if lr > 0 else (-math.inf, 0.0)}
    level = hx.SGD(max(lr, 0.0), learn="lr", bounds=bounds, space={"lr": space}, normalize=True, trust=0.03)
    opt = hx.HyperOptimizer([p], level / hx.SGD(lr=0.001 if space == "linear" else 0.9))
    live = opt.param_groups[0]["lr"].fill_(lr * start)

    def step(grad):
        before, p.grad = p.detach().clone(), torch.full_like(p, grad)
        opt.step()
        return (p.detach() - before).norm() / before.norm()

    turn = -math.copysign(1.0, lr)  # against a positive lr, for a negative one
    parts = [step(10 * turn**i) for i in range(20)]
    assert opt.bounded_steps()[0]["lr"] > 2
    if start == 1.0:
        assert parts[-1].item() == pytest.approx(1e-8, rel=0.02)  # of the parameters in the step before it fell so far
    else:
        assert live.item() == pytest.approx(lr * start, rel=1e-15)
    low = live.item()
    step(-10 * turn**20)
    assert live / low > 1.5


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_growth_is_of_the_size_of_a_negative_lr(sign):
    """A move towards 0 is left alone, and one away from it is cut, on both sides of 0."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    opt = hx.HyperOptimizer([p], hx.SGD(learn="lr", bounds=ANY, growth=1.02) / hx.SGD(lr=1e-3))
    lr = opt.param_groups[0]["lr"].fill_(0.1 * sign)
    expected = 0.1 * sign
    for grad, move in [(1.0, 0.0), (1.0, 4e-3), (-1.0, -4e-3)]:  # of lr, without a limit
        p.grad = torch.full_like(p, grad)
        opt.step()
        expected = max(-1.02 * abs(expected), min(expected + move, 1.02 * abs(expected)))
        assert lr.item() == pytest.approx(expected, rel=1e-12)
    assert opt.bounded_steps()[0]["lr"] == 1


def test_hyperparameters_for_each_tensor_are_optimizers_for_each_tensor():
    together, apart = Regression(20), Regression(20)
    level = hx.Adam(lr=1e-2, granularity="tensor", horizon=5, normalize=True, learn="lr", trust=0.01)
    above = hx.SGD(lr=0.05, learn="lr", granularity="tensor") / hx.SGD(lr=1e-3)
    opt = hx.HyperOptimizer(together.model.parameters(), level / above)
    own = [hx.HyperOptimizer([p], level / above) for p in apart.model.parameters()]
    for i in range(20):
        opt.zero_grad()
        together.loss(i).backward()
        for p, q in zip(together.model.parameters(), apart.model.parameters(), strict=True):
            q.grad = p.grad
        if i % 5 == 3:  # one tensor sits the step out, with its own tower
            together.model[0].weight.grad = apart.model[0].weight.grad = None
        opt.step()
        for other in own:
            other.step()
        for p, q in zip(together.model.parameters(), apart.model.parameters(), strict=True):
            assert torch.equal(p, q)
    assert [level["lr"].tolist() for level in opt.hyperparameters()] == [
        [other.hyperparameters()[0]["lr"].item() for other in own],
        [other.hyperparameters()[1]["lr"].item() for other in own],
        1e-3,
    ]
    assert len(set(opt.hyperparameters()[0]["lr"].tolist())) == 4


def test_what_is_written_to_a_shared_level_reaches_every_tensor():
    a, b = Regression(10), Regression(10)
    stack = hx.SGD(lr=1e-2, granularity="tensor") / hx.SGD(lr=1e-3) / hx.SGD(lr=1e-6)
    opt = hx.HyperOptimizer(a.model.parameters(), stack)
    expected = hx.HyperOptimizer(b.model.parameters(), stack[0] / hx.SGD(lr=1e-4) / stack[2])
    opt.hyperparameters()[1]["lr"].fill_(1e-4)
    opt.param_groups[0]["lr"][1] = 0.02
    opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"] * 1
    expected.param_groups[0]["lr"].copy_(torch.tensor([0.01, 0.02, 0.01, 0.01], dtype=torch.float64))
    for problem, optimizer in ((a, opt), (b, expected)):
        problem.train(optimizer, range(10))
    assert torch.equal(opt.hyperparameters()[0]["lr"], expected.hyperparameters()[0]["lr"])
    assert opt.hyperparameters()[1]["lr"] == expected.hyperparameters()[1]["lr"] != 1e-4


@pytest.mark.parametrize("horizon", [1, 4])
def test_shared_levels_stay_in_step_when_a_tensor_sits_out(horizon):
    problem = Regression(12)
    level = hx.Adam(lr=1e-2, granularity="tensor", horizon=horizon)
    opt = hx.HyperOptimizer(problem.model.parameters(), level / hx.Adam(lr=1e-4) / hx.SGD(lr=1e-6))
    weight = problem.model[0].weight
    for i in range(12):
        opt.zero_grad()
        problem.loss(i).backward()
        before = weight.detach().clone(), opt.hyperparameters()[0]["lr"].clone(), opt.hyperparameters()[1]["lr"].clone()
        if i in (4, 5, 9):
            weight.grad = None
        opt.step()
        lrs = opt.hyperparameters()[0]["lr"]
        if i in (4, 5, 9):
            assert torch.equal(weight, before[0])
            assert lrs[0] == before[1][0]
            assert (lrs[1:] != before[1][1:]).all()
        rows = opt.param_groups[0]["tower"]
        start = _C.tower_offsets(opt.stack.plan())[1][0]
        assert (rows[:, start:] == rows[0, start:])[:, : len(opt.hyperparameters()[1])].all()


@pytest.mark.parametrize("policy", ["hold", "skip", "raise"])
@pytest.mark.parametrize("where", ["gradient", "hypergradient"])
@pytest.mark.parametrize("horizon", [1, 4])
def test_policies_for_what_is_not_finite(policy, where, horizon):
    problem = Regression(10)
    stack = hx.SGD(lr=1e-2, learn="lr", horizon=horizon) / hx.SGD(lr=1e-3)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack, nonfinite=policy)
    problem.train(opt, range(3))
    opt.zero_grad()
    problem.loss(3).backward()
    p = problem.model[0].weight
    if where == "gradient":
        p.grad[0, 0] = float("nan")
    else:
        opt.state[p]["last_grad" if horizon == 1 else "trace_lr"][0, 0] = float("inf")
    params = [q.detach().clone() for q in problem.model.parameters()]
    lr, state = opt.hyperparameters()[0]["lr"].item(), copy.deepcopy(opt.state_dict()["state"])
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="nothing was changed"):
            opt.step()
        assert opt.skipped_steps() == opt.held_steps() == 0
    else:
        opt.step()
        assert opt.held_steps() == (policy == "hold" and where == "hypergradient")
        assert opt.skipped_steps() == 1 - opt.held_steps()
    assert opt.hyperparameters()[0]["lr"] == lr
    same = all(torch.equal(a, b) for a, b in zip(problem.model.parameters(), params, strict=True))
    assert same == (policy != "hold" or where == "gradient")
    if same:
        for a, b in zip(state.values(), opt.state_dict()["state"].values(), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


@pytest.mark.parametrize("policy", ["hold", "skip", "raise"])
def test_a_policy_holds_where_nothing_is_learned(policy):
    problem = Regression(3)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam(), nonfinite=policy)
    problem.train(opt, range(2))
    before = problem.model[0].weight.detach().clone()
    opt.zero_grad()
    (problem.loss(2) * float("nan")).backward()
    if policy == "raise":
        with pytest.raises(FloatingPointError):
            opt.step()
    else:
        opt.step()
        assert opt.skipped_steps() == 1
    assert torch.equal(problem.model[0].weight, before)


def test_a_trace_fades_while_its_parameter_has_no_gradient():
    w, u = (torch.nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (1.0, 2.0))
    opt = hx.HyperOptimizer([w, u], hx.SGD(lr=0.1, horizon=4) / hx.SGD(lr=1e-3))
    script = [(1.0, 10.0), (2.0, None), (3.0, 20.0), (4.0, 30.0)]
    lr, z = 0.1, [0.0, 0.0]
    for grads in script:
        lr -= 1e-3 * sum(g * t for g, t in zip(grads, z, strict=True) if g is not None)
        z = [0.75 * t - (0.0 if g is None else g) for g, t in zip(grads, z, strict=True)]
        w.grad, u.grad = (None if g is None else torch.tensor([g], dtype=torch.float64) for g in grads)
        opt.step()
        assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(lr, rel=1e-14)
        assert [opt.state[p]["trace_lr"].item() for p in (w, u)] == pytest.approx(z, rel=1e-14)


def test_a_learning_rate_does_not_turn_negative_and_says_so():
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = hx.HyperOptimizer([w], hx.SGD(lr=0.1) / hx.SGD(lr=1.0))
    for g in (1.0, -1.0, 1.0):
        w.grad = torch.tensor([g], dtype=torch.float64)
        opt.step()
    assert opt.hyperparameters()[0]["lr"] == 0
    assert opt.bounded_steps()[0]["lr"] == 2


@pytest.mark.parametrize(
    ("level", "name"),
    [(hx.Adam, "beta1"), (hx.Adam, "beta2"), (hx.Adadelta, "rho"), (hx.RMSprop, "alpha"), (hx.SGD, "momentum")],
)
@pytest.mark.parametrize("space", ["linear", "tanh"])
def test_a_bound_of_one_keeps_a_coefficient_below_one(level, name, space):
    """At 1 the bias correction divides by 0."""
    momentum = {"momentum": 0.5} if level is hx.SGD else {}
    base = level(learn=name, bounds={name: (0.0, 1.0)}, space={name: space}, **momentum)
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = hx.HyperOptimizer([w], base / hx.SGD(lr=0.0))
    opt.hyperparameters()[0][name].fill_(1.0)
    for _ in range(3):
        w.grad = torch.ones_like(w)
        opt.step()
    assert opt.hyperparameters()[0][name] == 1 - 2.0**-30
    assert w.isfinite().all()


@pytest.mark.parametrize(
    ("space", "written", "taken"),
    [("log", -1.0, 0.0), ("square", -1.0, 0.0), ("softplus", -1.0, 0.0), ("tanh", 2.0, 1.0)],
)
def test_bounds_end_where_the_coordinate_does(space, written, taken):
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = hx.HyperOptimizer([w], hx.SGD(lr=0.1, space={"lr": space}, bounds={"lr": (-3.0, 3.0)}) / hx.SGD(lr=0.1))
    opt.hyperparameters()[0]["lr"].fill_(written)
    for _ in range(3):
        w.grad = torch.ones_like(w)
        opt.step()
        assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(taken, abs=1e-12)


def test_an_unbounded_learning_rate_turns_negative_and_comes_back():
    """As in the paper's package."""
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = hx.HyperOptimizer([w], gdtuo.SGD(0.1) / gdtuo.SGD(0.1))
    alpha, last, seen = 0.1, 0.0, []
    for g in (1.0, -2.0, 1.0, 1.0, 2.0, 1.0):
        alpha += 0.1 * g * last
        last = g
        w.grad = torch.tensor([g], dtype=torch.float64)
        opt.step()
        assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(alpha, rel=1e-12)
        seen.append(alpha)
    assert min(seen) < -0.2 < 0.1 < seen[-1]


def test_the_package_has_an_alpha_for_each_tensor():
    """SGDPerParam of the paper's package, also under levels that all tensors share."""
    problem = Regression(20)
    alphas = [0.01, 0.02, 0.005, 0.03]
    opt = hx.HyperOptimizer(problem.model.parameters(), gdtuo.SGDPerParam() / gdtuo.SGD(1e-3) / gdtuo.SGD(1e-6))
    opt.param_groups[0]["lr"].copy_(torch.tensor(alphas, dtype=torch.float64))
    names = [name for name, _ in problem.model.named_parameters()]
    pairs = zip(names, alphas, strict=True)
    with float64_by_default():
        wrapper = package.ModuleWrapper(
            copy.deepcopy(problem.model),
            optimizer=package.SGDPerParam(pairs, optimizer=package.SGD(1e-3, optimizer=package.SGD(1e-6))),
        )
        wrapper.initialize()
        for i in range(20):
            problem.train(opt, range(i, i + 1))
            wrapper.begin()
            loss = problem.loss(i, wrapper.forward)
            wrapper.zero_grad()
            loss.backward()
            wrapper.step()
    theirs = [wrapper.optimizer.parameters[name + "_alpha"].item() for name in names]
    assert opt.hyperparameters()[0]["lr"].tolist() == pytest.approx(theirs, rel=1e-10)
    shared = wrapper.optimizer.optimizer.parameters["alpha"].item()
    assert opt.hyperparameters()[1]["lr"].item() == pytest.approx(shared, rel=1e-10) != 1e-3


@pytest.mark.parametrize("learn", ["lr", "all"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_trace_is_the_discounted_sum_of_the_derivatives_of_each_update(case, learn):
    checks.traces_are_discounted_sums(case, case.names if learn == "all" else ("lr",))


def test_a_cosine_points_the_way_of_the_coordinate():
    """h = x^2 falls with x where x < 0."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = hx.HyperOptimizer([p], hx.SGD(lr=0.01, space={"lr": "square"}, normalize=True) / hx.SGD(lr=0.15))
    lrs = []
    for g in (1.0, -1.0, 1.0, 1.0):  # against the last one, against it, along it
        p.grad = torch.full_like(p, g)
        opt.step()
        lrs.append(opt.hyperparameters()[0]["lr"].item())
    torch.testing.assert_close(lrs, [0.1**2, 0.05**2, 0.1**2, 0.25**2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("space", ["log", "softplus", "tanh"])
def test_a_move_beyond_all_values_can_be_undone(space):
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = hx.HyperOptimizer([p], hx.SGD(lr=0.01, space={"lr": space}, normalize=True) / hx.SGD(lr=710.0))
    for g in (1.0, -1.0, -1.0):
        p.grad = torch.full_like(p, g)
        opt.step()
        lr = opt.hyperparameters()[0]["lr"].item()
        if g == -1.0 and lr < 0.01:
            assert 0 < lr < 1e-290
            assert opt.bounded_steps()[0]["lr"] == 1
    assert lr > 0.01


def test_a_clip_holds_whatever_the_hypergradient():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = hx.HyperOptimizer([p], hx.SGD(lr=0.5, clip=1.0) / hx.SGD(lr=1e-3))
    for _ in range(2):
        p.grad = torch.full_like(p, 1e80)  # its square is a number, the square of that is not
        opt.step()
    torch.testing.assert_close(opt.hyperparameters()[0]["lr"].item(), 0.501, rtol=1e-12, atol=0)


def test_arguments_of_the_last_level_alone_are_pointed_out():
    p = torch.nn.Parameter(torch.zeros(1))
    for first in (hx.Adam(), hx.Adam(learn="lr")):
        with pytest.warns(UserWarning, match="nothing heeds normalize, since no level stands above"):
            hx.HyperOptimizer([p], first / hx.SGD(lr=0.02, normalize=True))
    hx.HyperOptimizer([p], hx.Stack.of(hx.SGD(normalize=True), 3))  # a warning would be an error
