"""One table of rules for the whole suite: a rule is covered by being named here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

import hyperopt_ext as hx


@dataclass(frozen=True)
class Case:
    """A rule, arguments that reach every line of it, and the published optimizer that it must equal."""

    rule: str
    make: Callable[..., hx.Level]
    published: Callable[..., torch.optim.Optimizer]
    options: tuple[dict[str, Any], ...]
    hyper: dict[str, float]  # a generic point at which derivatives are tested

    def __str__(self) -> str:
        return self.rule


CASES = [
    Case(
        "sgd",
        hx.SGD,
        torch.optim.SGD,
        ({"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.2}),
        {"lr": 0.1, "weight_decay": 0.3},
    ),
    Case(
        "sgd_momentum",
        hx.SGD,
        torch.optim.SGD,
        (
            {"lr": 0.1, "momentum": 0.9},
            {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.2},
            {"lr": 0.1, "momentum": 0.5, "dampening": -0.5},
        ),
        {"lr": 0.1, "momentum": 0.6, "dampening": 0.2, "weight_decay": 0.3},
    ),
    Case(
        "sgd_nesterov",
        lambda **kw: hx.SGD(nesterov=True, **kw),
        lambda params, **kw: torch.optim.SGD(params, nesterov=True, **kw),
        ({"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2}),
        {"lr": 0.1, "momentum": 0.6, "dampening": 0.0, "weight_decay": 0.3},
    ),
    Case(
        "adam",
        hx.Adam,
        torch.optim.Adam,
        (
            {},
            {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.2},
            {"lr": 0.1, "betas": (0.0, 0.9)},
            {"lr": 0.01, "betas": (0.9, 0.0), "eps": 0.1},
        ),
        {"lr": 0.1, "beta1": 0.6, "beta2": 0.8, "eps": 1e-2, "weight_decay": 0.3},
    ),
]

RULE_CASES = {case.rule: case for case in CASES}


def level_of(rule: str, hyper: dict[str, float], **kw: Any) -> hx.Level:
    """The level of a rule at the values `hyper` (by the names of the hyperparameters)."""
    values = dict(hyper)
    if "beta1" in values:
        values["betas"] = (values.pop("beta1"), values.pop("beta2"))
    return RULE_CASES[rule].make(**values, **kw)


@st.composite
def levels(draw: st.DrawFn, lr: float) -> hx.Level:
    """A level of any rule, with a step size up to `lr`, that learns any of its hyperparameters in any coordinate."""
    rule = draw(st.sampled_from(sorted(RULE_CASES)))
    case = RULE_CASES[rule]
    hyper = {name: value if name != "lr" else lr * draw(st.floats(0.1, 1.0)) for name, value in case.hyper.items()}
    hyper["weight_decay"] = draw(st.sampled_from([0.0, 0.01]))
    names = sorted(hyper)
    learn = draw(st.lists(st.sampled_from(names), unique=True))
    space = {}
    for name in learn:
        coordinates = ["linear", "square"] + (["log", "softplus", "tanh"] if hyper[name] > 0 else [])
        space[name] = draw(st.sampled_from(coordinates))
    return level_of(rule, hyper, learn=tuple(learn), space=space)


@st.composite
def stacks(draw: st.DrawFn, max_height: int = 4) -> hx.Stack:
    """A stack of up to `max_height` levels above the first."""
    height = draw(st.integers(0, max_height))
    return hx.Stack((draw(levels(0.05)), *(draw(levels(1e-3)) for _ in range(height))))
