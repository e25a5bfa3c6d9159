"""What a level of a tower is, and how levels are stacked."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, Field, dataclass, field, fields, replace
from difflib import get_close_matches
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, ClassVar, NoReturn, Self, TypeGuard

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from hyperopt_ext import _C

RULES = {rule["name"]: rule for rule in _C.rules()}

# The values that each coordinate can take, ends included.
_RANGES = {
    "linear": (-math.inf, math.inf),
    "log": (0.0, math.inf),
    "square": (0.0, math.inf),
    "softplus": (0.0, math.inf),
    "tanh": (0.0, 1.0),
    "multiplicative": (0.0, math.inf),
}
assert list(_RANGES) == _C.spaces()

# How close a learned coefficient may come to an open end of its range (a beta of exactly 1 has no bias correction).
_OPEN_END = 2.0**-30

_GRANULARITIES = ("group", "tensor")


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)  # numpy's scalars, too


def _known(level: str, argument: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            hint = "; betas go by their names" if name == "betas" and "beta1" in known else ""
            raise ValueError(f"{level}: {argument} names {name!r}, but this level has {', '.join(known)}{hint}")


def _not_a_level(one: object) -> NoReturn:
    kind = one if isinstance(one, type) else type(one)
    if issubclass(kind, Optimizer):
        name = kind.__name__
        raise TypeError(
            f"only levels can be stacked, not an optimizer: write hx.{name}(...), if there is one, or "
            f"hx.Wrap(torch.optim.{name}, lr=...)"
        )
    raise TypeError(f"only levels can be stacked, not {one!r}; a level is written with its parentheses: hx.Adam()")


@dataclass(frozen=True, eq=False)
class Level:
    """One level of a tower: an update rule, the start values of its hyperparameters, and how they are tuned.

    Args:
        learn: names of the hyperparameters that the level above tunes, one name or several; ``()`` is none. Default:
            ``None``, those that the class lists under "Learned by default". The top level of a stack has nothing above
            it: its hyperparameters stay fixed.
        space: for each name, the coordinate x in which it is moved: ``"linear"`` (h = x), ``"log"`` (h = exp x),
            ``"square"`` (h = x²), ``"softplus"`` (h = log(1 + exp x)), ``"tanh"`` (h = (tanh x + 1) / 2, the paper's
            choice for betas) or ``"multiplicative"`` (h = exp x, but a move by d multiplies h by 1 + d: with
            ``normalize``, the multiplicative rule of Baydin et al., ICLR 2018). Default: tanh for betas, alpha and rho,
            log for eps and eps_root, linear for all others.
        bounds: for each name, ``(low, high)``, ends included, that a learned value is projected to; what its coordinate
            cannot reach is cut off, and a beta stays 1e-9 below 1. Default: its valid range, so that a learning rate
            does not turn negative; an eps stays above 0.
        initial_state: for each state tensor of the rule, the number that it starts from. Default: 0.
        horizon: how many steps back a hypergradient looks, >= 1. With 1 it is that of the paper, which judges a step
            by the next gradient alone and so prefers step sizes that are too small (Wu et al., "Understanding
            Short-Horizon Bias in Stochastic Meta-Optimization", ICLR 2018). With n, each learned hyperparameter has a
            trace z <- (1 - 1/n) z + d(update)/dh, one tensor a parameter, and the hypergradient is <gradient, z>: the
            long-horizon hypergradients of Franceschi et al. (ICML 2017, RTHO) and Donini et al. (IJCAI 2020, MARTHE),
            discounted and without their second derivatives. With ``(n, part)`` the horizon grows: at a parameter's
            t-th update it is max(n, part * t). Default: 1.
        granularity: ``"group"``, one set of this level's hyperparameters for all that it moves, or ``"tensor"``, one
            for each parameter tensor, if the levels below have it, too. Default: ``"group"``.
        normalize: the level above gets the cosine between the gradient and the derivative of the update instead of
            their product, a number in [-1, 1] that no scale enters (Baydin et al., ICLR 2018, multiplicative rule), as
            long as the squares of gradients are numbers of their dtype. The level above that one is tuned by the exact
            product all the same, unless the level above has it, too. Where a derivative is 0 but for rounding (of
            Adam's betas after the first update), the cosine is that of the rounding, of any size: learn lr alone.
            Default: False.
        clip: the norm to which the hypergradient of this level is clipped, > 0 (Pascanu et al., ICML 2013), as the
            level above sees it. Default: None, no clipping.
        growth: the factor, > 1, by which a learned lr grows at most in one step (as in D-Adaptation: Defazio &
            Mishchenko, ICML 2023). Default: None, no limit.
        trust: tau > 0, of the first level: lr is lowered where the norm of an update would exceed tau times the norm of
            the parameters, which LARS (You et al., 2017) and LAMB (You et al., ICLR 2020) measure steps by, from the
            first step on. Parameters whose root mean square is below 1e-3 count as if it were that, so that zeros can
            move (as in Adafactor: Shazeer & Stern, ICML 2018). A scheduler's factor, if it is below 1 and one of an lr
            that is learned or that each tensor has of its own, is one of tau, too. Neither ``burn_in`` nor ``bounds``
            keep it from that; with ``converge``, what is lowered is the lr in use, and the learned one becomes that.
            Nor does the level above lower an lr any further whose last update was, without a scheduler, 1e-8 of the
            parameters or less: nothing would tell it from a smaller one, from which it would be long in coming back.
            Costs a third pass, which only reads. Default: None.
        burn_in: first steps in which this level is not tuned, >= 0. Default: 0.
        converge: ``(limit, steps)``: the lr in use is d(t) lr + (1 - d(t)) limit with d(t) = 1 / (1 + (t / steps)²),
            halfway after ``steps``: a convergent step size (Baydin et al., ICLR 2018, section 5). A scheduler's factor
            multiplies the sum of both; with a horizon, earlier updates count as if made with the present d(t). The
            learned lr is what :meth:`HyperOptimizer.hyperparameters` shows. Default: None.

    Without a level above, ``trust`` and ``converge`` still hold; all else that concerns learning does nothing.

    Raises:
        ValueError: a value out of its range or not finite, or an unknown name.
        TypeError: a value that is not a number, or an unknown argument.
    """

    _: KW_ONLY
    learn: str | Sequence[str] | None = None
    space: Mapping[str, str] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    initial_state: Mapping[str, float] = field(default_factory=dict)
    horizon: int | tuple[int, float] = 1
    granularity: str = "group"
    normalize: bool = False
    clip: float | None = None
    growth: float | None = None
    trust: float | None = None
    burn_in: int = 0
    converge: tuple[float, float] | None = None

    # Hyperparameters without which (0 and not learned) the method is another rule, with less state.
    optional: ClassVar[tuple[str, ...]] = ()
    # What is always switched on, and has a name in the param groups of torch.optim.
    always: ClassVar[tuple[str, ...]] = ()
    # Arguments that similar classes have, and what stands here in their place.
    elsewhere: ClassVar[dict[str, str]] = {
        "maximize": "it is an argument of HyperOptimizer",
        "fused": "leave it out, every step is fused",
        "foreach": "leave it out, every step is fused",
        "capturable": "leave it out, every step is capturable",
        "differentiable": "use hx.functional, with detach=False",
        "optimizer": "write the level above after a slash, as hx.Adam() / hx.SGD()",
    }
    # Whether it can move parameters alone, and not the hyperparameters of another level.
    first_only: ClassVar[bool] = False

    @classmethod
    def rule_for(cls, names: Collection[str], **structure: bool) -> str:
        """The C++ rule of this method.

        Args:
            names: hyperparameters that it must have; what it has in any case need not be named.
            structure: the arguments of the level that are not numbers, as ``nesterov=True``.
        """
        raise TypeError("Level is the base of the levels: use hx.SGD, hx.Adam, ...")

    @classmethod
    def structural(cls) -> tuple[str, ...]:
        """The arguments that are not numbers but choose a variant of the method."""
        own = {f.name for f in fields(Level)}
        return tuple(f.name for f in fields(cls) if isinstance(f.default, bool) and f.name not in own)

    @property
    def rule(self) -> str:
        """The name of the C++ rule that makes this level's updates."""
        names = {*(self.learn or ()), *(name for name in self.optional if getattr(self, name) != 0)}
        return self.rule_for(names, **{name: bool(getattr(self, name)) for name in self.structural()})

    def values(self) -> dict[str, float]:
        """The start value of each hyperparameter of the rule, in the rule's order."""
        return {h["name"]: getattr(self, h["name"]) for h in RULES[self.rule]["hypers"]}

    def __new__(cls, *args: Any, **arguments: Any) -> Level:
        if args and isinstance(args[0], Iterable | torch.nn.Module) and not isinstance(args[0], str | Tensor):
            raise TypeError(
                f"{cls.__name__} is a level of a stack, and takes no parameters: write "
                f"hx.HyperOptimizer(params, hx.{cls.__name__}(lr=...) / ...)"
            )
        every = {f.name for f in fields(Level)}
        known = sorted((f.name for f in fields(cls)), key=lambda name: name in every)  # the method's own come first
        for name in arguments:
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f": {cls.elsewhere[name]}" if name in cls.elsewhere else f" (is it {close[0]}?)" if close else ""
                raise TypeError(f"{cls.__name__} has no argument {name!r}{hint}; its arguments are {', '.join(known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.learn, str):
            object.__setattr__(self, "learn", (self.learn,))
        for name in ("space", "bounds", "initial_state"):
            object.__setattr__(self, name, self._mapping(name, getattr(self, name)))
        if self.learn is not None and not isinstance(self.learn, Collection):
            raise TypeError(f"{type(self).__name__}: learn must be a name or several, not {self.learn!r}")
        me = type(self).__name__
        for name in (*self.structural(), "normalize"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{me}: {name} must be True or False, not {getattr(self, name)!r}")
        hypers = RULES[self.rule]["hypers"]
        known = [h["name"] for h in hypers]
        for argument, names in [("learn", self.learn or ()), ("space", self.space), ("bounds", self.bounds)]:
            _known(me, argument, list(names), known)
        if self.learn is not None:
            object.__setattr__(self, "learn", self.learn_names)
        _known(me, "initial_state", list(self.initial_state), RULES[self.rule]["state"] or ["no state"])
        for name, value in self.initial_state.items():
            if not is_number(value) or not math.isfinite(value):
                raise ValueError(f"{me}: initial_state[{name!r}] must be a finite number, not {value!r}")
        for h, value in zip(hypers, self.values().values(), strict=True):
            self._check_value(me, h, value)
        self._check_safeguards(me)

    def _check_safeguards(self, me: str) -> None:
        for name in ("growth", "trust", "converge"):
            if getattr(self, name) is not None and "lr" not in {h["name"] for h in RULES[self.rule]["hypers"]}:
                raise ValueError(f"{me}: {name} is about lr, and rule {self.rule!r} has none")
        for name, low in [("clip", 0.0), ("growth", 1.0), ("trust", 0.0)]:
            value = getattr(self, name)
            if value is not None and not (is_number(value) and low < value < math.inf):
                raise ValueError(f"{me}: {name} must be None or a number greater than {low:g}, not {value!r}")
        if isinstance(self.horizon, list):
            object.__setattr__(self, "horizon", tuple(self.horizon))
        horizon = self.horizon if isinstance(self.horizon, tuple) else (self.horizon, 0.0)
        if len(horizon) != 2 or not is_number(horizon[1]) or not 0 <= horizon[1] <= 1:
            raise ValueError(
                f"{me}: horizon must be a number of steps, or (steps, part of all steps, up to 1) as (100, 0.25), not "
                f"{self.horizon!r}"
            )
        for name, value, least in [("horizon", horizon[0], 1), ("burn_in", self.burn_in, 0)]:
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ValueError(f"{me}: {name} must be a whole number of steps, at least {least}, not {value!r}")
        if self.granularity not in _GRANULARITIES:
            known = ", ".join(map(repr, _GRANULARITIES))
            raise ValueError(f"{me}: granularity is {self.granularity!r}, but the granularities are {known}")
        if self.converge is not None:
            pair = (
                isinstance(self.converge, Sequence) and len(self.converge) == 2 and all(map(is_number, self.converge))
            )
            if not pair or not (0 <= self.converge[0] < math.inf and 0 < self.converge[1] < math.inf):
                raise ValueError(
                    f"{me}: converge must be (limit >= 0, steps > 0), as (1e-3, 1000), not {self.converge!r}"
                )
            object.__setattr__(self, "converge", tuple(self.converge))

    def _check_value(self, me: str, h: _C.HyperparameterInfo, value: object) -> None:
        name, low, high = h["name"], h["low"], h["high"]
        if not is_number(value):
            hint = f"; write float({name})" if isinstance(value, Tensor) and value.numel() == 1 else ""
            raise TypeError(f"{me}: {name} must be a number, not {value!r}{hint}")
        if not (low <= value < high and math.isfinite(value)):
            raise ValueError(f"{me}: {name} must be in [{low:g}, {high:g}), not {value!r}")
        space = self.space.get(name, h["space"])
        if not isinstance(space, str) or space not in _RANGES:
            raise ValueError(f"{me}: space[{name!r}] is {space!r}, but the coordinates are {', '.join(_RANGES)}")
        if name in self.learn_names and not _RANGES[space][0] <= value <= _RANGES[space][1]:
            raise ValueError(
                f"{me}: {name} = {value!r} does not exist in the coordinate {space!r}; choose another space"
            )
        stuck = {"log", "multiplicative"} | ({"square", "softplus", "tanh"} if name in self.space else set())
        if name in self.learn_names and value == 0 and space in stuck:
            raise ValueError(
                f"{me}: {name} = 0 cannot be left in the coordinate {space!r}; start from more, or choose another space"
            )
        bounds = self.bounds.get(name, (low, high))
        pair = isinstance(bounds, Sequence) and len(bounds) == 2 and all(map(is_number, bounds))
        if not pair or not bounds[0] <= bounds[1]:
            raise ValueError(f"{me}: bounds[{name!r}] must be two numbers, low <= high, not {bounds!r}")
        if not bounds[0] <= value <= bounds[1]:
            raise ValueError(f"{me}: {name} = {value!r} is outside bounds[{name!r}] = {tuple(bounds)!r}")

    @property
    def learn_names(self) -> tuple[str, ...]:
        """The learned hyperparameters, in the rule's order."""
        hypers = RULES[self.rule]["hypers"]
        return tuple(h["name"] for h in hypers if (h["learned"] if self.learn is None else h["name"] in self.learn))

    def tuning(self) -> list[str]:
        """The arguments for a level above that were given; a ``learn`` counts if it leaves out some of the default."""
        default = {f.name: f.default for f in fields(self)}
        names = [
            name
            for name in ("horizon", "normalize", "clip", "growth", "burn_in")
            if getattr(self, name) != default[name]
        ]
        learned = {h["name"] for h in RULES[self.rule]["hypers"] if h["learned"]}
        return ["learn"] * bool(self.learn and learned - {*self.learn}) + names

    def learn_mask(self) -> int:
        """The learned hyperparameters as bits, lowest first in the rule's order."""
        learned = self.learn_names
        return sum(1 << i for i, name in enumerate(self.values()) if name in learned)

    def coordinates(self) -> list[str]:
        """The coordinate of each hyperparameter of the rule."""
        return [self.space.get(h["name"], h["space"]) for h in RULES[self.rule]["hypers"]]

    def limits(self) -> list[tuple[float, float]]:
        """The bounds of each hyperparameter of the rule: short of an open end, and within the coordinate if learned."""
        result, learned = [], self.learn_names
        for h, space in zip(RULES[self.rule]["hypers"], self.coordinates(), strict=True):
            low, high = self.bounds.get(h["name"], (h["low"], h["high"]))
            if high > h["high"] and h["space"] == "tanh":  # what averages cannot go beyond 1, as a momentum can
                high = h["high"]
            least, most = _RANGES[space] if h["name"] in learned else _RANGES["linear"]
            if h["space"] == "log" and space != "log" and h["name"] in learned and h["name"] not in self.bounds:
                least = _OPEN_END * h["initial"]  # an eps of 0 would divide 0 by 0
            high = min(high, most)
            if high == h["high"] < math.inf:
                high -= _OPEN_END * (abs(high) or 1.0)
            result.append((float(max(low, least)), float(high)))
        return result

    def start(self) -> dict[str, float]:
        """The start value of each state tensor of the rule."""
        return {name: float(self.initial_state.get(name, 0.0)) for name in RULES[self.rule]["state"]}

    def horizons(self) -> tuple[float, float]:
        """The horizon in steps, and as a part of all steps: the larger one counts."""
        steps, part = self.horizon if isinstance(self.horizon, tuple) else (self.horizon, 0.0)
        return float(steps), float(part)

    def is_traced(self) -> bool:
        """Whether hypergradients are those of traces and not of the last step alone."""
        return self.horizons() > (1.0, 0.0)

    def settings(self) -> dict[str, float]:
        """How the hyperparameters of this level are moved, by the names of csrc/tower.h."""
        limit, limit_steps = self.converge or (0.0, math.inf)
        horizon, horizon_growth = self.horizons()
        return {
            "clip": math.inf if self.clip is None else self.clip,
            "normalize": float(self.normalize),
            "growth": math.inf if self.growth is None else self.growth,
            "burn_in": self.burn_in,
            "horizon": horizon,
            "horizon_growth": horizon_growth,
            "limit": limit,
            "limit_steps": limit_steps,
            "trust": math.inf if self.trust is None else self.trust,
            "per_tensor": float(self.granularity == "tensor"),
        }

    def arguments(self) -> list[str]:
        """The names that a param group may give its own values for, those of the method first."""
        every = {f.name for f in fields(Level)}
        return sorted((f.name for f in fields(self)), key=lambda name: name in every)

    def make(self, group: dict[str, Any], is_part: bool) -> Optimizer | None:
        """The optimizer that moves the parameters of a param group, if it is not this library.

        Args:
            group: the param group.
            is_part: whether other processes may have parameters of it where this one has none.
        """
        return None

    def step_of(self, group: dict[str, Any]) -> Callable[..., None]:
        """What makes an update of a param group's parameters, with the arguments of csrc/pass.h."""
        step: Callable[..., None] = getattr(torch.ops.hyperopt_ext, f"{self.rule}_step_").default
        return step

    def replace(self, **changes: Any) -> Self:
        """The same level with other arguments."""
        return replace(self, **changes)

    def structure(self, learns: bool = True) -> str:
        """What two levels must have in common for one to go on from the other's state: all but the numbers.

        Args:
            learns: whether there is a level above, for what is learned to count.
        """
        spaces = dict(zip(self.values(), self.coordinates(), strict=True))
        parts = [f"{name}: {spaces[name]}" for name in self.learn_names if learns]
        parts += ["traced"] * self.is_traced()
        parts += ["per tensor"] * (self.granularity == "tensor")
        return f"{self.rule}({', '.join(parts)})"

    def __truediv__(self, above: Level | Stack) -> Stack:
        return Stack((self,)) / above

    def __rtruediv__(self, below: object) -> Stack:
        return _not_a_level(below)

    @classmethod
    def _mapping(cls, name: str, value: Any) -> dict[str, Any]:
        if value is None or isinstance(value, Mapping):
            return dict(value or {})
        example = {"space": '{"lr": "log"}', "bounds": '{"lr": (1e-8, 1.0)}', "initial_state": '{"exp_avg": 0.0}'}[name]
        raise TypeError(f"{cls.__name__}: {name} must be a dict such as {example}, not {value!r}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), self.structure(), *self.values().values()))

    def __str__(self) -> str:
        return type(self).__name__

    def __repr__(self) -> str:
        def default(f: Field[Any]) -> Any:
            return f.default if f.default_factory is MISSING else f.default_factory()

        shown = [f.name for f in fields(self) if f.name == "lr" or getattr(self, f.name) != default(f)]
        return f"{self}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


@dataclass(frozen=True, repr=False)
class Stack:
    """A tower: ``levels[0]`` moves the parameters, and ``levels[k]`` the learned hyperparameters of ``levels[k - 1]``.

    Written with a slash, as in the paper: ``hx.Adam(lr=1e-3) / hx.Adam(lr=1e-4) / hx.SGD(lr=1e-5)``.

    Args:
        levels: one :class:`Level` or more, lowest first.

    Raises:
        TypeError: something in ``levels`` is not a level.
        ValueError: there is no level.
    """

    levels: tuple[Level, ...]

    def __new__(cls, levels: Any = (), *more: Any) -> Stack:
        if more:
            raise TypeError("Stack: levels is one sequence; write a / b to stack two")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        levels = self.levels
        if isinstance(levels, Level | Stack):
            raise TypeError(
                "Stack: levels must be a sequence of levels; write a / b to stack two, or pass the level itself"
            )
        object.__setattr__(self, "levels", tuple(levels))
        if not self.levels:
            raise ValueError("Stack: levels is empty; a stack has at least the level that moves the parameters")
        for level in self.levels:
            if isinstance(level, Stack):
                raise TypeError(f"Stack: levels holds a stack, {level}; write a / b to put one stack on top of another")
            if not isinstance(level, Level):
                raise TypeError(f"Stack: levels must hold levels such as hx.Adam(...), not {level!r}")
        for below, level in pairwise(self.levels):
            if level.first_only:
                raise ValueError(f"Stack: {level!r} can only be the first level, which moves the parameters")
            if level.trust is not None:
                raise ValueError(
                    f"Stack: trust measures steps of the parameters, so only the first level can have it, not {level!r}"
                )
            if level.granularity == "tensor" and below.granularity == "group":
                raise ValueError(
                    f"Stack: {level!r} has the granularity 'tensor', but the level below has one set for the group; "
                    "give both the same"
                )

    @classmethod
    def of(cls, spec: Level, height: int) -> Stack:
        """``height`` levels of the same spec: ``Stack.of(hx.Adam(lr=1e-3), height=3)`` is Adam/Adam/Adam.

        Raises:
            TypeError: ``spec`` is not a level, or ``height`` not an int.
            ValueError: ``height`` is less than 1.
        """
        if not isinstance(spec, Level):
            raise TypeError(f"Stack.of: spec must be a level such as hx.Adam(...), not {spec!r}")
        if isinstance(height, bool) or not isinstance(height, int):
            raise TypeError(f"Stack.of: height must be an int, not {height!r}")
        if height < 1:
            raise ValueError(f"Stack.of: height must be at least 1, not {height}")
        return cls((spec,) * height)

    @classmethod
    def coerce(cls, stack: Level | Stack) -> Stack:
        """A stack as it is, a level as a stack of one."""
        if isinstance(stack, Level):
            return cls((stack,))
        if isinstance(stack, Stack):
            return stack
        if isinstance(stack, Optimizer) or (isinstance(stack, type) and issubclass(stack, Optimizer)):
            return _not_a_level(stack)
        if isinstance(stack, type):
            raise TypeError(
                f"stack must be a level or a stack, and {stack.__name__} is a class: write it with parentheses"
            )
        raise TypeError(
            f"stack must be a level or a stack, as hx.Adam(lr=1e-3) / hx.SGD(lr=1e-5), not {type(stack).__name__}; "
            "it comes after params"
        )

    def structure(self) -> str:
        """What two stacks must have in common for one to go on from the other's state."""
        return " / ".join(level.structure(learns=k + 1 < len(self.levels)) for k, level in enumerate(self.levels))

    def plan(self) -> list[int]:
        """The stack as the tower operator reads it (csrc/tower.h)."""
        spaces = _C.spaces()
        plan = []
        for k, level in enumerate(self.levels):
            learn = 0 if k + 1 == len(self.levels) else level.learn_mask()
            coordinates = sum(spaces.index(name) << (_C.SPACE_BITS * i) for i, name in enumerate(level.coordinates()))
            plan += [RULES[level.rule]["id"], learn, coordinates]
        return _C.tower_plan(plan)

    def __truediv__(self, above: Level | Stack) -> Stack:
        if not isinstance(above, Level | Stack):
            return _not_a_level(above)
        return Stack(self.levels + Stack.coerce(above).levels)

    def __rtruediv__(self, below: object) -> Stack:
        return _not_a_level(below)

    def __len__(self) -> int:
        return len(self.levels)

    def __iter__(self) -> Iterator[Level]:
        return iter(self.levels)

    def __getitem__(self, k: int) -> Level:
        return self.levels[k]

    def __str__(self) -> str:
        return "/".join(str(level) for level in self.levels)

    def __repr__(self) -> str:
        return " / ".join(repr(level) for level in self.levels)
