"""Each rule by itself: its operators against the fp64 twin in plain torch, and what torch asks of operators."""

from __future__ import annotations

import contextlib

import pytest
import torch
from cases import CASES, RULE_CASES, level_of, structure_of
from problems import relative_error
from reference import TWINS
from torch import Tensor

import hyperopt_ext as hx
from hyperopt_ext.optimizer import _Update
from hyperopt_ext.stack import RULES

OPS = torch.ops.hyperopt_ext
every_rule = pytest.mark.parametrize("case", CASES, ids=str)


def subsets(rule):
    """Every single hyperparameter, all pairs and all."""
    names = [h["name"] for h in RULES[rule]["hypers"]]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return [*((name,) for name in names), *pairs, tuple(names)]


def optimizer(case, params, learn, **hyper):
    """One that learns and stays: linear coordinates leave the values as they are, to the bit, 0 in log included."""
    hyper = {**case.hyper, **hyper}
    level = level_of(case.rule, hyper, learn=learn, space=dict.fromkeys(hyper, "linear"))
    return hx.HyperOptimizer(params, level / hx.SGD(lr=0.0))


def operands(opt, params, grads):
    """What the operators of a pass take (csrc/cpu/passes.h), for parameters that have taken a step."""
    return (params, grads, *_Update(opt._groups[0], opt.param_groups[0]["params"], opt.state).active[2:])


def hypergradient(opt, params, grads) -> Tensor:
    return getattr(OPS, f"{opt.stack[0].rule}_hypergradient")(*operands(opt, params, grads), False)[0]


def twin_run(case, w, grads, hyper):
    """The twin's last parameter after steps on `grads`, with the hyperparameters of the last step as leaves."""
    state = {name: torch.zeros_like(w) for name in RULES[case.rule]["state"]}
    fixed = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in hyper.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in fixed.items()}
    for step, g in enumerate(grads, 1):
        last = step == len(grads)
        w, state = TWINS[case.rule](
            w.detach(), g, {k: v.detach() for k, v in state.items()}, leaves if last else fixed, step
        )
    return w, leaves


def some_gradients(steps=5, size=3000, dtype=torch.float64):
    grads = torch.randn(steps + 1, size, dtype=dtype)
    grads[:, :100] = 0  # elements that never saw a gradient
    grads[-2, 100:200] = 0
    return list(grads[:-1]), grads[-1]


def with_zeros():
    """Every case at its generic point and with each hyperparameter at 0, where the level allows that."""
    params = []
    for case in CASES:
        for zeroed in [{}, *({name: 0.0} for name in case.hyper)]:
            with contextlib.suppress(ValueError):
                level_of(case.rule, {**case.hyper, **zeroed})
                params.append(pytest.param(case, zeroed, id="-".join([case.rule, *zeroed])))
    return params


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize(("case", "zeroed"), with_zeros())
def test_hypergradient_equals_autograd(case, zeroed, steps):
    """For every learned set, also where a coefficient is 0 and where no gradient ever was."""
    hyper = {**case.hyper, **zeroed}
    grads, upstream = some_gradients(steps)
    start = torch.randn(grads[0].shape, dtype=torch.float64)
    if "eps" in zeroed:  # may be 0 / 0 in the rule itself, in torch.optim too
        defined = twin_run(case, start, grads, hyper)[0].isfinite()
        assert defined.sum() > 2000
        start, upstream, grads = start[defined], upstream[defined], [g[defined] for g in grads]
    w, leaves = twin_run(case, start, grads, hyper)
    expected = torch.autograd.grad((w * upstream).sum(), list(leaves.values()), allow_unused=True)
    for learn in subsets(case.rule):
        if level_of(case.rule, hyper, learn=learn, space=dict.fromkeys(learn, "linear")).rule != case.rule:
            continue  # without momentum it is another one
        p = torch.nn.Parameter(start.clone())
        opt = optimizer(case, [p], learn, **zeroed)
        for g in grads:
            p.grad = g.clone()
            opt.step()
        assert relative_error(p.detach(), w.detach()) < 1e-12
        got = hypergradient(opt, [p], [upstream])
        for i, (name, value) in enumerate(zip(leaves, expected, strict=True)):
            if name in learn:
                assert got[i].item() == pytest.approx(0.0 if value is None else value.item(), rel=1e-9, abs=1e-12), (
                    learn,
                    name,
                )
            else:
                assert got[i] == 0
        assert got[-1].item() == pytest.approx(upstream.square().sum().item(), rel=1e-12)


@every_rule
def test_fp32_hypergradients_are_close_to_fp64(case):
    names = [h["name"] for h in RULES[case.rule]["hypers"]]
    grads, upstream = some_gradients(size=100_000)
    results = []
    for dtype in (torch.float64, torch.float32):
        p = torch.nn.Parameter(torch.linspace(-1, 1, grads[0].numel(), dtype=torch.float64).to(dtype))
        opt = optimizer(case, [p], names)
        for g in grads:
            p.grad = g.float().to(dtype)
            opt.step()
        results.append(hypergradient(opt, [p], [upstream.float().to(dtype)]))
    for got, expected in zip(*reversed(results), strict=True):
        assert got.item() == pytest.approx(expected.item(), rel=1e-5)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_functional_form_equals_autograd(case, dtype):
    grads, upstream = some_gradients(3)
    start = torch.randn(grads[0].shape, dtype=torch.float64)
    w, leaves = twin_run(case, start, grads, case.hyper)
    expected = torch.autograd.grad((w * upstream).sum(), list(leaves.values()), allow_unused=True)

    level = level_of(case.rule, case.hyper)
    function, options = getattr(hx.functional, type(level).__name__.lower()), structure_of(level)
    hyper = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in case.hyper.items()}
    params, state = [start.to(dtype)], None
    for step, g in enumerate(grads, 1):
        params = [p.detach() for p in params]
        params, state = function(params, [g.to(dtype)], state, hyper, torch.tensor(step), **options)
    assert not any(t.requires_grad for slot in state.values() for t in slot)
    got = torch.autograd.grad((params[0] * upstream.to(dtype)).sum(), list(hyper.values()))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert relative_error(params[0].detach(), w.detach()) < (1e-12 if dtype == torch.float64 else 1e-6)
    for g, e in zip(got, expected, strict=True):
        assert g.item() == pytest.approx(0.0 if e is None else e.item(), rel=tolerance, abs=1e-12)


