"""The independent truth: every rule in eager torch ops, and a tower of them built of plain autograd.

Nothing here knows of csrc. ``ReferenceTower`` is the method as the paper states it: the last update of every level is
part of the graph of the loss, and everything that the update read is detached.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

State = dict[str, Tensor]


def safe_sqrt(x: Tensor) -> Tensor:
    """The root with slope 0 at 0, the library's convention."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def sgd(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    return w - h["lr"] * (g + h["weight_decay"] * w), {}


def sgd_momentum(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    buffer = g if step == 1 else h["momentum"] * s["momentum_buffer"] + (1 - h["dampening"]) * g
    return w - h["lr"] * buffer, {"momentum_buffer": buffer}


def sgd_nesterov(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    buffer = g if step == 1 else h["momentum"] * s["momentum_buffer"] + (1 - h["dampening"]) * g
    return w - h["lr"] * (g + h["momentum"] * buffer), {"momentum_buffer": buffer}


def adam(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    m = h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g
    v = h["beta2"] * s["exp_avg_sq"] + (1 - h["beta2"]) * g * g
    m_hat = m / (1 - h["beta1"] ** step)
    v_hat = v / (1 - h["beta2"] ** step)
    return w - h["lr"] * m_hat / (safe_sqrt(v_hat) + h["eps"]), {"exp_avg": m, "exp_avg_sq": v}


def adamw(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    new, state = adam(w, g, s, {**h, "weight_decay": torch.zeros(())}, step)
    return new - h["lr"] * h["weight_decay"] * w, state


def larger(a: Tensor, b: Tensor) -> Tensor:
    """The maximum, with the slope of `a` where they are equal, the library's convention."""
    return torch.where(a >= b, a, b)


def amsgrad(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    m = h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g
    v = h["beta2"] * s["exp_avg_sq"] + (1 - h["beta2"]) * g * g
    largest = larger(s["max_exp_avg_sq"], v)
    m_hat = m / (1 - h["beta1"] ** step)
    v_hat = largest / (1 - h["beta2"] ** step)
    new = w - h["lr"] * m_hat / (safe_sqrt(v_hat) + h["eps"])
    return new, {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": largest}


def adabelief(w: Tensor, g: Tensor, s: State, h: State, step: int, rectify=False, decouple=True):
    if not decouple:
        g = g + h["weight_decay"] * w
    m = h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g
    v = h["beta2"] * s["exp_avg_var"] + (1 - h["beta2"]) * (g - m) ** 2 + h["eps"]
    state = {"exp_avg": m, "exp_avg_var": v}
    m_hat = m / (1 - h["beta1"] ** step)
    if decouple:
        w = w - h["lr"] * h["weight_decay"] * w
    if not rectify:
        return w - h["lr"] * m_hat / (safe_sqrt(v / (1 - h["beta2"] ** step)) + h["eps"]), state
    limit = 2 / (1 - h["beta2"]) - 1
    samples = limit - 2 * step * h["beta2"] ** step / (1 - h["beta2"] ** step)
    if samples < 5:
        return w - h["lr"] * m_hat, state
    factor = (samples - 4) / (limit - 4) * (samples - 2) / samples * limit / (limit - 2)
    factor = (factor * (1 - h["beta2"] ** step)).sqrt()
    return w - h["lr"] * factor * m_hat / (safe_sqrt(v) + h["eps"]), state


def adagrad(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    total = s["sum"] + g * g
    lr = h["lr"] / (1 + (step - 1) * h["lr_decay"])
    return w - lr * g / (safe_sqrt(total + h["eps_root"]) + h["eps"]), {"sum": total}


def adadelta(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    square = h["rho"] * s["square_avg"] + (1 - h["rho"]) * g * g
    delta = safe_sqrt(s["acc_delta"] + h["eps"]) / safe_sqrt(square + h["eps"]) * g
    acc_delta = h["rho"] * s["acc_delta"] + (1 - h["rho"]) * delta * delta
    return w - h["lr"] * delta, {"square_avg": square, "acc_delta": acc_delta}


def rmsprop(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    square = h["alpha"] * s["square_avg"] + (1 - h["alpha"]) * g * g
    state, variance = {"square_avg": square}, square
    if "grad_avg" in s:
        state["grad_avg"] = mean = h["alpha"] * s["grad_avg"] + (1 - h["alpha"]) * g
        variance = square - mean * mean
    direction = g / (safe_sqrt(variance + h["eps_root"]) + h["eps"])
    if "momentum_buffer" in s:
        state["momentum_buffer"] = direction = h["momentum"] * s["momentum_buffer"] + direction
    return w - h["lr"] * direction, state


def lion(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    direction = (h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g).sign()
    m = h["beta2"] * s["exp_avg"] + (1 - h["beta2"]) * g
    return w - h["lr"] * (direction + h["weight_decay"] * w), {"exp_avg": m}


TWINS: dict[str, Callable[..., tuple[Tensor, State]]] = {
    "sgd": sgd,
    "sgd_momentum": sgd_momentum,
    "sgd_nesterov": sgd_nesterov,
    "adam": adam,
    "adamw": adamw,
    "amsgrad": amsgrad,
    "adabelief": adabelief,
    "adabelief_coupled": partial(adabelief, decouple=False),
    "adabelief_rectified": partial(adabelief, rectify=True),
    "adabelief_rectified_coupled": partial(adabelief, rectify=True, decouple=False),
    "adagrad": adagrad,
    "adadelta": adadelta,
    "rmsprop": rmsprop,
    "rmsprop_momentum": rmsprop,
    "rmsprop_centered": rmsprop,
    "rmsprop_centered_momentum": rmsprop,
    "lion": lion,
}

COORDINATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "linear": (lambda x: x, lambda h: h),
    "log": (torch.exp, torch.log),
    "square": (torch.square, torch.sqrt),
    "softplus": (torch.nn.functional.softplus, lambda h: h + torch.log(-torch.expm1(-h))),
    "tanh": (lambda x: (torch.tanh(x) + 1) / 2, lambda h: torch.atanh(2 * h - 1)),
}


class _Level:
    def __init__(self, level, is_top: bool) -> None:
        self.twin = TWINS[level.rule]
        self.values = {k: torch.tensor(float(v), dtype=torch.float64) for k, v in level.values().items()}
        self.spaces = dict(zip(self.values, level.coordinates(), strict=True))
        self.limits = dict(zip(self.values, level.limits(), strict=True))
        self.learn = () if is_top else level.learn_names
        self.x = {k: COORDINATES[self.spaces[k]][1](self.values[k]).requires_grad_() for k in self.learn}
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
    """Trains copies of ``params`` (a list) with the levels of an ``hx.Stack``, through one autograd graph a step."""

    def __init__(self, params, stack) -> None:
        self.params = [p.detach().clone().requires_grad_() for p in params]
        self.levels = [_Level(level, k + 1 == len(stack)) for k, level in enumerate(stack)]
        self.steps = 0

    def step(self, loss_of_params) -> None:
        self.steps += 1
        learned = [x for level in self.levels for x in level.x.values()]
        loss = loss_of_params(self.params)
        grads = torch.autograd.grad(loss, [*self.params, *learned], allow_unused=True)
        grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, [*self.params, *learned], strict=True)]
        of = dict(zip(map(id, [*self.params, *learned]), grads, strict=True))

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
                        moved = moved + (to_x(projected) - moved).detach()
                    level.x[name] = moved if moved.requires_grad else moved.requires_grad_()
        base, h = self.levels[0], self.levels[0].h()
        self.params = [base.update(i, w, of[id(w)], self.steps, h) for i, w in enumerate(self.params)]
        self.params = [w if w.requires_grad else w.requires_grad_() for w in self.params]

    def hyperparameters(self) -> list[dict[str, float]]:
        return [{name: value.item() for name, value in level.h().items()} for level in self.levels]
