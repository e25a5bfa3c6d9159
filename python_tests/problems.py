"""Small training problems."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch.func import functional_call


class Regression:
    """A smooth regression with a fresh batch every step: `loss(step, model)` or, of a list of parameters, `loss_of`."""

    def __init__(self, steps: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(steps, 16, 4, generator=generator, dtype=dtype)
        self.y = torch.sin(self.x.sum(-1, keepdim=True)) + 0.3
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).to(dtype)

    def loss(self, step: int, model: torch.nn.Module | None = None) -> Tensor:
        model = self.model if model is None else model
        return (model(self.x[step]) - self.y[step]).square().mean()

    def loss_of(self, step: int, params: list[Tensor]) -> Tensor:
        named = dict(zip([name for name, _ in self.model.named_parameters()], params, strict=True))
        return (functional_call(self.model, named, (self.x[step],)) - self.y[step]).square().mean()

    def train(self, opt: torch.optim.Optimizer, steps: range) -> None:
        for i in steps:
            opt.zero_grad()
            self.loss(i).backward()
            opt.step()


def relative_error(a, b) -> float:
    """The largest difference over the largest entry of b."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()


@contextlib.contextmanager
def float64_by_default():
    """What torch and the package keep in scalars is as exact as what the library keeps."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_same(params, hyper, expected_params, expected_hyper, tolerance=1e-9):
    """Parameters, and the values of every level: a number, or a list where each tensor has its own."""
    for p, q in zip(params, expected_params, strict=True):
        assert relative_error(p.detach(), q.detach()) <= tolerance
    for level, expected in zip(hyper, expected_hyper, strict=True):
        for name, value in expected.items():
            assert level[name].tolist() == pytest.approx(value, rel=tolerance, abs=1e-300), name
