"""A tower of Adams in the form of the paper: every level's step is part of the autograd graph.

The levels are made of ``hyperopt_ext.functional.adam``. One ``loss.backward()`` runs through the last step of the whole
tower and leaves every level's hypergradient in a ``.grad``. The trajectories are those of
``hx.HyperOptimizer(params, hx.Stack.of(hx.Adam(lr), height=height))``, which needs no graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hyperopt_ext import functional


class AutogradTower:
    """Trains ``params`` with Adam, whose lr, beta1 and beta2 are trained with Adam, and so on up to ``height`` levels.

    Use ``tower.params`` in the loss; each step replaces them::

        loss(tower.params).backward()
        tower.step()

    Args:
        params: start values of the model's parameters; they are not written to.
        height: number of levels, the one that moves the parameters included, >= 1.
        lr, betas: start values of every level; those of the top level stay fixed.
    """

    def __init__(
        self, params: Iterable[Tensor], height: int, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        start = torch.tensor([lr, *(math.atanh(2 * beta - 1) for beta in betas)], dtype=torch.float64)
        self.height = height
        self.params = [p.detach().clone().requires_grad_() for p in params]
        # Of each level, lr and the betas as the level above moves them: h = x for lr, h = (tanh x + 1) / 2 for betas.
        self.coordinates = [start.clone().requires_grad_(k + 1 < height) for k in range(height)]
        self.states: list[functional.State | None] = [None] * height
        self.steps = 0

    def hyperparameters(self) -> list[dict[str, Tensor]]:
        """The current values, one dict a level, lowest level first."""
        return [self._values(x.detach()) for x in self.coordinates]

    @staticmethod
    def _values(x: Tensor) -> dict[str, Tensor]:
        lr, x1, x2 = x.unbind()
        return {"lr": lr, "beta1": (x1.tanh() + 1) / 2, "beta2": (x2.tanh() + 1) / 2}

    def step(self) -> None:
        """One step of every level, from the top down, with the hyperparameters that the level above has just moved."""
        self.steps += 1
        step = torch.tensor(self.steps)
        for k in reversed(range(self.height)):
            moved = self.coordinates[k - 1 : k] if k > 0 else self.params
            # There is no gradient before the first update of a level.
            grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in moved]
            hyper = self._values(self.coordinates[k])
            new, self.states[k] = functional.adam([x.detach() for x in moved], grads, self.states[k], hyper, step)
            for x in new:
                x.requires_grad_().retain_grad()
            if k > 0:
                # lr is projected to its range and, as in the library, the derivative does not see it.
                new[0].detach()[0].clamp_(min=0)
                self.coordinates[k - 1] = new[0]
            else:
                self.params = new
