"""What must not change anything, at any time: of two optimizers that are used alike, one is also saved, copied, moved
and looked at, and both stay equal bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import chain

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stacks import LEARNING
from torch.optim import lr_scheduler

import hyperopt_ext as hx

STACKS = {
    **LEARNING,
    "plain": hx.SGD(lr=0.01, momentum=0.9),
    "wrapped": hx.Wrap(torch.optim.Adam, lr=0.01) / hx.SGD(lr=1e-4),
    "cosine": hx.Adam(lr=0.01, learn="lr", space={"lr": "log"}, normalize=True, horizon=(3, 0.25), trust=0.05)
    / hx.SGD(lr=0.1),
    "decay": hx.Adam(
        lr=0.01, weight_decay=0.1, learn=("lr", "weight_decay"), space={"lr": "multiplicative"}, growth=1.1
    )
    / hx.Adam(lr=1e-3, converge=(1e-4, 5), burn_in=2, horizon=4, learn="lr")
    / hx.RMSprop(lr=1e-4),
    "rows": hx.Adadelta(lr=0.5, granularity="tensor") / hx.Adagrad(lr=1e-3, granularity="tensor") / hx.NAdam(lr=1e-5),
}
OTHER = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(3))], hx.Adagrad() / hx.SGD())
SCHEDULERS = {
    "step": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 7),
    "chain": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt, 0.3, 1.0, 3), lr_scheduler.ExponentialLR(opt, 0.9)]
    ),
}
SHAPES = [(5,), (2, 3), (), (3, 2, 2), (0,), (1,), (4,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Run:
    """An optimizer of the first parameters, to which further groups may be added."""

    def __init__(self, stack: hx.Stack, n: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(DTYPES[i % len(DTYPES)]))
            for i, shape in enumerate(SHAPES)
        ]
        self.groups = [(range(n), stack)]
        self.opt = self.new_optimizer()
        self.scheduler, self.kind = None, ""

    def new_optimizer(self) -> hx.HyperOptimizer:
        return hx.HyperOptimizer([self.group(indices, stack) for indices, stack in self.groups], self.groups[0][1])

    def group(self, indices: range, stack: hx.Stack) -> dict:
        return {"params": [self.params[i] for i in indices], "stack": stack}

    def add(self, n: int, stack: hx.Stack) -> None:
        self.groups.append((range(self.groups[-1][0].stop, self.groups[-1][0].stop + n), stack))
        self.opt.add_param_group(self.group(*self.groups[-1]))

    def schedule(self, kind: str) -> None:
        self.scheduler, self.kind = SCHEDULERS[kind](self.opt), kind

    def numbers(self) -> list[torch.Tensor]:
        every = range(len(self.groups))
        values = [[*self.opt.hyperparameters(i), *self.opt.in_use(i), *self.opt.bounded_steps(i)] for i in every]
        state = [sorted(self.opt.state[p].items()) for p in self.params if p in self.opt.state]
        return [
            *self.params,
            *(value for level in chain(*values) for value in level.values()),
            *(count(i) for i in every for count in (self.opt.skipped_steps, self.opt.held_steps)),
            *(value for _, value in chain(*state)),
            *(torch.as_tensor(group["lr"]) for group in self.opt.param_groups),
        ]


class Machine(RuleBasedStateMachine):
    @initialize(stack=st.sampled_from(sorted(STACKS)), n=st.integers(1, 4))
    def start(self, stack, n):
        self.runs = [Run(STACKS[stack], n) for _ in range(2)]
        self.plain, self.other = self.runs
        self.steps = 0

    @invariant()
    def are_equal(self):
        for a, b in zip(*(run.numbers() for run in getattr(self, "runs", ([], []))), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

    # What is done to both.

    @rule(
        has_grad=st.lists(st.booleans(), min_size=len(SHAPES), max_size=len(SHAPES)),
        first=st.sampled_from([None, None, None, float("nan"), float("inf"), 1e30]),
        reused=st.booleans(),
        strided=st.booleans(),
    )
    def train(self, has_grad, first, reused, strided):
        self.steps += 1
        for run in self.runs:
            generator = torch.Generator().manual_seed(self.steps)
            for p, has in zip(run.params, has_grad, strict=True):
                grad = (torch.randn(p.shape, generator=generator) + 0.3).to(p.dtype)
                if first is not None and p is run.params[0]:
                    grad[0] = first
                if strided and run is self.other and p.dim() > 1:
                    grad = grad.transpose(0, -1).contiguous().transpose(0, -1)
                p.grad = grad if has or p is run.params[0] else None
            run.opt.step()
            if run.scheduler is not None:
                run.scheduler.step()
        for p in self.other.params:
            if reused and p.grad is not None:
                p.grad.fill_(777.0)

    @rule(i=st.integers(0, len(SHAPES) - 1), requires_grad=st.booleans())
    def freeze(self, i, requires_grad):
        for run in self.runs:
            run.params[i].requires_grad_(requires_grad)

    @rule(
        how=st.sampled_from(["number", "tensor", "fill", "betas", "upper"]), value=st.sampled_from([0.0, 0.005, 0.02])
    )
    def write(self, how, value):
        for run in self.runs:
            group, levels = run.opt.param_groups[0], run.opt.hyperparameters()
            if how in ("number", "tensor"):
                group["lr"] = value if how == "number" else torch.tensor(value)
            elif how == "betas" and "betas" in group:
                group["betas"] = (0.8, 0.9 + value)
            else:
                levels[-1 if how == "upper" else 0]["lr"].fill_(value * (1e-3 if how == "upper" else 1.0))

    @precondition(lambda self: self.plain.scheduler is None)
    @rule(kind=st.sampled_from(sorted(SCHEDULERS)))
    def schedule(self, kind):
        if all((torch.as_tensor(group["lr"]) > 0).all() for group in self.plain.opt.param_groups):
            for run in self.runs:
                run.schedule(kind)

    @precondition(lambda self: self.plain.groups[-1][0].stop < len(SHAPES) - 1 and self.plain.scheduler is None)
    @rule(stack=st.sampled_from(sorted(STACKS)), n=st.integers(1, 2))
    def add_param_group(self, stack, n):
        for run in self.runs:
            run.add(n, STACKS[stack])

    @rule(policy=st.sampled_from(["hold", "skip", None]), maximize=st.booleans())
    def change(self, policy, maximize):
        for run in self.runs:
            run.opt.param_groups[-1]["nonfinite"] = policy
            run.opt.param_groups[0]["maximize"] = maximize

    # What is done to the other one alone.

    @rule(new=st.booleans(), as_file=st.booleans())
    def resume(self, new, as_file):
        run, saved = self.other, self.other.opt.state_dict()
        if as_file:
            file = io.BytesIO()
            torch.save(saved, file)
            saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        if new:
            run.opt = run.new_optimizer()
            if run.scheduler is not None:
                schedule = copy.deepcopy(run.scheduler.state_dict())
                run.schedule(run.kind)
                run.scheduler.load_state_dict(schedule)
        run.opt.load_state_dict(saved)

    @rule(duplicate=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def duplicate(self, duplicate):
        run = self.other
        run.params, run.opt, run.scheduler = duplicate((run.params, run.opt, run.scheduler))

    @rule()
    def move(self):
        for group in self.other.opt.param_groups:
            group.update({name: value.clone() for name, value in group.items() if isinstance(value, torch.Tensor)})

    @rule()
    def look(self):
        opt = self.other.opt
        assert "HyperOptimizer" in repr(opt)
        assert all(isinstance(shown, str) for shown in hx.summary(opt).values())

    @rule()
    def fail(self):
        p, opt = self.other.params[0], self.other.opt
        grad, p.grad = p.grad, torch.ones(5).to_sparse()
        if p.requires_grad:
            with pytest.raises(ValueError, match="sparse"):
                opt.step()
        p.grad = grad
        with pytest.raises(ValueError, match="state_dict"):
            opt.load_state_dict(OTHER.state_dict())

    @rule(n=st.sampled_from([1, 2]))
    def use_threads(self, n):
        torch.set_num_threads(n)


Machine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=25, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step\\(\\)` has been overridden")  # of a copied scheduler
class TestUndisturbed(Machine.TestCase):
    @pytest.fixture(autouse=True)
    def _threads(self, threads):
        """Puts their number back."""
