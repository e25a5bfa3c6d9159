"""The levels that a tower is built of: one class a method, with the arguments and defaults of ``torch.optim``."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

from hyperopt_ext.stack import Level, is_number


@dataclass(frozen=True, eq=False, repr=False)
class SGD(Level):
    """Stochastic gradient descent, with momentum, Nesterov's momentum and weight decay as in ``torch.optim.SGD``.

    As a level above another one it is the hyperoptimizer of Baydin et al. (ICLR 2018) and of most towers of Chandra et
    al. (NeurIPS 2022): one number, the step size of the hyperparameters.

    Args:
        lr: step size, >= 0. Default: 1e-3.
        momentum: factor of the momentum buffer, in [0, 1). Default: 0, without a buffer.
        dampening: the gradient enters the buffer with 1 - dampening, from the second step on. Default: 0.
        weight_decay: coupled weight decay (L2 penalty), >= 0. Default: 0.
        nesterov: use Nesterov's momentum; needs momentum > 0 and no dampening. Default: False.
        learn, space, bounds, ...: see :class:`Level`. Learned by default: lr, and momentum if it is not 0.

    State per parameter: ``momentum_buffer`` if there is momentum.
    """

    optional = ("momentum",)

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    @classmethod
    def rule_for(cls, names: Collection[str], nesterov: bool = False, **structure: bool) -> str:
        return "sgd_nesterov" if nesterov else "sgd_momentum" if {"momentum", "dampening"} & set(names) else "sgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ValueError("SGD: nesterov needs momentum > 0 and dampening = 0")


@dataclass(frozen=True, eq=False, repr=False)
class Adagrad(Level):
    """Adagrad (Duchi, Hazan & Singer, JMLR 2011), as in ``torch.optim.Adagrad``.

    Every element is divided by the root of the sum of all its squared gradients.

    Args:
        lr: step size, >= 0. Default: 1e-2.
        lr_decay: at step t, from 1, lr is divided by 1 + (t - 1) lr_decay; >= 0. Default: 0.
        weight_decay: coupled weight decay (L2 penalty), >= 0. Default: 0.
        initial_accumulator_value: what the sum starts from, >= 0. Default: 0.
        eps: added to the denominator, outside the root, >= 0. Default: 1e-10.
        eps_root: added to the sum, inside the root, >= 0; torch has none. Default: 0; to learn it, start from more,
            or in another coordinate than log.
        learn, space, bounds, ...: see :class:`Level`. Learned by default: lr.

    State per parameter: ``sum``.
    """

    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    eps_root: float = field(default=0.0, kw_only=True)

    @classmethod
    def rule_for(cls, names: Collection[str], **structure: bool) -> str:
        return "adagrad"

    def start(self) -> dict[str, float]:
        return {"sum": float(self.initial_state.get("sum", self.initial_accumulator_value))}

    def __post_init__(self) -> None:
        super().__post_init__()
        value = self.initial_accumulator_value
        if not is_number(value):
            raise TypeError(f"Adagrad: initial_accumulator_value must be a number, not {value!r}")
        if not 0 <= value < math.inf:
            raise ValueError(f"Adagrad: initial_accumulator_value must be in [0, inf), not {value!r}")


@dataclass(frozen=True, eq=False, repr=False)
class Adadelta(Level):
    """Adadelta (Zeiler, arXiv:1212.5701, Algorithm 1), as in ``torch.optim.Adadelta``.

    Every element is divided by the root mean square of its gradients and multiplied by that of its updates.

    Args:
        lr: factor of the update, >= 0. Default: 1, the method itself.
        rho: decay rate of both running averages, in [0, 1). Default: 0.9.
        eps: added to both averages, inside the roots, >= 0. Default: 1e-6.
        weight_decay: coupled weight decay (L2 penalty), >= 0. Default: 0.
        learn, space, bounds, ...: see :class:`Level`. Learned by default: lr and rho.

    State per parameter: ``square_avg`` and ``acc_delta``.
    """

    lr: float = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0

    @classmethod
    def rule_for(cls, names: Collection[str], **structure: bool) -> str:
        return "adadelta"


@dataclass(frozen=True, eq=False, repr=False)
class RMSprop(Level):
    """RMSprop (Tieleman & Hinton, Neural Networks for Machine Learning, lecture 6.5, 2012), as ``torch.optim.RMSprop``.

    Args:
        lr: step size, >= 0. Default: 1e-2.
        alpha: decay rate of the running averages, in [0, 1); gamma in Chandra et al. Default: 0.99.
        eps: added to the denominator, outside the root, >= 0. Default: 1e-8.
        weight_decay: coupled weight decay (L2 penalty), >= 0. Default: 0.
        momentum: factor of the momentum buffer, in [0, 1). Default: 0, without a buffer.
        centered: divide by the root of an estimate of the gradient's variance instead of its second moment (Graves,
            arXiv:1308.0850). An estimate below 0, which rounding can make, counts as 0. Default: False.
        eps_root: added to what the root is taken of, >= 0; torch has none. Default: 0; to learn it, start from more,
            or in another coordinate than log.
        learn, space, bounds, ...: see :class:`Level`. Learned by default: lr and alpha.

    State per parameter: ``square_avg``, ``grad_avg`` if centered, and ``momentum_buffer`` if there is momentum.
    """

    optional = ("momentum",)

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    eps_root: float = field(default=0.0, kw_only=True)

    @classmethod
    def rule_for(cls, names: Collection[str], centered: bool = False, **structure: bool) -> str:
        return "rmsprop" + "_centered" * centered + "_momentum" * ("momentum" in names)


class Betas(Level):
    """The base of levels whose argument ``betas`` holds two hyperparameters, ``beta1`` and ``beta2``."""

    betas: tuple[float, float]

    @property
    def beta1(self) -> float:
        return self.betas[0]

    @property
    def beta2(self) -> float:
        return self.betas[1]

    def __post_init__(self) -> None:
        try:
            beta1, beta2 = self.betas
        except (TypeError, ValueError):
            raise TypeError(f"{type(self).__name__}: betas must be two numbers, not {self.betas!r}") from None
        object.__setattr__(self, "betas", (beta1, beta2))
        super().__post_init__()


@dataclass(frozen=True, eq=False, repr=False)
class Adam(Betas):
    """Adam (Kingma & Ba, ICLR 2015, Algorithm 1), as in ``torch.optim.Adam``.

    Args:
        lr: step size, >= 0. Default: 1e-3.
        betas: decay rates of the running averages of the gradient and of its square, each in [0, 1).
            Default: (0.9, 0.999). Learned as ``beta1`` and ``beta2``.
        eps: added to the denominator, outside the root, >= 0. Default: 1e-8.
        weight_decay: coupled weight decay (L2 penalty), >= 0. Default: 0.
        learn, space, bounds, ...: see :class:`Level`. Learned by default: lr, beta1 and beta2;
            ``learn="lr"`` is the paper's Adam^alpha and, under SGD, Adam-HD of Baydin et al. (ICLR 2018).

    State per parameter: ``exp_avg`` and ``exp_avg_sq``.
    """

    elsewhere: ClassVar[dict[str, str]] = {
        **Betas.elsewhere,
        "amsgrad": "use hx.AMSGrad",
        "decoupled_weight_decay": "use hx.AdamW",
    }

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @classmethod
    def rule_for(cls, names: Collection[str], **structure: bool) -> str:
        return "adam"


@dataclass(frozen=True, eq=False, repr=False)
class AdamW(Betas):
    """AdamW (Loshchilov & Hutter, ICLR 2019, Algorithm 2), as in ``torch.optim.AdamW``.

    Adam whose weight decay does not pass through the moments: w shrinks by the factor 1 - lr * weight_decay. So the
    decay, too, is part of what a learned lr is judged by.

    Args:
        lr: step size, >= 0. Default: 1e-3.
        betas: decay rates of the running averages of the gradient and of its square, each in [0, 1).
            Default: (0.9, 0.999). Learned as ``beta1`` and ``beta2``.
        eps: added to the denominator, outside the root, >= 0. Default: 1e-8.
        weight_decay: decoupled weight decay, >= 0. Default: 1e-2.
        learn, space, bounds, ...: see :class:`Level`. Learned by default: lr, beta1 and beta2.

    State per parameter: ``exp_avg`` and ``exp_avg_sq``.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2

    always = ("decoupled_weight_decay",)

    @classmethod
    def rule_for(cls, names: Collection[str], **structure: bool) -> str:
        return "adamw"


