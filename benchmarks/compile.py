"""The whole training step, eager and compiled, with and without a tower.

    python benchmarks/compile.py

An MLP (784-128-10, batch 256) and a small transformer are trained with

    torch      fused Adam of ``torch.optim``, constant: what a training step costs without a tower
    hx         ``hx.HyperOptimizer`` with Adam/SGD: lr and both betas are learned
    function   the same tower as ``hx.functional.tower``: parameters and state in, parameters and state out
    plain      the same tower in plain torch ops (plain_tower.py): what Inductor makes of the method
    package    the paper's own package, gradient-descent-the-ultimate-optimizer

Forward, gradients, tower and update are in one function, which runs as it is or through ``torch.compile``; the package cannot
be compiled as a whole (it keeps its graph from step to step), so its model is. Beside the time of a step there are the time
of the first call, the graphs that it made, graph breaks, recompiles over the next 100 steps, and the peak of what tensors hold.
Before that all towers are run side by side and must agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import plain_tower
import torch
import torch._dynamo
import transformer
from gradient_descent_the_ultimate_optimizer import gdtuo
from harness import (
    Compiled,
    Contender,
    compiled,
    describe_machine,
    format_seconds,
    interleave,
    median,
    peak_bytes,
    save,
    timing_options,
)
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from mlp import MLP, batches
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hyperopt_ext as hx

LR, TOP_LR = 1e-3, 1e-7
BASELINE = "torch"
RECOMPILE_STEPS = 100

Data = Iterator[tuple[Tensor, Tensor]]
Drive = Callable[[Callable[..., Any]], Callable[[], object]]

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Data]]] = {
    "MLP": (MLP, batches),
    "transformer": (transformer.Transformer, transformer.batches),
}


def with_optimizer(model: nn.Module, data: Data, optimizer: torch.optim.Optimizer) -> tuple[Callable[..., Any], Drive]:
    params = list(model.parameters())

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g
        optimizer.step()
        return loss.detach()

    return step, lambda step: lambda: step(*next(data))


def by_torch(model: nn.Module, data: Data) -> tuple[Callable[..., Any], Drive]:
    return with_optimizer(model, data, torch.optim.Adam(model.parameters(), LR, fused=True))


def by_hx(model: nn.Module, data: Data) -> tuple[Callable[..., Any], Drive]:
    return with_optimizer(model, data, hx.HyperOptimizer(model.parameters(), hx.Adam(LR) / hx.SGD(TOP_LR)))


def with_state(
    model: nn.Module, data: Data, start: tuple[list[Tensor], Any], move: Callable[..., tuple[list[Tensor], Any]]
) -> tuple[Callable[..., Any], Drive]:
    names = [name for name, _ in model.named_parameters()]

    def loss_of(params: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, dict(zip(names, params, strict=True)), (x,)), y)

    def step(params: list[Tensor], state: Any, x: Tensor, y: Tensor) -> tuple[list[Tensor], Any]:
        return move(params, torch.func.grad(loss_of)(params, x, y), state)

    def drive(step: Callable[..., Any]) -> Callable[[], object]:
        held = [start]

        def run() -> None:
            held[0] = step(*held[0], *next(data))
            with torch.no_grad():  # for those who look at the model
                pass

        run.params = lambda: held[0][0]  # type: ignore[attr-defined]
        return run

    return step, drive


def by_function(model: nn.Module, data: Data) -> tuple[Callable[..., Any], Drive]:
    tower = hx.functional.tower(hx.Adam(LR) / hx.SGD(TOP_LR))
    return with_state(model, data, tower.init(list(model.parameters())), tower.step)


def by_plain_ops(model: nn.Module, data: Data) -> tuple[Callable[..., Any], Drive]:
    def move(params: list[Tensor], grads: list[Tensor], state: plain_tower.State) -> Any:
        return plain_tower.step(params, grads, state, TOP_LR)

    return with_state(model, data, plain_tower.start(model.parameters(), LR), move)
