"""Small training problems, and what "equal" means."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

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

    def loss(self, step: int, model: Any = None) -> Tensor:
        model = self.model if model is None else model
        loss: Tensor = (model(self.x[step]) - self.y[step]).square().mean()
        return loss

    def loss_of(self, step: int, params: Sequence[Tensor]) -> Tensor:
        named = dict(zip([name for name, _ in self.model.named_parameters()], params, strict=True))
        return self.loss(step, lambda x: functional_call(self.model, named, (x,)))

    def train(self, opt: torch.optim.Optimizer, steps: range) -> None:
        for i in steps:
            opt.zero_grad()
            self.loss(i).backward()  # type: ignore[no-untyped-call]
            opt.step()


def relative_error(a: Any, b: Any) -> float:
    """The largest difference over the largest entry of b."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    if b.numel() == 0:
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def assert_close(got: Any, expected: Any, what: str, rel: float, floor: float = 1e-12) -> None:
    """Two numbers differ by at most `rel` of the expected one, or `floor`."""
    got, expected = (float(x.detach() if isinstance(x, Tensor) else x) for x in (got, expected))
    if not (got == expected or abs(got - expected) <= max(rel * abs(expected), floor)):
        raise AssertionError(f"{what} is {got!r}, but should be {expected!r}, to {rel:g} of it")


def assert_near(got: Any, expected: Any, what: str, tolerance: float) -> None:
    """Two tensors are equal up to `tolerance` of the largest entry of the expected one."""
    error = relative_error(got, expected)
    if not error <= tolerance:
        raise AssertionError(f"{what}: the largest difference is {error:.3g} of the largest entry, not {tolerance:g}")


def assert_same(
    params: Iterable[Tensor],
    hyper: Sequence[Mapping[str, Tensor]],
    expected_params: Iterable[Tensor],
    expected_hyper: Sequence[Mapping[str, Any]],
    tolerance: float = 1e-9,
    first: Sequence[Mapping[str, float]] = (),
) -> None:
    """Parameters, and the values of every level: a number, or a list where each tensor has its own.

    Of one that comes down to 0 from its `first` value, rounding decides whether it stops there.
    """
    for i, (p, q) in enumerate(zip(params, expected_params, strict=True)):
        assert_near(p.detach(), q.detach(), f"parameter {i}", tolerance)
    for k, (level, expected) in enumerate(zip(hyper, expected_hyper, strict=True)):
        for name, value in expected.items():
            values = value if isinstance(value, list) else [value]
            got = level[name].reshape(-1).tolist()
            for x, y in zip(got, values, strict=True):
                floor = 1e-15 * first[k][name] if first else 0.0
                assert_close(x, y, f"{name} of level {k}", tolerance, max(floor, 1e-100))


def assert_raises(message: str, call: Callable[[], object]) -> None:
    """The call is a RuntimeError that says `message`."""
    try:
        call()
    except RuntimeError as error:
        if message not in str(error):
            raise
        return
    raise AssertionError(f"there is no error that says {message!r}")


@contextlib.contextmanager
def float64_by_default() -> Iterator[None]:
    """What other packages keep in scalars is as exact as what this one keeps."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