@dataclass(frozen=True, eq=False, repr=False)
class AMSGrad(Betas):
    """AMSGrad (Reddi, Kale & Kumar, ICLR 2018, Algorithm 2), as ``torch.optim.Adam(amsgrad=True)``.

    Adam that divides by the largest second moment so far, so that the step of an element never grows again. Where the
    second moment does not exceed the largest one, the latter is a constant, and beta2 has no slope.

    Args:
        lr: step size, >= 0. Default: 1e-3.
        betas: decay rates of the running averages of the gradient and of its square, each in [0, 1).
            Default: (0.9, 0.999). Learned as ``beta1`` and ``beta2``.
        eps: added to the denominator, outside the root, >= 0. Default: 1e-8.
        weight_decay: coupled weight decay (L2 penalty), >= 0. Default: 0.
        learn, space, bounds, ...: see :class:`Level`. Learned by default: lr, beta1 and beta2.

    State per parameter: ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    always = ("amsgrad",)

    @classmethod
    def rule_for(cls, names: Collection[str], **structure: bool) -> str:
        return "amsgrad"


@dataclass(frozen=True, eq=False, repr=False)
class AdaBelief(Betas):
    """AdaBelief (Zhuang et al., NeurIPS 2020, Algorithm 2), as in the authors' package ``adabelief-pytorch`` 0.2.

    Adam that divides by the running average of the squared distance between the gradient and its average. The defaults
    are that package's, rectification included, which the paper's algorithm does not have.

    Args:
        lr: step size, >= 0. Default: 1e-3.
        betas: decay rates of the running averages of the gradient and of its squared distance from the first, each in
            [0, 1). Default: (0.9, 0.999). Learned as ``beta1`` and ``beta2``.
        eps: added to the second average itself, at every step, and to the denominator, outside the root; >= 0.
            Default: 1e-16.
        weight_decay: weight decay, >= 0. Default: 0.
        weight_decouple: decoupled weight decay, w shrinks by the factor 1 - lr * weight_decay (as in AdamW); else
            coupled (L2 penalty). Default: True.
        rectify: rectified as RAdam (Liu et al., ICLR 2020): the first steps, fewer than beta2 needs for an estimate,
            are SGD with momentum, and later ones are scaled by what the estimate is worth. Default: True.
        learn, space, bounds, ...: see :class:`Level`. Learned by default: lr, beta1 and beta2.

    The package's ``amsgrad``, ``fixed_decay`` and ``degenerated_to_sgd=False`` are not offered.

    State per parameter: ``exp_avg`` and ``exp_avg_var``.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-16
    weight_decay: float = 0.0
    weight_decouple: bool = True
    rectify: bool = True

    @classmethod
    def rule_for(
        cls, names: Collection[str], weight_decouple: bool = True, rectify: bool = True, **structure: bool
    ) -> str:
        return "adabelief" + "_rectified" * rectify + "_coupled" * (not weight_decouple)