def functional_arguments(case, requires_grad=True):
    names = [h["name"] for h in RULES[case.rule]["hypers"]]
    params = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    state = [torch.rand_like(p) + 0.1 for _ in RULES[case.rule]["state"] for p in params]
    hyper = [torch.tensor(case.hyper[name], dtype=torch.float64, requires_grad=requires_grad) for name in names]
    return params, [torch.randn_like(p) for p in params], state, hyper, torch.tensor(3)


@every_rule
def test_functional_form_passes_gradcheck(case):
    params, grads, state, hyper, step = functional_arguments(case)
    op = getattr(OPS, case.rule)

    def update(*hyper):
        return tuple(op(params, grads, state, list(hyper), step, True)[: len(params)])

    torch.autograd.gradcheck(update, hyper)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unrolled_steps_equal_autograd(case, dtype):
    """Ten steps with gradients that depend on the parameters, differentiated with respect to all that went in."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(50, dtype=torch.float64, generator=generator)
    start = torch.randn(50, dtype=torch.float64, generator=generator)
    level = level_of(case.rule, case.hyper)
    function, options = getattr(hx.functional, type(level).__name__.lower()), structure_of(level)

    def unroll(update, dtype):
        w = start.to(dtype).requires_grad_()
        first = {name: torch.full_like(w, 0.1, requires_grad=True) for name in RULES[case.rule]["state"]}
        hyper = {name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in case.hyper.items()}
        p, state = w, first
        for step in range(1, 11):
            g = torch.sin(p) * 0.5 + (p - target.to(dtype)) * 0.1
            p, state = update(p, g, state, hyper, step)
        inputs = [w, *first.values(), *hyper.values()]
        loss = (p * target.to(dtype)).sum() + sum(s.square().sum() for s in state.values())
        return torch.autograd.grad(loss, inputs, allow_unused=True)

    def ours(p, g, state, hyper, step):
        lists = {name: [s] for name, s in state.items()}
        [new], after = function([p], [g], lists, hyper, torch.tensor(step), detach=False, **options)
        return new, {name: t for name, [t] in after.items()}

    expected = unroll(TWINS[case.rule], torch.float64)
    for got, e in zip(unroll(ours, dtype), expected, strict=True):
        e = torch.zeros_like(got, dtype=torch.float64) if e is None else e
        scale = max(e.abs().max().item(), 1e-3)
        assert (got - e).abs().max().item() < (1e-9 if dtype == torch.float64 else 1e-3) * scale


@every_rule
@pytest.mark.parametrize("detach", [True, False])
def test_second_derivatives_are_an_error_not_a_wrong_number(case, detach):
    params, grads, state, hyper, step = functional_arguments(case)
    new = getattr(OPS, case.rule)(params, grads, state, hyper, step, detach)[0]
    (first,) = torch.autograd.grad(new.sum(), hyper[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(first, hyper[:1])


@every_rule
@pytest.mark.parametrize("learn", ["lr", "all"])
def test_opcheck(case, learn):
    names = [h["name"] for h in RULES[case.rule]["hypers"]]
    params = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    opt = optimizer(case, params, names if learn == "all" else learn)
    grads = [torch.randn_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    opt.step()
    plain = [p.detach().clone() for p in params]
    arguments, check = operands(opt, plain, grads), torch.library.opcheck
    check(getattr(OPS, f"{case.rule}_hypergradient").default, (*arguments, True))
    for op in ("norms", "step_", "settle_"):
        check(getattr(OPS, f"{case.rule}_{op}").default, arguments)
    check(getattr(OPS, case.rule).default, (*functional_arguments(case, requires_grad=learn == "all"), learn == "lr"))
    params, grads, state, hyper, step = functional_arguments(case, requires_grad=False)
    check(getattr(OPS, f"{case.rule}_backward").default, (grads, params, grads, state, hyper, step))
    needs = 1 if learn == "lr" else (1 << (2 + len(RULES[case.rule]["state"]))) - 1
    check(getattr(OPS, f"{case.rule}_vjp").default, (grads, state, params, grads, state, hyper, step, needs))


def test_opcheck_of_the_tower():
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(2))], hx.Adam() / hx.SGD() / hx.SGD())
    group = opt._groups[0]
    for op, columns in [(OPS.tower_, 11), (OPS.cap_, 3)]:
        sums = torch.ones(1, columns, dtype=torch.float64)
        torch.library.opcheck(op.default, ([group.tower], [sums], [group.plan], [group.bounds], [group.settings]))


def test_every_rule_is_in_the_table():
    assert set(RULES) == set(RULE_CASES) == set(TWINS)
    for case in CASES:
        assert set(case.hyper) == {h["name"] for h in RULES[case.rule]["hypers"]}
        assert {case.make(**options).rule for options in case.options} == {case.rule}
