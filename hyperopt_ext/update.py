"""What a step of the optimizer is made of: a param group's tower and operators, its two passes, the call between."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from operator import is_
from typing import Any, TypeGuard

import torch
from torch import Tensor

from hyperopt_ext import _C, distributed
from hyperopt_ext.stack import Level, Stack, is_number

_POLICIES = ("hold", "skip", "raise")


def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which dynamo takes for True at every compilation in torch 2.11."""
    return bool(torch.compiler._is_exporting_flag)


def is_capturing(t: Tensor) -> bool:
    """Whether what is done with ``t`` is not done now, but at each replay of a CUDA graph."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def check_no_module(params: object) -> None:
    if isinstance(params, torch.nn.Module) and not isinstance(params, torch.nn.ParameterList):
        raise TypeError(f"params are those of the {type(params).__name__}: write model.parameters()")


def is_rehearsal() -> bool:
    """Whether torch.distributed.checkpoint is making an optimizer create its state.

    It calls ``step()`` with gradients and an lr of 0, of those optimizers alone that have no state, perhaps in one of
    several processes; a step of a caller may look like that, too.
    """
    module = "torch.distributed.checkpoint.state_dict"
    frame = sys._getframe(1) if module in sys.modules else None
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state" and frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False


def check_policy(policy: Any) -> None:
    if policy is not None and policy not in _POLICIES:
        raise ValueError(f"nonfinite is {policy!r}, but the policies are {', '.join(map(repr, _POLICIES))}")


def state_dtype(p: Tensor, name: str) -> torch.dtype:
    """Counters are int64; the arithmetic and the state of half-precision parameters are fp32."""
    if name in ("step", "tick"):
        return torch.int64
    return p.dtype if name == "last_param" or p.dtype == torch.float64 else torch.float32


def new_state(p: Tensor, name: str, value: float = 0.0) -> Tensor:
    like = torch.empty((), device=p.device) if name in ("step", "tick") else p
    return torch.full_like(like, value, dtype=state_dtype(p, name), requires_grad=False)


def is_state(known: Mapping[str, Any] | None) -> TypeGuard[dict[str, Tensor]]:
    """Whether it is this library's: an entry may be empty, having been looked at, or hold a caller's own."""
    return known is not None and "step" in known


def new_tower(stack: Stack, params: list[Tensor], device: torch.device) -> Tensor:
    """One row for all parameters, or, if the first level has hyperparameters for each tensor, one for each.

    A group without parameters has one row, too.
    """
    values = [float(value) for level in stack for value in level.values().values()]
    start = [value for level in stack for value in level.start().values()]
    row = torch.tensor(_C.tower_row(stack.plan(), values, start), dtype=torch.float64, device=device)
    return row.repeat(max(1, len(params)) if stack[0].granularity == "tensor" else 1, 1)


def _foreign_levels(plan: list[int]) -> list[tuple[int, int]]:
    """The levels that are moved by a rule which the CUDA tower is not compiled with, and the id of that rule."""
    columns = [plan[i :: len(_C.PLAN)] for i in range(len(_C.PLAN))]
    built_in, rule = columns[_C.PLAN.index("built_in")], columns[_C.PLAN.index("rule")]
    return [(k, rule[k + 1]) for k in range(len(rule) - 1) if built_in[k + 1] < 0]


def _assigned(name: str, value: Any, live: Tensor) -> float | Tensor:
    """What a caller put in the place of a hyperparameter's live value: no view of one, nor of another."""
    if isinstance(value, Tensor) and value.numel() in (1, live.numel()):
        own: Tensor = value.detach().clone()
        return own.reshape(()) if own.numel() == 1 else own
    if not is_number(value):
        raise TypeError(f"param group: {name} must be a number or a tensor of one, not {value!r}")
    if not torch.compiler.is_compiling():
        return float(value)
    return torch.zeros((), dtype=live.dtype, device="cpu") + value  # a sum, so that dynamo makes an input of the number


