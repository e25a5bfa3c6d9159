"""The functional form beside what it states: the tower, and torch's own tools around a step."""

from __future__ import annotations

import re

import pytest
import torch
from cases import CASES, stacks
from hypothesis import given
from problems import Regression, assert_same, relative_error
from reference import TWINS
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import hyperopt_ext as hx
from hyperopt_ext.stack import RULES
from hyperopt_ext.testing import ReferenceTower

STEPS = 40


def as_numbers(hyperparameters):
    return [{name: value.item() for name, value in level.items()} for level in hyperparameters]


def train(tower, problem, steps=STEPS):
    """With the model as a function of a dict of parameters."""

    def loss_of(params, x, y):
        return (functional_call(problem.model, params, (x,)) - y).square().mean()

    params, state = tower.init(dict(problem.model.named_parameters()))
    for i in range(steps):
        grads = torch.func.grad(loss_of)(params, problem.x[i], problem.y[i])
        params, state = tower.step(params, grads, state)
    return list(params.values()), tower.hyperparameters(state), state


@given(stack=stacks())
def test_a_tower_of_functions_equals_autograd_and_the_optimizer(stack):
    problem = Regression(STEPS)
    before = [p.detach().clone() for p in problem.model.parameters()]
    params, hyper, _ = train(hx.functional.tower(stack), problem)
    assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), before, strict=True))
    reference = ReferenceTower(problem.model.parameters(), stack, TWINS)
    for i in range(STEPS):
        reference.step(lambda params, i=i: problem.loss_of(i, params))
    first = [level.values() for level in stack]
    assert_same(params, hyper, reference.params, reference.hyperparameters(), first=first)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    problem.train(opt, range(STEPS))
    assert_same(params, hyper, problem.model.parameters(), as_numbers(opt.hyperparameters()), first=first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tower_of_functions_in_low_precision_equals_the_optimizer(dtype):
    problem = Regression(STEPS, dtype)
    stack = hx.AdamW(lr=1e-2, space={"lr": "multiplicative"}, bounds={"lr": (1e-2, 1.1e-2)}) / hx.Adam() / hx.SGD()
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    tower = hx.functional.tower(stack)
    params, state = tower.init(list(problem.model.parameters()))
    for i in range(STEPS):
        opt.zero_grad()
        problem.loss(i).backward()
        params, state = tower.step(params, [p.grad for p in problem.model.parameters()], state)
        opt.step()
    assert all(p.dtype == dtype for p in params)
    ours, theirs = (torch.cat([p.detach().flatten() for p in ps]) for ps in (params, problem.model.parameters()))
    assert relative_error(ours, theirs) <= (1e-5 if dtype == torch.float32 else 1e-2)
    hyper = as_numbers(opt.hyperparameters())
    assert as_numbers(tower.hyperparameters(state))[0]["lr"] == pytest.approx(hyper[0]["lr"], rel=1e-4)


def test_a_tower_of_functions_changes_nothing_and_can_go_back():
    tower, problem = hx.functional.tower(hx.Adam(lr=1e-2) / hx.SGD(lr=1e-3)), Regression(3)
    params, state = tower.init(list(problem.model.parameters()))
    grads = [torch.ones_like(p) for p in params]
    params, state = tower.step(params, grads, state)
    leaves = torch.utils._pytree.tree_leaves((params, grads, state))
    versions = [t._version for t in leaves]
    first, second = tower.step(params, grads, state), tower.step(params, grads, state)
    assert [t._version for t in leaves] == versions
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (first, second)), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t, p, g, s: hx.functional.tower("adam"), TypeError, "stack must be a level or a stack"),
        (
            lambda t, p, g, s: hx.functional.tower(hx.Wrap(torch.optim.Muon) / hx.SGD()),
            TypeError,
            "makes its step by another optimizer",
        ),
        (lambda t, p, g, s: hx.functional.of(hx.Wrap), TypeError, "Wrap makes its step by another optimizer"),
        (lambda t, p, g, s: hx.functional.of("adam"), TypeError, "spec must be a class of levels, .* not 'adam'"),
        (lambda t, p, g, s: hx.functional.of(hx.SGD()), TypeError, "spec must be a class of levels"),
        (lambda t, p, g, s: hx.functional.tower(hx.SGD(clip=1.0)), ValueError, "no clip, which SGD"),
        (lambda t, p, g, s: hx.functional.tower(hx.SGD() / hx.SGD(horizon=9)), ValueError, "no horizon"),
        (lambda t, p, g, s: t.init(p[0]), TypeError, "params must be a list of tensors, or a dict"),
        (lambda t, p, g, s: t.step(p, g, None), TypeError, "state must be the TowerState"),
        (lambda t, p, g, s: t.step(p, [None, g[1]], s), TypeError, "grads must be a list of tensors"),
        (lambda t, p, g, s: t.step(p, g[:1], s), ValueError, "grads must be of the shapes of params"),
        (lambda t, p, g, s: t.step(p, [g[1], g[0]], s), ValueError, "grads must be of the shapes of params"),
        (lambda t, p, g, s: t.step(dict(a=p[0], b=p[1]), dict(b=g[1], a=g[0]), s), ValueError, "the keys of params"),
        (lambda t, p, g, s: hx.functional.tower(hx.SGD()).step(p, g, s), ValueError, "state is of 2 levels, but SGD"),
        (
            lambda t, p, g, s: hx.functional.tower(hx.SGD() / hx.SGD()).step(p, g, s),
            ValueError,
            "state is of another stack than SGD/SGD",
        ),
        (
            lambda t, p, g, s: hx.functional.tower(hx.Adam(learn="lr") / hx.SGD()).step(p, g, s),
            ValueError,
            "state is of another stack than Adam/SGD",
        ),
        (lambda t, p, g, s: t.step(p[:1], g[:1], s), ValueError, "state must be of the shapes of params"),
    ],
)
def test_clear_errors_of_a_tower_of_functions(change, error, words):
    tower = hx.functional.tower(hx.Adam() / hx.SGD())
    params, state = tower.init([torch.ones(2), torch.ones(3)])
    with pytest.raises(error, match=words):
        change(tower, params, [torch.ones(2), torch.ones(3)], state)


