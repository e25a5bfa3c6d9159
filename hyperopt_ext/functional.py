"""One step of a rule as a function that autograd can differentiate with respect to the hyperparameters.

This is the method in the form of the paper: the step is part of the graph, and ``loss.backward()`` in the next
iteration leaves the hypergradient in ``hyper["lr"].grad``. Its detach points are the paper's: parameters, gradients and
state count as constants, one step back and no further. :class:`hyperopt_ext.HyperOptimizer` computes the same numbers
without a graph.

There is one function for each class of levels, by its name in lower case: ``adam``, ``sgd``, ``rmsprop``, ...; ``of``
makes that of a class of your own.

    >>> w, lr = torch.ones(3), torch.tensor(0.1, requires_grad=True)
    >>> [w1], _ = hx.functional.sgd([w], [w], None, {"lr": lr}, torch.tensor(1))
    >>> (w1**2).sum().backward()
    >>> lr.grad
    tensor(-5.4000)

:func:`tower` is the whole method, made of these: parameters and state in, parameters and state out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hyperopt_ext import levels
from hyperopt_ext.stack import RULES, Level, Stack
from hyperopt_ext.update import check_no_module, is_exporting, new_state

State = dict[str, list[Tensor]]
Params = TypeVar("Params", bound=Sequence[Tensor] | Mapping[str, Tensor])


_DOC = """One step of {name}, as :class:`{name}` makes it.

