"""Mixed precision as torch does it: GradScaler in both of its ways, autocast, and parameters of half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import Regression, relative_error
from reference import TWINS
from stacks import LEARNING, every_stack

import hyperopt_ext as hx
from hyperopt_ext.testing import ReferenceTower

STEPS = 12


def values(opt, group=0):
    return [{k: v.tolist() for k, v in level.items()} for level in opt.hyperparameters(group)]


def scaled_step(problem, opt, scaler, i, factor=1.0):
    opt.zero_grad()
    scaler.scale(problem.loss(i) * factor).backward()
    scaler.step(opt)
    scaler.update()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


@every_stack
def test_the_division_may_be_left_to_the_scaler(stack):
    divided, plain = Regression(STEPS), Regression(STEPS)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), stack) for p in (divided, plain))
    opt.unscales = False
    divided, opt = copy.deepcopy((divided, opt))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for i in range(STEPS):
        scaled_step(divided, opt, scaler, i)
        plain.train(expected, range(i, i + 1))
        for p, q in zip(divided.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert same(divided, plain)
    assert values(opt) == values(expected)


@every_stack
def test_scaled_gradients_give_what_gradients_give(stack):
    """A scale that is a power of two, and grows, changes no bit: the hypergradient, too, is that of the loss."""
    scaled, plain = Regression(STEPS), Regression(STEPS)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), stack) for p in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for i in range(STEPS):
        scaled_step(scaled, opt, scaler, i)
        plain.train(expected, range(i, i + 1))
        for p, q in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
            assert relative_error(p.grad, q.grad) > 1  # step() reads scaled gradients and leaves them as they are
    assert scaler.get_scale() == 2.0**14
    assert same(scaled, plain)
    assert values(opt) == values(expected)
    assert not hasattr(opt, "grad_scale")


@every_stack
@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_with_an_infinite_gradient_changes_nothing(stack, first, bad):
    """Of all groups, though the gradients of one alone are not finite; and the next hypergradient is right."""
    problem, clean = Regression(STEPS), Regression(STEPS)
    opt, expected = (
        hx.HyperOptimizer([{"params": layer.parameters()} for layer in (p.model[0], p.model[2])], stack)
        for p in (problem, clean)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(STEPS):
        if i == first:
            params = [p.detach().clone() for p in problem.model.parameters()]
            before = copy.deepcopy(opt.state_dict())
            opt.zero_grad()
            scaler.scale(problem.loss(i)).backward()
            problem.model[0].weight.grad[0, 0] = bad
            scaler.step(opt)
            scaler.update()
            assert scaler.get_scale() == 2.0**9
            assert all(torch.equal(p, q) for p, q in zip(params, problem.model.parameters(), strict=True))
            assert all(bool((opt.skipped_steps(g) == 1).all()) for g in (0, 1))
            after = opt.state_dict()
            for key, state in after["state"].items():
                assert state["step"] == i
                for name, value in before["state"].get(key, {}).items():
                    assert torch.equal(state[name], value)
            for a, b in zip(before["param_groups"], after["param_groups"], strict=True):
                assert all(torch.equal(a[name], b[name]) for name in opt.hyperparameters()[0])
        scaled_step(problem, opt, scaler, i)
        clean.train(expected, range(i, i + 1))
    assert same(problem, clean)
    assert [values(opt, 0), values(opt, 1)] == [values(expected, 0), values(expected, 1)]


def test_the_policy_raise_leaves_it_to_the_scaler():
    problem = Regression(3)
    opt = hx.HyperOptimizer(problem.model.parameters(), LEARNING["adam"], nonfinite="raise")
    scaler = torch.amp.GradScaler("cpu")
    scaled_step(problem, opt, scaler, 0, float("inf"))
    assert opt.skipped_steps() == 1


@every_stack
def test_unscale_clip_step(stack):
    """The other way: step() sees gradients that were unscaled and clipped."""
    scaled, plain = Regression(STEPS), Regression(STEPS)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), stack) for p in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in [0, 1, 2, -1, *range(3, STEPS)]:
        opt.zero_grad()
        scaler.scale(scaled.loss(i) * (float("inf") if i < 0 else 1.0)).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(scaled.model.parameters(), 0.05)
        scaler.step(opt)
        scaler.update()
        if i < 0:
            assert (opt.skipped_steps() == 1).all()
            continue
        expected.zero_grad()
        plain.loss(i).backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 0.05)
        expected.step()
    assert same(scaled, plain)
    assert values(opt) == values(expected)


def test_what_has_no_gradient_skips_nothing():
    for level, in_one_group in ((hx.SGD(lr=0.1), False), (hx.SGD(lr=0.1, granularity="tensor"), True)):
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        groups = [{"params": params}] if in_one_group else [{"params": [p]} for p in params]
        opt = hx.HyperOptimizer(groups, level / hx.SGD(lr=0.0))
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale((params[0] * float("inf")).sum()).backward()
        scaler.step(opt)
        skipped = [opt.skipped_steps(i).reshape(-1) for i in range(len(groups))]
        assert torch.cat(skipped).tolist() == [1, 0]


def test_a_disabled_scaler():
    scaled, plain = Regression(3), Regression(3)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), LEARNING["adam"]) for p in (scaled, plain))
    for i in range(3):
        scaled_step(scaled, opt, torch.amp.GradScaler("cpu", enabled=False), i)
        plain.train(expected, range(i, i + 1))
    assert same(scaled, plain)


@pytest.mark.parametrize("trust", [None, 0.01])
def test_a_cap_measures_unscaled_gradients(trust):
    stack = hx.SGD(lr=0.5, momentum=0.9, learn="lr", trust=trust) / hx.SGD(lr=1e-3)
    scaled, plain = Regression(5), Regression(5)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), stack) for p in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(5):
        scaled_step(scaled, opt, scaler, i)
        plain.train(expected, range(i, i + 1))
    assert same(scaled, plain)


def test_a_scale_of_the_wrong_kind_is_an_error():
    p = torch.nn.Parameter(torch.ones(2))
    opt = hx.HyperOptimizer([p], LEARNING["adam"])
    p.grad = torch.ones(2)
    opt.grad_scale = torch.ones(2)
    with pytest.raises(ValueError, match="grad_scale must be one float32"):
        opt.step()


@pytest.mark.parametrize("scaled", [False, True])
def test_autocast(scaled):
    """The loss in bf16, parameters and towers in fp32: against plain autograd through the same autocast."""
    problem = Regression(STEPS, torch.float32)
    stack = hx.Adam(lr=1e-2, learn="lr") / hx.SGD(lr=1e-4)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    reference = ReferenceTower(problem.model.parameters(), stack, TWINS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=scaled)

    def loss_of(params, i):
        with torch.autocast("cpu", torch.bfloat16):
            return problem.loss_of(i, params)

    for i in range(STEPS):
        reference.step(lambda params, i=i: loss_of(params, i))
        opt.zero_grad()
        scaler.scale(loss_of(list(problem.model.parameters()), i)).backward()
        scaler.step(opt)
        scaler.update()
    assert opt.hyperparameters()[0]["lr"] != 1e-2
    assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(reference.hyperparameters()[0]["lr"], rel=1e-3)
    for p, q in zip(problem.model.parameters(), reference.params, strict=True):
        assert relative_error(p.detach(), q.detach()) <= 1e-2  # bf16 rounds what differs in the last bit of fp32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stack", LEARNING.values(), ids=LEARNING)
def test_half_precision_parameters_have_fp32_state(stack, dtype):
    """fp16 gradients can overflow, so the scaler's fused way is the one that takes them."""
    problem = Regression(STEPS)
    problem.model.to(dtype)
    problem.x, problem.y = problem.x.to(dtype), problem.y.to(dtype)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for i in range(STEPS):
        scaled_step(problem, opt, scaler, i)
    for p, state in opt.state.items():
        assert p.dtype == dtype
        for name, value in state.items():
            floating = torch.int64 if name in ("step", "tick") else dtype if name == "last_param" else torch.float32
            assert value.dtype == floating
            assert torch.isfinite(value).all()
    assert values(opt)[0] != {**values(opt)[0], **stack[0].values()}
