"""The operators behind ``step()``, one by one, for every rule.

    python -m pytest benchmarks --benchmark-only --benchmark-group-by=func

The passes over the parameters are timed through ``torch.ops.hyperopt_ext``, with the lists that
``HyperOptimizer.step()`` gives them; ``test_optimizer_step`` is the whole step with its Python, and
``test_torch_fused_adam`` the yardstick. Sizes are tensors x elements; everything runs on one thread. For ratios that
are interleaved in one run see step_cost.py; the numbers here tell which part of a step has become slower.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import hyperopt_ext as hx
from hyperopt_ext import levels
from hyperopt_ext.stack import RULES
from hyperopt_ext.update import Update

SIZES = {"1x10k": (1, 10_000), "1x1M": (1, 1_000_000), "100x10k": (100, 10_000)}
TINY = hx.SGD(lr=1e-14)  # as the level above, it leaves all values sane for any number of steps


def variants() -> Iterator[hx.Level]:
    """Every method with every choice of its structural arguments, with and without momentum where it has one."""
    for method in levels.methods():
        for choice in product((False, True), repeat=len(method.structural())):
            structure = dict(zip(method.structural(), choice, strict=True))
            for hyper in ({}, dict.fromkeys(method.optional, 0.9)):
                with contextlib.suppress(ValueError):  # Nesterov's momentum without momentum
                    yield method(**hyper, **structure)


SPECS = {spec.rule: spec for spec in variants()}

rules = pytest.mark.parametrize("rule", RULES)
sizes = pytest.mark.parametrize("size", SIZES)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def new_params(size: str) -> list[Tensor]:
    """Leaf tensors with gradients that are not near 0, so that no square is denormal."""
    generator = torch.Generator().manual_seed(0)
    count, elements = SIZES[size]
    params = [torch.randn(elements, generator=generator).requires_grad_() for _ in range(count)]
    for p in params:
        p.grad = torch.empty(elements).uniform_(0.5, 1.5, generator=generator)
    return params


def new_optimizer(rule: str, size: str) -> hx.HyperOptimizer:
    """Two levels, after two steps: from then on every step is alike."""
    optimizer = hx.HyperOptimizer(new_params(size), SPECS[rule] / TINY)
    optimizer.step()
    optimizer.step()
    return optimizer


def operands(optimizer: hx.HyperOptimizer) -> tuple[object, ...]:
    """The arguments of both passes (csrc/pass.h)."""
    [group] = optimizer._groups
    return Update(group, group.params, optimizer.state).active


def tower_operands(optimizer: hx.HyperOptimizer, hypergradient: float) -> tuple[list[Tensor], ...]:
    [group] = optimizer._groups
    sums = torch.full((1, 2 * len(optimizer.stack[0].values()) + 1), hypergradient, dtype=torch.float64)
    return [group.tower], [sums], [group.plan], [group.bounds], [group.settings]


def check(optimizer: hx.HyperOptimizer) -> None:
    assert optimizer.skipped_steps() == optimizer.held_steps() == 0
    assert all(torch.isfinite(h) for level in optimizer.hyperparameters() for h in level.values())
    assert all(torch.isfinite(p).all() for p in optimizer.param_groups[0]["params"])


@rules
@sizes
def test_hypergradient_pass(benchmark: BenchmarkFixture, rule: str, size: str) -> None:
    optimizer = new_optimizer(rule, size)
    op = getattr(torch.ops.hyperopt_ext, f"{rule}_hypergradient").default
    with torch.no_grad():
        sums = benchmark(op, *operands(optimizer), False, False)
    assert sums.count_nonzero() > 0


@rules
@sizes
def test_step_pass(benchmark: BenchmarkFixture, rule: str, size: str) -> None:
    optimizer = new_optimizer(rule, size)
    op = getattr(torch.ops.hyperopt_ext, f"{rule}_step_").default
    arguments, tower = operands(optimizer), tower_operands(optimizer, 0.0)

    def next_tick() -> None:
        torch.ops.hyperopt_ext.tower_.default(*tower)

    with torch.no_grad():
        benchmark.pedantic(op, arguments, setup=next_tick, rounds=200, warmup_rounds=5)
    check(optimizer)


@pytest.mark.parametrize("height", [2, 10, 100, 1000])
def test_tower(benchmark: BenchmarkFixture, height: int) -> None:
    p = torch.ones(1, requires_grad=True)
    # With lr = 0 nothing moves, though all is computed: a hypergradient that never changes lets tall towers run away.
    optimizer = hx.HyperOptimizer([p], hx.Stack.of(hx.Adam(lr=0.0), height=height))
    with torch.no_grad():
        benchmark(torch.ops.hyperopt_ext.tower_.default, *tower_operands(optimizer, 1e-3))
    check(optimizer)


@sizes
def test_functional_adam(benchmark: BenchmarkFixture, size: str) -> None:
    """Forward and backward."""
    values = [p.detach() for p in new_params(size)]
    grads = [torch.full_like(p, 0.5) for p in values]
    state = {name: [torch.full_like(p, 0.1) for p in values] for name in RULES["adam"]["state"]}
    hyper = {name: torch.tensor(h, requires_grad=True) for name, h in [("lr", 1e-3), ("beta1", 0.9), ("beta2", 0.999)]}
    step = torch.tensor(10)

    def forward_and_backward() -> tuple[Tensor, ...]:
        new, _ = hx.functional.adam(values, grads, state, hyper, step)
        return torch.autograd.grad(new, list(hyper.values()), grads)

    assert all(torch.isfinite(g) for g in benchmark(forward_and_backward))


@rules
@sizes
def test_optimizer_step(benchmark: BenchmarkFixture, rule: str, size: str) -> None:
    optimizer = new_optimizer(rule, size)
    benchmark(optimizer.step)
    check(optimizer)


@sizes
def test_torch_fused_adam(benchmark: BenchmarkFixture, size: str) -> None:
    optimizer = torch.optim.Adam(new_params(size), fused=True)
    benchmark(optimizer.step)
    assert all(torch.isfinite(p).all() for p in optimizer.param_groups[0]["params"])
