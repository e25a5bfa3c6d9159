"""The levels that a tower is built of: one class a method, with the arguments and defaults of ``torch.optim``."""

from __future__ import annotations

from dataclasses import dataclass

from hyperopt_ext.stack import Level


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
        learn, space, bounds, initial_state: see :class:`Level`. Learned by default: lr, and momentum if it is not 0.

    State per parameter: ``momentum_buffer`` if there is momentum.
    """

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    @property
    def rule(self) -> str:
        if self.nesterov:
            return "sgd_nesterov"
        return "sgd_momentum" if self.momentum != 0 or {"momentum", "dampening"} & set(self.learn or ()) else "sgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ValueError("SGD: nesterov needs momentum > 0 and dampening = 0")


@dataclass(frozen=True, eq=False, repr=False)
class Adam(Level):
    """Adam (Kingma & Ba, ICLR 2015, Algorithm 1), as in ``torch.optim.Adam``.

    Args:
        lr: step size, >= 0. Default: 1e-3.
        betas: decay rates of the running averages of the gradient and of its square, each in [0, 1).
            Default: (0.9, 0.999). Learned as ``beta1`` and ``beta2``.
        eps: added to the denominator, outside the root, >= 0. Default: 1e-8.
        weight_decay: coupled weight decay (L2 penalty), >= 0. Default: 0.
        learn, space, bounds, initial_state: see :class:`Level`. Learned by default: lr, beta1 and beta2;
            ``learn="lr"`` is the paper's Adam^alpha and, under SGD, Adam-HD of Baydin et al. (ICLR 2018).

    State per parameter: ``exp_avg`` and ``exp_avg_sq``.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @property
    def rule(self) -> str:
        return "adam"

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
            raise TypeError(f"Adam: betas must be two numbers, not {self.betas!r}") from None
        object.__setattr__(self, "betas", (beta1, beta2))
        super().__post_init__()
