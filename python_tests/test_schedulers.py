"""The schedulers of torch.optim.lr_scheduler: what they make of lr multiplies a learned lr."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from problems import Regression, assert_same, float64_by_default, relative_error
from reference import TWINS, TranscribedTower
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

import hyperopt_ext as hx
from hyperopt_ext.testing import ReferenceTower

STEPS = 30
LR = 0.02


def with_initial_lr(opt, lr):
    for group in opt.param_groups:
        group["initial_lr"] = lr
    return opt


# Every scheduler, absolute and recursive ones, alone and nested.
SCHEDULERS = {
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda t: min(1.0, (t + 1) / 10)),
    "LambdaLR from 0": lambda opt: schedulers.LambdaLR(opt, lambda t: min(1.0, t / 5)),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda t: 0.9),
    "StepLR": lambda opt: schedulers.StepLR(opt, 10, 0.5),
    "MultiStepLR": lambda opt: schedulers.MultiStepLR(opt, [5, 12], 0.3),
    "ConstantLR": lambda opt: schedulers.ConstantLR(opt, 0.5, 7),
    "LinearLR": lambda opt: schedulers.LinearLR(opt, 0.1, 1.0, 10),
    "ExponentialLR": lambda opt: schedulers.ExponentialLR(opt, 0.95),
    "PolynomialLR": lambda opt: schedulers.PolynomialLR(opt, STEPS + 5, 2.0),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, 12, eta_min=0.003),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 5, 2, eta_min=0.001),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 0.01, 0.03, 6, cycle_momentum=False),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, 0.03, total_steps=STEPS + 1, cycle_momentum=False),
    "SequentialLR": lambda opt: schedulers.SequentialLR(
        opt, [schedulers.LinearLR(opt, 0.1, 1.0, 8), schedulers.CosineAnnealingLR(opt, 10, 0.001)], [8]
    ),
    "ChainedScheduler": lambda opt: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(opt, 0.5, 7), schedulers.ExponentialLR(opt, 0.95)]
    ),
    "SWALR": lambda opt: SWALR(opt, 0.005, 10),
    "SWALR of Lightning": lambda opt: SWALR(with_initial_lr(opt, 0.05), 0.05, 10),
}
MOMENTUM = {
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 0.01, 0.03, 6, base_momentum=0.6, max_momentum=0.9),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, 0.03, total_steps=STEPS + 1),
}
every_scheduler = pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)


def train(problem, opt, scheduler, steps=None, metric=None):
    """Yields after each step."""
    for i in range(STEPS) if steps is None else steps:
        problem.train(opt, range(i, i + 1))
        yield i
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR uses what torch has deprecated
            scheduler.step(*() if metric is None else (metric(i),))


def factors(schedule, lr=LR):
    """What the scheduler multiplies the first lr of an ordinary optimizer by, step for step."""
    with float64_by_default():
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)
        scheduler = schedule(opt)
        initial = opt.param_groups[0]["initial_lr"]
        result = []
        for _ in range(STEPS):
            result.append(opt.param_groups[0]["lr"] / initial)
            opt.step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler.step()
    return result, initial


FIXED = {
    "not learned": hx.Adam(lr=LR, learn=()) / hx.SGD(),
    "one level": hx.Adam(lr=LR),
    "learned by a level that stands still": hx.Adam(lr=LR, learn="lr") / hx.SGD(lr=0.0),
    "sgd": hx.SGD(lr=LR, momentum=0.7, learn="lr") / hx.SGD(lr=0.0),
}


@every_scheduler
@pytest.mark.parametrize("stack", FIXED.values(), ids=FIXED)
def test_if_nothing_is_learned_it_is_what_torch_does(schedule, stack):
    assert_as_torch(schedule, stack)


@pytest.mark.parametrize("schedule", MOMENTUM.values(), ids=MOMENTUM)
@pytest.mark.parametrize("stack", FIXED.values(), ids=FIXED)
def test_momentum_is_cycled_as_in_torch(schedule, stack):
    assert_as_torch(schedule, stack)


def assert_as_torch(schedule, stack):
    ours, theirs = Regression(STEPS), Regression(STEPS)
    opt = hx.HyperOptimizer(ours.model.parameters(), stack)
    base = hx.Stack.coerce(stack)[0]
    make = torch.optim.Adam if isinstance(base, hx.Adam) else lambda p, lr: torch.optim.SGD(p, lr, momentum=0.7)
    twin = make(theirs.model.parameters(), lr=LR)
    scheduler, other = schedule(opt), schedule(twin)
    with float64_by_default():
        for _ in zip(train(ours, opt, scheduler), train(theirs, twin, other), strict=True):
            assert scheduler.get_last_lr()[0].item() == pytest.approx(other.get_last_lr()[0], rel=1e-12)
            for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
                assert relative_error(p.detach(), q.detach()) <= 1e-12


LEARNED = {
    "linear": hx.Adam(lr=LR) / hx.SGD(lr=1e-4),
    "log": hx.SGD(lr=LR, learn="lr", space={"lr": "log"}) / hx.Adam(lr=1e-2) / hx.SGD(lr=1e-5),
}


class Sharing(torch.optim.Optimizer):
    """A wrapper that gives the scheduler the groups of the optimizer inside, as those of SAM and Lookahead do."""

    def __init__(self, inside):
        super().__init__(inside.param_groups, {})
        self.param_groups = inside.param_groups


@pytest.mark.parametrize("shared", [False, True], ids=["", "through a wrapper"])
@every_scheduler
@pytest.mark.parametrize("stack", LEARNED.values(), ids=LEARNED)
def test_a_learned_lr_is_multiplied_and_the_hypergradient_is_that_of_the_learned_one(schedule, stack, shared):
    """Against plain autograd through (factor of the scheduler) * (learned lr)."""
    problem = Regression(STEPS)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    factor, initial = factors(schedule)
    reference = ReferenceTower(
        problem.model.parameters(), hx.Stack((stack[0].replace(lr=initial), *stack.levels[1:])), TWINS
    )
    learned_of = reference.levels[0].h
    for i in train(problem, opt, schedule(Sharing(opt) if shared else opt)):
        reference.levels[0].h = lambda i=i: {**learned_of(), "lr": learned_of()["lr"] * factor[i]}
        reference.step(lambda params, i=i: problem.loss_of(i, params))
        learned, used = opt.hyperparameters()[0]["lr"].item(), opt.in_use()[0]["lr"].item()
        assert learned == pytest.approx(learned_of()["lr"].item(), rel=1e-9)
        assert used == pytest.approx(learned * factor[i], rel=1e-12, abs=1e-300)
        for p, q in zip(problem.model.parameters(), reference.params, strict=True):
            assert relative_error(p.detach(), q.detach()) <= 1e-9
    assert learned != pytest.approx(initial, rel=1e-6)


SAFEGUARDED = {
    "horizon": hx.Adam(lr=LR, learn="lr", horizon=5) / hx.SGD(lr=1e-4),
    "growing horizon, cosines": hx.SGD(lr=LR, horizon=(3, 0.25), normalize=True, space={"lr": "log"}) / hx.SGD(lr=0.05),
    "converge, clip": hx.Adam(lr=LR, learn="lr", converge=(0.005, 10), clip=1e-3) / hx.SGD(lr=1e-2) / hx.SGD(lr=1e-6),
    "tensors": hx.Adam(lr=LR, granularity="tensor") / hx.Adam(lr=1e-3, learn="lr") / hx.SGD(lr=1e-6),
    "tensors, all levels": hx.SGD(lr=LR, granularity="tensor", horizon=3) / hx.SGD(lr=1e-3, granularity="tensor"),
}


@pytest.mark.parametrize("stack", SAFEGUARDED.values(), ids=SAFEGUARDED)
def test_the_factor_stands_between_the_learned_lr_and_the_one_in_use(stack):
    """Against the written-out tower, whose lr in use, and its derivative by the learned one, have the factor."""
    problem, schedule = Regression(STEPS), SCHEDULERS["CosineAnnealingWarmRestarts"]
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    factor, _ = factors(schedule)
    reference = TranscribedTower(problem.model.parameters(), stack)
    for s in reference.levels[0]:

        def use(t, s=s, plain=s.use):
            s.delta = 1.0
            plain(t)
            s.used["lr"] = factor[t - 1] * s.used["lr"]
            s.delta *= factor[t - 1]

        s.use = use
    for i in train(problem, opt, schedule(opt)):
        reference.step(lambda params, i=i: problem.loss_of(i, params))
        assert_same(problem.model.parameters(), opt.hyperparameters(), reference.params, reference.hyperparameters())
    assert opt.hyperparameters()[0]["lr"].reshape(-1)[0] != LR


def test_plateaus_scale_the_learned_lr():
    problem = Regression(12)
    opt = hx.HyperOptimizer(problem.model.parameters(), LEARNED["linear"])
    scheduler = schedulers.ReduceLROnPlateau(opt, factor=0.5, patience=2)
    before = math.nan
    for i in train(problem, opt, scheduler, range(4), metric=lambda i: 1.0):
        before = opt.hyperparameters()[0]["lr"].item()
        assert i < 4
    assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(0.5 * before, rel=1e-12)


def test_who_owns_which_entry():
    """With a scheduler, the group's lr is the scheduler's, and hyperparameters() shows the learned one."""
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), LEARNED["linear"])
    learned = opt.hyperparameters()[0]["lr"]
    problem.train(opt, range(3))
    before = learned.item()
    scheduler = schedulers.LambdaLR(opt, lambda t: 0.5)
    assert learned == before == opt.param_groups[0]["initial_lr"]
    assert opt.param_groups[0]["lr"] == 0.5 * before
    for _ in train(problem, opt, scheduler, range(3, 6)):
        pass
    assert learned != before
    assert opt.param_groups[0]["lr"] == 0.5 * before
    assert opt.in_use()[0]["lr"] == 0.5 * learned
    learned.fill_(0.01)  # the next step starts from there
    opt.param_groups[0]["lr"] = 0.25 * before
    opt.hyperparameters()[1]["lr"].fill_(0.0)
    problem.train(opt, range(6, 7))
    assert opt.in_use()[0]["lr"].item() == pytest.approx(0.25 * 0.01, rel=1e-12)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_a_scheduled_run_resumes_bit_for_bit(way):
    problem = Regression(20)
    opt = hx.HyperOptimizer(problem.model.parameters(), LEARNED["linear"])
    scheduler = SCHEDULERS["CosineAnnealingWarmRestarts"](opt)
    for _ in train(problem, opt, scheduler, range(8)):
        pass
    if way == "deepcopy":
        other, resumed, again = copy.deepcopy((problem, opt, scheduler))
    else:
        other = Regression(20)
        other.model.load_state_dict(problem.model.state_dict())
        resumed = hx.HyperOptimizer(other.model.parameters(), LEARNED["linear"])
        again = SCHEDULERS["CosineAnnealingWarmRestarts"](resumed)
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        again.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    for a, b, s in [(problem, opt, scheduler), (other, resumed, again)]:
        for _ in train(a, b, s, range(8, 20)):
            pass
    assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), other.model.parameters(), strict=True))
    assert opt.hyperparameters() == resumed.hyperparameters()
    assert opt.param_groups[0]["lr"] == resumed.param_groups[0]["lr"]


def test_a_scheduler_that_comes_with_a_checkpoint_of_a_run_without_one():
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), LEARNED["linear"])
    problem.train(opt, range(5))
    resumed = hx.HyperOptimizer(problem.model.parameters(), LEARNED["linear"])
    scheduler = schedulers.LambdaLR(resumed, lambda t: 0.5)
    resumed.load_state_dict(opt.state_dict())
    for _ in train(problem, resumed, scheduler, range(5, 6)):
        assert resumed.in_use()[0]["lr"] == 0.5 * resumed.hyperparameters()[0]["lr"]
    assert resumed.hyperparameters()[0]["lr"].item() == pytest.approx(opt.hyperparameters()[0]["lr"].item(), rel=0.1)


RESTARTED = {
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda t: 0.9**t),
    **{name: SCHEDULERS[name] for name in ("CosineAnnealingLR", "ExponentialLR", "LinearLR", "SequentialLR")},
    "OneCycleLR": SCHEDULERS["OneCycleLR"],
}


@pytest.mark.parametrize("schedule", RESTARTED.values(), ids=RESTARTED)
@pytest.mark.parametrize("stack", [LEARNED["linear"], FIXED["sgd"], FIXED["one level"]], ids=str)
def test_a_run_that_starts_again_from_a_snapshot_without_a_scheduler_is_the_same(schedule, stack):
    """As for the folds of a cross-validation, or after a search for an lr."""
    problem = Regression(12)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    problem.train(opt, range(2))
    start = copy.deepcopy((problem.model.state_dict(), opt.state_dict()))
    seen = []
    for fold in range(3):
        if fold > 0:
            problem.model.load_state_dict(start[0])
            opt.load_state_dict(start[1])
            assert opt.param_groups[0]["lr"].equal(opt.hyperparameters()[0]["lr"])
            assert "initial_lr" not in opt.param_groups[0]
        for _ in train(problem, opt, schedule(opt), range(2, 12)):
            pass
        seen.append([p.detach().clone() for p in problem.model.parameters()])
        if fold == 1:  # a search, at an lr that is far off
            problem.model.load_state_dict(start[0])
            for _ in train(problem, opt, schedulers.ExponentialLR(with_initial_lr(opt, 1e-9), 3.0), range(10)):
                pass
    torch.testing.assert_close(seen[1:], seen[:1] * 2, rtol=0, atol=0)


def test_one_lr_for_each_tensor():
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam(lr=LR, granularity="tensor") / hx.SGD(lr=1e-4))
    problem.train(opt, range(3))
    scheduler = schedulers.LambdaLR(opt, lambda t: 0.5)
    for _ in train(problem, opt, scheduler, range(3, 6)):
        torch.testing.assert_close(opt.in_use()[0]["lr"], 0.5 * opt.hyperparameters()[0]["lr"], rtol=1e-14, atol=0)
    assert scheduler.get_last_lr() == [0.5 * LR]
    assert len(set(opt.hyperparameters()[0]["lr"].tolist())) == 4


@pytest.mark.parametrize("normalize", [False, True])
def test_while_the_factor_is_0_lr_stays_where_it_was(normalize):
    problem = Regression(10)
    stack = hx.Adam(lr=LR, learn="lr", normalize=normalize, horizon=3, trust=0.5) / hx.SGD(lr=1e-3)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    for _ in train(problem, opt, schedulers.LambdaLR(opt, lambda t: 0.0), range(5)):
        assert opt.hyperparameters()[0]["lr"] == LR


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_factor_below_1_is_one_of_the_cap_too(factor):
    problem = Regression(3)
    opt = hx.auto(problem.model.parameters())
    before = torch.cat([p.detach().flatten() for p in problem.model.parameters()])
    scheduler = schedulers.LambdaLR(opt, lambda t: factor)
    next(train(problem, opt, scheduler))
    moved = torch.cat([p.detach().flatten() for p in problem.model.parameters()]) - before
    assert moved.norm().item() == pytest.approx(0.03 * min(1.0, factor) * before.norm().item(), rel=1e-6)
    assert opt.in_use()[0]["lr"].item() == pytest.approx(factor * opt.hyperparameters()[0]["lr"].item(), rel=1e-12)


def test_a_warm_up_is_not_learned_away():
    """Without a first lr it is the cap that sets it."""
    lengths = {}
    for steps in (1, 10):
        problem = Regression(8)
        opt = hx.auto(problem.model.parameters())
        scheduler = schedulers.LambdaLR(opt, lambda t, steps=steps: min(1.0, (t + 1) / steps))
        lengths[steps] = []
        for _ in train(problem, opt, scheduler, range(8)):
            lengths[steps].append(opt.in_use()[0]["lr"].item())
    for t, (without, with_warm_up) in enumerate(zip(*lengths.values(), strict=True)):
        assert with_warm_up == pytest.approx((t + 1) / 10 * without, rel=0.3)


def test_no_factor_can_be_told_of_an_lr_that_starts_from_0():
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(1))], hx.SGD(lr=0.0) / hx.SGD())
    with pytest.raises(ValueError, match="initial_lr must be greater than 0, not 0"):
        schedulers.ExponentialLR(opt, 0.9)
    opt.param_groups[0]["lr"] = 0.1  # and it goes on
    schedulers.ExponentialLR(opt, 0.9)
    assert opt.param_groups[0]["initial_lr"] == opt.hyperparameters()[0]["lr"] == 0.1


def test_momentum_that_is_not_there_is_an_error_of_torch():
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(1))], hx.SGD(lr=0.1) / hx.SGD())
    with pytest.raises(ValueError, match="must support momentum"):
        schedulers.OneCycleLR(opt, 0.1, total_steps=10)


@pytest.mark.parametrize("learn", [None, "momentum", ()])
@every_scheduler
def test_tensors_with_an_lr_each_have_one_factor(schedule, learn):
    """Whether lr is learned or not: the entry of the group is one number, which scales those of all tensors."""
    level = hx.SGD(lr=LR, momentum=0.8, granularity="tensor", learn=learn)
    problem, plain = Regression(STEPS), Regression(STEPS)
    opt = hx.HyperOptimizer(problem.model.parameters(), level / hx.SGD(lr=0.0))
    other = torch.optim.SGD(plain.model.parameters(), lr=LR, momentum=0.8)
    for _ in zip(train(problem, opt, schedule(opt)), train(plain, other, schedule(other)), strict=True):
        assert opt.in_use()[0]["lr"].tolist() == pytest.approx([other.param_groups[0]["lr"]] * 4, rel=1e-6)


def test_without_its_initial_lr_a_schedule_is_over():
    """As one starts another schedule: lr is the learned one again, or what was assigned meanwhile."""
    for assigned in (None, 0.3):
        problem = Regression(8)
        opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam(lr=LR) / hx.SGD(lr=1e-6))
        scheduler = schedulers.ConstantLR(opt, 0.5, 100)
        problem.train(opt, range(3))
        learned = opt.hyperparameters()[0]["lr"].item()
        opt.param_groups[0].pop("initial_lr")
        if assigned is not None:
            opt.param_groups[0]["lr"] = assigned
        del scheduler
        problem.train(opt, range(3, 4))
        assert opt.in_use()[0]["lr"] == pytest.approx(assigned or learned, rel=1e-2)
        assert opt.param_groups[0]["lr"] is opt.param_groups[0]["lr"]
        assert opt.param_groups[0]["lr"].equal(opt.hyperparameters()[0]["lr"])
        schedulers.ConstantLR(opt, 0.1, 100)
        problem.train(opt, range(4, 5))
        assert opt.in_use()[0]["lr"] == pytest.approx(0.1 * (assigned or learned), rel=2e-2)
    state_dict = opt.state_dict()
    state_dict["param_groups"][0]["initial_lr"] = None
    with pytest.raises(ValueError, match="initial_lr of param group 0 must be a number, not None"):
        opt.load_state_dict(state_dict)


@pytest.mark.parametrize("granularity", ["group", "tensor"])
def test_an_lr_that_was_assigned_before_a_scheduler_came_counts(granularity):
    problem, plain = Regression(4), Regression(4)
    stack = hx.SGD(lr=LR, granularity=granularity) / hx.SGD(lr=0.0)
    opt, other = hx.HyperOptimizer(problem.model.parameters(), stack), torch.optim.SGD(plain.model.parameters(), LR)
    for one, of in ((problem, opt), (plain, other)):
        one.train(of, range(1))
        of.param_groups[0]["lr"] = 0.1
        for _ in train(one, of, schedulers.ExponentialLR(of, 0.9), range(1, 3)):
            pass
        of.param_groups[0]["lr"] = 0.03
        del of.param_groups[0]["initial_lr"]
        for _ in train(one, of, schedulers.ConstantLR(of, 0.5), range(3, 4)):
            pass
    for p, q in zip(problem.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)


def test_what_was_assigned_before_a_scheduler_came_counts():
    problem = Regression(1)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.SGD(lr=LR, momentum=0.9, learn="lr") / hx.SGD(lr=1e-6))
    opt.param_groups[0]["momentum"] = 0.5
    schedulers.ConstantLR(opt, 0.5, 100)
    problem.train(opt, range(1))
    assert opt.in_use()[0]["momentum"] == 0.5


@pytest.mark.parametrize("granularity", ["group", "tensor"])
@pytest.mark.parametrize("make", [partial(schedulers.StepLR, step_size=1), schedulers.ExponentialLR])
def test_a_group_that_is_added_has_a_schedule_of_its_own(make, granularity):
    """It starts at its own lr, and its learned lr is not what the scheduler writes to."""
    problem, plain = Regression(STEPS), Regression(STEPS)
    level = hx.SGD(lr=LR, granularity=granularity)
    opt = hx.HyperOptimizer(problem.model[0].parameters(), level / hx.SGD(lr=0.0))
    other = torch.optim.SGD(plain.model[0].parameters(), lr=LR)
    one, two = make(opt, gamma=0.5), make(other, gamma=0.5)
    for added in (False, True):
        if added:
            opt.add_param_group({"params": problem.model[2].parameters(), "lr": 0.2})
            other.add_param_group({"params": plain.model[2].parameters(), "lr": 0.2})
        for _ in zip(train(problem, opt, one, range(2)), train(plain, other, two, range(2)), strict=True):
            pass
    opt.step()
    assert opt.hyperparameters(1)[0]["lr"].reshape(-1)[0] == 0.2
    assert opt.in_use(1)[0]["lr"].reshape(-1)[0] == pytest.approx(0.05, rel=1e-12)
    for p, q in zip(problem.model[2].parameters(), plain.model[2].parameters(), strict=True):
        assert relative_error(p.detach(), q.detach() - 0.05 * q.grad) <= 1e-12


def test_a_schedule_after_another_one_starts_from_the_lr_in_use():
    problem = Regression(8)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.SGD(lr=LR) / hx.SGD(lr=0.0))
    for _ in train(problem, opt, schedulers.ExponentialLR(opt, 0.5), range(3)):
        pass
    opt.param_groups[0]["initial_lr"] = 2 * LR  # as one that names a first lr brings it
    problem.train(opt, range(3, 4))
    assert opt.hyperparameters()[0]["lr"].item() == 2 * LR
    assert opt.in_use()[0]["lr"].item() == pytest.approx(LR / 8, rel=1e-12)


def test_an_initial_lr_of_0_in_a_checkpoint_is_an_error():
    opt = hx.HyperOptimizer(Regression(1).model.parameters(), hx.SGD(lr=LR) / hx.SGD(lr=0.0))
    schedulers.ConstantLR(opt, 0.5)
    state_dict = opt.state_dict()
    state_dict["param_groups"][0]["initial_lr"] = torch.tensor(0.0)
    with pytest.raises(ValueError, match="initial_lr of param group 0 must be greater than 0, not 0"):
        opt.load_state_dict(state_dict)


@pytest.mark.parametrize("wrapped", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.7)])
@pytest.mark.parametrize("schedule", MOMENTUM.values(), ids=MOMENTUM)
def test_the_momentum_of_a_wrapped_optimizer_is_cycled(schedule, wrapped):
    problem, plain = Regression(STEPS), Regression(STEPS)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Wrap(wrapped, lr=LR) / hx.SGD(lr=0.0))
    other = wrapped(plain.model.parameters(), lr=LR)
    with float64_by_default():
        for _ in zip(train(problem, opt, schedule(opt)), train(plain, other, schedule(other)), strict=True):
            for p, q in zip(problem.model.parameters(), plain.model.parameters(), strict=True):
                assert relative_error(p.detach(), q.detach()) <= 1e-9


def test_an_swa_lr_without_a_first_lr_is_an_error():
    """It would be 0.05 of 1e20, and freeze the model. One that is made later starts from what was learned."""
    problem = Regression(4)
    opt = hx.auto(problem.model.parameters())
    schedulers.CosineAnnealingLR(opt, 10)
    problem.train(opt, range(2))
    SWALR(opt, 0.05)
    before = [p.detach().clone() for p in problem.model.parameters()]
    with pytest.raises(ValueError, match=r"swa_lr=0.05 is meant relative to the first lr, which is 1e\+20"):
        problem.train(opt, range(2, 3))
    assert all(map(torch.equal, before, problem.model.parameters()))
    later = hx.auto(problem.model.parameters())
    problem.train(later, range(2))
    SWALR(later, 0.05)
    problem.train(later, range(2, 4))
