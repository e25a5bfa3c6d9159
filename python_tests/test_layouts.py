"""What a tensor may look like, and that how the work is cut up does not show in the result."""

from __future__ import annotations

import gc
import resource

import pytest
import torch
from cases import CASES, level_of
from problems import Regression, relative_error

import hyperopt_ext as hx

every_rule = pytest.mark.parametrize("case", CASES, ids=str)


every_horizon = pytest.mark.parametrize("horizon", [1, 5])


def stack_for(case, lr=1e-7, horizon=1):
    """A tower that moves its hyperparameters by a few percent a step; one that looks far back is also capped."""
    base = case.make(**case.options[0], horizon=horizon, trust=None if horizon == 1 else 1e-3)
    return base / hx.SGD(lr=lr, momentum=0.5) / hx.SGD(lr=lr**2 / 100)


def run(params, stack, steps=5):
    """Steps with gradients that depend on the parameters alone, by value."""
    opt = hx.HyperOptimizer(params, stack)
    for i in range(steps):
        for p in params:
            p.grad = (torch.sin(p.detach().double() * (i + 3)) + 0.1).to(p.dtype)
        opt.step()
    return opt


@every_horizon
@every_rule
def test_the_number_of_threads_does_not_show(case, threads, horizon):
    results = []
    for n in (1, 2):
        threads(n)
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s)) for s in (300_000, 17, 0, 1000, 50_001)]
        opt = run(params, stack_for(case, horizon=horizon))
        results.append([p.detach() for p in params] + [torch.stack(list(h.values())) for h in opt.hyperparameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@every_horizon
@every_rule
def test_many_tensors_are_one(case, horizon):
    """A list of tensors does what their concatenation does."""
    whole = torch.nn.Parameter(torch.randn(5000, dtype=torch.float64))
    parts = [torch.nn.Parameter(t.clone()) for t in whole.detach().split([1, 0, 4000, 7, 992])]
    a, b = (run(params, stack_for(case, horizon=horizon)) for params in ([whole], parts))
    assert relative_error(torch.cat([p.detach() for p in parts]), whole.detach()) < 1e-12
    for x, y in zip(a.hyperparameters(), b.hyperparameters(), strict=True):
        for name in x:
            assert x[name].item() == pytest.approx(y[name].item(), rel=1e-12)


LAYOUTS = {
    "transposed": lambda t: t.clone().t(),
    "channels_last": lambda t: t.clone().view(3, 4, 5, 7).to(memory_format=torch.channels_last),
    "every second column": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
    "offset by one": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "no dimension": lambda t: t[0, 0].clone(),
}


@every_horizon
@every_rule
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grads", ["alike", "contiguous", "expanded"])
def test_strides_do_not_show(case, layout, grads, horizon):
    values = torch.randn(12, 35, dtype=torch.float64)
    view = LAYOUTS[layout](values)
    odd, plain = torch.nn.Parameter(view), torch.nn.Parameter(view.clone(memory_format=torch.contiguous_format))
    optimizers = [hx.HyperOptimizer([p], stack_for(case, horizon=horizon)) for p in (odd, plain)]
    for i in range(4):
        for p, opt in zip((odd, plain), optimizers, strict=True):
            g = torch.sin(p.detach() * (i + 3)) + 0.1
            if grads == "contiguous":
                g = g.contiguous()
            elif grads == "expanded":
                g = torch.full((), 0.1 + i, dtype=torch.float64).expand(p.shape)
            p.grad = g
            opt.step()
    assert relative_error(odd.detach(), plain.detach()) < 1e-12
    assert odd.stride() == view.stride()
    for x, y in zip(*(opt.hyperparameters() for opt in optimizers), strict=True):
        for name in x:
            assert x[name].item() == pytest.approx(y[name].item(), rel=1e-12)


@every_horizon
@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fp32_arithmetic_on_rounded_parameters(case, dtype, horizon):
    start = torch.randn(1000).to(dtype)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    opt, expected = (hx.HyperOptimizer([t], stack_for(case, horizon=horizon)) for t in (p, q))
    for i in range(5):
        p.grad = (torch.sin(p.detach().float() * (i + 3)) + 0.1).to(dtype)
        q.grad = p.grad.float()
        opt.step()
        expected.step()
        spacing = torch.finfo(dtype).eps * q.detach().abs().clamp_min(torch.finfo(dtype).smallest_normal)
        assert ((p.detach().float() - q.detach()).abs() <= 0.51 * spacing).all()  # rounded once, to nearest
        with torch.no_grad():
            q.copy_(p)
    assert opt.hyperparameters()[0]["lr"] != case.make(**case.options[0]).lr
    for x, y in zip(opt.hyperparameters(), expected.hyperparameters(), strict=True):
        for name in x:
            assert x[name].item() == pytest.approx(y[name].item(), rel=1e-6)
    for name, value in opt.state[p].items():
        expected_dtype = {"step": torch.int64, "tick": torch.int64, "last_param": dtype}.get(name, torch.float32)
        assert value.dtype == expected_dtype


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_kept_of_a_parameter_is_exact(case, dtype):
    level = level_of(case.rule, case.hyper, learn=tuple(case.hyper))
    start = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-7, 6e4])]).to(dtype)
    p = torch.nn.Parameter(start.clone())
    opt = hx.HyperOptimizer([p], level / hx.SGD(lr=0.0))
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.randn_like(p)
        opt.step()
        assert torch.equal(opt.state[p].get("last_param", before), before)