@dataclass(frozen=True, eq=False, repr=False)
class NAdam(Betas):
    """NAdam (Dozat, ICLR 2016 workshop), as in ``torch.optim.NAdam``: Adam with Nesterov's momentum.

    The update is made of the gradient and of its running average, weighted by a momentum coefficient that grows from
    beta1 / 2 to beta1. torch keeps the product of all coefficients so far as a state; here it is that of the present
    beta1, as in Adam's bias correction, which is the same as long as beta1 and momentum_decay stay what they are.

    Args:
        lr: step size, >= 0. Default: 2e-3.
        betas: decay rates of the running averages of the gradient and of its square, each in [0, 1).
            Default: (0.9, 0.999). Learned as ``beta1`` and ``beta2``.
        eps: added to the denominator, outside the root, >= 0. Default: 1e-8.
        weight_decay: weight decay, >= 0. Default: 0.
        momentum_decay: how fast the momentum coefficient grows, >= 0: at step t it is
            beta1 (1 - 0.96^(t momentum_decay) / 2). Default: 4e-3.
        decoupled_weight_decay: decoupled weight decay, w shrinks by the factor 1 - lr * weight_decay (as in AdamW);
            else coupled (L2 penalty). Default: False.
        learn, space, bounds, ...: see :class:`Level`. Learned by default: lr, beta1 and beta2.

    State per parameter: ``exp_avg`` and ``exp_avg_sq``.
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False

    @classmethod
    def rule_for(cls, names: Collection[str], decoupled_weight_decay: bool = False, **structure: bool) -> str:
        return "nadam" + "_decoupled" * decoupled_weight_decay


@dataclass(frozen=True, eq=False, repr=False)
class Lion(Betas):
    """Lion (Chen et al., NeurIPS 2023, Algorithm 2), as in the package ``lion-pytorch``.

    The update is lr times a sign, whose slope is 0 wherever it has one and, by definition here, at 0, too. So lr and
    weight_decay can be learned, while the hypergradient of the betas is 0: to learn them is allowed and leaves them
    where they are.

    Args:
        lr: step size, >= 0. Default: 1e-4.
        betas: weight of the running average of the gradient in the direction of the update, and its decay rate, each
            in [0, 1). Default: (0.9, 0.99). Learned as ``beta1`` and ``beta2``.
        weight_decay: decoupled weight decay, >= 0: w shrinks by the factor 1 - lr * weight_decay. Default: 0.
        learn, space, bounds, ...: see :class:`Level`. Learned by default: lr.

    The package's ``decoupled_weight_decay`` (a decay that is not multiplied by lr) is not offered.

    State per parameter: ``exp_avg``.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    @classmethod
    def rule_for(cls, names: Collection[str], **structure: bool) -> str:
        return "lion"


def methods() -> list[type[Level]]:
    """The methods of this module."""
    classes = [c for c in globals().values() if isinstance(c, type) and c.__module__ == __name__]
    return [c for c in classes if c is not Betas]
