"""What must hold of every rule, one function a property; each raises an ``AssertionError`` that says what does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd import forward_ad

from hyperopt_ext import functional
from hyperopt_ext.levels import SGD, Adam
from hyperopt_ext.optimizer import HyperOptimizer
from hyperopt_ext.stack import RULES, Level, Stack
from hyperopt_ext.testing.problems import (
    Regression,
    assert_close,
    assert_near,
    assert_raises,
    assert_same,
    float64_by_default,
)
from hyperopt_ext.testing.reference import ReferenceTower, State, Twin
from hyperopt_ext.update import Update


@dataclass(frozen=True)
class Case:
    """A rule, and what it must equal.

    Args:
        rule: its name.
        make: its level, from the arguments of the level: a class of levels, or one with a variant fixed.
        twin: one step of the rule in torch ops: ``twin(w, g, state, hyper, step) -> (new w, new state)``, where
            ``state`` and ``hyper`` are dicts by name, and ``step`` is an int from 1.
        published: the ``torch.optim.Optimizer`` that the rule equals, from parameters and the arguments in ``options``.
        options: arguments of the level that together reach every line of the rule.
        hyper: a generic point, a value for each hyperparameter of the rule, at which derivatives are tested. None is 0
            or so small that it does not count.
        jumps: the update is not continuous in the gradient. Default: False.
    """

    rule: str
    make: Callable[..., Level]
    twin: Twin
    published: Callable[..., torch.optim.Optimizer] | None
    options: tuple[dict[str, Any], ...]
    hyper: dict[str, float]
    jumps: bool = False

    def __str__(self) -> str:
        return self.rule

    def level(self, hyper: Mapping[str, float] | None = None, **arguments: Any) -> Level:
        """The level at the values `hyper`, by the names of the hyperparameters; default: the generic point."""
        values: dict[str, Any] = dict(self.hyper if hyper is None else hyper)
        if "beta1" in values and "beta2" in values:
            values["betas"] = (values.pop("beta1"), values.pop("beta2"))
        return self.make(**values, **arguments)

    @property
    def names(self) -> tuple[str, ...]:
        """The hyperparameters of the rule, in its order."""
        return tuple(h["name"] for h in RULES[self.rule]["hypers"])

    @property
    def function(self) -> Callable[..., tuple[list[Tensor], dict[str, list[Tensor]]]]:
        """One step as a function."""
        level = self.level()
        structure = {name: getattr(level, name) for name in level.structural()}
        return partial(functional.of(type(level)), **structure)


def op(case: Case, suffix: str = "") -> Any:
    return getattr(torch.ops.hyperopt_ext, case.rule + suffix).default


def subsets(case: Case) -> list[tuple[str, ...]]:
    """Every single hyperparameter, all pairs and all."""
    pairs = [(a, b) for i, a in enumerate(case.names) for b in case.names[i + 1 :]]
    return [*((name,) for name in case.names), *pairs, case.names]


def points(case: Case) -> list[dict[str, float]]:
    """The generic point, and each hyperparameter at 0, where the level allows that: what is changed of the first."""
    allowed: list[dict[str, float]] = [{}]
    for name in case.hyper:
        with suppress(ValueError):
            case.level({**case.hyper, name: 0.0})
            allowed.append({name: 0.0})
    return allowed


def optimizer(case: Case, params: list[Any], learn: str | Sequence[str], **hyper: float) -> HyperOptimizer:
    """One that learns and stays: linear coordinates leave the values as they are, to the bit, 0 in log included."""
    values = {**case.hyper, **hyper}
    level = case.level(values, learn=learn, space=dict.fromkeys(values, "linear"))
    return HyperOptimizer(params, level / SGD(lr=0.0))


def operands(opt: HyperOptimizer, params: list[Tensor], grads: list[Tensor]) -> tuple[Any, ...]:
    """What the operators of a pass take (csrc/pass.h), for parameters that have taken a step."""
    return (params, grads, *Update(opt._groups[0], opt.param_groups[0]["params"], opt.state).active[2:])


def hypergradient(opt: HyperOptimizer, params: list[Tensor], grads: list[Tensor]) -> Tensor:
    of_rule = getattr(torch.ops.hyperopt_ext, f"{opt.stack[0].rule}_hypergradient")
    sums: Tensor = of_rule(*operands(opt, params, grads), False, False)[0]
    return sums


def twin_run(case: Case, w: Tensor, grads: Sequence[Tensor], hyper: Mapping[str, float]) -> tuple[Tensor, State]:
    """The twin's last parameter after steps on `grads`, with the hyperparameters of the last step as leaves."""
    start = case.level(hyper).start()
    state = {name: torch.full_like(w, start.get(name, 0.0)) for name in RULES[case.rule]["state"]}
    fixed = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in hyper.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in fixed.items()}
    for step, g in enumerate(grads, 1):
        last = step == len(grads)
        w, state = case.twin(w.detach(), g, {k: v.detach() for k, v in state.items()}, leaves if last else fixed, step)
    return w, leaves


