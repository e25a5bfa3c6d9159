"""Stacks and optimizers that have a name of their own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hyperopt_ext.levels import SGD, Adam, AdamW
from hyperopt_ext.optimizer import HyperOptimizer
from hyperopt_ext.stack import Level, Stack, is_number

# Larger than any lr that `trust` lets pass: the first step lowers it.
_ANY_LR = 1e20

_MOVED_BY_COSINES: dict[str, Any] = {"learn": "lr", "space": {"lr": "log"}, "normalize": True}
_BASES: dict[str, Level] = {
    "adam": Adam(lr=_ANY_LR, betas=(0.9, 0.99), horizon=(125, 0.25), trust=0.03, **_MOVED_BY_COSINES),
    "adamw": AdamW(lr=_ANY_LR, betas=(0.9, 0.99), horizon=(125, 0.25), trust=0.03, **_MOVED_BY_COSINES),
    "sgd": SGD(lr=_ANY_LR, momentum=0.9, nesterov=True, horizon=(400, 0.25), trust=0.02, **_MOVED_BY_COSINES),
}
# log lr moves by 0.2 times a running mean of the cosines.
_ABOVE = {
    "adam": SGD(lr=0.2, momentum=0.9, dampening=0.9),
    "adamw": SGD(lr=0.2, momentum=0.9, dampening=0.9),
    "sgd": SGD(lr=0.2, momentum=0.95, dampening=0.95),
}


def auto(
    params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
    base: str = "adam",
    lr: float | None = None,
    *,
    maximize: bool = False,
    nonfinite: str | None = None,
    **arguments: Any,
) -> HyperOptimizer:
    """An optimizer that asks for no step size.

    The logarithm of lr follows the cosine between the gradient and the trace of the updates of the last steps: it grows
    as long as the updates of the recent past turn out to have been too short, and shrinks when they went too far. No
    update is larger than a small part of the parameters (``trust``), which sets the first lr and makes any larger one
    harmless; a smaller one has to grow first, which costs a short training some of its steps. The horizon is 125 steps
    (of SGD 400), or a quarter of all steps if that is more: a short one anneals lr early, in a long and noisy training
    too early.

    It is the stack ``Adam(betas=(0.9, 0.99), learn="lr", space={"lr": "log"}, normalize=True, horizon=(125, 0.25),
    trust=0.03) / SGD(lr=0.2, momentum=0.9, dampening=0.9)``, or AdamW in the place of Adam, or ``SGD(momentum=0.9,
    nesterov=True, horizon=(400, 0.25), trust=0.02, ...) / SGD(lr=0.2, momentum=0.95, dampening=0.95)``.

    It needs help where tensors are of very different size, as embeddings are (``granularity="tensor"``), with outliers
    (clip the gradients), in a GAN (``betas=(0.5, 0.99)``), where the training loss comes down to 0 (``weight_decay``),
    and in fine-tuning (an ``lr`` that is also an upper bound): see the README.

    Args:
        params: as :class:`HyperOptimizer` takes them.
        base: ``"adam"``, ``"adamw"`` or ``"sgd"``, the last with Nesterov's momentum. Default: ``"adam"``.
        lr: the first lr, > 0. Default: ``None``, the largest that the first step allows; until then a number beyond
            all bounds, 1e20.
        maximize, nonfinite: as in :class:`HyperOptimizer`.
        arguments: of the base level, in the place of those above: ``weight_decay=0.1``, ``betas=(0.9, 0.999)``, ...

    A scheduler of ``torch.optim.lr_scheduler`` multiplies what is learned (see :class:`HyperOptimizer`); one that names
    a first lr of its own (``OneCycleLR``, ``CyclicLR``) sets it. An ``eta_min``, or the lr of ``SWALR``, counts as a
    part of the first lr, and needs one to be given.

    Raises:
        ValueError: an unknown ``base``, or a value out of its range.
        TypeError: an unknown argument.
    """
    if is_number(base):
        raise TypeError(f"auto: base must be one of {', '.join(map(repr, _BASES))}, not {base!r}; write lr={base!r}")
    if not isinstance(base, str):
        raise TypeError(
            f"auto: base must be one of {', '.join(map(repr, _BASES))}, not {base!r}; its arguments follow it"
        )
    if base.lower() not in _BASES:
        raise ValueError(f"auto: base is {base!r}, but the bases are {', '.join(map(repr, _BASES))}")
    if lr is not None and not is_number(lr):
        raise TypeError(f"auto: lr must be a number or None, not {lr!r}")
    if lr is not None and not lr > 0:
        raise ValueError(f"auto: lr must be greater than 0, since its logarithm is learned, not {lr!r}")
    name = base.lower()
    level = _BASES[name].replace(**({} if lr is None else {"lr": lr}), **_within_bounds(lr, arguments))
    if lr is None and level.trust is None:
        raise ValueError("auto: without trust, nothing sets the first lr; give one, as lr=1e-3")
    return HyperOptimizer(params, level / _ABOVE[name], maximize=maximize, nonfinite=nonfinite)


def _within_bounds(lr: float | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, and the largest lr that their bounds allow if none was given."""
    bounds = arguments.get("bounds")
    pair = bounds.get("lr") if isinstance(bounds, Mapping) else None
    largest = pair[-1] if isinstance(pair, Sequence) and pair else None  # what else is wrong with it, Level says
    return {**arguments, "lr": largest} if lr is None and is_number(largest) and largest < math.inf else arguments


def sgd_hd(lr: float, hyper_lr: float = 1e-6) -> Stack:
    """SGD-HD (Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR 2018, Algorithm 2).

    Args:
        lr: the first step size, alpha_0 there, >= 0.
        hyper_lr: the step size of lr, beta there, >= 0. Default: 1e-6.

    The lr is projected to >= 0, which the algorithm does not say.
    """
    return SGD(lr=lr, learn="lr") / SGD(lr=hyper_lr)


def sgdn_hd(lr: float, hyper_lr: float = 1e-6, momentum: float = 0.9) -> Stack:
    """SGDN-HD, the same with Nesterov's momentum (Baydin et al., ICLR 2018, Algorithm 4).

    Args:
        lr: the first step size, alpha_0 there, >= 0.
        hyper_lr: the step size of lr, beta there, >= 0. Default: 1e-6.
        momentum: mu there, in (0, 1). Default: 0.9.
    """
    return SGD(lr=lr, momentum=momentum, nesterov=True, learn="lr") / SGD(lr=hyper_lr)


def adam_hd(
    lr: float = 1e-3, hyper_lr: float = 1e-8, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Stack:
    """Adam-HD (Baydin et al., ICLR 2018, Algorithm 6).

    Args:
        lr: the first step size, alpha_0 there, >= 0. Default: 1e-3.
        hyper_lr: the step size of lr, beta there, >= 0. Default: 1e-8.
        betas, eps: as in :class:`hyperopt_ext.Adam`.
    """
    return Adam(lr=lr, betas=betas, eps=eps, learn="lr") / SGD(lr=hyper_lr)
