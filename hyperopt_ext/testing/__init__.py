"""The suite of the built-in rules, for a rule from outside: one call, in a test of any framework.

    from hyperopt_ext.testing import check_rule, larger

    def adamax(w, g, s, h, step):                                       # the same step in torch ops: the twin
        g = g + h["weight_decay"] * w
        m = h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g
        u = larger(h["beta2"] * s["exp_inf"], g.abs() + h["eps"])
        return w - h["lr"] / (1 - h["beta1"] ** step) * m / u, {"exp_avg": m, "exp_inf": u}

    def test_adamax():
        check_rule(
            Adamax,
            twin=adamax,
            published=torch.optim.Adamax,
            options=[{}, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.2}],
            hyper={"lr": 0.1, "beta1": 0.6, "beta2": 0.8, "eps": 1e-2, "weight_decay": 0.3},
        )

Needs nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hyperopt_ext.stack import RULES, Level
from hyperopt_ext.testing.checks import Case, all_checks
from hyperopt_ext.testing.reference import ReferenceTower, State, Twin, larger, safe_sqrt

__all__ = ["Case", "ReferenceTower", "Twin", "all_checks", "check_rule", "larger", "safe_sqrt"]


def check_rule(
    level: Callable[..., Level],
    *,
    twin: Twin,
    hyper: Mapping[str, float],
    published: Callable[..., torch.optim.Optimizer] | None = None,
    options: Sequence[Mapping[str, Any]] = ({},),
    jumps: bool = False,
) -> None:
    """Checks all that the library promises of a rule.

    Some eighty properties, in half a minute: updates equal the twin's to 1e-12 and hypergradients autograd's to 1e-9,
    for every learned hyperparameter and pair of them, also where one is 0; and so do towers, traces, the functional
    form and unrolled steps; fp32 is close; half precision, strides, long lists of tensors and threads do not show;
    torch's ``gradcheck`` and ``opcheck`` pass; ``torch.compile`` makes one graph; a state dict resumes to the bit.

    Args:
        level: a class of levels, or a function of the same arguments that fixes a variant.
        twin: one step in torch ops, differentiable: ``twin(w, g, state, hyper, step) -> (new w, new state)``, with
            state and hyperparameters by name, and ``step`` an int from 1. Where the rule has a root or a maximum, the
            library's conventions are :func:`safe_sqrt` and :func:`larger`.
        hyper: a generic point, a value for each hyperparameter, at which derivatives are tested.
        published: the ``torch.optim.Optimizer`` that the rule equals, if there is one.
        options: arguments of the level, and of ``published``, that together reach every line. Default: its defaults.
        jumps: the update is not continuous in the gradient, as that of Lion. Default: False.

    Raises:
        AssertionError: a property does not hold; a note says which one.
        TypeError: ``level`` is no class or function, or the twin does not return two things.
        ValueError: ``hyper``, or the state that the twin returns, is not that of the rule.

    For a test of each property, as pytest's ``parametrize`` makes them, see :func:`all_checks`.
    """
    if isinstance(level, Level):
        raise TypeError(f"check_rule: level must be a class, as {type(level).__name__}, not {level!r}")
    rule = RULES[level().rule]
    if sorted(hyper) != sorted(names := [h["name"] for h in rule["hypers"]]):
        raise ValueError(f"check_rule: hyper must give {', '.join(names)}, not {', '.join(hyper)}")

    def checked(w: Tensor, g: Tensor, state: State, h: State, step: int) -> tuple[Tensor, State]:
        result = twin(w, g, state, h, step)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise TypeError(f"check_rule: twin must return the new w and the new state, not a {type(result).__name__}")
        if sorted(result[1]) != sorted(rule["state"]):
            expected = ", ".join(rule["state"]) or "nothing"
            raise ValueError(
                f"check_rule: the state that twin returns must hold {expected}, not {', '.join(result[1])}"
            )
        return result[0], result[1]

    case = Case(rule["name"], level, checked, published, tuple(dict(o) for o in options), dict(hyper), jumps)
    for name, check in all_checks(case).items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                check()
            except Exception as error:
                error.add_note(f"in hyperopt_ext.testing: {name}")
                raise