def derivatives_of(w: Tensor, upstream: Tensor, leaves: State) -> dict[str, float]:
    found: Any = torch.autograd.grad((w * upstream).sum(), list(leaves.values()), allow_unused=True)
    return {name: 0.0 if g is None else g.item() for name, g in zip(leaves, found, strict=True)}


def some_gradients(steps: int = 5, size: int = 3000) -> tuple[list[Tensor], Tensor]:
    grads = torch.randn(steps + 1, size, dtype=torch.float64)
    grads[:, :100] = 0  # elements that never saw a gradient
    grads[-2, 100:200] = 0
    return list(grads[:-1]), grads[-1]


# Against the twin.


def the_case_is_complete(case: Case) -> None:
    """The generic point has a value for every hyperparameter, and the options are of this rule."""
    if set(case.hyper) != set(case.names):
        raise AssertionError(f"hyper must give {', '.join(case.names)} for {case}, not {', '.join(case.hyper)}")
    others = {case.make(**options).rule for options in case.options} - {case.rule}
    if others:
        raise AssertionError(f"options of {case} are those of {', '.join(sorted(others))}")


def hypergradients_equal_autograd(case: Case, zeroed: Mapping[str, float], steps: int) -> None:
    """For every learned set, also where a coefficient is 0 and where no gradient ever was; and so do the updates.

    And whatever was done to the parameters since: clipped, pruned, averaged.
    """
    hyper = {**case.hyper, **zeroed}
    grads, upstream = some_gradients(steps)
    start = torch.randn(grads[0].shape, dtype=torch.float64)
    if zeroed:  # may be 0 / 0 in the rule itself: with an eps of 0 in torch.optim, too
        defined = twin_run(case, start, grads, hyper)[0].isfinite()
        assert defined.sum() > 2000
        start, upstream, grads = start[defined], upstream[defined], [g[defined] for g in grads]
    w, leaves = twin_run(case, start, grads, hyper)
    expected = derivatives_of(w, upstream, leaves)
    for learn in subsets(case):
        where = f"{case}, {dict(zeroed) or 'generic point'}, step {steps}, learning {', '.join(learn)}: "
        if case.level(hyper, learn=learn, space=dict.fromkeys(learn, "linear")).rule != case.rule:
            continue  # without momentum it is another one
        p = torch.nn.Parameter(start.clone())
        opt = optimizer(case, [p], learn, **zeroed)
        for g in grads:
            p.grad = g.clone()
            opt.step()
        assert_near(p.detach(), w.detach(), where + "the parameters", 1e-12)
        with torch.no_grad():
            p.mul_(0.5)
        got = hypergradient(opt, [p], [upstream])
        for i, name in enumerate(case.names):
            value = expected[name] if name in learn else 0.0
            assert_close(got[i], value, where + f"the hypergradient of {name}", 1e-9, 1e-12 if name in learn else 0.0)
        assert_close(got[-1], upstream.square().sum(), where + "the squared norm of the gradient", 1e-12)


