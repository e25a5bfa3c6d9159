"""AMSGrad in the form of the paper's package and without bias corrections, to find out what others have measured."""

from __future__ import annotations

import torch
from gradient_descent_the_ultimate_optimizer import gdtuo
from torch import Tensor


class UncorrectedAMSGrad(gdtuo.Adam):
    """AMSGrad (Reddi, Kale & Kumar, ICLR 2018, Algorithm 2), which has no bias corrections.

    Args:
        alpha, beta1, beta2, log_eps: as of the package's Adam; the second moment starts at eps, too.
        forget: the maximum is that of the last two second moments, not of all.
        optimizer: the level above.
    """

    def __init__(
        self,
        alpha: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        log_eps: float = -8.0,
        forget: bool = False,
        optimizer: gdtuo.Optimizable | None = None,
    ) -> None:
        super().__init__(alpha, beta1, beta2, log_eps, optimizer or gdtuo.NoOpOptimizer())
        self.forget = forget

    def step(self, params: dict[str, Tensor]) -> None:
        self.optimizer.step(self.parameters)
        beta1, beta2 = (gdtuo.Adam.clamp(self.parameters[name]) for name in ("beta1", "beta2"))
        for name, param in params.items():
            start = torch.full_like(param, self.eps)
            m, v, largest = self.cache.get(name, (torch.zeros_like(param), start, start))
            assert param.grad is not None
            g = param.grad.detach()
            m = beta1 * m.detach() + (1 - beta1) * g
            new = beta2 * v.detach() + (1 - beta2) * g * g
            largest = torch.maximum((v if self.forget else largest).detach(), new)
            self.cache[name] = m, new, largest
            params[name] = param.detach() - self.parameters["alpha"] * m / (largest.sqrt() + self.eps)
