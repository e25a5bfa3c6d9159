"""One table of rules for the whole suite: a rule is covered by being named here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from hypothesis import strategies as st
from reference import TWINS

import hyperopt_ext as hx
from hyperopt_ext import testing


def published_elsewhere(package: str, name: str) -> Callable[..., torch.optim.Optimizer]:
    """An optimizer of a package that is only needed to compare with it."""
    return lambda *args, **kw: getattr(import_module(package), name)(*args, **kw)


AdaBelief, Lion = published_elsewhere("adabelief_pytorch", "AdaBelief"), published_elsewhere("lion_pytorch", "Lion")


def rule_case(
    rule: str,
    make: Callable[..., hx.Level],
    published: Callable[..., torch.optim.Optimizer],
    options: tuple[dict[str, Any], ...],
    hyper: dict[str, float],
    jumps: bool = False,
) -> testing.Case:
    """A rule of the library; its twin is in reference.py."""
    return testing.Case(rule, make, TWINS[rule], published, options, hyper, jumps)


CASES = [
    rule_case(
        "sgd",
        hx.SGD,
        torch.optim.SGD,
        ({"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.2}),
        {"lr": 0.1, "weight_decay": 0.3},
    ),
    rule_case(
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
    rule_case(
        "sgd_nesterov",
        lambda **kw: hx.SGD(nesterov=True, **kw),
        lambda params, **kw: torch.optim.SGD(params, nesterov=True, **kw),
        ({"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.2}),
        {"lr": 0.1, "momentum": 0.6, "dampening": 0.0, "weight_decay": 0.3},
    ),
    rule_case(
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
    rule_case(
        "adamw",
        hx.AdamW,
        torch.optim.AdamW,
        (
            {},
            {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.2},
            {"lr": 0.1, "betas": (0.0, 0.9), "weight_decay": 0.0},
            {"lr": 0.01, "betas": (0.9, 0.0), "eps": 0.1},
        ),
        {"lr": 0.1, "beta1": 0.6, "beta2": 0.8, "eps": 1e-2, "weight_decay": 0.3},
    ),
    rule_case(
        "amsgrad",
        hx.AMSGrad,
        partial(torch.optim.Adam, amsgrad=True),
        (
            {},
            {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.2},
            {"lr": 0.1, "betas": (0.0, 0.9)},
            {"lr": 0.01, "betas": (0.9, 0.0), "eps": 0.1},
        ),
        {"lr": 0.1, "beta1": 0.6, "beta2": 0.8, "eps": 1e-2, "weight_decay": 0.3},
    ),
    *(
        rule_case(
            "adabelief" + "_rectified" * rectify + "_coupled" * (not decouple),
            partial(hx.AdaBelief, weight_decouple=decouple, rectify=rectify),
            partial(AdaBelief, weight_decouple=decouple, rectify=rectify, print_change_log=False),
            (
                {},
                {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.2},
                {"lr": 0.01, "betas": (0.0, 0.9), "eps": 0.1},
                {"lr": 0.01, "betas": (0.9, 0.0), "eps": 0.1},
            ),
            {"lr": 0.1, "beta1": 0.6, "beta2": 0.8, "eps": 1e-2, "weight_decay": 0.3},
        )
        for rectify in (False, True)
        for decouple in (False, True)
    ),
    rule_case(
        "adagrad",
        hx.Adagrad,
        torch.optim.Adagrad,
        (
            {},
            {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.2, "initial_accumulator_value": 0.3, "eps": 1e-2},
        ),
        {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.3, "eps": 1e-2, "eps_root": 1e-2},
    ),
    rule_case(
        "adadelta",
        hx.Adadelta,
        torch.optim.Adadelta,
        ({}, {"lr": 0.5, "rho": 0.5, "eps": 1e-3, "weight_decay": 0.2}, {"rho": 0.0}),
        {"lr": 0.1, "rho": 0.6, "eps": 1e-2, "weight_decay": 0.3},
    ),
    *(
        rule_case(
            "rmsprop" + "_centered" * centered + "_momentum" * bool(momentum),
            partial(hx.RMSprop, centered=centered),
            partial(torch.optim.RMSprop, centered=centered),
            (
                {**momentum},
                {"lr": 0.01, "alpha": 0.9, "eps": 1e-2, "weight_decay": 0.2, **momentum},
                {"lr": 0.01, "alpha": 0.1, "eps": 0.1, **momentum},
            ),
            {
                **{"lr": 0.1, "alpha": 0.8, "eps": 1e-2, "weight_decay": 0.3, "eps_root": 1e-2},
                **momentum,
            },
        )
        for centered in (False, True)
        for momentum in ({}, {"momentum": 0.6})
    ),
    *(
        rule_case(
            "nadam" + "_decoupled" * decoupled,
            partial(hx.NAdam, decoupled_weight_decay=decoupled),
            partial(torch.optim.NAdam, decoupled_weight_decay=decoupled),
            (
                {},
                {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.2, "momentum_decay": 0.1},
                {"lr": 0.1, "betas": (0.0, 0.9), "momentum_decay": 0.0},
                {"lr": 0.01, "betas": (0.999, 0.0), "eps": 0.1, "momentum_decay": 50.0},
            ),
            {"lr": 0.1, "beta1": 0.6, "beta2": 0.8, "eps": 1e-2, "weight_decay": 0.3, "momentum_decay": 0.1},
        )
        for decoupled in (False, True)
    ),
    rule_case(
        "lion",
        hx.Lion,
        Lion,
        (
            {},
            {"lr": 0.01, "betas": (0.5, 0.9), "weight_decay": 0.2},
            {"lr": 0.01, "betas": (0.0, 0.9)},
            {"lr": 0.01, "betas": (0.9, 0.0)},
        ),
        {"lr": 0.1, "beta1": 0.6, "beta2": 0.8, "weight_decay": 0.3},
        jumps=True,
    ),
]

RULE_CASES = {case.rule: case for case in CASES}


def level_of(rule: str, hyper: dict[str, float], **kw: Any) -> hx.Level:
    """The level of a rule at the values `hyper` (by the names of the hyperparameters)."""
    return RULE_CASES[rule].level(hyper, **kw)


def is_noisy(levels: Iterable[hx.Level]) -> bool:
    """After the first step, bias correction makes the hypergradient of betas 0, of which rounding leaves any sign.

    What stands above such a level is as noisy.
    """
    return any({"beta1", "beta2"} & set(level.learn_names) for level in levels)


@st.composite
def levels(draw: st.DrawFn, lr: float, below: Sequence[hx.Level] = ()) -> hx.Level:
    """A level of any rule, with a step size up to `lr`, that learns any of its hyperparameters in any coordinate.

    None that jumps stands above one that learns betas (see is_noisy()), nor one with a value on its bound.
    """
    noisy = is_noisy(below)
    rule = draw(st.sampled_from(sorted(name for name, case in RULE_CASES.items() if not (noisy and case.jumps))))
    case = RULE_CASES[rule]
    hyper = {name: value if name != "lr" else lr * draw(st.floats(0.1, 1.0)) for name, value in case.hyper.items()}
    hyper["weight_decay"] = draw(st.sampled_from([0.01] if noisy else [0.0, 0.01]))
    names = sorted(hyper)
    learn = draw(st.lists(st.sampled_from(names), unique=True))
    space = {}
    for name in learn:
        coordinates = ["linear"] + (["square", "log", "softplus", "tanh"] if hyper[name] > 0 else [])
        space[name] = draw(st.sampled_from(coordinates))
    return level_of(rule, hyper, learn=tuple(learn), space=space)


@st.composite
def safeguarded(draw: st.DrawFn, level: hx.Level, below: Sequence[hx.Level], granularity: str) -> hx.Level:
    """The level with some of what goes beyond the paper.

    Only what is well-conditioned is normalised: neither betas nor what stands above them, and the hypergradient of
    scalars with respect to eps cancels.
    """
    is_base = not below
    learned = set(level.learn_names)
    lr = level.values()["lr"]
    space = dict(level.space)
    if "lr" in learned and draw(st.booleans()):
        space["lr"] = "multiplicative"
    noisy = {"beta1", "beta2", "rho", "alpha", "momentum", "dampening", "lr_decay"} & learned
    return level.replace(
        space=space,
        granularity=granularity,
        horizon=draw(st.sampled_from([1, 1, 2, 20, (2, 0.5)])),
        normalize=not is_noisy(below) and (learned <= {"lr"} or (is_base and not noisy)) and draw(st.booleans()),
        clip=draw(st.sampled_from([None, 1e-3, 0.1])),
        growth=draw(st.sampled_from([None, 1.001, 1.1])),
        burn_in=draw(st.sampled_from([0, 0, 3])),
        converge=draw(st.sampled_from([None, (lr / 2, 10.0)])),
        trust=draw(st.sampled_from([None, 1e-3, 1e-2])) if is_base else None,
    )


@st.composite
def safeguarded_stacks(draw: st.DrawFn) -> hx.Stack:
    """Stacks of one to four levels; up to a level, each tensor may have hyperparameters of its own."""
    plain = draw(stacks(max_height=3)).levels
    own = draw(st.integers(0, len(plain)))
    return hx.Stack(
        [draw(safeguarded(level, plain[:k], "tensor" if k < own else "group")) for k, level in enumerate(plain)]
    )


@st.composite
def stacks(draw: st.DrawFn, min_height: int = 0, max_height: int = 4) -> hx.Stack:
    """A stack of `min_height` to `max_height` levels above the first."""
    stack = [draw(levels(0.05))]
    for _ in range(draw(st.integers(min_height, max_height))):
        stack.append(draw(levels(1e-3, below=stack)))
    return hx.Stack(stack)