Args:
    params: n dense tensors, fp32, fp64, fp16 or bf16.
    grads: their gradients, of the same shapes and dtypes.
    state: for each state tensor of the method, n tensors of the parameters' shapes, fp64 for fp64 parameters and fp32
        else. ``None`` stands for zeros.
    hyper: the hyperparameters of the method by name (``lr``, ``beta1``, ...), as floating-point tensors of one number;
        what is not named is at its default.
    step: the number of this step, from 1, a tensor of one number. (Less is an error on a CPU. On a GPU it is not looked
        at, which would mean to wait, and the update is none of the method's.)
    detach: parameters, gradients and state count as constants, as in the paper, and a backward reaches the
        hyperparameters alone. ``False``: the step is differentiable with respect to all that it reads, so that several
        can be unrolled. What a backward gives cannot be differentiated again in both cases. Default: True.
{structure}
Returns:
    The new parameters, differentiable with respect to ``hyper``, and the new state, which is not, unless ``detach`` is
    False.

Raises:
    TypeError: a hyperparameter or ``step`` is not a tensor.
    ValueError: an unknown hyperparameter or state, or tensors that do not match.
"""


def of(spec: type[Level]) -> Callable[..., tuple[list[Tensor], State]]:
    """The function of a class of levels, as of a rule from outside: ``hx.functional.of(hx.Adam)`` is ``adam``."""
    if not (isinstance(spec, type) and issubclass(spec, Level)):
        raise TypeError(f"functional.of: spec must be a class of levels, as hx.Adam, not {spec!r}")
    if spec.first_only:
        raise TypeError(f"functional.of: {spec.__name__} makes its step by another optimizer, and is no function")
    known, function = spec.structural(), spec.__name__.lower()
    numbers = {f.name for f in fields(spec)} - {f.name for f in fields(Level)} - {*known}

    def update(
        params: Iterable[Tensor],
        grads: Iterable[Tensor],
        state: Mapping[str, Sequence[Tensor]] | None,
        hyper: Mapping[str, Tensor],
        step: Tensor,
        detach: bool = True,
        **structure: bool,
    ) -> tuple[list[Tensor], State]:
        for name in structure:
            if name not in known:
                hint = ": name it in hyper" if name in numbers else f"; it has {', '.join(known)}" if known else ""
                raise TypeError(f"{function} has no argument {name!r}{hint}")
        if not isinstance(hyper, Mapping):
            raise TypeError(f"hyper must be a dict of tensors, as {{'lr': torch.tensor(0.1)}}, not {hyper!r}")
        return _update(spec.rule_for(list(hyper), **structure), params, grads, state, hyper, step, detach)

    arguments = f"    {', '.join(known)}: the variant of the method, as there.\n" if known else ""
    if spec.optional:
        arguments += f"\nThere is {', '.join(spec.optional)} if ``hyper`` names it.\n"
    update.__name__ = update.__qualname__ = function
    update.__doc__ = _DOC.format(name=spec.__name__, structure=arguments)
    return update


_METHODS = {spec.__name__.lower(): of(spec) for spec in levels.methods()}
globals().update(_METHODS)


def __getattr__(name: str) -> Callable[..., tuple[list[Tensor], State]]:
    raise AttributeError(f"hyperopt_ext.functional has no {name!r}; it has {', '.join(_METHODS)}")


def _update(
    rule: str,
    params: Iterable[Tensor],
    grads: Iterable[Tensor],
    state: Mapping[str, Sequence[Tensor]] | None,
    hyper: Mapping[str, Tensor],
    step: Tensor,
    detach: bool,
) -> tuple[list[Tensor], State]:
    slots, known = RULES[rule]["state"], RULES[rule]["hypers"]
    params, grads = _tensors("params", params), _tensors("grads", grads)
    if state is not None and not isinstance(state, Mapping):
        raise TypeError(f"state must be None or a dict of lists of tensors, not {type(state).__name__}")
    if state is None:
        state = {name: [new_state(p, name) for p in params] for name in slots}
    if sorted(state) != sorted(slots):
        raise ValueError(
            f"state must hold {', '.join(slots) or 'nothing'} for {rule}, not {', '.join(state) or 'nothing'}"
        )
    names = [h["name"] for h in known]
    for name, value in {**hyper, "step": step}.items():
        if name not in [*names, "step"]:
            hint = "; betas go by their names" if name == "betas" and "beta1" in names else ""
            raise ValueError(f"hyper names {name!r}, but {rule} has {', '.join(names)}{hint}")
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor of one number, as torch.tensor({value!r}), not {value!r}")
    values = [
        hyper[h["name"]] if h["name"] in hyper else step.new_full((), h["initial"], dtype=torch.float64) for h in known
    ]
    op = getattr(torch.ops.hyperopt_ext, rule).default
    outputs = op(params, grads, [t for name in slots for t in state[name]], values, step, detach)
    n = len(params)
    return outputs[:n], {name: outputs[n * (k + 1) : n * (k + 2)] for k, name in enumerate(slots)}


def _tensors(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name} must be a list of tensors, not one tensor")
    tensors = list(tensors)
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a list of tensors, but {name}[{i}] is {t!r}")
    return tensors


# Of each coordinate (hx.Level, `space`), h = T(x) and its inverse, which is finite at the ends of the range, too, and
# gives of two x that on the side of another one.
_COORDINATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": (lambda x: x, lambda h, _: h),
    "log": (torch.exp, lambda h, _: h.log().clamp_min(-700.0)),
    "square": (torch.square, lambda h, x: torch.where(x < 0, -h.sqrt(), h.sqrt())),
    "softplus": (lambda x: -logsigmoid(-x), lambda h, _: h + (-torch.expm1(-h)).log().clamp_min(-700.0)),
    "tanh": (lambda x: (2 * x).sigmoid(), lambda h, _: (h.logit() / 2).clamp(-350.0, 20.0)),  # (tanh x + 1) / 2
}
_COORDINATES["multiplicative"] = _COORDINATES["log"]


class TowerState(NamedTuple):
    """What a tower of :func:`tower` carries from one step to the next: tensors, none of them differentiable.

    A pytree, so that ``torch.compile``, ``torch.utils._pytree`` and the like take it as it is.
    """

    step: Tensor  #: steps made, int64, no dimension
    #: for each level, by name, the coordinate of every hyperparameter that is learned, and the value of every other
    #: one: float64, no dimension
    coordinates: list[dict[str, Tensor]]
    states: list[State]  #: for each level, its rule's state for all that it moves
    #: for each level, what its last update read: the values that it moved, their gradients, and its state before
    last: list[tuple[list[Tensor], list[Tensor], State]]


class _TowerLevel(NamedTuple):
    """A level as a function of its coordinates. Names and numbers only, so that a graph holds it as a constant."""

    rule: str
    learned: tuple[str, ...]
    spaces: tuple[str, ...]  # of `learned`
    moved_spaces: tuple[str, ...]  # of what the level moves; of parameters: none

    def values(self, coordinates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The hyperparameters h = T(x)."""
        spaces = dict(zip(self.learned, self.spaces, strict=True))
        return {name: _COORDINATES[spaces[name]][0](x) if name in spaces else x for name, x in coordinates.items()}

    def update(
        self,
        coordinates: Mapping[str, Tensor],
        moved: list[Tensor],
        grads: list[Tensor],
        state: State,
        step: Tensor,
    ) -> tuple[list[Tensor], State]:
        """The new values of what the level moves, which autograd knows as a function of ``coordinates``."""
        new, state = _update(self.rule, moved, grads, state, self.values(coordinates), step, True)
        if "multiplicative" in self.moved_spaces:  # a move by d multiplies h = exp x by 1 + d
            each = zip(moved, new, self.moved_spaces, strict=True)
            new = [x + torch.log1p(y - x) if space == "multiplicative" else y for x, y, space in each]
        return new, state


# torch.compile takes a call of this as it is, and differentiates while it lowers the graph.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _hypergradients(
    level: _TowerLevel,
    coordinates: dict[str, Tensor],
    last: tuple[list[Tensor], list[Tensor], State],
    upstream: list[Tensor],
    steps: Tensor,
) -> list[Tensor]:
    """d <upstream, last update of the level> / d x of each learned hyperparameter; 0 before the first update."""
    if not upstream:  # of a level that moves nothing
        return [torch.zeros_like(coordinates[name]) for name in level.learned]
    with torch.enable_grad():
        x = {name: coordinates[name].detach().requires_grad_() for name in level.learned}
        updated, _ = level.update({**coordinates, **x}, *last, steps.clamp_min(1))
        found = torch.autograd.grad(updated, list(x.values()), upstream) if x else []
    return [torch.where(steps > 0, g, 0.0) for g in found]