def traces_are_discounted_sums(case: Case, learn: Sequence[str]) -> None:
    """With a horizon, of the derivatives of every update, each of which is that of autograd."""
    level = case.level(learn=learn, space=dict.fromkeys(learn, "linear"), horizon=3)
    hyper = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in case.hyper.items()}
    p = torch.nn.Parameter(torch.randn(500, dtype=torch.float64))
    opt = HyperOptimizer([p], level / SGD(lr=0.0))
    state = {name: torch.full_like(p, start) for name, start in level.start().items()}
    traces = {name: torch.zeros_like(p).detach() for name in learn}
    for step in range(1, 8):
        w, p.grad = p.detach().clone(), torch.randn_like(p)
        p.grad[:20] = 0
        for name in learn:
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(hyper[name], torch.ones_like(hyper[name]))  # type: ignore[no-untyped-call]
                new, _ = case.twin(w, p.grad, state, {**hyper, name: dual}, step)
                tangent = forward_ad.unpack_dual(new).tangent  # type: ignore[no-untyped-call]
            traces[name] = traces[name] * (2 / 3) + (0.0 if tangent is None else tangent)
        expected, state = case.twin(w, p.grad, state, hyper, step)
        opt.step()
        assert_near(p.detach(), expected, f"{case}: the parameters after step {step}", 1e-12)
        for name, trace in traces.items():
            text = f"{case}: trace_{name} after step {step} is not the discounted sum of the derivatives"
            torch.testing.assert_close(opt.state[p][f"trace_{name}"], trace, rtol=1e-9, atol=1e-12, msg=text)


def fp32_hypergradients_are_close_to_fp64(case: Case) -> None:
    grads, upstream = some_gradients(size=100_000)
    results = []
    for dtype in (torch.float64, torch.float32):
        p = torch.nn.Parameter(torch.linspace(-1, 1, grads[0].numel(), dtype=torch.float64).to(dtype))
        opt = optimizer(case, [p], case.names)
        for g in grads:
            p.grad = g.float().to(dtype)
            opt.step()
        results.append(hypergradient(opt, [p], [upstream.float().to(dtype)]))
    for i, (expected, got) in enumerate(zip(*results, strict=True)):
        assert_close(got, expected, f"{case}: sum {i} in fp32", 1e-5)


def functional_form_equals_autograd(case: Case, dtype: torch.dtype) -> None:
    grads, upstream = some_gradients(3)
    start = torch.randn(grads[0].shape, dtype=torch.float64)
    w, leaves = twin_run(case, start, grads, case.hyper)
    expected = derivatives_of(w, upstream, leaves)
    hyper = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in case.hyper.items()}
    params: list[Tensor] = [start.to(dtype)]
    state = {name: [torch.full_like(params[0], value)] for name, value in case.level().start().items()}
    for step, g in enumerate(grads, 1):
        params = [p.detach() for p in params]
        params, state = case.function(params, [g.to(dtype)], state, hyper, torch.tensor(step))
    if any(t.requires_grad for slot in state.values() for t in slot):
        raise AssertionError(f"{case}: the new state is differentiable in spite of detach=True")
    got = torch.autograd.grad((params[0] * upstream.to(dtype)).sum(), list(hyper.values()))
    exact = dtype == torch.float64
    assert_near(params[0].detach(), w.detach(), f"{case}, {dtype}: the parameters", 1e-12 if exact else 1e-6)
    for name, g in zip(hyper, got, strict=True):
        assert_close(g, expected[name], f"{case}, {dtype}: the gradient of {name}", 1e-9 if exact else 1e-4)


