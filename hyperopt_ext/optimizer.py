"""The optimizer: a ``torch.optim.Optimizer`` whose hyperparameters learn while it trains."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar, overload
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hyperopt_ext import _C, distributed
from hyperopt_ext.export import export
from hyperopt_ext.stack import RULES, Level, Stack
from hyperopt_ext.state_dict import check_mapping, check_state_dict
from hyperopt_ext.update import (
    Group,
    Update,
    adopt_assignments,
    check_no_module,
    check_policy,
    is_exporting,
    is_rehearsal,
    is_state,
    move_towers,
    new_tower,
    state_dtype,
    write,
)
from hyperopt_ext.wrap import create_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from hyperopt_ext.recorder import Recorder

Loss = TypeVar("Loss")  # what a closure returns: a float, or a tensor

_PRINTED_LEVELS = 8  # above the first
_UNPRINTED = ("params", "tower", "betas", "optimizer")
# What a param group holds that load_state_dict() copies into and does not replace.
_OWN = ("stack", "tower", "optimizer")
# What a param group may hold beside the arguments of its first level; and what else torch's groups hold, which is a
# mistake where it is switched on.
_GROUP_KEYS = {"params", "param_names", "stack", "maximize", "nonfinite", "initial_lr"}
_SWITCHES = ("amsgrad", "decoupled_weight_decay", "nesterov", "centered")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _warn(text: str) -> None:
    """Names the caller's line, of the constructor or of add_param_group()."""
    frame, stacklevel = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "hyperopt_ext",
        "torch",
    ):
        frame, stacklevel = frame.f_back, stacklevel + 1
    warnings.warn(text, stacklevel=stacklevel)


_alive: WeakValueDictionary[str, HyperOptimizer] = WeakValueDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _create_state(key: str) -> None:
    """Runs while a step is traced, so that the graph finds all state there and need not change after the first step."""
    opt = _alive[key]
    opt._adopt_groups()
    for group in opt._groups:
        torch._dynamo.mark_static_address(group.tower)  # what a step writes to is in no CUDA graph else
        for p in group.params:
            if p.requires_grad and not is_state(opt.state.get(p)):
                opt.state[p].update(group.new_state(p))
            if is_state(opt.state.get(p)):
                for name in group.state_names():
                    torch._dynamo.mark_static_address(opt.state[p][name])


