"""The optimizer: a ``torch.optim.Optimizer`` whose hyperparameters learn while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, overload
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hyperopt_ext import _C
from hyperopt_ext.stack import RULES, Level, Stack

_POLICIES = ("hold", "skip", "raise")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _state_dtype(p: Tensor, name: str) -> torch.dtype:
    """Counters are int64; the arithmetic and the state of half-precision parameters are fp32."""
    if name in ("step", "tick"):
        return torch.int64
    return p.dtype if name == "last_param" or p.dtype == torch.float64 else torch.float32


def _new_tower(stack: Stack, params: list[Tensor], device: torch.device) -> Tensor:
    """One row for all parameters, or, if the first level has hyperparameters for each tensor, one for each."""
    values = [float(value) for level in stack for value in level.values().values()]
    start = [value for level in stack for value in level.start().values()]
    row = torch.tensor(_C.tower_row(stack.plan(), values, start), dtype=torch.float64, device=device)
    return row.repeat(len(params) if stack[0].granularity == "tensor" else 1, 1)


class _Group:
    """What ``step()`` needs of a param group: its tower, and the operators of its first rule."""

    def __init__(self, group: dict[str, Any]) -> None:
        stack: Stack = group["stack"]
        base, plan = stack[0], stack.plan()
        self.group = group
        self.tower: Tensor = group["tower"]
        self.learn = base.learn_mask() if len(stack) > 1 else 0
        self.horizon = base.horizons()
        self.nonfinite: str | None = group["nonfinite"]
        self.capped = base.trust is not None
        # The row of each parameter, if they have rows of their own.
        self.row_of = {p: i for i, p in enumerate(group["params"])} if base.granularity == "tensor" else None
        device = self.tower.device
        settings = [{**level.settings(), "skip": float(self.nonfinite in ("skip", "raise"))} for level in stack]
        self.plan = torch.tensor(plan, device=device).view(len(stack), -1)
        self.bounds = torch.tensor(
            [limit for level in stack for limit in level.limits()], dtype=torch.float64, device=device
        )
        self.settings = torch.tensor(
            [[values[name] for name in _C.SETTINGS] for values in settings], dtype=torch.float64, device=device
        )
        offsets = _C.tower_offsets(plan)
        self.hyperparameters = [self._views(level, live) for level, (live, _) in zip(stack, offsets, strict=True)]
        self.bounded = [self._views(level, bounded) for level, (_, bounded) in zip(stack, offsets, strict=True)]
        self.states = base.start()
        self.records = _C.record(base.rule, self.learn, base.is_traced())
        ops = torch.ops.hyperopt_ext
        self.hypergradient = getattr(ops, f"{base.rule}_hypergradient").default
        self.norms = getattr(ops, f"{base.rule}_norms").default
        self.step = getattr(ops, f"{base.rule}_step_").default
        self.settle = getattr(ops, f"{base.rule}_settle_").default

    def _views(self, level: Level, start: int) -> dict[str, Tensor]:
        """What the tower holds for each hyperparameter of a level: no dimension, or one of the parameters."""
        rows = self.tower if level.granularity == "tensor" else self.tower[0]
        return {name: rows[..., start + i] for i, name in enumerate(level.values())}

    def count(self, column: int) -> Tensor:
        return self.tower[0, column] if self.row_of is None else self.tower[:, column]

    def adopt_assignments(self) -> None:
        """``group["lr"] = 0.1`` is ``group["lr"].fill_(0.1)``: the entry is a view of the tower again."""
        for name, live in self.hyperparameters[0].items():
            value = self.group.get(name)
            if value is live:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number and not (isinstance(value, Tensor) and value.numel() in (1, live.numel())):
                raise TypeError(f"param group: {name} must be a number or a tensor of one, not {value!r}")
            value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=live.dtype)
            live.copy_(value.reshape(()) if value.numel() == 1 else value)
            self.group[name] = live

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        start = {"step": 0, "tick": -1, **self.states, **dict.fromkeys(self.records, 0)}
        state = {}
        for name, value in start.items():
            shape = torch.empty((), device=p.device) if name in ("step", "tick") else p
            state[name] = torch.full_like(shape, value, dtype=_state_dtype(p, name), requires_grad=False)
        return state


class _Update:
    """One step of one group: its parameters that have a gradient, and the idle ones that moved before."""

    def __init__(self, group: _Group, params: list[Tensor], state: dict[Tensor, dict[str, Tensor]]) -> None:
        self.group = group
        self.new = {p: group.new_state(p) for p in params if p not in state}
        states = [state[p] if p in state else self.new[p] for p in params]
        self.active = self._arguments(params, [p.grad for p in params], states)
        self.idle = None
        if group.row_of is None and len(params) != len(group.group["params"]):
            moving = set(params)
            idle = [p for p in group.group["params"] if p in state and p not in moving]
            self.idle = self._arguments(idle, idle, [state[p] for p in idle])

    def _arguments(self, params: list[Tensor], grads: list[Any], states: list[dict[str, Tensor]]) -> tuple[Any, ...]:
        """What the operators of a pass take (csrc/cpu/passes.h)."""
        g = self.group
        return (
            params,
            grads,
            [state[name] for name in g.states for state in states],
            [state[name] for name in g.records for state in states],
            [state["step"] for state in states],
            [state["tick"] for state in states],
            g.tower,
            [] if g.row_of is None else [g.row_of[p] for p in params],
            g.learn,
            *g.horizon,
            -1.0 if g.group["maximize"] else 1.0,
        )

    def hypergradient(self) -> Tensor:
        """Pass A. Checks all lists before anything is changed."""
        sums: Tensor = self.group.hypergradient(*self.active, self.group.nonfinite is not None)
        if self.group.nonfinite == "raise" and not bool(sums.isfinite().all()):
            raise FloatingPointError("a gradient, or a hypergradient, is not finite; nothing was changed in this step")
        return sums

    def step(self) -> None:
        """Pass B."""
        if self.idle is not None:
            self.group.settle(*self.idle)
        self.group.step(*self.active)


def _move_towers(updates: list[_Update]) -> None:
    """All towers in one call, and, where ``trust`` asks for it, the largest lr that the coming update allows."""

    def apply(op: Any, some: list[_Update], sums: list[Tensor]) -> None:
        groups = [update.group for update in some]
        if groups:
            op(
                [g.tower for g in groups],
                sums,
                [g.plan for g in groups],
                [g.bounds for g in groups],
                [g.settings for g in groups],
            )

    ops = torch.ops.hyperopt_ext
    apply(ops.tower_.default, updates, [update.hypergradient() for update in updates])
    capped = [update for update in updates if update.group.capped]
    apply(ops.cap_.default, capped, [update.group.norms(*update.active) for update in capped])


_alive: WeakValueDictionary[str, HyperOptimizer] = WeakValueDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _create_state(key: str) -> None:
    """Runs while a step is traced, so that the graph finds all state there and need not change after the first step."""
    opt = _alive[key]
    for group in opt._groups:
        for p in group.group["params"]:
            if p.requires_grad and p not in opt.state:
                opt.state[p] = group.new_state(p)


class HyperOptimizer(Optimizer):
    """Trains parameters with ``stack[0]``, and each level's hyperparameters by gradient descent with the level above.

    The method is that of Chandra et al., "Gradient Descent: The Ultimate Optimizer" (NeurIPS 2022). At every step each
    level's last update is differentiated with respect to the hyperparameters that made it (one step back, everything
    else held constant), the tower moves them from the top down, and the parameters are updated with the new values.
    There is no autograd graph: an ordinary ``loss.backward()`` before ``step()`` is all it takes. At the first step,
    and for a parameter that had no gradient in the step before, the hypergradient is 0.

    Args:
        params: parameters, named parameters, or dicts that define param groups; fp32, fp64, fp16 or bf16, dense, any
            strides, those of a group on one device. A group may have its own ``stack``, or its own values for
            arguments of the first level (``{"params": ..., "lr": 1e-2}``), and has hyperparameters of its own in any
            case.
        stack: a level or a stack of levels, as ``hx.Adam(lr=1e-3) / hx.SGD(lr=1e-5)``.
        maximize: maximise the objective instead of minimising it; for the whole tower. Default: False.
        nonfinite: what happens where a number is not finite. ``"hold"``: because of a gradient the group sits the step
            out, because of a hypergradient only the tower does. ``"skip"``: because of either, the group sits the step
            out. ``"raise"``: before anything is changed, a ``FloatingPointError`` (which makes the host wait for the
            device at every step). Default: ``None``, as ``"hold"`` if something is learned; a stack of one level does
            what ``torch.optim`` does.

    State, in ``opt.state[p]``: ``step`` (updates made) and ``tick`` (the step of the tower that the last one belongs
    to), both int64 of no dimension; the rule's state, and, where the next hypergradient needs it, ``last_grad``, each
    of the parameter's shape in fp32 (fp64 for fp64 parameters), and ``last_param``, a copy of the parameter before its
    last update (of rules with decoupled weight decay). If a learned hyperparameter reaches the state (Adam's betas), or
    the update is made of a state that it replaces (Lion, Adadelta), the state is that *before* the update that
    ``last_grad`` made: it is advanced in the next step. With a ``horizon`` of more than one step there is neither of
    the two and no lag, but a ``trace_lr`` (and so on) for each learned hyperparameter, in the state's dtype.

    Current values are in ``param_groups`` by name (``"lr"``, ``"beta1"``, ...) for the first level and in
    :meth:`hyperparameters` for all: float64 tensors of no dimension on the parameters' device. They may be written to
    (``group["lr"].fill_(0.1)``, or ``group["lr"] = 0.1``); the next step starts from what it finds, projected to the
    bounds. Of a level with ``granularity="tensor"`` they have one number for each parameter of the group, in its
    order.

    Non-finite numbers do not spread: see ``nonfinite``. A gradient so large that its squared norm is not finite counts
    as one that is not. :meth:`skipped_steps` counts the steps that a group sat out, :meth:`held_steps` those that its
    tower did, and :meth:`bounded_steps` how often ``bounds``, ``growth`` or ``trust`` cut a move.

    Raises:
        TypeError: a parameter is not floating-point or not dense, or the stack is not one.
        ValueError: a parameter appears twice, a group spans devices, a hyperparameter is out of its range, or
            ``nonfinite`` is no policy.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        stack: Level | Stack,
        *,
        maximize: bool = False,
        nonfinite: str | None = None,
    ) -> None:
        super().__init__(params, {"stack": Stack.coerce(stack), "maximize": maximize, "nonfinite": nonfinite})

    @property
    def stack(self) -> Stack:
        """The stack of every group that was given none of its own."""
        stack: Stack = self.defaults["stack"]
        return stack

    def hyperparameters(self, group: int = 0) -> list[dict[str, Tensor]]:
        """The current values in a param group, one dict a level, level 0 first: live float64 tensors.

        They have no dimension, or, of a level with ``granularity="tensor"``, one number for each parameter.
        """
        return [dict(level) for level in self._groups[group].hyperparameters]

    def skipped_steps(self, group: int = 0) -> Tensor:
        """How many steps changed nothing, because a number was not finite: live, float64, 0-d, or one a tensor."""
        return self._groups[group].count(_C.SKIPPED)

    def held_steps(self, group: int = 0) -> Tensor:
        """How many steps left the tower alone, because a hypergradient was not finite: as :meth:`skipped_steps`."""
        return self._groups[group].count(_C.HELD)

    def bounded_steps(self, group: int = 0) -> list[dict[str, Tensor]]:
        """How many moves of each hyperparameter were cut, one dict a level: live.

        By ``bounds``, those that are there by default included, by ``growth`` or by ``trust``.
        """
        return [dict(level) for level in self._groups[group].bounded]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every level, from the gradients in ``p.grad``.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            ValueError: a gradient is sparse, or does not match its parameter in shape, dtype or device. Nothing is
                changed then.
            RuntimeError: under ``torch.export``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        if torch.compiler.is_exporting():
            raise RuntimeError(
                "torch.export would make constants of the parameters and of the optimizer's state; export a step of "
                "hx.functional.<rule>"
            )
        if torch.compiler.is_compiling():
            _create_state(self._key)
        # All gradients before any state: dynamo must not meet a parameter as a key of the state first.
        moving = [[p for p in g.group["params"] if p.grad is not None and p.requires_grad] for g in self._groups]
        for group in self._groups:
            group.adopt_assignments()
        updates = [_Update(g, params, self.state) for g, params in zip(self._groups, moving, strict=True) if params]
        _move_towers(updates)
        for update in updates:
            update.step()
            self.state.update(update.new)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, with a tower of its own. See :class:`HyperOptimizer` for what it may hold."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, not {type(param_group).__name__}")
        group = dict(param_group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif not isinstance(group["params"], set):
            group["params"] = list(group["params"])
        stack = self._stack_for(group)
        policy = group.get("nonfinite", self.defaults["nonfinite"])
        if policy is not None and policy not in _POLICIES:
            raise ValueError(f"nonfinite is {policy!r}, but the policies are {', '.join(map(repr, _POLICIES))}")
        device = self._check_params(group["params"])
        super().add_param_group(group)
        group["stack"] = stack
        group["tower"] = _new_tower(stack, group["params"], device)
        self._attach()

    def _stack_for(self, group: dict[str, Any]) -> Stack:
        """The stack of a new group; takes the arguments of its first level out of the group."""
        stack = Stack.coerce(group.get("stack", self.defaults["stack"]))
        arguments = [f.name for f in fields(stack[0])]
        changes = {name: group.pop(name) for name in arguments if name in group}
        for name in stack[0].values():
            if name in group:
                raise ValueError(
                    f"param group: {name} is set through the arguments of {stack[0]}: {', '.join(arguments)}"
                )
        for name in sorted({h["name"] for rule in RULES.values() for h in rule["hypers"]} & set(group)):
            raise ValueError(f"param group: {stack[0]} has no {name}; its arguments are {', '.join(arguments)}")
        return Stack((stack[0].replace(**changes), *stack.levels[1:])) if changes else stack

    @staticmethod
    def _check_params(params: Iterable[Any]) -> torch.device:
        seen: dict[Tensor, int] = {}
        device = torch.device("cpu")
        for i, entry in enumerate(params):
            name, p = entry if isinstance(entry, tuple) else (f"params[{i}]", entry)
            if not isinstance(p, Tensor):
                continue  # torch.optim.Optimizer says what is wrong
            if p.dtype not in _DTYPES:
                known = ", ".join(str(dtype) for dtype in _DTYPES)
                raise TypeError(f"params: {name} is {p.dtype}, but only {known} can be trained")
            if p.layout != torch.strided:
                raise TypeError(f"params: {name} is {p.layout}, but only dense parameters are supported")
            if p in seen:
                raise ValueError(f"params: {name} is the same parameter as params[{seen[p]}]; list each one once")
            if seen and p.device != device:
                raise ValueError(
                    f"params: {name} is on {p.device}, but the group starts on {device}; use one param group a device"
                )
            seen[p], device = i, p.device
        return device

    def _attach(self) -> None:
        """Rebuilds what is derived from the param groups."""
        self._groups = [_Group(group) for group in self.param_groups]
        self._key = str(id(self))  # of an int, dynamo would make a symbol
        _alive[self._key] = self
        for group in self._groups:
            group.group.update(group.hyperparameters[0])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if all(isinstance(group["stack"], Stack) for group in self.param_groups):  # else load_state_dict() attaches
            self._attach()

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim. A group holds its ``tower`` (all levels) and, as a string, the structure of its stack."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group["stack"] = group["stack"].structure()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the optimizer that gave ``state_dict`` stood, bit for bit.

        Raises:
            ValueError: the state dict is of another stack, or of parameters of other shapes. Nothing is changed then.
        """
        own = [(group["stack"], group["tower"]) for group in self.param_groups]
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, incoming: dict[str, Any]) -> None:
            self._check_state_dict(incoming)
            loaded.update(incoming)

        hooks = [
            self.register_load_state_dict_pre_hook(check),  # last: sees what the caller's own hooks made of it
            self.register_load_state_dict_post_hook(lambda _: self._restore(own, loaded), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _restore(self, own: list[tuple[Stack, Tensor]], loaded: dict[str, Any]) -> None:
        """Mends what Optimizer.load_state_dict does to towers and state.

        It puts the saved towers in the place of those that hyperparameters() gave views of, shares the caller's
        tensors, and casts state to the parameter's dtype.
        """
        saved = [dict(group) for group in self.param_groups]
        for group, (stack, tower) in zip(self.param_groups, own, strict=True):
            tower.copy_(group["tower"])
            group.update(stack=stack, tower=tower)
        self._attach()
        for attached, values in zip(self._groups, saved, strict=True):
            for name, live in attached.hyperparameters[0].items():
                live.copy_(values.get(name, live))  # the caller may have edited them
        keys = [key for group in loaded["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):
            for name, value in loaded["state"].get(key, {}).items():
                like = p if value.shape == p.shape else value
                state = torch.empty_like(like, dtype=_state_dtype(p, name), device=p.device, requires_grad=False)
                self.state[p][name] = state.copy_(value)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved_groups = state_dict.get("param_groups", [])
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"state_dict has {len(saved_groups)} param groups, but this optimizer has {len(self.param_groups)}"
            )
        for i, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            ours = group["stack"].structure()
            if "stack" not in saved:
                raise ValueError("state_dict is not that of a HyperOptimizer: its param groups name no stack")
            if saved["stack"] != ours:
                raise ValueError(
                    f"state_dict: param group {i} is of the stack {saved['stack']!r}, but this optimizer's is {ours!r}"
                )
            if len(saved["params"]) != len(group["params"]):
                raise ValueError(
                    f"state_dict: param group {i} has {len(saved['params'])} parameters, but this optimizer's has "
                    f"{len(group['params'])}"
                )
            if saved["tower"].shape != group["tower"].shape:
                raise ValueError(
                    f"state_dict: the tower of param group {i} has the shape {tuple(saved['tower'].shape)}"
                )
            names = ["step", "tick", *self._groups[i].states, *self._groups[i].records]
            for j, (key, p) in enumerate(zip(saved["params"], group["params"], strict=True)):
                state = state_dict["state"].get(key)
                if state is None:
                    continue
                if sorted(state) != sorted(names):
                    raise ValueError(
                        f"state_dict: the state of parameter {j} of group {i} holds {', '.join(state)}, "
                        f"not {', '.join(names)}"
                    )
                for name, value in state.items():
                    shape = () if name in ("step", "tick") else p.shape
                    if value.shape != shape:
                        raise ValueError(
                            f"state_dict: {name} of parameter {j} of group {i} has the shape {tuple(value.shape)}, "
                            f"but the parameter needs {tuple(shape)}"
                        )

    def __repr__(self) -> str:
        lines = [f"HyperOptimizer({self.stack}"]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key not in ("params", "tower")]
        return "\n".join([*lines, ")"])