class Tower:
    """What :func:`tower` returns: the levels of a stack, as functions from state to state."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._levels: list[_TowerLevel] = []
        self._limits: list[dict[str, tuple[float, float]]] = []
        self._known: list[tuple[list[str], list[str], int]] = []  # names, state, number moved; of parameters: 0
        moved_spaces: tuple[str, ...] = ()
        for k, level in enumerate(stack):
            learned = level.learn_names if k + 1 < len(stack) else ()
            space_of = dict(zip(level.values(), level.coordinates(), strict=True))
            spaces = tuple(space_of[name] for name in learned)
            self._levels.append(_TowerLevel(level.rule, learned, spaces, moved_spaces))
            self._limits.append(dict(zip(level.values(), level.limits(), strict=True)))
            self._known.append((sorted(level.values()), sorted(level.start()), len(moved_spaces)))
            moved_spaces = spaces

    @overload
    def init(self, params: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], TowerState]: ...
    @overload
    def init(self, params: Iterable[Tensor]) -> tuple[list[Tensor], TowerState]: ...
    def init(self, params: Any) -> tuple[Any, TowerState]:
        """Copies of the parameters, a list or a dict as of ``named_parameters()``, and the state to start from."""
        check_no_module(params)
        values = [p.detach().clone() for p in _values("params", params)]
        for i, p in enumerate(values):
            if not p.is_floating_point():
                raise TypeError(f"params: number {i} is {p.dtype}, but only floating-point tensors can be trained")
        device = values[0].device if values else None
        coordinates: list[dict[str, Tensor]] = []
        for level, spec in zip(self._levels, self.stack, strict=True):
            h = {name: torch.tensor(float(h), dtype=torch.float64, device=device) for name, h in spec.values().items()}
            for name, space in zip(level.learned, level.spaces, strict=True):
                h[name] = _COORDINATES[space][1](h[name], h[name])
            coordinates.append(h)
        moved = [values, *self._learned(coordinates)]

        def start() -> list[State]:
            return [
                {name: [new_state(t, name, number) for t in tensors] for name, number in level.start().items()}
                for level, tensors in zip(self.stack, moved, strict=True)
            ]

        # Nothing has happened, and what did is of the shapes that it will have: a graph of a step need not change.
        last = [
            ([t.clone() for t in tensors], [torch.zeros_like(t) for t in tensors], state)
            for tensors, state in zip(moved, start(), strict=True)
        ]
        return _like(params, values), TowerState(torch.tensor(0, device=device), coordinates, start(), last)

    def step(self, params: Params, grads: Params, state: TowerState) -> tuple[Params, TowerState]:
        """One step of every level.

        Args:
            params: the parameters, a list, or a dict as ``torch.func.functional_call`` takes it.
            grads: dL/dw at ``params``, in the same form.
            state: what the step before returned, or :meth:`init`.

        Returns:
            The new parameters, in the form of ``params``, and the new state. None of it requires a gradient. Nothing is
            written to; ``params`` and ``grads`` become part of the state as they are, so do not write to them either.

        Raises:
            TypeError: ``params`` or ``grads`` hold something that is not a tensor, or ``state`` is none of a tower.
            ValueError: lists that do not match, or a state of another stack.
            RuntimeError: under ``torch.export``.
        """
        if is_exporting():
            raise RuntimeError("torch.export does not know autograd.grad; export a step of hx.functional.<rule>")
        if not isinstance(state, TowerState):
            raise TypeError("state must be the TowerState that init() or the last step() returned")
        if len(state.coordinates) != len(self._levels):
            raise ValueError(f"state is of {len(state.coordinates)} levels, but {self.stack} has {len(self._levels)}")
        known = [
            (sorted(x), sorted(s), len(moved) if k > 0 else 0)
            for k, (x, s, (moved, _, _)) in enumerate(zip(state.coordinates, state.states, state.last, strict=True))
        ]
        if known != self._known:
            raise ValueError(f"state is of another stack than {self.stack}: start from init()")
        if isinstance(params, Mapping) and (not isinstance(grads, Mapping) or list(grads) != list(params)):
            raise ValueError("grads must be a dict with the keys of params")
        values, gradients = _values("params", params), [[g.detach() for g in _values("grads", grads)]]
        shapes = [p.shape for p in values]
        for argument, tensors in [("grads", gradients[0]), ("state", state.last[0][0])]:
            if [t.shape for t in tensors] != shapes:
                raise ValueError(f"{argument} must be of the shapes of params")
        # Bottom-up, the gradients of the loss with respect to what each level moves.
        for level, x, inputs in zip(self._levels[:-1], state.coordinates, state.last, strict=False):
            gradients.append(_hypergradients(level, x, inputs, gradients[-1], state.step))

        # Top-down, the updates: each level has just been moved by the one above.
        moved = [[p.detach() for p in values], *self._learned(state.coordinates)]
        last = list(zip(moved, gradients, state.states, strict=True))
        coordinates, states, steps = list(state.coordinates), list(state.states), state.step + 1
        with torch.no_grad():
            for k in reversed(range(len(self._levels))):
                new, states[k] = self._levels[k].update(coordinates[k], *last[k], steps)
                if k > 0:
                    coordinates[k - 1] = self._at(k - 1, coordinates[k - 1], new)
        return _like(params, new), TowerState(steps, coordinates, states, last)

    def hyperparameters(self, state: TowerState) -> list[dict[str, Tensor]]:
        """The current values, one dict a level, level 0 first: float64 tensors of no dimension."""
        return [level.values(x) for level, x in zip(self._levels, state.coordinates, strict=True)]

    def _learned(self, coordinates: list[dict[str, Tensor]]) -> list[list[Tensor]]:
        """What the levels above the lowest move: the learned coordinates of the level below each."""
        return [
            [x[name] for name in level.learned] for level, x in zip(self._levels[:-1], coordinates[:-1], strict=True)
        ]

    def _at(self, k: int, coordinates: dict[str, Tensor], new: list[Tensor]) -> dict[str, Tensor]:
        """The coordinates of level k with new ones of what it learns, projected to the bounds."""
        level, result = self._levels[k], dict(coordinates)
        for name, space, x in zip(level.learned, level.spaces, new, strict=True):
            to_h, to_x = _COORDINATES[space]
            value = to_h(x)
            within = value.clamp(*self._limits[k][name])
            result[name] = torch.where(within == value, x, to_x(within, x))
        return result


def tower(stack: Level | Stack) -> Tower:
    """The levels of a stack as pure functions: the method of Chandra et al. (NeurIPS 2022), in code that states it.

    With the parameters w, a loss L, and for each level k = 0, ..., H a rule R_k, coordinates x_k of its learned
    hyperparameters h_k = T_k(x_k), and a state s_k, one step is::

        G_0     = dL/dw
        G_{k+1} = d <G_k, R_k(last inputs; T_k(x_k))> / d x_k          k = 0, ..., H - 1
        x_{k-1}, s_k <- R_k(x_{k-1}, G_k, s_k; T_k(x_k))               k = H, ..., 1
        w, s_0       <- R_0(w, G_0, s_0; T_0(x_0))

    The hypergradients go bottom-up, and each is autograd's, through the last update of its level as
    ``hyperopt_ext.functional`` makes it: what that update read is held constant (the paper's detach points), and before
    the first one the hypergradient is 0. The updates go top-down, each with values that were just updated, and project
    to the bounds. :class:`hyperopt_ext.HyperOptimizer` computes the same numbers, faster.

        >>> tower = hx.functional.tower(hx.Adam(lr=1e-3) / hx.SGD(lr=1e-5))
        >>> params, state = tower.init(dict(model.named_parameters()))
        >>> def loss_of(params, x, y):
        ...     return F.mse_loss(torch.func.functional_call(model, params, x), y)
        >>> def train(params, state, x, y):  # a pure function; torch.compile(train, fullgraph=True) takes it
        ...     return tower.step(params, torch.func.grad(loss_of)(params, x, y), state)

    Args:
        stack: a level or a stack. ``learn``, ``space``, ``bounds`` and ``initial_state`` count as in the optimizer, and
            a number that is not finite goes where it will.

    Returns:
        A :class:`Tower`: ``init(params)``, ``step(params, grads, state)`` and ``hyperparameters(state)``.

    Raises:
        TypeError: ``stack`` is not one, or wraps another optimizer.
        ValueError: a level has a safeguard (``horizon``, ``trust``, ...), which the paper's form does not know.
    """
    stack = Stack.coerce(stack)
    for level in stack:
        if level.first_only:
            raise TypeError(f"functional.tower: {level!r} makes its step by another optimizer, and is no function")
        for name in ("horizon", "granularity", "normalize", "clip", "growth", "trust", "burn_in", "converge"):
            if getattr(level, name) != getattr(Level, name):
                raise ValueError(f"functional.tower has no {name}, which {level!r} asks for; use hx.HyperOptimizer")
    return Tower(stack)


def _values(argument: str, tensors: Sequence[Tensor] | Mapping[str, Tensor]) -> list[Tensor]:
    named = tensors if isinstance(tensors, Mapping) else dict(enumerate(tensors))
    if isinstance(tensors, Tensor):
        raise TypeError(f"{argument} must be a list of tensors, or a dict of them, not one tensor")
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(
                f"{argument} must be a list of tensors, or a dict of them, but {argument}[{name!r}] is {t!r} (a "
                "parameter that took no part has a gradient of zeros)"
            )
    return list(named.values())


def _like(params: Params, values: list[Tensor]) -> Params:
    """The values in the form of ``params``."""
    return dict(zip(params, values, strict=True)) if isinstance(params, Mapping) else values  # type: ignore[return-value]
