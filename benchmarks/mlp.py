"""The model of the training-step benchmarks: an MLP 784-128-10 with tanh, of the size that is usual for MNIST.

The data is made up: normal inputs, labelled by a random linear map, so that there is something to learn and the
hypergradients of different batches agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHAPES = ((128, 784), (128,), (10, 128), (10,))
BATCH = 256


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, w1, b1)), w2, b2)


class MLP(nn.Module):
    """Weights from a fixed seed, so that all contenders start from the same point."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in zip(("w1", "b1", "w2", "b2"), SHAPES, strict=True):
            bound = (784 if name.endswith("1") else 128) ** -0.5
            values = torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
            self.register_parameter(name, nn.Parameter(values))

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, *self.parameters())


def batches(dtype: torch.dtype = torch.float32, count: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs [256, 784] and labels [256], endlessly; the same for every caller."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(784, 10, dtype=dtype, generator=generator)
    inputs = [torch.randn(BATCH, 784, dtype=dtype, generator=generator) for _ in range(count)]
    return cycle([(x, (x @ teacher).argmax(1)) for x in inputs])


def training_step(model: MLP, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that makes one whole training step, on the next batch."""
    data = batches()

    def step() -> None:
        x, y = next(data)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step
