"""Stacks and optimizers that have a name of their own."""

from __future__ import annotations

from hyperopt_ext.levels import SGD, Adam
from hyperopt_ext.stack import Stack


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