BAD_STEPS = {
    "a float where a tensor is needed": (
        lambda w: hx.functional.adam([w], [w], None, {"lr": 0.1}, torch.tensor(1)),
        TypeError,
        "lr must be a tensor of one number, as torch.tensor(0.1), not 0.1",
    ),
    "an int where a tensor is needed": (
        lambda w: hx.functional.adam([w], [w], None, {}, 1),
        TypeError,
        "step must be a tensor of one number",
    ),
    "an integer lr": (
        lambda w: hx.functional.adam([w], [w], None, {"lr": torch.tensor(1)}, torch.tensor(1)),
        ValueError,
        "lr must be a tensor of one floating-point number",
    ),
    "a state of another rule": (
        lambda w: hx.functional.adam([w], [w], {"momentum_buffer": [w]}, {}, torch.tensor(1)),
        ValueError,
        "state must hold exp_avg, exp_avg_sq for adam, not momentum_buffer",
    ),
    "a hyperparameter of another rule": (
        lambda w: hx.functional.adam([w], [w], None, {"momentum": torch.tensor(0.1)}, torch.tensor(1)),
        ValueError,
        "hyper names 'momentum', but adam has lr, beta1",
    ),
    "fewer gradients than parameters": (
        lambda w: hx.functional.adam([w, w], [w], None, {}, torch.tensor(1)),
        ValueError,
        "grads must have the length 2, 1 for each of the params, not 1",
    ),
    "fewer states than parameters": (
        lambda w: hx.functional.sgd([w, w], [w, w], {"momentum_buffer": [w]}, MOMENTUM, torch.tensor(1)),
        ValueError,
        "state must have the length 2, 1 for each of the params, not 1",
    ),
    "a gradient of another shape": (
        lambda w: hx.functional.sgd([w], [w[:1]], None, {}, torch.tensor(1)),
        ValueError,
        "grads of params[0] must be a dense Float tensor of shape [2]",
    ),
    "a tensor that is no list": (
        lambda w: hx.functional.sgd(w, w, None, {}, torch.tensor(1)),
        TypeError,
        "params must be a list of tensors",
    ),
}
MOMENTUM = {"momentum": torch.tensor(0.5)}