def unrolled_steps_equal_autograd(case: Case, dtype: torch.dtype) -> None:
    """Ten steps with gradients that depend on the parameters, differentiated with respect to all that went in."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(50, dtype=torch.float64, generator=generator)
    start = torch.randn(50, dtype=torch.float64, generator=generator)

    def unroll(update: Twin, dtype: torch.dtype) -> tuple[list[str], Any]:
        w = start.to(dtype).requires_grad_()
        first = {name: torch.full_like(w, 0.1, requires_grad=True) for name in RULES[case.rule]["state"]}
        hyper = {name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in case.hyper.items()}
        p, state = w, first
        for step in range(1, 11):
            g = torch.sin(p) * 0.5 + (p - target.to(dtype)) * 0.1
            p, state = update(p, g, state, hyper, step)
        inputs = {"the first parameters": w, **first, **hyper}
        loss = (p * target.to(dtype)).sum()
        for s in state.values():
            loss = loss + s.square().sum()
        return list(inputs), torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)

    def ours(p: Tensor, g: Tensor, state: State, hyper: State, step: int) -> tuple[Tensor, State]:
        lists = {name: [s] for name, s in state.items()}
        [new], after = case.function([p], [g], lists, hyper, torch.tensor(step), detach=False)
        return new, {name: t for name, [t] in after.items()}

    _, expected = unroll(case.twin, torch.float64)
    for name, got, e in zip(*unroll(ours, dtype), expected, strict=True):
        e = torch.zeros_like(got, dtype=torch.float64) if e is None else e
        bound = (1e-9 if dtype == torch.float64 else 1e-3) * max(e.abs().max().item(), 1e-3)
        error = (got - e).abs().max().item()
        if not error < bound:
            raise AssertionError(
                f"{case}, {dtype}: the gradient of {name} is off by {error:.3g}, more than {bound:.3g}"
            )


def the_step_is_proportional_to_lr(case: Case) -> None:
    """Where a hyperparameter is called lr: `trust` and `converge` scale the update by it."""
    if "lr" not in case.names:
        return
    grads, _ = some_gradients(3)
    updates = []
    for factor in (1.0, 2.0):
        p = torch.nn.Parameter(torch.linspace(-1, 1, grads[0].numel(), dtype=torch.float64))
        opt = HyperOptimizer([p], case.level())
        for step, g in enumerate(grads, 1):
            before, p.grad = p.detach().clone(), g.clone()
            if step == len(grads):
                opt.param_groups[0]["lr"] *= factor
            opt.step()
        updates.append((p.detach() - before) / factor)
    assert_near(updates[1], updates[0], f"{case}: half the update at twice the lr", 1e-9)


# What torch asks of operators.


def functional_arguments(case: Case, requires_grad: bool = True) -> tuple[Any, ...]:
    params = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    state = [torch.rand_like(p) + 0.1 for _ in RULES[case.rule]["state"] for p in params]
    hyper = [torch.tensor(case.hyper[n], dtype=torch.float64, requires_grad=requires_grad) for n in case.names]
    return params, [torch.randn_like(p) for p in params], state, hyper, torch.tensor(3)


def functional_form_passes_gradcheck(case: Case) -> None:
    params, grads, state, hyper, step = functional_arguments(case)

    def update(*hyper: Tensor) -> tuple[Tensor, ...]:
        return tuple(op(case)(params, grads, state, list(hyper), step, True)[: len(params)])

    torch.autograd.gradcheck(update, hyper)


def second_derivatives_are_an_error(case: Case, detach: bool) -> None:
    """Not a wrong number."""
    params, grads, state, hyper, step = functional_arguments(case)
    new = op(case)(params, grads, state, hyper, step, detach)[0]
    (first,) = torch.autograd.grad(new.sum(), hyper[:1], create_graph=True)
    assert_raises("not implemented", lambda: torch.autograd.grad(first, hyper[:1]))


def operators_pass_opcheck(case: Case, learn: Sequence[str]) -> None:
    params: list[Tensor] = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    opt = optimizer(case, params, learn)
    grads = [torch.randn_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    opt.step()
    plain = [p.detach().clone() for p in params]
    arguments, check = operands(opt, plain, grads), torch.library.opcheck
    check(op(case, "_hypergradient"), (*arguments, True, True))
    lr_alone = tuple(learn) == ("lr",)
    for suffix in ("_step_",) if lr_alone else ("_norms", "_step_", "_settle_", "_check"):
        check(op(case, suffix), (*arguments, torch.tensor(2.0)))
    check(op(case), (*functional_arguments(case, requires_grad=not lr_alone), lr_alone))
    params, grads, state, hyper, step = functional_arguments(case, requires_grad=False)
    check(op(case, "_backward"), (grads, params, grads, state, hyper, step))
    needs = 1 if lr_alone else (1 << (2 + len(RULES[case.rule]["state"]))) - 1
    check(op(case, "_vjp"), (grads, state, params, grads, state, hyper, step, needs))


def the_optimizer_is_one_graph(
    stack: Level | Stack, steps: int = 100, dtype: torch.dtype = torch.float64, **options: Any
) -> None:
    """torch.compile, with these options, takes step() whole, once, and what it makes of it equals eager mode."""
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = Regression(steps, dtype), Regression(steps, dtype)
    optimizers = [HyperOptimizer(problem.model.parameters(), stack) for problem in (eager, compiled)]
    eager.train(optimizers[0], range(steps))
    step = torch.compile(optimizers[1].step, fullgraph=True, **options)
    for i in range(steps):
        optimizers[1].zero_grad()
        compiled.loss(i).backward()  # type: ignore[no-untyped-call]
        step()
    assert_one_graph()
    assert_compiled_equals_eager(eager, compiled, optimizers)


def assert_one_graph() -> None:
    graphs, breaks = counters["stats"]["unique_graphs"], list(counters["graph_break"])
    if graphs != 1 or breaks:
        raise AssertionError(f"{graphs} graphs instead of one; breaks: {', '.join(breaks) or 'none'}")


def assert_compiled_equals_eager(a: Regression, b: Regression, optimizers: Sequence[HyperOptimizer]) -> None:
    """Hyperparameters up to a tolerance of what they are or started from: a beta near 0 has no digits of its own."""
    tolerance = 1e-6 if a.x.dtype == torch.float32 else 1e-12
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert_near(q.detach(), p.detach(), "compiled parameters", tolerance)
    stack = optimizers[0].param_groups[0]["stack"]
    for level, *values in zip(stack, *(opt.hyperparameters() for opt in optimizers), strict=True):
        for name, start in level.values().items():
            x, y = (torch.cat([v[name].reshape(-1).cpu(), torch.tensor([start], dtype=torch.float64)]) for v in values)
            assert_near(y, x, f"compiled {name}", tolerance)


# Training.


def equals_the_published_optimizer(case: Case) -> None:
    """If nothing is learned."""
    assert case.published is not None
    for options in case.options:
        for stack in (case.make(**options), case.make(**options, learn=()) / Adam()):
            ours, theirs = Regression(100), Regression(100)
            opt = HyperOptimizer(ours.model.parameters(), stack)
            published = case.published(theirs.model.parameters(), **options)
            ours.train(opt, range(100))
            with float64_by_default():  # of the scalars that torch keeps
                theirs.train(published, range(100))
            for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
                assert_near(p.detach(), q.detach(), f"{case} with {options}: the parameters after 100 steps", 1e-12)


def equals_a_tower_of_plain_autograd(stack: Stack, twins: Mapping[str, Twin], steps: int = 60) -> None:
    problem = Regression(steps)
    reference = ReferenceTower(problem.model.parameters(), stack, twins)
    opt = HyperOptimizer(problem.model.parameters(), stack)
    for i in range(steps):
        reference.step(partial(problem.loss_of, i))
        problem.train(opt, range(i, i + 1))
        expected = reference.hyperparameters()
        if not all(abs(value) < 1e50 for level in expected for value in level.values()):
            if i < 3:
                raise AssertionError(f"{stack} runs away at once: nothing is compared; take other values")
            return  # a tower without safeguards may run away: it is compared up to there
        first = [level.values() for level in stack]
        assert_same(problem.model.parameters(), opt.hyperparameters(), reference.params, expected, first=first)
    assert opt.skipped_steps() == 0


def towers_equal_plain_autograd(case: Case, height: int) -> None:
    """Of levels of the rule itself, each of which moves what is learned by default."""
    learn = ("lr",) if case.jumps else None  # a jump where rounding decides of the sign
    rates = [{"lr": lr} if "lr" in case.names else {} for lr in (0.05, *[1e-3] * height)]
    stack = Stack(tuple(case.level({**case.hyper, **lr}, learn=learn) for lr in rates))
    equals_a_tower_of_plain_autograd(stack, {case.rule: case.twin})


def a_state_dict_resumes_to_the_bit(case: Case) -> None:
    whole, half = Regression(20), Regression(20)
    first = HyperOptimizer(whole.model.parameters(), stack_for(case))
    whole.train(first, range(10))
    half.model.load_state_dict(whole.model.state_dict())
    resumed = HyperOptimizer(half.model.parameters(), stack_for(case))
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for problem, opt in ((whole, first), (half, resumed)):
        problem.train(opt, range(10, 20))
    for p, q in zip(whole.model.parameters(), half.model.parameters(), strict=True):
        if not torch.equal(p, q):
            raise AssertionError(f"{case}: training goes on otherwise from a state dict")
    assert first.hyperparameters() == resumed.hyperparameters()


# What a tensor may look like.


def stack_for(case: Case, lr: float = 1e-7, horizon: int = 1) -> Stack:
    """A tower that moves its hyperparameters by a few percent a step; one that looks far back is also capped."""
    trust = 1e-3 if horizon > 1 and "lr" in case.names else None
    base = case.make(**case.options[0], horizon=horizon, trust=trust)
    return base / SGD(lr=lr, momentum=0.5) / SGD(lr=lr**2 / 100)


def run(params: Sequence[Tensor], stack: Stack, steps: int = 5) -> HyperOptimizer:
    """Steps with gradients that depend on the parameters alone, by value."""
    opt = HyperOptimizer(params, stack)
    for i in range(steps):
        for p in params:
            p.grad = (torch.sin(p.detach().double() * (i + 3)) + 0.1).to(p.dtype)
        opt.step()
    return opt


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def the_number_of_threads_does_not_show(case: Case, horizon: int) -> None:
    results = []
    for n in (1, 2):
        with threads(n):
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(s)) for s in (300_000, 17, 0, 1000, 50_001)]
            opt = run(params, stack_for(case, horizon=horizon))
        levels = [torch.stack(list(h.values())) for h in opt.hyperparameters()]
        results.append([p.detach() for p in params] + levels)
    for a, b in zip(*results, strict=True):
        if not torch.equal(a, b):
            raise AssertionError(f"{case}: two threads give other numbers than one")


def assert_equal_values(a: HyperOptimizer, b: HyperOptimizer, rel: float, what: str) -> None:
    for k, (x, y) in enumerate(zip(a.hyperparameters(), b.hyperparameters(), strict=True)):
        for name in x:
            assert_close(x[name], y[name], f"{what}: {name} of level {k}", rel)


def many_tensors_are_one(case: Case, horizon: int) -> None:
    """A list of tensors does what their concatenation does."""
    whole = torch.nn.Parameter(torch.randn(5000, dtype=torch.float64))
    parts = [torch.nn.Parameter(t.clone()) for t in torch.split(whole.detach(), [1, 0, 4000, 7, 992])]
    a, b = (run(params, stack_for(case, horizon=horizon)) for params in ([whole], parts))
    assert_near(torch.cat([p.detach() for p in parts]), whole.detach(), f"{case}: the parts of a tensor", 1e-12)
    assert_equal_values(a, b, 1e-12, f"{case}, whole and in parts")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.clone().t(),
    "channels_last": lambda t: t.clone().view(3, 4, 5, 7).to(memory_format=torch.channels_last),
    "every second column": lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2],
    "offset by one": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "no dimension": lambda t: t[0, 0].clone(),
    "a dimension of size 1": lambda t: t[0].clone().unsqueeze(1).t(),  # its stride is 1, and means nothing
}


def strides_do_not_show(case: Case, layout: str, grads: str, horizon: int) -> None:
    """Of parameters; their gradients are laid out "alike", "contiguous" or "expanded"."""
    values = torch.randn(12, 35, dtype=torch.float64)
    view = LAYOUTS[layout](values)
    odd, plain = torch.nn.Parameter(view), torch.nn.Parameter(view.clone(memory_format=torch.contiguous_format))
    optimizers = [HyperOptimizer([p], stack_for(case, horizon=horizon)) for p in (odd, plain)]
    for i in range(4):
        for p, opt in zip((odd, plain), optimizers, strict=True):
            g = torch.sin(p.detach() * (i + 3)) + 0.1
            if grads == "contiguous":
                g = g.contiguous()
            elif grads == "expanded":
                g = torch.full((), 0.1 + i, dtype=torch.float64).expand(p.shape)
            p.grad = g
            opt.step()
    assert_near(odd.detach(), plain.detach(), f"{case}, {layout}: the parameters", 1e-12)
    assert odd.stride() == view.stride()
    assert_equal_values(optimizers[0], optimizers[1], 1e-12, f"{case}, {layout}")


def half_precision_is_fp32_arithmetic_on_rounded_parameters(case: Case, dtype: torch.dtype, horizon: int) -> None:
    start = torch.randn(3000).to(dtype)  # more than is brought to fp32 at once
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    opt, expected = (HyperOptimizer([t], stack_for(case, horizon=horizon)) for t in (p, q))
    for i in range(5):
        p.grad = (torch.sin(p.detach().float() * (i + 3)) + 0.1).to(dtype)
        q.grad = p.grad.float()
        opt.step()
        expected.step()
        spacing = torch.finfo(dtype).eps * q.detach().abs().clamp_min(torch.finfo(dtype).smallest_normal)
        if not ((p.detach().float() - q.detach()).abs() <= 0.51 * spacing).all():  # rounded once, to nearest
            raise AssertionError(f"{case}: {dtype} parameters are not the fp32 ones, rounded")
        with torch.no_grad():
            q.copy_(p)
    first = {name: value.item() for name, value in opt.hyperparameters()[0].items()}
    assert first != case.make(**case.options[0]).values()  # it learns
    assert_equal_values(opt, expected, 1e-6, f"{case}, {dtype}")
    for name, value in opt.state[p].items():
        expected_dtype = {"step": torch.int64, "tick": torch.int64, "last_param": dtype}.get(name, torch.float32)
        assert value.dtype == expected_dtype, f"{case}: {name} is {value.dtype}"


def what_is_kept_of_a_parameter_is_exact(case: Case, dtype: torch.dtype) -> None:
    level = case.level(learn=tuple(case.hyper))
    start = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-7, 6e4])]).to(dtype)
    p = torch.nn.Parameter(start.clone())
    opt = HyperOptimizer([p], level / SGD(lr=0.0))
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.randn_like(p)
        opt.step()
        if not torch.equal(opt.state[p].get("last_param", before), before):
            raise AssertionError(f"{case}, {dtype}: last_param is not the parameter before the step")


def version_counters_move(case: Case) -> None:
    p = torch.nn.Parameter(torch.randn(10))
    opt = run([p], stack_for(case), steps=1)
    watched = [p, opt.param_groups[0]["tower"], *opt.state[p].values()]
    before = [t._version for t in watched]
    p.grad = torch.ones_like(p)
    opt.step()
    assert all(t._version > v for t, v in zip(watched, before, strict=True))

    saved = (p * p * torch.randn(10)).sum()  # backward needs p as it was
    opt.step()
    assert_raises("modified by an inplace operation", saved.backward)


def all_checks(case: Case) -> dict[str, Callable[[], None]]:
    """Every property of a case, by its name and what it is tested with: for a test of each, where there is pytest,

    @pytest.mark.parametrize("check", all_checks(case).values(), ids=all_checks(case))
    def test_my_rule(check):
        check()
    """
    dtypes, half = (torch.float64, torch.float32), (torch.bfloat16, torch.float16)
    found: dict[str, Callable[[], None]] = {}

    def add(check: Callable[..., None], *arguments: Any) -> None:
        shown = ", ".join(map(str, arguments))
        found[f"{check.__name__}({shown})"] = partial(check, *arguments)

    add(the_case_is_complete, case)
    if case.published is not None:
        add(equals_the_published_optimizer, case)
    for point in points(case):
        for steps in (1, 2, 8):
            add(hypergradients_equal_autograd, case, point, steps)
    for learn in {case.names[:1], case.names}:
        add(traces_are_discounted_sums, case, learn)
        add(operators_pass_opcheck, case, learn)
    for check in (
        fp32_hypergradients_are_close_to_fp64,
        the_step_is_proportional_to_lr,
        functional_form_passes_gradcheck,
        a_state_dict_resumes_to_the_bit,
        version_counters_move,
    ):
        add(check, case)
    for dtype in dtypes:
        add(functional_form_equals_autograd, case, dtype)
        add(unrolled_steps_equal_autograd, case, dtype)
    for detach in (True, False):
        add(second_derivatives_are_an_error, case, detach)
    for height in (0, 1, 2, 4):
        add(towers_equal_plain_autograd, case, height)
    for horizon in (1, 5):
        add(the_number_of_threads_does_not_show, case, horizon)
        add(many_tensors_are_one, case, horizon)
        for layout in LAYOUTS:
            for grads in ("alike", "contiguous", "expanded"):
                add(strides_do_not_show, case, layout, grads, horizon)
        for dtype in half:
            add(half_precision_is_fp32_arithmetic_on_rounded_parameters, case, dtype, horizon)
    for dtype in (*half, *dtypes):
        add(what_is_kept_of_a_parameter_is_exact, case, dtype)
    add(the_optimizer_is_one_graph, case.level() / SGD(lr=1e-6))
    return found