class HyperOptimizer(Optimizer):
    """Trains parameters with ``stack[0]``, and each level's hyperparameters by gradient descent with the level above.

    The method is that of Chandra et al., "Gradient Descent: The Ultimate Optimizer" (NeurIPS 2022). At every step each
    level's last update is differentiated with respect to the hyperparameters that made it (one step back, everything
    else held constant), the tower moves them from the top down, and the parameters are updated with the new values.
    There is no autograd graph: an ordinary ``loss.backward()`` before ``step()`` is all it takes. At the first step,
    and for a parameter that had no gradient in the step before, the hypergradient is 0. A group without any gradient
    (or a tensor, if it has a tower of its own) stands still, its clock too, and goes on from its last update.

    Args:
        params: parameters, named parameters, or dicts that define param groups; fp32, fp64, fp16 or bf16, dense, any
            strides, those of a group on one device. A group may have its own ``stack``, or its own values for
            arguments of the first level (``{"params": ..., "lr": 1e-2}``), and has hyperparameters of its own in any
            case.
        stack: a level or a stack of levels, as ``hx.Adam(lr=1e-3) / hx.SGD(lr=1e-5)``.
        maximize: maximise the objective instead of minimising it; for the whole tower. Default: False.
        nonfinite: what happens where a number is not finite. ``"hold"``: because of a gradient the group sits the step
            out, because of a hypergradient only the tower does. ``"skip"``: because of either, the group sits the step
            out. ``"raise"``: a ``FloatingPointError`` before anything is changed, because of a gradient or a
            hypergradient of the first level (which makes the host wait for the device at every step), and else as
            ``"skip"``. Default: ``None``, as ``"hold"`` if something is learned; a stack of one level does
            what ``torch.optim`` does.
        shard_group: the processes that share the parameters out, if the parameters do not show it: each was given other
            ones (ZeRO, stages of a pipeline), or parts of them as plain tensors (FSDP1). Their sums are added up, so
            that all have the same towers; each must have the same param groups, though perhaps with no parameters.
            DTensors (FSDP2, HSDP, tensor parallelism) know their mesh and replicas (DDP) need nothing. Default: None.

    State, in ``opt.state[p]``: ``step`` (updates made) and ``tick`` (the step of the tower that the last one belongs
    to), both int64 of no dimension; the rule's state, and, where the next hypergradient needs it, ``last_grad``, each
    of the parameter's shape in fp32 (fp64 for fp64 parameters), and ``last_param``, a copy of the parameter before its
    last update (where weight decay is decoupled, or learned). If a learned hyperparameter reaches the state (Adam's
    betas), or the update is made of a state that it replaces (Lion, Adadelta), the state is that *before* the update
    that ``last_grad`` made: it is advanced in the next step. With a ``horizon`` of more than one step there is neither
    of the two and no lag, but a ``trace_lr`` (and so on) for each learned hyperparameter, in the state's dtype. Entries
    of others (as of a wrapper around the optimizer) are kept, saved and loaded.

    Current values are in ``param_groups`` by name (``"lr"``, ``"beta1"``, ...) for the first level and in
    :meth:`hyperparameters` for all: float64 tensors of no dimension on the parameters' device. They may be written to
    (``group["lr"].fill_(0.1)``, or ``group["lr"] = 0.1``); the next step starts from what it finds, projected to the
    bounds. Of a level with ``granularity="tensor"`` they have one number for each parameter of the group, in its
    order.

    A scheduler of ``torch.optim.lr_scheduler`` multiplies a learned lr. Once it has written ``initial_lr`` to the
    group, the entry ``lr`` is the scheduler's own, a float64 tensor of no dimension; the lr in use (:meth:`in_use`) is
    the learned one times ``lr / initial_lr``, and hypergradients are those of the learned one, which bounds and
    ``growth`` hold for. With a horizon, earlier updates count as if they had been made with the present factor. An
    ``initial_lr`` that is not the present lr (of ``OneCycleLR``) becomes the learned lr, and the schedule starts from
    the lr in use. What else a scheduler writes (momentum, betas, an lr that is not learned, that of
    ``ReduceLROnPlateau``) is written as by anyone. An argument of the first level that it was made without (SGD's
    momentum) cannot be switched on in the group, which is a ``ValueError`` of ``step()``.

    Hypergradients are made of the gradients that move the parameters: unscaled, if a ``torch.amp.GradScaler`` scaled
    them (``step()`` divides by its scale, without waiting for it; where it found an inf, all groups sit the step out),
    and clipped, if they were clipped before ``step()``. ``opt.unscales = False`` leaves the division to the scaler,
    which then waits for the device, as for torch's optimizers that are not fused: Lightning asks for that where it
    clips.

    Non-finite numbers do not spread: see ``nonfinite``. A gradient so large that its squared norm is not finite counts
    as one that is not. :meth:`skipped_steps` counts the steps that a group sat out, :meth:`held_steps` those that its
    tower did, and :meth:`bounded_steps` how often ``bounds``, ``growth`` or ``trust`` cut a move.

    Raises:
        TypeError: a parameter is not floating-point or not dense, ``stack`` is not one, or ``maximize`` not a bool.
        ValueError: a parameter appears twice, a group spans devices, a hyperparameter is out of its range, or
            ``nonfinite`` is no policy.
    """

    _shard_group: ProcessGroup | None = None  # no part of what is copied
    _rehearsed: Sequence[tuple[Optimizer, dict[str, Any]]] = ()  # wrapped ones, and their state before
    _rehearses = False  # the last call of step() was none, but how torch.distributed.checkpoint creates state

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        stack: Level | Stack,
        *,
        maximize: bool = False,
        nonfinite: str | None = None,
        shard_group: ProcessGroup | None = None,
    ) -> None:
        if isinstance(params, Level | Stack):
            raise TypeError("params and stack are in the wrong order: HyperOptimizer(model.parameters(), stack)")
        check_no_module(params)
        distributed.check_group(shard_group)
        self._shard_group = shard_group
        self.unscales = True
        self._groups: list[Group] = []
        stack = Stack.coerce(stack)
        values: dict[str, Any] = stack[0].values()
        if "beta1" in values:
            values = {"betas": (values.pop("beta1"), values.pop("beta2")), **values}
        super().__init__(params, {**values, "stack": stack, "maximize": maximize, "nonfinite": nonfinite})
        if shard_group is not None:
            self._gather_empty_groups()

    # GradScaler.step() then leaves it to step() to divide by `grad_scale` and to heed `found_inf`, as in torch's fused
    # optimizers.
    @property
    def _step_supports_amp_scaling(self) -> bool:
        return self.unscales and not any("optimizer" in group for group in self.param_groups)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As in torch.optim."""
        for group in getattr(self, "_groups", ()):
            group.meet_scheduler()
        return self._param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._param_groups = groups

    @property
    def stack(self) -> Stack:
        """The stack of every group that was given none of its own."""
        stack: Stack = self.defaults["stack"]
        return stack

    def hyperparameters(self, group: int = 0) -> list[dict[str, Tensor]]:
        """The current values in a param group, as live tensors.

        Write to them by ``fill_()`` or ``copy_()``; to assign to a key of a dict changes nothing. Every step changes
        them: keep ``float(t)`` or ``t.clone()``.

        Args:
            group: number of the param group. Default: 0.

        Returns:
            One dict a level, level 0 first, of float64 tensors on the device of the parameters: of no dimension, or,
            of a level with ``granularity="tensor"``, [parameters].

        Raises:
            IndexError: there is no such group.
        """
        return [dict(level) for level in self._group(group).hyperparameters]

    def in_use(self, group: int = 0) -> list[dict[str, Tensor]]:
        """The values that the most recent update was made with, as :meth:`hyperparameters` gives the learned ones.

        They differ where a scheduler or ``converge`` stands between the two, and in what ``trust`` lowers. Before the
        first step they are the start values; what is written to a hyperparameter shows after the next step.
        """
        return [dict(level) for level in self._group(group).used]

    def skipped_steps(self, group: int = 0) -> Tensor:
        """How many steps changed nothing, because a number was not finite.

        Live, float64, of no dimension, or [parameters] with ``granularity="tensor"``. It only grows.
        """
        return self._group(group).count(_C.SKIPPED)

    def held_steps(self, group: int = 0) -> Tensor:
        """How many steps left the tower alone, because a hypergradient was not finite: as :meth:`skipped_steps`."""
        return self._group(group).count(_C.HELD)

    def bounded_steps(self, group: int = 0) -> list[dict[str, Tensor]]:
        """How many moves of each hyperparameter were cut, one dict a level: live.

        By ``bounds``, those that are there by default included, by ``growth`` or by ``trust``.
        """
        return [dict(level) for level in self._group(group).bounded]

    def export(
        self,
        recorder: Recorder | None = None,
        *,
        values: str = "final",
        schedule: bool = True,
        params: Iterable[Any] | None = None,
    ) -> tuple[Optimizer, LambdaLR]:
        """What was learned, as an optimizer of ``torch.optim`` and a ``LambdaLR`` on it; call ``step()`` of both.

        A ``LambdaLR`` schedules lr alone. All other hyperparameters, as learned betas, are constants there.

        Args:
            recorder: the :class:`Recorder` of this run. The lr follows what it recorded of the lr in use, record for
                record, and stays at the last one. ``None``: lr is constant, and the LambdaLR is the factor 1.
            values: of the constants: ``"final"``, those of the last step, or ``"mean"``, the mean over all records.
                Default: ``"final"``.
            schedule: False: lr is one of these constants, too. Default: True.
            params: what the new optimizer trains, as parameters or, of several param groups, as a list of lists, in the
                order of this one's. Default: the same parameters. The state starts anew in any case.

        A level with ``granularity="tensor"`` makes a param group of each tensor. ``Wrap`` makes the optimizer that it
        wraps.

        Raises:
            TypeError: the first level is no method of ``torch.optim`` (AdaBelief, Lion, those of ``hx.compat``, any
                with an ``eps_root``), or the param groups have several methods.
            ValueError: the recorder is empty or that of another optimizer, a mean without one, or other parameters.
        """
        return export(self, recorder, values=values, schedule=schedule, params=params)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """One step of every level, from the gradients in ``p.grad``.

        Args:
            closure: evaluates the model again and returns the loss; called once, with gradients enabled.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            FloatingPointError: with ``nonfinite="raise"``. Nothing is changed then.
            ValueError: a gradient is sparse, or does not match its parameter in shape, dtype or device. Nothing is
                changed then.
            RuntimeError: under ``torch.export``, or compiled with ``nonfinite="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        if is_exporting():
            raise RuntimeError(
                "torch.export would make constants of the parameters and of the optimizer's state; export a step of "
                "hx.functional.<rule>"
            )
        compiling = torch.compiler.is_compiling()
        if compiling:
            _create_state(self._key)
            if any(g.nonfinite == "raise" for g in self._groups):
                raise RuntimeError("nonfinite='raise' has to read values, which a compiled step cannot; use 'skip'")
        self._adopt_groups()
        if not compiling:
            self._rehearses = not self.state and is_rehearsal()
            if self._rehearses:
                _create_state(self._key)
                wrapped = [group["optimizer"] for group in self._param_groups if "optimizer" in group]
                self._rehearsed = [(optimizer, create_state(optimizer)) for optimizer in wrapped]
                return loss
            for optimizer, before in self._rehearsed:  # and nothing was loaded
                optimizer.load_state_dict(before)
            self._rehearsed = []
        # All gradients before any state: dynamo must not meet a parameter as a key of the state first.
        moving = [[p for p in g.group["params"] if p.grad is not None and p.requires_grad] for g in self._groups]
        if compiling:
            for p in [*(p for g in self._groups for p in g.params), *self.state]:
                id(p)  # makes a guard: with another tensor in its place, the step is traced again
        adopt_assignments(self._groups)
        reduction = self._reduction
        scaler = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # of a torch.amp.GradScaler
        updates = [
            Update(g, params, self.state, reduction, *scaler)
            for g, params in zip(self._groups, moving, strict=True)
            if params or (reduction is not None and (g.sums or g.capped))  # others may have some
        ]
        move_towers(updates, reduction)
        for update in updates:
            update.step()
            for p, state in update.new.items():
                self.state[p].update(state)
        return loss

    def _adopt_groups(self) -> None:
        """Groups may have been taken out or given another policy, and what shards a model puts new lists in place.

        What moves an optimizer puts new towers there. Reads all from the groups first, since dynamo makes guards of
        what it meets first.
        """
        groups = self._param_groups
        if len(groups) != len(self._groups) or any(
            group is not g.group
            or group["stack"] is not g.stack
            or group["params"] is not g.params
            or group["nonfinite"] is not g.nonfinite
            or group["tower"] is not g.tower
            or len(group["params"]) != len(g.members)
            or (not torch.compiler.is_compiling() and g.was_edited())
            for group, g in zip(groups, self._groups, strict=True)
        ):
            for g in self._groups:
                same, g.group["stack"] = g.stack == g.group["stack"], g.stack
                if not same:
                    raise ValueError("param group: its stack stays what it is; add_param_group() takes another one")
                for group in groups:
                    if group is g.group or group["tower"] is g.tower:
                        g.check_places(group["params"])
            for g in self._groups:
                stay = [
                    group["params"]
                    for group in groups
                    if group is g.group or group["tower"] is g.tower or group["params"] is g.params
                ]
                g.let_go({p for params in stay for p in params}, self.state, self._reduction)
            saved = [dict(group) for group in groups]
            self._attach_all()
            self._adopt_values(saved)
        for g in self._groups:  # a wrapper that shares the list of groups gives them to a scheduler
            g.meet_scheduler()

    def _gather_empty_groups(self) -> None:
        """Puts their towers where the parameters of this process are: all processes add up on one kind of device."""
        device = next((p.device for group in self._param_groups for p in group["params"]), None)
        for group in self._param_groups:
            if not group["params"] and device is not None:
                group["tower"] = group["tower"].to(device)
        self._adopt_groups()

    def _group(self, index: int) -> Group:
        self._adopt_groups()
        if not -len(self._groups) <= index < len(self._groups):
            raise IndexError(f"group is {index}, but this optimizer has {len(self._groups)} param groups")
        adopt_assignments(self._groups)
        return self._groups[index]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, with a tower of its own. See :class:`HyperOptimizer` for what it may hold."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, not {type(param_group).__name__}")
        if "params" not in param_group:
            raise ValueError(f"param_group has no 'params': it holds {', '.join(map(repr, param_group)) or 'nothing'}")
        group = dict(param_group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif not isinstance(group["params"], set):
            group["params"] = list(group["params"])
        stack = self._stack_for(group)
        check_policy(group.get("nonfinite", self.defaults["nonfinite"]))
        maximize = group.get("maximize", self.defaults["maximize"])
        if not isinstance(maximize, bool):
            raise TypeError(f"maximize must be True or False, not {maximize!r}")
        device = self._check_params(group["params"])
        added = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        present = [p for g in self.param_groups for p in g["params"]]
        reduction = distributed.Reduction.of([*present, *added], self._shard_group)
        if self._shard_group is not None:
            if stack[0].granularity == "tensor":
                raise ValueError(
                    f"{stack[0]}: with a shard_group, granularity must be 'group', since other processes hold other "
                    "tensors; without one each process has towers of its own"
                )
            if not group["params"]:
                device = present[0].device if present else distributed.device_of(self._shard_group)
        super().add_param_group(group)
        for name in self.defaults.keys() - {"stack", "maximize", "nonfinite"}:
            group.pop(name, None)
        group["stack"] = stack
        try:
            optimizer = stack[0].make(group, self._shard_group is not None)
        except Exception:
            self.param_groups.pop()
            raise
        if optimizer is not None:
            group["optimizer"] = optimizer
            for name in ("momentum", "betas"):  # where a scheduler that cycles them looks
                if name in optimizer.param_groups[0]:
                    group[name] = optimizer.param_groups[0][name]
                    if self.stack[0].first_only:
                        self.defaults[name] = group[name]
        if any(g.initial is not None for g in self._groups) and "lr" in stack[0].values():
            group["lr"] = group["initial_lr"] = stack[0].values()["lr"]  # a schedule of its own, as the others have
        group["tower"] = new_tower(stack, group["params"], device)
        self._attach(group, reduction)

    def _stack_for(self, group: dict[str, Any]) -> Stack:
        """The stack of a new group; takes the arguments of its first level out of the group."""
        if "tower" in group:
            raise ValueError(
                "param group: it is that of another HyperOptimizer; write {'params': group['params']}, and arguments "
                "of its first level as numbers"
            )
        stack = Stack.coerce(group.get("stack", self.defaults["stack"]))
        arguments = stack[0].arguments()
        changes = {name: group.pop(name) for name in arguments if name in group}
        for name in stack[0].values():
            if name in group:
                raise ValueError(
                    f"param group: {name} is set through the arguments of {stack[0]}: {', '.join(arguments)}"
                )
        others = {h["name"] for rule in RULES.values() for h in rule["hypers"]} | {"betas"}
        for name in sorted(group.keys() - _GROUP_KEYS, key=str):
            close = get_close_matches(str(name), arguments, 1, cutoff=0.8)
            switched_on = name in _SWITCHES and name not in stack[0].always and group[name]
            if name in others or close or switched_on:
                hint = f" (is it {close[0]}?)" if close else ""
                known = ", ".join(arguments)
                _warn(f"param group: {stack[0]} has no {name}{hint}, which does nothing; its arguments are {known}")
        stack = Stack((stack[0].replace(**changes), *stack.levels[1:])) if changes else stack
        *below, top = (level.tuning() for level in stack)
        if below:  # a tower of equal levels is no mistake, nor is one whose levels all say what would be learned
            top = [name for name in top if name != "learn"]
        if top and not any({*names} - {"learn"} for names in below):
            _warn(
                f"{stack[-1]}: nothing heeds {', '.join(top)}, since no level stands above; arguments belong to the "
                f"level that is tuned, as in {stack[0]}({top[0]}=...) / SGD()"
            )
        return stack

    @staticmethod
    def _check_params(params: Iterable[Any]) -> torch.device:
        seen: dict[Tensor, int] = {}
        device = torch.device("cpu")
        for i, entry in enumerate(params):
            name, p = entry if isinstance(entry, tuple) else (f"params[{i}]", entry)
            if not isinstance(p, Tensor):
                continue  # torch.optim.Optimizer says what is wrong
            if (p.requires_grad or p.is_complex()) and p.dtype not in _DTYPES:
                known = ", ".join(str(dtype) for dtype in _DTYPES)
                raise TypeError(f"params: {name} is {p.dtype}, but only {known} can be trained")
            if p.requires_grad and p.layout != torch.strided:
                raise TypeError(f"params: {name} is {p.layout}, but only dense parameters are supported")
            if p.requires_grad and is_traceable_wrapper_subclass(p) and not distributed.is_dtensor(p):
                kind = type(p.data).__name__
                raise TypeError(
                    f"params: {name} is a {kind}, which is made of other tensors; of those, only DTensors are supported"
                )
            if p in seen:
                raise ValueError(f"params: {name} is the same parameter as params[{seen[p]}]; list each one once")
            if seen and p.device != device:
                raise ValueError(
                    f"params: {name} is on {p.device}, but the group starts on {device}; use one param group a device"
                )
            seen[p], device = i, p.device
        return device

    def _attach_all(self) -> None:
        """Rebuilds what is derived from the param groups."""
        groups, self._groups = self.param_groups, []
        reduction = distributed.Reduction.of([p for group in groups for p in group["params"]], self._shard_group)
        for group in groups:
            self._attach(group, reduction)

    def _adopt_values(self, saved: list[dict[str, Any]]) -> None:
        """The hyperparameters of the first level, from what the groups held before :meth:`_attach_all`."""
        edited = [group.edited(values) for group, values in zip(self._groups, saved, strict=True)]
        for group, values, new in zip(self._groups, saved, edited, strict=True):
            for name, value in new.items():
                if name != "lr" or "initial_lr" not in values or group.initial is None:
                    write(group.hyperparameters[0][name], value)

    def _attach(self, group: dict[str, Any], reduction: distributed.Reduction | None) -> None:
        """Adds what is derived from a param group; ``reduction`` is that of all groups."""
        self._reduction = reduction
        self._key = str(id(self))  # of an int, dynamo would make a symbol
        _alive[self._key] = self
        self._groups.append(Group(group))
        self._groups[-1].link()

    def __getstate__(self) -> dict[str, Any]:
        if self._shard_group is not None:
            raise TypeError("an optimizer with a shard_group cannot be copied or pickled; use state_dict()")
        self._adopt_groups()
        adopt_assignments(self._groups)
        state: dict[str, Any] = super().__getstate__()
        return {**state, "unscales": self.unscales}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._param_groups = self.__dict__.pop("param_groups")  # where torch puts it, past the property
        if all(isinstance(group["stack"], Stack) for group in self.param_groups):  # else load_state_dict() attaches
            self._attach_all()

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim. A group holds its ``tower`` (all levels) and, as a string, the structure of its stack."""
        self._adopt_groups()
        hook = self.register_state_dict_post_hook(self._describe, prepend=True)  # before the caller's own hooks
        try:
            state_dict: dict[str, Any] = super().state_dict()
        finally:
            hook.remove()
        return state_dict

    @staticmethod
    def _describe(_: Optimizer, state_dict: dict[str, Any]) -> None:
        """Stacks and wrapped optimizers, as what torch.save() takes."""
        for group in state_dict["param_groups"]:
            stack: Stack = group["stack"]
            group["stack"] = stack.structure()
            if "optimizer" in group:
                group["optimizer"] = group["optimizer"].state_dict()
            # Where each tensor has its own, they are a column of the tower, which collectives do not take.
            for name in stack[0].values():
                if isinstance(value := group.get(name), Tensor):
                    group[name] = value.contiguous()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the optimizer that gave ``state_dict`` stood, bit for bit.

        If that one had no scheduler, a schedule that this one has ends, as in torch; unless it has made no step yet:
        then its scheduler is taken to be for what comes.

        Raises:
            ValueError: the state dict is of another stack, or of parameters of other shapes. Nothing is changed then.
            TypeError: it is no dict, or one of its hyperparameters is no number. Nothing is changed then.
        """
        check_mapping(state_dict)
        self._adopt_groups()
        own = [{name: group[name] for name in _OWN if name in group} for group in self.param_groups]
        started = any(is_state(state) for state in self.state.values())
        schedules = [None if started or g.initial is None else (g.entries["lr"], g.initial) for g in self._groups]
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, incoming: dict[str, Any]) -> None:
            check_state_dict(incoming, self._groups, [group["params"] for group in self.param_groups])
            self._load_wrapped(incoming["param_groups"])
            loaded.update(incoming)

        hooks = [
            self.register_load_state_dict_pre_hook(check),  # last: sees what the caller's own hooks made of it
            self.register_load_state_dict_post_hook(lambda _: self._restore(own, schedules, loaded), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _load_wrapped(self, saved: list[dict[str, Any]]) -> None:
        """Loads all wrapped optimizers, or none: they have checks of their own."""
        before: list[tuple[Optimizer, dict[str, Any]]] = []
        try:
            for group, incoming in zip(self.param_groups, saved, strict=True):
                if "optimizer" in group:
                    before.append((group["optimizer"], group["optimizer"].state_dict()))
                    inner = deepcopy(incoming["optimizer"])  # it would share the tensors
                    # Where torch.distributed.checkpoint has gathered it, the numbers of the parameters are strings.
                    inner["state"] = {int(k) if str(k).isdigit() else k: v for k, v in inner["state"].items()}
                    group["optimizer"].load_state_dict(inner)
        except Exception:
            for optimizer, state_dict in before:
                optimizer.load_state_dict(state_dict)
            raise
        self._rehearsed = []

    def _restore(
        self,
        own: list[dict[str, Any]],
        schedules: list[tuple[Tensor, Tensor] | None],
        loaded: dict[str, Any],
    ) -> None:
        """Mends what Optimizer.load_state_dict does to towers and state.

        It puts the saved towers in the place of those that hyperparameters() gave views of, shares the caller's
        tensors, and casts state to the parameter's dtype.
        """
        groups = self._param_groups
        saved = [dict(group) for group in groups]
        for group, mine, schedule in zip(groups, own, schedules, strict=True):
            mine["tower"].copy_(group["tower"])
            mine["tower"][:, _C.ARRIVED].zero_()  # blocks on a GPU, if it was copied while they were at work
            group.update(mine)
            if schedule is not None and "initial_lr" not in group:  # made for the run that goes on from here
                group.update(lr=schedule[0], initial_lr=schedule[1])
        self._attach_all()
        self._adopt_values(saved)
        for attached, incoming in zip(self._groups, loaded["param_groups"], strict=True):
            for key, p in zip(incoming["params"], attached.params, strict=True):
                saved_state = loaded["state"].get(key, {})
                for name in attached.state_names() if "step" in saved_state else ():
                    value = saved_state[name]
                    like = value if name in ("step", "tick") else p
                    state = torch.empty_like(like, dtype=state_dtype(p, name), device=p.device, requires_grad=False)
                    self.state[p][name] = state.copy_(value)

    def __repr__(self) -> str:
        lines = [f"HyperOptimizer({self.stack}"]
        live = {id(g.group): g.hyperparameters for g in self._groups}
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            lines += [f"    {key}: {group[key]}" for key in sorted(group, key=str) if key not in _UNPRINTED]
            upper = list(zip(group["stack"], live.get(id(group), ()), strict=False))[1:]
            for k, (level, values) in enumerate(upper[:_PRINTED_LEVELS], 1):
                names = [name for name in values if name == "lr" or name in level.learn_names]
                lines += [f"    {k}/{level}/{name}: {values[name]}" for name in names]
            if len(upper) > _PRINTED_LEVELS:
                lines.append(f"    and {len(upper) - _PRINTED_LEVELS} levels more")
        return "\n".join([*lines, ")"])