@pytest.mark.parametrize(("step", "error", "words"), BAD_STEPS.values(), ids=BAD_STEPS)
def test_clear_errors_in_eager_mode_and_while_tracing(step, error, words):
    w = torch.ones(2)
    with pytest.raises(error, match=re.escape(words)):
        step(w)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=re.escape(words)):
        torch.compile(step, fullgraph=True, backend="eager")(w)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gradient_that_nobody_asks_for_changes_no_other(case):
    function = case.function
    generator = torch.Generator().manual_seed(0)

    def leaf():
        return torch.rand(7, 3, generator=generator, dtype=torch.float64).add_(0.1).requires_grad_()

    inputs = {name: leaf() for name in ["param", "grad", *RULES[case.rule]["state"]]}
    hyper = {name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in case.hyper.items()}
    state = {name: [inputs[name]] for name in RULES[case.rule]["state"]}
    [new], after = function([inputs["param"]], [inputs["grad"]], state, hyper, torch.tensor(3), detach=False)
    out = new.sum() + sum(s.square().sum() for [s] in after.values())
    leaves = [*inputs.values(), *hyper.values()]
    every = torch.autograd.grad(out, leaves, retain_graph=True)
    for leaf_, expected in zip(leaves, every, strict=True):
        [alone] = torch.autograd.grad(out, leaf_, retain_graph=True)
        assert torch.equal(alone, expected)


def unrolled(problem, steps, around, lr):
    """The loss after steps of Adam, and where they started; `around(step, ...)` calls each step."""

    def step(i, m, v, params):
        grads = torch.autograd.grad(problem.loss_of(i, params), params, create_graph=True)
        state = {"exp_avg": m, "exp_avg_sq": v}
        new, state = hx.functional.adam(params, grads, state, {"lr": lr}, torch.tensor(i + 1), detach=False)
        return state["exp_avg"], state["exp_avg_sq"], new

    start = [p.detach().clone().requires_grad_() for p in problem.model.parameters()]
    m, v, params = [torch.zeros_like(p) for p in start], [torch.zeros_like(p) for p in start], start
    for i in range(steps):
        m, v, params = around(step, i, m, v, params)
    return problem.loss_of(steps, params), start


def test_checkpointed_steps_have_the_same_gradients():
    problem, lr = Regression(7), torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    results = []
    for around in (
        lambda step, *args: step(*args),
        lambda step, *args: checkpoint(step, *args, use_reentrant=False),
    ):
        loss, start = unrolled(problem, 6, around, lr)
        results.append(torch.autograd.grad(loss, [lr, *start]))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= 1e-12
        assert b.abs().max() > 0


def test_the_profiler_shows_one_operator_a_pass_by_its_name():
    problem = Regression(3)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam(trust=0.1) / hx.SGD(lr=1e-5))
    problem.train(opt, range(2))
    problem.loss(2).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
        lr = torch.tensor(0.1, requires_grad=True)
        [new], _ = hx.functional.adam([torch.ones(2)], [torch.ones(2)], None, {"lr": lr}, torch.tensor(1))
        new.sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    ours = {name: n for name, n in counts.items() if name.startswith("hyperopt_ext::")}
    names = ("adam_hypergradient", "tower_", "adam_norms", "cap_", "adam_step_", "adam", "adam_backward")
    assert ours == dict.fromkeys((f"hyperopt_ext::{name}" for name in names), 1)


