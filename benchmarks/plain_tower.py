"""Adam, whose lr and betas are tuned by SGD, in plain torch ops: what a compiler can make of the method by itself.

The step of :func:`hyperopt_ext.functional.tower`, with the arithmetic of the rule spelled out, and its derivatives from
``torch.func``. Nothing here is of this library; `compile.py` hands it to Inductor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-8


class State(NamedTuple):
    step: Tensor  # int64 []
    x: Tensor  # float64 [3]: lr, and of both betas the x of (tanh x + 1) / 2
    moments: list[tuple[Tensor, Tensor]]  # of each parameter, exp_avg and exp_avg_sq
    last: list[tuple[Tensor, Tensor, Tensor]]  # of each parameter, the last gradient and the moments before it


def start(
    params: Iterable[Tensor], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999)
) -> tuple[list[Tensor], State]:
    """Copies of the parameters, and the state before the first step."""
    values = [p.detach().clone() for p in params]
    x = torch.tensor([lr, *(math.atanh(2 * beta - 1) for beta in betas)], dtype=torch.float64)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in values]
    last = [tuple(torch.zeros_like(p) for _ in range(3)) for p in values]
    return values, State(torch.tensor(0), x, moments, last)


def moments_of(x: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    beta1, beta2 = ((x[1:].tanh() + 1) / 2).to(g.dtype)
    return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g


def change(x: Tensor, m: Tensor, v: Tensor, step: Tensor) -> Tensor:
    beta1, beta2 = (x[1:].tanh() + 1) / 2
    step_size, root = x[0] / (1 - beta1**step), (1 - beta2**step).sqrt()
    positive = v > 0  # the slope of the root at 0 is 0
    denominator = torch.where(positive, torch.where(positive, v, 1.0).sqrt(), 0.0) / root.to(v.dtype) + EPS
    return -step_size.to(m.dtype) * m / denominator


def hypergradient(x: Tensor, grads: list[Tensor], last: list[tuple[Tensor, Tensor, Tensor]], step: Tensor) -> Tensor:
    """d <grads, last update> / d x."""

    def product(x: Tensor) -> Tensor:
        changes = [change(x, *moments_of(x, *inputs), step) for inputs in last]
        return torch.stack([(g * c).sum() for g, c in zip(grads, changes, strict=True)]).sum()

    return torch.func.grad(product)(x)


def step(params: list[Tensor], grads: list[Tensor], state: State, top_lr: float = 1e-7) -> tuple[list[Tensor], State]:
    """One step of Adam/SGD, without a change of what it is given."""
    found = hypergradient(state.x, grads, state.last, state.step.clamp_min(1))
    x = state.x - top_lr * torch.where(state.step > 0, found, 0.0)
    x = torch.cat([x[:1].clamp_min(0), x[1:]])
    steps = state.step + 1
    last = [(g, *moments) for g, moments in zip(grads, state.moments, strict=True)]
    moments = [moments_of(x, *inputs) for inputs in last]
    new = [p + change(x, *mv, steps) for p, mv in zip(params, moments, strict=True)]
    return new, State(steps, x, moments, last)