def test_dtypes_may_be_mixed_in_a_group():
    params = [torch.nn.Parameter(torch.randn(50).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    opt = run(params, hx.Adam(lr=1e-2) / hx.SGD(lr=1e-5))
    assert all(torch.isfinite(p).all() for p in params)
    assert opt.hyperparameters()[0]["lr"] != 1e-2


@every_rule
def test_version_counters_move(case):
    p = torch.nn.Parameter(torch.randn(10))
    opt = run([p], stack_for(case), steps=1)
    group = opt.param_groups[0]
    watched = [p, group["tower"], *opt.state[p].values()]
    before = [t._version for t in watched]
    p.grad = torch.ones_like(p)
    opt.step()
    assert all(t._version > v for t, v in zip(watched, before, strict=True))

    x = torch.randn(10)
    saved = (p * p * x).sum()  # backward needs p as it was
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def state_bytes(opt):
    return sum(t.numel() * t.element_size() for s in opt.state.values() for t in s.values() if t.numel() > 1)


def test_extra_state():
    """None beside torch's Adam if only lr is learned, one gradient-sized tensor if the betas are, too.

    One more of the parameter's size where the update reads the parameter, as decoupled weight decay does. A longer
    horizon has one trace for each learned hyperparameter instead.
    """
    n = 1000
    sizes = {}
    for name, make in {
        "torch": lambda p: torch.optim.Adam(p),
        "lr": lambda p: hx.HyperOptimizer(p, hx.Adam(learn="lr") / hx.SGD()),
        "all": lambda p: hx.HyperOptimizer(p, hx.Adam() / hx.SGD()),
        "none": lambda p: hx.HyperOptimizer(p, hx.Adam()),
        "adamw, lr": lambda p: hx.HyperOptimizer(p, hx.AdamW(learn="lr") / hx.SGD()),
        "adamw, all": lambda p: hx.HyperOptimizer(p, hx.AdamW() / hx.SGD()),
        "lr, traced": lambda p: hx.HyperOptimizer(p, hx.Adam(learn="lr", horizon=9) / hx.SGD()),
        "all, traced": lambda p: hx.HyperOptimizer(p, hx.Adam(horizon=9) / hx.SGD()),
        "adamw, none": lambda p: hx.HyperOptimizer(p, hx.AdamW()),
    }.items():
        p = torch.nn.Parameter(torch.randn(n))
        p.grad = torch.randn(n)
        opt = make([p])
        opt.step()
        sizes[name] = state_bytes(opt)
    assert sizes["lr"] == sizes["none"] == sizes["torch"]
    assert sizes["adamw, none"] == sizes["torch"]
    assert sizes["all"] == sizes["adamw, lr"] == sizes["torch"] + 4 * n
    assert sizes["adamw, all"] == sizes["torch"] + 8 * n
    assert sizes["lr, traced"] == sizes["torch"] + 4 * n
    assert sizes["all, traced"] == sizes["torch"] + 12 * n


def test_memory_is_flat_over_ten_thousand_steps():
    problem = Regression(10, torch.float32)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam() / hx.Adam(lr=1e-5) / hx.SGD(lr=1e-6))

    def steps(n):
        for i in range(n):
            problem.train(opt, range(i % 10, i % 10 + 1))
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sum(
            issubclass(type(o), torch.Tensor) for o in gc.get_objects()
        )

    peak, tensors = steps(500)
    later_peak, later_tensors = steps(10_000)
    assert later_tensors == tensors
    assert later_peak - peak < 4096  # KiB