class Step(torch.nn.Module):
    """A step as torch.export takes it."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, *args):
        return self.step(*args)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_can_be_exported(case):
    function = case.function

    def arguments(seed):
        generator = torch.Generator().manual_seed(seed)
        new = [torch.rand(5, generator=generator) for _ in range(2 + len(RULES[case.rule]["state"]))]
        state = {name: [s] for name, s in zip(RULES[case.rule]["state"], new[2:], strict=True)}
        hyper = {name: torch.tensor(value / seed) for name, value in case.hyper.items()}
        return new[:1], new[1:2], state, hyper, torch.tensor(seed)

    exported = torch.export.export(Step(lambda *args: function(*args)), arguments(1)).module()
    for seed in (1, 2):
        expected = function(*arguments(seed))
        got = exported(*arguments(seed))
        for a, b in zip(*map(torch.utils._pytree.tree_leaves, (got, expected)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("strict", [False, True])
def test_what_cannot_be_exported_says_so(strict):
    problem = Regression(1)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam() / hx.SGD())
    problem.loss(0).backward()
    with pytest.raises(Exception, match="export a step of hx"):
        torch.export.export(Step(lambda: opt.step()), (), strict=strict)  # torch 2.11 takes no bound method
    tower = hx.functional.tower(hx.Adam() / hx.SGD())
    params, state = tower.init([torch.ones(2)])
    with pytest.raises(Exception, match="export a step of hx"):
        torch.export.export(Step(tower.step), (params, params, state), strict=strict)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "with gaps": lambda t: torch.stack([t, torch.zeros_like(t)], -1)[..., 0],
    "a row for all": lambda t: t[:1].expand_as(t),
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_step_of_any_layout_equals_the_contiguous_one(layout):
    generator = torch.Generator().manual_seed(0)
    values = [layout(torch.rand(300, 200, generator=generator) + 0.1) for _ in range(4)]

    def step(tensors):
        w, g, m, v = (t.detach().requires_grad_() for t in tensors)
        lr = torch.tensor(0.1, requires_grad=True)
        state = {"exp_avg": [m], "exp_avg_sq": [v]}
        [new], after = hx.functional.adam([w], [g], state, {"lr": lr}, torch.tensor(3), detach=False)
        out = new.sum() + after["exp_avg"][0].square().sum()
        return [new, *torch.autograd.grad(out, [w, g, m, v, lr])]

    for a, b in zip(step(values), step([t.contiguous() for t in values]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_parameters_without_elements_next_to_others(shape):
    lr = torch.tensor(0.1, requires_grad=True)
    w = [torch.zeros(shape), torch.ones(2)]
    new, _ = hx.functional.adam(w, w, None, {"lr": lr}, torch.tensor(1), detach=False)
    [slope] = torch.autograd.grad(new[0].sum() + new[1].sum(), lr)
    torch.testing.assert_close(slope, torch.tensor(-2.0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_operator_has_a_meta_kernel(case):
    """Shapes and dtypes without data: what fake tensors, and so all of torch.compile, are made of."""
    level = case.level()
    with torch.device("meta"):
        params = [torch.nn.Parameter(torch.empty(3, 2, dtype=torch.bfloat16)), torch.nn.Parameter(torch.empty(4))]
        opt = hx.HyperOptimizer(params, level.replace(trust=0.1) / hx.SGD())
        for p in params:
            p.grad = torch.empty_like(p)
        opt.step()
        step, hyper = torch.tensor(1), {"lr": torch.empty((), requires_grad=True)}
        function = case.function
        grads = [torch.empty_like(p, requires_grad=True) for p in params]
        hyper |= {name: torch.empty(()) for name in ("momentum",) if name in case.hyper}
        new, state = function(params, grads, None, hyper, step, detach=False)
        loss = sum(p.float().sum() for p in new)
        got = torch.autograd.grad(loss, [*params, *grads, hyper["lr"]])
    for a, b in zip([*new, *got], [*params, *params, *grads, hyper["lr"]], strict=True):
        assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)
    for slot in state.values():
        assert [s.dtype for s in slot] == [torch.float32] * 2


def test_what_is_not_named_is_at_its_default_in_double():
    generator = torch.Generator().manual_seed(0)
    w, g = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))
    p = torch.nn.Parameter(w.clone())
    p.grad = g
    torch.optim.Adam([p], lr=0.1).step()
    lr = torch.tensor(0.1, dtype=torch.float64)
    [new], _ = hx.functional.adam([w], [g], None, {"lr": lr}, torch.tensor(1))
    torch.testing.assert_close(new, p.detach(), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    "stack",
    [
        hx.Adam(lr=0.01, initial_state={"exp_avg": 0.3, "exp_avg_sq": 0.2}) / hx.SGD(lr=1e-4),
        hx.SGD(lr=0.01, learn="lr") / hx.Adagrad(lr=1e-3, initial_accumulator_value=0.5),
        hx.Adagrad(lr=0.01, initial_accumulator_value=0.5, initial_state={"sum": 0.1}) / hx.SGD(lr=1e-4),
    ],
    ids=["states", "a level above", "the state in two ways"],
)
def test_a_tower_starts_as_the_optimizer_does(stack):
    problem = Regression(30)
    opt, tower = hx.HyperOptimizer(problem.model.parameters(), stack), hx.functional.tower(stack)
    params, state = tower.init(problem.model.parameters())
    for i in range(30):
        leaves = [p.clone().requires_grad_() for p in params]
        params, state = tower.step(params, torch.autograd.grad(problem.loss_of(i, leaves), leaves), state)
        problem.train(opt, range(i, i + 1))
    assert_same(problem.model.parameters(), opt.hyperparameters(), params, tower.hyperparameters(state))


def test_a_root_may_come_to_be_below_0():
    stack = hx.SGD(lr=0.01, learn="lr", space={"lr": "square"}) / hx.SGD(lr=0.3)
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt, tower = hx.HyperOptimizer([w], stack), hx.functional.tower(stack)
    params, state = tower.init([w])
    roots = []
    for i in range(6):  # the last step was wrong, each time
        w.grad = torch.full_like(w, (-1.0) ** i)
        opt.step()
        params, state = tower.step(params, [w.grad], state)
        roots.append(state.coordinates[0]["lr"].item())
    assert min(roots) < 0
    assert_same([w], opt.hyperparameters(), params, tower.hyperparameters(state))


WRONG = {
    "a number of the level": (
        lambda w, f: f.sgd([w], [w], None, {}, torch.tensor(1), momentum=True),
        "sgd has no argument 'momentum': name it in hyper",
    ),
    "no such variant": (
        lambda w, f: f.sgd([w], [w], None, {}, torch.tensor(1), amsgrad=True),
        "sgd has no argument 'amsgrad'; it has nesterov",
    ),
    "hyper is no dict": (lambda w, f: f.adam([w], [w], None, None, torch.tensor(1)), "hyper must be a dict of tensors"),
    "state is a list": (lambda w, f: f.adam([w], [w], [w, w], {}, torch.tensor(1)), "state must be None or a dict"),
    "betas": (
        lambda w, f: f.adam([w], [w], None, {"betas": torch.ones(2)}, torch.tensor(1)),
        "betas go by their names",
    ),
    "a complex parameter": (
        lambda w, f: f.tower(hx.SGD()).init([w + 0j]),
        "only floating-point tensors can be trained",
    ),
    "a module": (
        lambda w, f: f.tower(hx.SGD()).init(torch.nn.Linear(1, 1)),
        r"those of the Linear: write model\.param",
    ),
    "a gradient that is not there": (
        lambda w, f: f.tower(hx.SGD()).step({"a": w}, {"a": None}, f.tower(hx.SGD()).init({"a": w})[1]),
        r"grads\['a'\] is None \(a parameter that took no part has a gradient of zeros",
    ),
}


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call(torch.ones(2), hx.functional)
