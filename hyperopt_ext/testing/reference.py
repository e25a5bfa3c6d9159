"""The independent truth: towers of rules in eager torch ops, through plain autograd.

Nothing here knows of the kernels. ``ReferenceTower`` is the method as the paper states it: the last update of every
level is part of the graph of the loss, and everything that the update read is detached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_ext.stack import Level, Stack

State = dict[str, Tensor]
# twin(w, g, state, hyper, step) -> new w, new state: one step of a rule in torch ops. w, g and each state are of one
# shape, each hyperparameter is a tensor of no dimension, step an int from 1.
Twin = Callable[[Tensor, Tensor, State, State, int], tuple[Tensor, State]]


def safe_sqrt(x: Tensor) -> Tensor:
    """The root with slope 0 at 0, the library's convention."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def larger(a: Tensor, b: Tensor) -> Tensor:
    """The maximum, with the slope of `a` where they are equal, and NaN where either is: the library's convention."""
    return torch.where((a >= b) | a.isnan(), a, b)


COORDINATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": (lambda x: x, lambda h, _: h),
    "log": (torch.exp, lambda h, _: torch.log(h)),
    "square": (torch.square, lambda h, x: h.sqrt().copysign(x)),
    "softplus": (torch.nn.functional.softplus, lambda h, _: h + torch.log(-torch.expm1(-h))),
    "tanh": (lambda x: (torch.tanh(x) + 1) / 2, lambda h, _: torch.atanh(2 * h - 1)),
    "multiplicative": (torch.exp, lambda h, _: torch.log(h)),
}


class _Level:
    def __init__(self, level: Level, twin: Twin, is_top: bool) -> None:
        self.twin = twin
        self.values = {k: torch.tensor(float(v), dtype=torch.float64) for k, v in level.values().items()}
        self.spaces = dict(zip(self.values, level.coordinates(), strict=True))
        self.limits = dict(zip(self.values, level.limits(), strict=True))
        self.learn = () if is_top else level.learn_names
        self.x = {
            k: COORDINATES[self.spaces[k]][1](self.values[k], self.values[k]).requires_grad_() for k in self.learn
        }
        self.start = level.start()
        self.state: dict[object, State] = {}

    def h(self) -> State:
        learned = {k: COORDINATES[self.spaces[k]][0](x) for k, x in self.x.items()}
        return {**self.values, **learned}

    def update(self, key: object, w: Tensor, g: Tensor, step: int, h: State) -> Tensor:
        start = {name: torch.full_like(w, value) for name, value in self.start.items()}
        state = {k: v.detach() for k, v in self.state.get(key, start).items()}
        new, self.state[key] = self.twin(w.detach(), g, state, h, step)
        return new


class ReferenceTower:
    """Trains copies of ``params`` with the levels of a stack, through one autograd graph a step.

    Args:
        params: fp64 tensors.
        stack: what to train with; levels in the paper's form alone.
        twins: the twin of each rule in the stack, by its name.
    """

    def __init__(self, params: Iterable[Tensor], stack: Stack, twins: Mapping[str, Twin]) -> None:
        self.params = [p.detach().clone().requires_grad_() for p in params]
        self.levels = [_Level(level, twins[level.rule], k + 1 == len(stack)) for k, level in enumerate(stack)]
        self.steps = 0

    def step(self, loss_of_params: Callable[[list[Tensor]], Tensor]) -> None:
        self.steps += 1
        learned = [x for level in self.levels for x in level.x.values()]
        inputs = [*self.params, *learned]
        found: Any = torch.autograd.grad(loss_of_params(self.params), inputs, allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]
        of = dict(zip(map(id, inputs), grads, strict=True))

        for k in reversed(range(len(self.levels))):
            level = self.levels[k]
            if k + 1 < len(self.levels):
                above, h = self.levels[k + 1], self.levels[k + 1].h()
                for name, x in level.x.items():
                    moved = above.update(name, x, of[id(x)], self.steps, h)
                    to_h, to_x = COORDINATES[level.spaces[name]]
                    value = to_h(moved).detach()
                    projected = value.clamp(*level.limits[name])
                    if projected != value:
                        moved = moved + (to_x(projected, moved) - moved).detach()
                    level.x[name] = moved if moved.requires_grad else moved.requires_grad_()
        base, h = self.levels[0], self.levels[0].h()
        self.params = [base.update(i, w, of[id(w)], self.steps, h) for i, w in enumerate(self.params)]
        self.params = [w if w.requires_grad else w.requires_grad_() for w in self.params]

    def hyperparameters(self) -> list[dict[str, float]]:
        return [{name: value.item() for name, value in level.h().items()} for level in self.levels]