def write(target: Tensor, value: float | Tensor) -> None:
    if isinstance(value, Tensor) and value.dim() > 0:
        target.copy_(value)
    else:
        target.fill_(value)  # a copy from the host would wait for the device


def _pair(betas: Any) -> tuple[Any, Any]:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"param group: betas must be two numbers, not {betas!r}")
    return betas[0], betas[1]


class Group:
    """What ``step()`` needs of a param group: its tower, and the operators of its first rule."""

    def __init__(self, group: dict[str, Any]) -> None:
        stack: Stack = group["stack"]
        base, plan = stack[0], stack.plan()
        self.group, self.stack = group, stack
        self.params: list[Tensor] = group["params"]
        self.members = list(self.params)  # the list may change
        self.tower: Tensor = group["tower"]
        if base.granularity == "tensor" and max(1, len(self.params)) != len(self.tower):
            raise ValueError(
                f"param group: {base} has hyperparameters for each of {len(self.tower)} tensors, but there are "
                f"{len(self.params)} now; use add_param_group()"
            )
        self.learn = base.learn_mask() if len(stack) > 1 else 0
        self.horizon = base.horizons()
        check_policy(group["nonfinite"])
        self.nonfinite: str | None = group["nonfinite"]
        self.capped = base.trust is not None
        self.normalize = base.normalize
        self.sums = self.learn != 0 or self.nonfinite is not None  # else pass A has nothing to say
        # The row of each parameter, if they have rows of their own.
        self.row_of = self._numbered() if base.granularity == "tensor" else None
        device = self.tower.device
        settings = [{**level.settings(), "skip": float(self.nonfinite in ("skip", "raise"))} for level in stack]
        self.plan = torch.tensor(plan, device=device).view(len(stack), -1)
        self.foreign = _foreign_levels(plan)
        self.bounds = torch.tensor(
            [limit for level in stack for limit in level.limits()], dtype=torch.float64, device=device
        )
        self.settings = torch.tensor(
            [[values[name] for name in _C.SETTINGS] for values in settings], dtype=torch.float64, device=device
        )
        offsets = _C.tower_offsets(plan)
        self.start_of_used = offsets[0][2]
        self.hyperparameters, self.bounded, self.used = (
            [self._views(level, starts[i]) for level, starts in zip(stack, offsets, strict=True)] for i in range(3)
        )
        # Of the first level's values, to write to: in a graph, a write to a view without dimensions is lost once an
        # operator writes to its base.
        self.columns = {name: self.tower[:, offsets[0][0] + i] for i, name in enumerate(base.values())}
        self.schedule = self.tower[:, _C.SCHEDULE]
        self.initial: Tensor | None = None
        if self.scales_lr() and "lr" in group and "initial_lr" in group:
            for name in ("lr", "initial_lr"):
                group[name] = torch.as_tensor(group[name], dtype=torch.float64, device=device)
            self.initial = group["initial_lr"]
        self.swa_lr: float | None = None  # that was checked
        live = self.hyperparameters[0]
        self.betas = (live["beta1"], live["beta2"]) if "beta1" in live else None
        self.states = base.start()
        self.records = _C.record(base.rule, self.learn, base.is_traced())
        ops = torch.ops.hyperopt_ext
        self.hypergradient = getattr(ops, f"{base.rule}_hypergradient").default
        self.norms = getattr(ops, f"{base.rule}_norms").default
        self.step = base.step_of(group)
        self.settle = getattr(ops, f"{base.rule}_settle_").default
        self.check = getattr(ops, f"{base.rule}_check").default

    def _views(self, level: Level, start: int) -> dict[str, Tensor]:
        """What the tower holds for each hyperparameter of a level: no dimension, or one of the parameters."""
        rows = self.tower if level.granularity == "tensor" else self.tower[0]
        return {name: rows[..., start + i] for i, name in enumerate(level.values())}

    def _numbered(self) -> dict[Tensor, int]:
        return {p: i for i, p in enumerate(self.params)}

    def rows(self, params: list[Tensor]) -> list[int]:
        """The row of each parameter; nothing if all have the same one."""
        if self.row_of is None:
            return []
        try:
            return [self.row_of[p] for p in params]
        except KeyError:  # in a compiled step, one was put in the place of another
            self.row_of = self._numbered()
            return [self.row_of[p] for p in params]

    def count(self, column: int) -> Tensor:
        return self.tower[0, column] if self.row_of is None else self.tower[:, column]

    def scales_lr(self) -> bool:
        """Whether a scheduler's lr is a factor of another one, which is learned or has a value for each tensor."""
        learned = self.learn != 0 and "lr" in self.stack[0].learn_names
        return learned or (self.row_of is not None and "lr" in self.hyperparameters[0])

    def link(self) -> None:
        """Puts the live values into the param group, but for an lr that is a scheduler's."""
        self.entries, self.targets = dict(self.hyperparameters[0]), dict(self.columns)
        if self.initial is not None:
            self.entries["lr"] = self.targets["lr"] = self.group["lr"]
        self.group.update(self.entries)
        if self.betas is not None:
            self.group["betas"] = self.betas
        self.names = set(self.group)
        inner = self.group["optimizer"].param_groups[0] if "optimizer" in self.group else {}
        self.absent = {*self.stack[0].arguments()} - {*self.names, *inner}

    def meet_scheduler(self) -> None:
        """An lr_scheduler writes ``initial_lr``. If it :meth:`scales_lr`, it gets an ``lr`` of its own to write to."""
        initial = self.group.get("initial_lr")
        moved = self.group["tower"] is not self.tower  # and all with it; the optimizer makes this anew
        if initial is self.initial or moved or not self.scales_lr():
            return
        if initial is None:  # the scheduler was taken away: lr is the learned one again
            if self.group["lr"] is self.entries["lr"]:
                self.group["lr"] = self.hyperparameters[0]["lr"]
            self.initial = None
            self.schedule.fill_(1.0)
            self.entries["lr"], self.targets["lr"] = self.hyperparameters[0]["lr"], self.columns["lr"]
            return
        live = self.hyperparameters[0]["lr"]
        used = torch.as_tensor(self.group["lr"], dtype=live.dtype, device=live.device)  # perhaps assigned just now
        used = used if self.initial is None else live * (used / self.initial)
        value = torch.as_tensor(initial, dtype=live.dtype, device=live.device).reshape(-1)
        own = len(value) > 1  # a copy of the lrs of all tensors
        same = not own or bool((value == value[0]).all())
        value = value[0] if same else value.new_tensor(self.stack[0].values()["lr"])
        if not bool(value > 0):
            del self.group["initial_lr"]
            raise ValueError(
                "param group: a scheduler multiplies this lr by its own over initial_lr, so initial_lr must be "
                f"greater than 0, not {value.item():g}"
            )
        entry = value.clone() if own else used.mean()  # starts from the lr in use, whatever initial_lr was brought
        if not own:
            live.copy_(value)
        self.initial = value.clone()
        self.group.update(initial_lr=self.initial, lr=entry)
        self.entries["lr"] = self.targets["lr"] = self.group["lr"]

    def assignments(self) -> dict[str, float | Tensor]:
        """What the caller put in the place of the live values, apart from them."""
        if len(self.group) != len(self.names):
            self._check_new_entries()
        if self.betas is not None:
            betas = _pair(self.group["betas"])
            if betas[0] is not self.betas[0] or betas[1] is not self.betas[1]:
                self.group.update(beta1=betas[0], beta2=betas[1], betas=self.betas)
        return {
            name: _assigned(name, value, live)
            for name, live in self.entries.items()
            if (value := self.group.get(name)) is not live
        }

    def adopt(self, assignments: dict[str, float | Tensor]) -> None:
        for name, value in assignments.items():
            write(self.targets[name], value)
            self.group[name] = self.entries[name]
        if self.initial is not None:
            self.schedule.copy_(self.entries["lr"] / self.initial)

    def _check_new_entries(self) -> None:
        """Something may have been switched on that the operators of this group do not have."""
        for name, value in self.group.items():
            if name in self.absent and (isinstance(value, Tensor) or value):
                base = self.stack[0]
                raise ValueError(
                    f"param group: {name} does nothing here, since this {base} was made without it; "
                    f"write {base}({name}={value!r})"
                )
        if torch.compiler.is_compiling() or (swa_lr := self.group.get("swa_lr")) is self.swa_lr:
            return
        first = 0.0 if self.initial is None else self.initial.item()  # waits, but once
        if is_number(swa_lr) and 0 < swa_lr < 1e-10 * first:
            raise ValueError(
                f"param group: swa_lr={swa_lr:g} is meant relative to the first lr, which is {first:g} where none is "
                "given; give one, as hx.auto(params, lr=0.1), or make SWALR where its part begins"
            )
        self.swa_lr = swa_lr

    def edited(self, saved: dict[str, Any]) -> dict[str, float | Tensor]:
        """The values of the first level in a param group of a state dict, where the caller may have edited them."""
        live = self.hyperparameters[0]
        values = {name: _assigned(name, saved[name], live[name]) for name in live if name in saved}
        if self.betas is not None and "betas" in saved:
            for name, beta in zip(("beta1", "beta2"), _pair(saved["betas"]), strict=True):
                value = torch.empty_like(live[name])
                write(value, _assigned(name, beta, live[name]))
                if not torch.equal(value, live[name]):  # else beta1 may be what was edited
                    values[name] = value
        return values

    def state_names(self) -> list[str]:
        return ["step", "tick", *self.states, *self.records]

    def arguments(
        self,
        params: list[Tensor],
        grads: list[Any],
        states: list[dict[str, Tensor]],
        reduction: distributed.Reduction | None,
        tower: Tensor | None = None,
        rows: list[int] | None = None,
    ) -> tuple[Any, ...]:
        """What the operators of a pass take (csrc/pass.h)."""
        rows = self.rows(params) if rows is None else rows
        if reduction is not None:
            params, grads = ([distributed.local(t) for t in tensors] for tensors in (params, grads))
            states = [{name: distributed.local(t) for name, t in state.items()} for state in states]
        return (
            params,
            grads,
            [state[name] for name in self.states for state in states],
            [state[name] for name in self.records for state in states],
            [state["step"] for state in states],
            [state["tick"] for state in states],
            self.tower if tower is None else tower,
            rows,
            self.learn,
            *self.horizon,
            -1.0 if self.group["maximize"] else 1.0,
        )

    def was_edited(self) -> bool:
        """Whether its list of parameters, which may be the same list, holds others now, or in another order."""
        return not all(map(is_, self.group["params"], self.members))

    def check_places(self, params: list[Tensor]) -> None:
        """Where each parameter has a tower of its own, it is that of its place."""
        if self.row_of is not None and any(self.row_of.get(p, i) != i for i, p in enumerate(params)):
            raise ValueError(
                f"param group: {self.stack[0]} has hyperparameters for each tensor, in their order, but tensors have "
                "changed places; put them back"
            )

    @torch.no_grad()
    def let_go(
        self, remaining: set[Tensor], state: Mapping[Tensor, Any], reduction: distributed.Reduction | None
    ) -> None:
        """Completes the state of parameters that have left the group, and takes their last update off the record.

        That is what sitting a step out does, a step that none of the values takes part in. The parameters themselves
        may be gone: a tensor of their state stands for each.
        """

        def is_whole(p: Tensor) -> bool:
            own, known = state[p], self.row_of is None or p in self.row_of
            if not known or "last_grad" not in self.records or not own.keys() >= {*self.state_names()}:
                return False
            like = own["last_grad"]
            same = all(own[name].shape == like.shape for name in (*self.states, *self.records))
            return same and like.device == self.tower.device

        gone = [p for p in self.members if p not in remaining and is_state(state.get(p))]
        for p in gone:
            for name in self.records:
                if name.startswith("trace_") and name in state[p]:
                    state[p][name].zero_()
        deferred = [p for p in gone if is_whole(p)]
        if deferred:
            tower, n = self.tower.clone(), len(self.hyperparameters[0])
            tower[:, _C.TICKS] += 1.0
            tower[:, _C.TICKING] = 1.0
            used, previous = (slice(start, start + n) for start in (self.start_of_used, self.start_of_used + n))
            tower[:, previous] = self.tower[:, used]
            states = [state[p] for p in deferred]
            like = [own.get("last_param", own["last_grad"]) for own in states]
            self.settle(*self.arguments(like, like, states, reduction, tower, self.rows(deferred)))
        for p in gone:
            if isinstance(tick := state[p].get("tick"), Tensor):
                tick.fill_(-1)

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        start = {"step": 0, "tick": -1, **self.states, **dict.fromkeys(self.records, 0)}
        return {name: new_state(p, name, value) for name, value in start.items()}


