"""Levels with the conventions of the paper's own package, ``gradient-descent-the-ultimate-optimizer`` 1.0.

Towers of these levels follow that package's step by step, so that its results can be had at this library's speed::

    from hyperopt_ext.compat import gdtuo
    opt = hx.HyperOptimizer(model.parameters(), gdtuo.Adam(alpha=1e-3) / gdtuo.SGD(alpha=1e-5))

What differs from the levels of ``hyperopt_ext``: step sizes and mu are linear and unbounded (they may turn negative),
Adam's second moment starts at eps and AdaGrad's sum at 0.1, RMSProp moves the root of alpha, AdaGrad and RMSProp have
their eps inside the root, and every level learns all that the package learns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hyperopt_ext import levels

_UNBOUNDED = (-math.inf, math.inf)


def SGD(alpha: float = 0.01, mu: float = 0.0) -> levels.SGD:  # noqa: N802
    """The package's ``SGD``: learns alpha (``lr``) and, if it is not 0, mu (``momentum``)."""
    bounds = {"lr": _UNBOUNDED} | ({"momentum": _UNBOUNDED} if mu else {})
    return levels.SGD(lr=alpha, momentum=mu, bounds=bounds)


def SGDPerParam(alpha: float = 0.01) -> levels.SGD:  # noqa: N802
    """The package's ``SGDPerParam``: an alpha (``lr``) for each parameter tensor; what is above it is shared by all.

    The package takes (name, alpha) pairs. Here all start from the same value, and others can be written afterwards:
    ``opt.param_groups[0]["lr"].copy_(torch.tensor([0.1, 0.01, ...]))``, in the order of the parameters.
    """
    return levels.SGD(lr=alpha, bounds={"lr": _UNBOUNDED}, granularity="tensor")


def AdaGrad(alpha: float = 0.01) -> levels.Adagrad:  # noqa: N802
    """The package's ``AdaGrad``: learns alpha (``lr``)."""
    return levels.Adagrad(
        lr=alpha, initial_accumulator_value=0.1, eps=0.0, eps_root=1e-10, learn="lr", bounds={"lr": _UNBOUNDED}
    )


def RMSProp(alpha: float = 0.01, gamma: float = 0.99) -> levels.RMSprop:  # noqa: N802
    """The package's ``RMSProp``: learns alpha (``lr``) as a square and, through (tanh x + 1) / 2, gamma (``alpha``)."""
    return _rmsprop(alpha, gamma, ("lr", "alpha"))


def RMSPropAlpha(alpha: float = 0.01, gamma: float = 0.99) -> levels.RMSprop:  # noqa: N802
    """The package's ``RMSPropAlpha``: the same, but it learns alpha alone."""
    return _rmsprop(alpha, gamma, ("lr",))


def _rmsprop(alpha: float, gamma: float, learn: tuple[str, ...]) -> levels.RMSprop:
    return levels.RMSprop(lr=alpha, alpha=gamma, eps=0.0, eps_root=1e-8, learn=learn, space={"lr": "square"})


def Adam(  # noqa: N802
    alpha: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, log_eps: float = -8.0
) -> levels.Adam:
    """The package's ``Adam``: learns alpha (``lr``) and, through (tanh x + 1) / 2, both betas; eps is 10 ** log_eps."""
    return _adam(alpha, beta1, beta2, log_eps, ("lr", "beta1", "beta2"))


def AdamBaydin(  # noqa: N802
    alpha: float = 0.001, beta1: float = 0.9, beta2: float = 0.999, log_eps: float = -8.0
) -> levels.Adam:
    """The package's ``AdamBaydin``: the same, but it learns alpha alone (Adam-HD of Baydin et al., ICLR 2018)."""
    return _adam(alpha, beta1, beta2, log_eps, ("lr",))


def _adam(alpha: float, beta1: float, beta2: float, log_eps: float, learn: tuple[str, ...]) -> levels.Adam:
    eps = 10.0**log_eps
    return levels.Adam(
        lr=alpha,
        betas=(beta1, beta2),
        eps=eps,
        learn=learn,
        bounds={"lr": _UNBOUNDED},
        initial_state={"exp_avg_sq": eps},
    )


if not TYPE_CHECKING:  # for which every name would be there

    def __getattr__(name):
        if name in ("ModuleWrapper", "NoOpOptimizer", "Optimizable"):
            raise AttributeError(
                f"compat.gdtuo has no {name}: hx.HyperOptimizer(model.parameters(), stack) stands in its place"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
