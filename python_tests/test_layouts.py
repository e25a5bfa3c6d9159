"""What a tensor may look like, and that how the work is cut up does not show in the result."""

from __future__ import annotations

import gc
import resource
from itertools import pairwise

import pytest
import torch
from cases import CASES
from problems import Regression

import hyperopt_ext as hx
from hyperopt_ext.testing import checks

every_rule = pytest.mark.parametrize("case", CASES, ids=str)
every_horizon = pytest.mark.parametrize("horizon", [1, 5])


@every_horizon
@every_rule
def test_the_number_of_threads_does_not_show(case, horizon):
    checks.the_number_of_threads_does_not_show(case, horizon)


@every_horizon
@every_rule
def test_many_tensors_are_one(case, horizon):
    checks.many_tensors_are_one(case, horizon)


@every_horizon
@every_rule
@pytest.mark.parametrize("layout", checks.LAYOUTS)
@pytest.mark.parametrize("grads", ["alike", "contiguous", "expanded"])
def test_strides_do_not_show(case, layout, grads, horizon):
    checks.strides_do_not_show(case, layout, grads, horizon)


@every_horizon
@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fp32_arithmetic_on_rounded_parameters(case, dtype, horizon):
    checks.half_precision_is_fp32_arithmetic_on_rounded_parameters(case, dtype, horizon)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [0.0, 1.0, 3.0, 1e9])
def test_half_precision_rounds_as_torch_does(dtype, lr):
    """Every finite number of the dtype, moved by ties and by what is near one, by what overflows and by nothing."""
    w = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    w = w[w.isfinite()]
    for grad in (0.0, 2.0**-11, -(2.0**-11), 2.0**-24, 3.0 * 2.0**-25, 16.0, -65504.0, torch.inf, torch.nan):
        p = torch.nn.Parameter(w.clone())
        p.grad = torch.full_like(p, grad)
        expected = (w.float() - lr * p.grad.float()).to(dtype)
        hx.HyperOptimizer([p], hx.SGD(lr=lr)).step()
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=0, equal_nan=True)


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_kept_of_a_parameter_is_exact(case, dtype):
    checks.what_is_kept_of_a_parameter_is_exact(case, dtype)


@pytest.mark.parametrize(("size", "copies"), [(1, 0), (6, 1)])
def test_gradients_are_copied_only_where_their_elements_lie_in_another_order(size, copies):
    p = torch.nn.Parameter(torch.ones(5, size).t())
    p.grad = torch.ones(size, 5)
    assert p.stride() != p.grad.stride()
    opt = hx.HyperOptimizer([p], hx.Adam())
    opt.step()
    with torch.profiler.profile() as profile:
        opt.step()
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::copy_") == copies


def test_dtypes_may_be_mixed_in_a_group():
    params = [torch.nn.Parameter(torch.randn(50).to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    opt = checks.run(params, hx.Adam(lr=1e-2) / hx.SGD(lr=1e-5))
    assert all(torch.isfinite(p).all() for p in params)
    assert opt.hyperparameters()[0]["lr"] != 1e-2


@every_rule
def test_version_counters_move(case):
    checks.version_counters_move(case)


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

    peaks, tensors = zip(*(steps(n) for n in (500, 2500, 2500, 2500, 2500)), strict=True)
    assert tensors[-1] <= tensors[0]
    # What leaks grows all the time; the allocator may take a page more for another reason.
    assert min(after - before for before, after in pairwise(peaks)) < 1024  # KiB