def adopt_assignments(groups: list[Group]) -> None:
    """``group["lr"] = 0.1`` is ``group["lr"].fill_(0.1)``: the entries are views of the towers again.

    All are read before any is written to, since two may have changed places.
    """
    assignments = [group.assignments() for group in groups]
    for group, values in zip(groups, assignments, strict=True):
        group.adopt(values)


class Update:
    """One step of one group: its parameters that have a gradient, and the idle ones that moved before.

    If processes share the parameters out, ``reduction`` says which of them count on this one.
    """

    def __init__(
        self,
        group: Group,
        params: list[Tensor],
        state: dict[Tensor, dict[str, Tensor]],
        reduction: distributed.Reduction | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        device = group.tower.device
        self.group = group
        self.reduction = reduction
        queued = device.type != "cpu"  # what is copied to the host has to be there when it is read
        self.grad_scale = None if grad_scale is None else grad_scale.to(device, torch.float32, non_blocking=queued)
        self.found_inf = None if found_inf is None else found_inf.to(device, non_blocking=queued)
        self.new: dict[Tensor, dict[str, Tensor]] = {}
        states = [self._state_of(p, state.get(p)) for p in params]
        if reduction is None:
            grads = [p.grad for p in params]
        else:
            grads = [distributed.local_grad(p, f"params[{i}]") for i, p in enumerate(params)]
        self.params = params
        self.active = self.counted = group.arguments(params, grads, states, reduction)
        self.uncounted: list[tuple[tuple[Any, ...], list[Tensor]]] = []  # what pass A does not see, and the parameters
        if reduction is not None and len(counted := reduction.counted(params)) < len(params):
            self.params = [params[i] for i in counted]
            some = [grads[i] for i in counted], [states[i] for i in counted]
            self.counted = group.arguments(self.params, *some, reduction)
            self.uncounted.append((self.active, params))
        self.idle = None
        if group.row_of is None and len(params) != len(group.group["params"]):
            moving = set(params)
            idle = [p for p in group.group["params"] if p not in moving and is_state(state.get(p))]
            self.idle = group.arguments(idle, idle, [state[p] for p in idle], reduction)
            self.uncounted.append((self.idle, idle))

    def _state_of(self, p: Tensor, known: dict[str, Tensor] | None) -> dict[str, Tensor]:
        if is_state(known):
            return known
        if is_capturing(p):
            raise RuntimeError("a CUDA graph would create a parameter's state anew at every replay: step once before")
        self.new[p] = self.group.new_state(p)
        return self.new[p]

    def hypergradient(self) -> Tensor:
        """Pass A. Checks all lists before anything is changed.

        But for those that it does not read, in a compiled step: what has no output is left out there.
        """
        g = self.group
        try:
            sums: Tensor = g.hypergradient(*self.counted, g.nonfinite is not None, g.normalize, self.grad_scale)
        except (TypeError, ValueError) as error:
            raise self._located(error, self.params) from None
        for others, params in self.uncounted:
            try:
                g.check(*others)
            except (TypeError, ValueError) as error:
                raise self._located(error, params) from None
        if self.found_inf is not None:  # in any group: all of them sit the step out
            norm = sums[:, -1]
            norm.masked_fill_((self.found_inf != 0) & (norm >= 0), math.inf)
        return sums

    def _located(self, error: Exception, params: list[Tensor]) -> Exception:
        """``error`` about ``grads[3]``, say, with the parameter that this is: the caller does not know these lists."""
        found = re.match(r"\w+\[(\d+)\]", str(error))
        if found is None:
            return error
        p = params[int(found[1]) % len(params)]
        return type(error)(f"{error} ({found[0]} belongs to {self._name_of(p)})")

    def _name_of(self, p: Tensor) -> str:
        i = next(i for i, known in enumerate(self.group.params) if known is p)
        names = self.group.group.get("param_names")
        name = f"parameter {i} of its group" if names is None else repr(names[i])
        return f"{name}, of shape {tuple(p.shape)}"

    def not_finite(self) -> str:
        """Which gradient of this process it is."""
        for p, grad in zip(self.params, self.counted[1], strict=True):
            if not bool(grad.isfinite().all()):
                return f"the gradient of {self._name_of(p)},"
        return "a hypergradient, a gradient's norm or a gradient of another process"

    def norms(self) -> Tensor:
        sums: Tensor = self.group.norms(*self.counted, self.grad_scale)
        return sums

    def step(self) -> None:
        """Pass B."""
        if self.idle is not None:
            self.group.settle(*self.idle)
        self.group.step(*self.active, self.grad_scale)


def move_towers(updates: list[Update], reduction: distributed.Reduction | None) -> None:
    """All towers of a device in one call; where ``trust`` asks for it, to the largest lr that the update allows."""

    def apply(op: Any, some: list[Update], sums: list[Tensor]) -> None:
        devices: list[torch.device] = []
        for update in some:
            if update.group.tower.device not in devices:
                devices.append(update.group.tower.device)
        for device in devices:
            here = [(u.group, own) for u, own in zip(some, sums, strict=True) if u.group.tower.device == device]
            groups = [group for group, _ in here]
            op(
                [g.tower for g in groups],
                [own for _, own in here],
                [g.plan for g in groups],
                [g.bounds for g in groups],
                [g.settings for g in groups],
                [number for i, g in enumerate(groups) for level in g.foreign for number in (i, *level)],
            )

    def added_up(sums: list[Tensor]) -> list[Tensor]:
        """Only of the groups that learn something, or look for numbers that are not finite."""
        if reduction is None:
            return sums
        totals = iter(reduction.hypergradients([s for u, s in zip(updates, sums, strict=True) if u.group.sums]))
        return [next(totals) if u.group.sums else s for u, s in zip(updates, sums, strict=True)]

    ops = torch.ops.hyperopt_ext
    sums = added_up([update.hypergradient() for update in updates])
    for update, own in zip(updates, sums, strict=True):
        raises = update.group.nonfinite == "raise" and update.found_inf is None
        if raises and not bool(own.isfinite().all()):
            raise FloatingPointError(f"{update.not_finite()} is not finite; nothing was changed in this step")
    apply(ops.tower_.default, updates, sums)
    capped = [update for update in updates if update.group.capped]
    norms = [update.norms() for update in capped]
    apply(ops.cap_.default, capped, norms if reduction is None else reduction.add_up(norms))
