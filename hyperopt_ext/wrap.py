"""Any optimizer as the first level of a tower, from the updates that it makes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import MISSING, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hyperopt_ext import _C
from hyperopt_ext.distributed import is_dtensor
from hyperopt_ext.stack import Level


class Wrap(Level):
    """An optimizer that this library does not know, whose lr is learned from the updates that it made.

    Its update is taken to be proportional to lr, so that d(update)/d(lr) is the update over lr, and the hypergradient
    is the product of that with the next gradient: what Baydin et al. (ICLR 2018) do for SGD and Adam, for any method.
    With decoupled weight decay, w shrinks by the factor 1 - lr * weight_decay (as in AdamW), so weight_decay can be
    learned, too; the update's part that does not depend on it need not be known. Neither is checked: an optimizer that
    clips lr (as Adafactor's ``min(lr, 1 / sqrt(step))``) is learned as if it did not, and to learn the weight decay of
    one that adds it to the gradient is wrong.

    ``hx.HyperOptimizer(params, hx.Wrap(torch.optim.Muon, lr=0.02) / hx.SGD(lr=1e-5))``

    Args:
        optimizer: a class, or a function, that makes a ``torch.optim.Optimizer`` of parameters and keyword arguments.
            It is called once for each param group, with the group's parameters.
        arguments: all keywords that are not those of :class:`Level` go to ``optimizer``. lr, and weight_decay, are
            numbers >= 0, by default the optimizer's own.
        learn: ``"lr"``, ``"weight_decay"`` or both. Default: ``"lr"``.
        space, bounds, horizon, normalize, clip, growth, burn_in, converge: see :class:`Level`. There is no ``trust``,
            which needs an update before it is made, and no ``granularity="tensor"``: use a param group for each tensor.

    State per parameter: ``trace_lr`` and ``trace_weight_decay``, those that are learned, fp32 (fp64 of fp64
    parameters). Of half-precision parameters they are made of updates that were rounded to it, so that what is too
    small to move a parameter counts as nothing. The optimizer's own state stays its own, in
    ``opt.param_groups[i]["optimizer"].state``, and is part of :meth:`HyperOptimizer.state_dict`.

    The optimizer is given its lr and weight decay as numbers, for which the host waits once a step, and sits out a step
    whose gradient is not finite. One with ``capturable=True``, of which only lr is learned and which has no
    ``nonfinite`` policy, is given lr as a tensor, and nothing in ``step()`` waits for a value; a gradient that is not
    finite then reaches it, as it does without a tower, and leaves the hyperparameters alone, and its weight decay stays
    as it was made. What else is written to a param group goes to the optimizer, if that has an entry of the name
    (``group["momentum"] = 0.9``). For ``GradScaler``, ``step()`` takes gradients that are unscaled; the scaler does
    that by itself. It is not for ``torch.compile``, and hooks of all optimizers
    (``register_optimizer_step_post_hook``) see the optimizer's steps as well as the tower's. An error in its own step
    comes after the tower has moved.

    Raises:
        TypeError: ``optimizer`` cannot be called, has no lr, or no argument of a name that was given; or, by
            :class:`HyperOptimizer`, a parameter is a DTensor.
        ValueError: a value out of its range.
    """

    first_only = True
    always = ("decoupled_weight_decay",)  # if its groups have it, it knows it

    optimizer: Callable[..., Optimizer]
    lr: float
    weight_decay: float
    own: dict[str, Any]

    def __new__(cls, *args: Any, **arguments: Any) -> Wrap:
        return object.__new__(cls)

    def __init__(self, optimizer: Callable[..., Optimizer], /, *values: Any, **arguments: Any) -> None:
        if values:
            raise TypeError(f"Wrap: all arguments but the class are given by name, as lr={values[0]!r}")
        if not callable(optimizer):
            shown = f"a {type(optimizer).__name__}" if isinstance(optimizer, Optimizer) else repr(optimizer)
            raise TypeError(f"Wrap: optimizer must be a class such as torch.optim.Muon, not {shown}")
        if isinstance(optimizer, type) and issubclass(optimizer, Level):
            raise TypeError(f"Wrap: {optimizer.__name__} is a level already; use it as it is")
        known: dict[str, Any] = self._parameters(optimizer)
        self._set(optimizer=optimizer)
        for f in fields(Level):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            self._set(**{f.name: arguments.pop(f.name, default)})
        if self.learn is None:
            self._set(learn=("lr",))
        for name in arguments:
            if name not in known and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                raise TypeError(f"Wrap: {self} has no argument {name!r}; its arguments are {', '.join(known)}")
        if "lr" not in known:
            raise TypeError(f"Wrap: {self} has no argument lr")
        for name in ("lr", "weight_decay"):
            default = known[name].default if name in known else 0.0
            self._set(**{name: arguments.get(name, default)})
        if self.lr is inspect.Parameter.empty:  # type: ignore[comparison-overlap]
            raise TypeError(f"Wrap: lr of {self} has no default; give one")
        self._set(own=arguments)
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trust is not None:
            raise ValueError("Wrap: trust measures an update before it is made, so it needs a level of this library")
        if self.granularity != "group":
            raise ValueError("Wrap: granularity must be 'group'; give each tensor a param group of its own")
        if "weight_decay" in self.learn_names and not self.has_weight_decay():
            raise ValueError(f"Wrap: {self} has no weight_decay to learn")

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def _parameters(optimizer: Callable[..., Any]) -> dict[str, inspect.Parameter]:
        """The arguments after the first, which are the parameters to train."""
        return dict(list(inspect.signature(optimizer).parameters.items())[1:])

    @classmethod
    def rule_for(cls, names: Collection[str], **structure: bool) -> str:
        """That of the hyperparameters: SGD's are lr and weight_decay."""
        return "sgd"

    def arguments(self) -> list[str]:
        return [*self._parameters(self.optimizer), *super().arguments()]

    def horizons(self) -> tuple[float, float]:
        """As for any level, but always more than one step, so that hypergradients are those of traces."""
        steps, part = super().horizons()
        return steps, max(part, sys.float_info.min)

    def replace(self, **changes: Any) -> Wrap:
        own = {f.name: getattr(self, f.name) for f in fields(Level)}
        return Wrap(self.optimizer, **{**own, **self.own, **changes})

    def structure(self, learns: bool = True) -> str:
        return f"Wrap[{self}]{super().structure(learns).removeprefix(self.rule)}"

    def make(self, group: dict[str, Any], is_part: bool) -> Optimizer:
        """The optimizer of a param group."""
        if any(is_dtensor(p) for p in group["params"]):
            raise TypeError(f"Wrap: {self} cannot be wrapped around DTensors; use a level of this library")
        arguments = dict(self.own)
        if group["maximize"]:
            if "maximize" not in self._parameters(self.optimizer):
                raise ValueError(f"Wrap: {self} has no maximize; change the sign of the loss")
            arguments["maximize"] = True
        nothing = [torch.zeros(1, 1)] if is_part else []  # no optimizer is made without a parameter
        optimizer = self.optimizer(group["params"] or nothing, **{**arguments, "lr": self.lr})
        if not isinstance(optimizer, Optimizer) or len(optimizer.param_groups) != 1:
            raise TypeError(f"Wrap: {self} made {type(optimizer).__name__}, which is no torch.optim.Optimizer")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(f"Wrap: {self} evaluates the loss in its step, by a closure, and cannot be wrapped")
        return optimizer

    def step_of(self, group: dict[str, Any]) -> Callable[..., None]:
        return _WrappedStep(self, group)

    def has_weight_decay(self) -> bool:
        """Whether the optimizer has an argument of that name."""
        return "weight_decay" in self._parameters(self.optimizer)

    def takes_tensors(self) -> bool:
        """Whether an lr that is a tensor makes it wait for nothing, as far as its arguments tell.

        Those of torch.optim that are not capturable read it for each parameter, and fused ones want it in fp32.
        """
        capturable = self.own.get("capturable") and not self.own.get("fused")
        return bool(capturable) and "Tensor" in str(self._parameters(self.optimizer)["lr"].annotation)

    def __str__(self) -> str:
        make: Any = self.optimizer
        while isinstance(make, partial):
            make = make.func
        return str(getattr(make, "__name__", type(make).__name__))

    def __repr__(self) -> str:
        own = {"lr": self.lr, **self.own}
        for f in fields(Level):
            default = ("lr",) if f.name == "learn" else f.default if f.default_factory is MISSING else {}
            if getattr(self, f.name) != default:
                own[f.name] = getattr(self, f.name)
        return f"Wrap({self}, {', '.join(f'{name}={value!r}' for name, value in own.items())})"


def create_state(optimizer: Optimizer) -> dict[str, Any]:
    """Makes an optimizer create its state, by a step with the gradients of 0 that it finds; parameters stay.

    Returns:
        Its state dict from before, which undoes that: it may have counted the step.
    """
    [group] = optimizer.param_groups
    before = deepcopy(optimizer.state_dict())
    params = [p.detach().clone() for p in group["params"]]
    own = dict(group)
    if "weight_decay" in group:
        group["weight_decay"] = 0.0
    try:
        optimizer.step()
    except Exception:  # one that cannot make a step of nothing is left without state
        optimizer.load_state_dict(before)
    finally:
        group.update(own)
        for p, start in zip(group["params"], params, strict=True):
            p.copy_(start)
    return before


class _WrappedStep:
    """Pass B of a wrapped optimizer, with the arguments of a rule's own."""

    def __init__(self, level: Wrap, group: dict[str, Any]) -> None:
        self.optimizer: Optimizer = group["optimizer"]
        self.optimizer.param_groups[0]["params"] = group["params"]  # one list, to which the caller may append
        self.group = group
        self.names = level.learn_names
        self.start = _C.tower_offsets(group["stack"].plan())[0][2]
        self.values = list(level.values())
        takes = level.takes_tensors() and "weight_decay" not in self.names
        self.waits = group["nonfinite"] is not None or not takes
        followed = self.values if self.waits else ["lr"]
        self.follows = [name for name in followed if name in self.optimizer.param_groups[0]]
        self.passed_on = {*level.arguments()} - {*self.values, "maximize"}

    def __call__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        state: list[Tensor],
        record: list[Tensor],
        steps: list[Tensor],
        ticks: list[Tensor],
        tower: Tensor,
        rows: list[int],
        learn: int,
        horizon: float,
        horizon_growth: float,
        scale: float,
        *_: Any,
    ) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("Wrap: a wrapped optimizer is not for torch.compile; compile the model alone")
        if not params:  # other processes have some
            return
        used = tower[0, self.start : self.start + len(self.values)]
        values: Any = used
        if self.waits:
            ticking, *values = torch.cat([tower[0, _C.TICKING : _C.TICKING + 1], used]).tolist()
            if not ticking:
                return
        inner = self.optimizer.param_groups[0]
        if "maximize" in inner:
            inner["maximize"] = scale < 0
        elif scale < 0:
            raise ValueError("Wrap: the optimizer has no maximize; change the sign of the loss")
        for name in self.passed_on & self.group.keys():
            inner[name] = self.group[name]
        for name in self.follows:
            inner[name] = values[self.values.index(name)]

        # z <- keep z + d(update)/dh in place, with the parameters as they are before and after the update.
        lr = used[self.values.index("lr")]
        unit = torch.where(lr == 0, 1.0, lr)  # an update of 0 says nothing of one per lr: the trace fades
        n = len(params)
        traces = {name: record[k * n : (k + 1) * n] for k, name in enumerate(self.names)} if learn else {}
        if "weight_decay" in traces:  # -lr w
            self._fade(traces["weight_decay"], torch.ones_like(lr), steps, horizon, horizon_growth)
            torch._foreach_addcmul_(traces["weight_decay"], params, [-lr] * n)
        if "lr" in traces:  # the update over lr
            self._fade(traces["lr"], unit, steps, horizon, horizon_growth)
            torch._foreach_sub_(traces["lr"], params)
        every = inner["params"]
        inner["params"] = params
        try:
            self.optimizer.step()
        finally:
            inner["params"] = every
            if "lr" in traces:  # after an error, too: the parameters were taken off
                torch._foreach_add_(traces["lr"], params)
                torch._foreach_mul_(traces["lr"], 1 / unit)
        torch._foreach_add_(steps, 1)
        torch._foreach_copy_(ticks, [tower[0, _C.TICKS]] * n)

    @staticmethod
    def _fade(traces: list[Tensor], factor: Tensor, steps: list[Tensor], horizon: float, growth: float) -> None:
        if growth <= sys.float_info.min:
            torch._foreach_mul_(traces, factor * (1 - 1 / horizon))
        else:  # by the steps of each parameter
            keep = 1 - 1 / (growth * (torch.stack(steps) + 1).to(factor)).clamp_min(horizon)
            torch._foreach_mul_(traces, list((keep * factor).unbind()))
