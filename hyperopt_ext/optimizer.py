"""The optimizer: a ``torch.optim.Optimizer`` whose hyperparameters learn while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hyperopt_ext import _C
from hyperopt_ext.stack import RULES, Level, Stack

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _state_dtype(p: Tensor, name: str) -> torch.dtype:
    """Counters are int64; the arithmetic and the state of half-precision parameters are fp32."""
    if name in ("step", "tick"):
        return torch.int64
    return p.dtype if name == "last_param" or p.dtype == torch.float64 else torch.float32


def _new_tower(stack: Stack, device: torch.device) -> Tensor:
    values = [float(value) for level in stack for value in level.values().values()]
    start = [value for level in stack for value in level.start().values()]
    return torch.tensor([_C.tower_row(stack.plan(), values, start)], dtype=torch.float64, device=device)


class _Group:
    """What ``step()`` needs of a param group: its tower, and the operators of its first rule."""

    def __init__(self, group: dict[str, Any]) -> None:
        stack: Stack = group["stack"]
        base, plan = stack[0], stack.plan()
        self.group = group
        self.tower: Tensor = group["tower"]
        self.learn = base.learn_mask() if len(stack) > 1 else 0
        limits = [limit for level in stack for limit in level.limits()]
        self.plan = torch.tensor(plan, device=self.tower.device).view(len(stack), -1)
        self.bounds = torch.tensor(limits, dtype=torch.float64, device=self.tower.device)
        self.hyperparameters = [
            {name: self.tower[0, start + i] for i, name in enumerate(level.values())}
            for start, level in zip(_C.tower_live(plan), stack, strict=True)
        ]
        self.states = base.start()
        self.records = _C.record(base.rule, self.learn)
        ops = torch.ops.hyperopt_ext
        self.hypergradient = getattr(ops, f"{base.rule}_hypergradient").default
        self.step = getattr(ops, f"{base.rule}_step_").default
        self.settle = getattr(ops, f"{base.rule}_settle_").default

    def adopt_assignments(self) -> None:
        """``group["lr"] = 0.1`` is ``group["lr"].fill_(0.1)``: the entry is a view of the tower again."""
        for name, live in self.hyperparameters[0].items():
            value = self.group.get(name)
            if value is live:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number and not (isinstance(value, Tensor) and value.numel() == 1):
                raise TypeError(f"param group: {name} must be a number or a tensor of one, not {value!r}")
            live.copy_(value.reshape(()) if isinstance(value, Tensor) else torch.tensor(value, dtype=live.dtype))
            self.group[name] = live

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        start = {"step": 0, "tick": -1, **self.states, **dict.fromkeys(self.records, 0)}
        state = {}
        for name, value in start.items():
            shape = torch.empty((), device=p.device) if name in ("step", "tick") else p
            state[name] = torch.full_like(shape, value, dtype=_state_dtype(p, name), requires_grad=False)
        return state


class _Lists:
    """Some parameters of a group and their state, in the order that the operators take (csrc/cpu/passes.h)."""

    def __init__(self, group: _Group, params: list[Tensor], states: list[dict[str, Tensor]]) -> None:
        self.params = params
        self.state = [state[name] for name in group.states for state in states]
        self.record = [state[name] for name in group.records for state in states]
        self.steps = [state["step"] for state in states]
        self.ticks = [state["tick"] for state in states]


class _Update:
    """One step of one group: its parameters that have a gradient, and the idle ones that moved before."""

    def __init__(self, group: _Group, params: list[Tensor], state: dict[Tensor, dict[str, Tensor]]) -> None:
        self.group = group
        self.new = {p: group.new_state(p) for p in params if p not in state}
        self.active = _Lists(group, params, [state[p] if p in state else self.new[p] for p in params])
        idle = []
        if len(params) != len(group.group["params"]):
            moving = set(params)
            idle = [p for p in group.group["params"] if p in state and p not in moving]
        self.idle = _Lists(group, idle, [state[p] for p in idle]) if idle else None
        self.grads = [p.grad for p in params]
        self.scale = -1.0 if group.group["maximize"] else 1.0

    def hypergradient(self) -> Tensor:
        """Pass A. Checks all lists before anything is changed."""
        a, g = self.active, self.group
        sums: Tensor = g.hypergradient(
            a.params, self.grads, a.state, a.record, a.steps, a.ticks, g.tower, g.learn, self.scale
        )
        return sums

    def step(self) -> None:
        """Pass B."""
        a, g, idle = self.active, self.group, self.idle
        if idle is not None:
            g.settle(idle.params, idle.state, idle.record, idle.steps, idle.ticks, g.tower, g.learn)
        g.step(a.params, self.grads, a.state, a.record, a.steps, a.ticks, g.tower, g.learn, self.scale)


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

    State, in ``opt.state[p]``: ``step`` (updates made) and ``tick`` (the step of the tower that the last one belongs
    to), both int64 of no dimension; the rule's state, and, where the next hypergradient needs it, ``last_grad``, each
    of the parameter's shape in fp32 (fp64 for fp64 parameters), and ``last_param``, a copy of the parameter before its
    last update (of rules with decoupled weight decay). If a learned hyperparameter reaches the state (Adam's betas), or
    the update is made of a state that it replaces (Lion, Adadelta), the state is that *before* the update that
    ``last_grad`` made: it is advanced in the next step.

    Current values are in ``param_groups`` by name (``"lr"``, ``"beta1"``, ...) for the first level and in
    :meth:`hyperparameters` for all: float64 tensors of no dimension on the parameters' device. They may be written to
    (``group["lr"].fill_(0.1)``, or ``group["lr"] = 0.1``); the next step starts from what it finds, projected to the
    bounds.

    Non-finite numbers do not spread. If something is learned, a group whose gradient is not finite, or so large that
    its squared norm is not, stays as it is in that step, and :meth:`skipped_steps` counts it. If the gradient is finite
    but a hypergradient is not, the parameters move and the tower stays as it is; :meth:`held_steps` counts that. A
    stack of one level does what ``torch.optim`` does.

    Raises:
        TypeError: a parameter is not floating-point or not dense, or the stack is not one.
        ValueError: a parameter appears twice, a group spans devices, or a hyperparameter is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        stack: Level | Stack,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"stack": Stack.coerce(stack), "maximize": maximize})

    @property
    def stack(self) -> Stack:
        """The stack of every group that was given none of its own."""
        stack: Stack = self.defaults["stack"]
        return stack

    def hyperparameters(self, group: int = 0) -> list[dict[str, Tensor]]:
        """The current values in a param group, one dict a level, level 0 first: live float64 0-d tensors."""
        return [dict(level) for level in self._groups[group].hyperparameters]

    def skipped_steps(self, group: int = 0) -> Tensor:
        """How many steps changed nothing, because a gradient was not finite: float64, no dimension, live."""
        return self._groups[group].tower[0, _C.SKIPPED]

    def held_steps(self, group: int = 0) -> Tensor:
        """How many steps left the tower as it was, because a hypergradient was not finite: float64, 0-d, live."""
        return self._groups[group].tower[0, _C.HELD]

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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        updates = []
        for group in self._groups:
            group.adopt_assignments()
            params = [p for p in group.group["params"] if p.grad is not None and p.requires_grad]
            if params:
                updates.append(_Update(group, params, self.state))

        hypergradients = [update.hypergradient() for update in updates]
        if updates:
            torch.ops.hyperopt_ext.tower_.default(
                [update.group.tower for update in updates],
                hypergradients,
                [update.group.plan for update in updates],
                [update.group.bounds for update in updates],
            )
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
        device = self._check_params(group["params"])
        super().add_param_group(group)
        group["stack"] = stack
        group["tower"] = _new_tower(stack, device)
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
                live.fill_(values.get(name, live))  # the caller may have edited them
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
