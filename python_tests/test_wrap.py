"""Optimizers that the library does not know, as the first level of a tower."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import pytorch_optimizer
import torch
import torch.distributed.checkpoint as dcp
from problems import Regression, relative_error
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import hyperopt_ext as hx

# Optimizers that this library has, too: the tower must be the same.
TWINS = {
    "sgd": (hx.Wrap(torch.optim.SGD, lr=0.02, momentum=0.9), hx.SGD(lr=0.02, momentum=0.9, learn="lr")),
    "adam": (hx.Wrap(torch.optim.Adam, lr=0.02), hx.Adam(lr=0.02, learn="lr")),
    "adamw": (hx.Wrap(torch.optim.AdamW, lr=0.02), hx.AdamW(lr=0.02, learn="lr")),
    "adamw's decay": (
        hx.Wrap(torch.optim.AdamW, lr=0.02, weight_decay=0.1, learn=("lr", "weight_decay")),
        hx.AdamW(lr=0.02, weight_decay=0.1, learn=("lr", "weight_decay")),
    ),
    "decay alone": (
        hx.Wrap(torch.optim.AdamW, lr=0.02, weight_decay=0.1, learn="weight_decay"),
        hx.AdamW(lr=0.02, weight_decay=0.1, learn="weight_decay"),
    ),
    "lion": (
        hx.Wrap(pytorch_optimizer.Lion, lr=1e-3, weight_decay=0.1),
        hx.Lion(lr=1e-3, weight_decay=0.1),
    ),
}
HOW = {
    "plain": {},
    "log": {"space": {"lr": "log"}},
    "horizon": {"horizon": 5},
    "growing horizon": {"horizon": (3, 0.25), "normalize": True, "growth": 1.01},
    "bounds": {"bounds": {"lr": (1e-4, 0.0201)}, "clip": 0.1, "burn_in": 3, "converge": (0.01, 20)},
}

# Optimizers that it does not have.
FOREIGN = {
    "Muon": lambda **kw: hx.Wrap(torch.optim.Muon, lr=0.02, **kw),
    "Adafactor": lambda **kw: hx.Wrap(torch.optim.Adafactor, lr=0.02, **kw),
    "AdamP": lambda **kw: hx.Wrap(pytorch_optimizer.AdamP, lr=0.02, weight_decay=0.01, **kw),
}
every_foreign = pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)


def matrices(problem):
    """Muon takes nothing else."""
    return [p for p in problem.model.parameters() if p.dim() == 2]


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize(("wrapped", "own"), TWINS.values(), ids=TWINS)
def test_equals_the_tower_of_a_level_that_the_library_has(wrapped, own, how):
    if "lr" not in own.learn_names:
        how = {name: value for name, value in how.items() if name not in ("space", "bounds", "growth")}
    problems = Regression(25), Regression(25)
    optimizers = [
        hx.HyperOptimizer(
            problem.model.parameters(), level.replace(**how) / hx.Adam(lr=1e-3, learn="lr") / hx.SGD(1e-6)
        )
        for problem, level in zip(problems, (wrapped, own), strict=True)
    ]
    for i in range(25):
        for problem, opt in zip(problems, optimizers, strict=True):
            if i in (9, 10):  # a parameter that sits out
                opt.zero_grad()
                problem.loss(i).backward()
                problem.model[0].bias.grad = None
                opt.step()
            else:
                problem.train(opt, range(i, i + 1))
        for p, q in zip(*(problem.model.parameters() for problem in problems), strict=True):
            assert relative_error(p.detach(), q.detach()) <= 1e-8
        for a, b in zip(*(opt.hyperparameters() for opt in optimizers), strict=True):
            for name in set(a) & set(b):
                assert a[name].item() == pytest.approx(b[name].item(), rel=1e-7, abs=1e-300), name
    assert optimizers[0].hyperparameters()[0] != optimizers[0].stack[0].values()


@every_foreign
def test_the_hypergradient_is_that_of_the_update_it_made(make):
    """The same optimizer by hand: lr follows the product of the gradient and the last update over lr."""
    problem, by_hand = Regression(30, torch.float32), Regression(30, torch.float32)
    opt = hx.HyperOptimizer(matrices(problem), make() / hx.SGD(lr=1e-4))
    level = opt.stack[0]
    lr = level.lr
    plain = level.optimizer(matrices(by_hand), **{**level.own, "lr": lr})
    direction = [torch.zeros_like(p) for p in matrices(by_hand)]
    for i in range(30):
        problem.train(opt, range(i, i + 1))
        by_hand.model.zero_grad()
        by_hand.loss(i).backward()
        lr -= 1e-4 * sum((p.grad * d).sum().item() for p, d in zip(matrices(by_hand), direction, strict=True))
        plain.param_groups[0]["lr"] = lr
        before = [p.detach().clone() for p in matrices(by_hand)]
        plain.step()
        direction = [(p.detach() - b) / lr for p, b in zip(matrices(by_hand), before, strict=True)]
        assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(lr, rel=1e-5)
        for p, q in zip(matrices(problem), matrices(by_hand), strict=True):
            assert relative_error(p.detach(), q.detach()) <= 1e-4
    assert abs(lr / level.lr - 1) > 1e-4


@every_foreign
def test_an_lr_that_is_too_small_grows(make):
    problem = Regression(60, torch.float32)
    stack = make(space={"lr": "log"}, normalize=True, horizon=10).replace(lr=1e-4) / hx.SGD(lr=0.1)
    opt = hx.HyperOptimizer(matrices(problem), stack)
    first = problem.loss(0).item()
    problem.train(opt, range(60))
    assert opt.hyperparameters()[0]["lr"] > 5e-4
    assert problem.loss(0) < first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    """Of half precision, the traces are fp32; the update is the one that was made, after rounding."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 64, dtype=dtype).reshape(8, 8))
    opt = hx.HyperOptimizer([p], hx.Wrap(torch.optim.SGD, lr=0.1) / hx.SGD(lr=0.0))
    before = p.detach().clone()
    p.grad = p.detach().clone()
    opt.step()
    trace = opt.state[p]["trace_lr"]
    assert trace.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    made = (p.detach().double() - before.double()) / 0.1
    torch.testing.assert_close(trace.double(), made, rtol=0, atol=1e-5)


# The optimizers of pytorch-optimizer lose attributes of their own in a copy.
@pytest.mark.parametrize(
    ("make", "way"),
    [(make, way) for make in FOREIGN.values() for way in ("memory", "file")]
    + [(FOREIGN[name], way) for name in ("Muon", "Adafactor") for way in ("pickle", "deepcopy")],
)
def test_it_resumes_bit_for_bit(make, way):
    problem = Regression(20, torch.float32)
    stack = make() / hx.Adam(lr=1e-4, learn="lr") / hx.SGD(lr=1e-6)
    opt = hx.HyperOptimizer(matrices(problem), stack)
    problem.train(opt, range(10))
    if way == "deepcopy":
        other, resumed = copy.deepcopy((problem, opt))
    elif way == "pickle":
        other, resumed = pickle.loads(pickle.dumps((problem, opt)))
    else:
        other = Regression(20, torch.float32)
        other.model.load_state_dict(problem.model.state_dict())
        resumed = hx.HyperOptimizer(matrices(other), stack)
        state_dict = opt.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(state_dict, file)
            file.seek(0)
            state_dict = torch.load(file, weights_only=True)
        resumed.load_state_dict(state_dict)
    problem.train(opt, range(10, 20))
    other.train(resumed, range(10, 20))
    assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), other.model.parameters(), strict=True))
    assert opt.hyperparameters() == resumed.hyperparameters()


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("options", [{}, {"full_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}])
@pytest.mark.parametrize(
    "wrapped",
    [*(make() for make in FOREIGN.values()), hx.Wrap(torch.optim.SGD, lr=0.1, momentum=0.9), TWINS["adam"][0]],
    ids=str,
)
def test_it_resumes_bit_for_bit_by_distributed_checkpoint(wrapped, options, on_disk, tmp_path):
    """Which fills what a new optimizer has: so the wrapped one must have its state."""
    options = StateDictOptions(**options)
    problem, other = Regression(20, torch.float32), Regression(20, torch.float32)
    opt, resumed = (hx.HyperOptimizer(matrices(p), wrapped / hx.SGD(lr=1e-4)) for p in (problem, other))
    problem.train(opt, range(10))
    model_state, state = get_state_dict(problem.model, opt, options=options)
    state = copy.deepcopy(state)
    if on_disk:
        dcp.save({"model": model_state, "opt": state}, checkpoint_id=tmp_path, no_dist=True)
        model_state, state = get_state_dict(other.model, resumed, options=options)
        dcp.load({"model": model_state, "opt": state}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other.model, resumed, model_state_dict=model_state, optim_state_dict=state, options=options)
    problem.train(opt, range(10, 20))
    other.train(resumed, range(10, 20))
    assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), other.model.parameters(), strict=True))
    assert opt.hyperparameters() == resumed.hyperparameters()


@pytest.mark.parametrize(
    "wrapped",
    [
        hx.Wrap(torch.optim.Adam, lr=0.02),
        hx.Wrap(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        hx.Wrap(torch.optim.Adagrad, lr=0.02, initial_accumulator_value=0.1),
        hx.Wrap(torch.optim.ASGD, lr=0.02),
        hx.Wrap(pytorch_optimizer.Lion, lr=1e-3, weight_decay=0.1, fixed_decay=True),
    ],
    ids=repr,
)
def test_to_ask_for_its_state_before_the_first_step_changes_nothing(wrapped):
    problem, other = Regression(5), Regression(5)
    opt, asked = (hx.HyperOptimizer(p.model.parameters(), wrapped / hx.SGD(lr=1e-4)) for p in (problem, other))
    get_state_dict(other.model, asked)
    for p, q in zip(problem.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    problem.train(opt, range(5))
    other.train(asked, range(5))
    for p, q in zip(problem.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_beside_levels_of_the_library_and_under_a_scheduler():
    """What Muon is made for: matrices with it, all else with AdamW."""
    problem = Regression(20, torch.float32)
    others = [p for p in problem.model.parameters() if p.dim() != 2]
    groups = [
        {"params": matrices(problem), "lr": 0.01, "momentum": 0.9},
        {"params": others, "stack": hx.AdamW(lr=1e-2, learn="lr") / hx.SGD(lr=1e-5)},
    ]
    opt = hx.HyperOptimizer(groups, hx.Wrap(torch.optim.Muon) / hx.SGD(lr=1e-5))
    assert opt.param_groups[0]["optimizer"].param_groups[0]["momentum"] == 0.9
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5)
    for i in range(20):
        problem.train(opt, range(i, i + 1))
        scheduler.step()
    for i, first in enumerate((0.01, 1e-2)):
        learned = opt.hyperparameters(i)[0]["lr"]
        assert learned != first
        assert opt.in_use(i)[0]["lr"] == 0.5 * learned
    assert opt.param_groups[0]["optimizer"].param_groups[0]["lr"] == 0.5 * opt.hyperparameters(0)[0]["lr"]


@pytest.mark.parametrize("policy", ["hold", "skip"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, pytorch_optimizer.Lamb, torch.optim.RMSprop])
def test_a_non_finite_gradient_is_skipped(optimizer, policy):
    problem, clean = Regression(10), Regression(10)
    stack = hx.Wrap(optimizer, lr=0.01) / hx.SGD(lr=1e-4)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), stack, nonfinite=policy) for p in (problem, clean))
    for i in range(10):
        if i == 5:
            opt.zero_grad()
            (problem.loss(i) * float("nan")).backward()
            opt.step()
            assert opt.skipped_steps() == 1
        problem.train(opt, range(i, i + 1))
        clean.train(expected, range(i, i + 1))
    assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), clean.model.parameters(), strict=True))
    assert opt.hyperparameters() == expected.hyperparameters()


def test_a_frozen_parameter_does_not_move():
    problem = Regression(4)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Wrap(torch.optim.AdamW) / hx.SGD(lr=1e-4))
    problem.train(opt, range(2))
    problem.loss(2).backward()
    frozen = problem.model[0].weight.requires_grad_(False)
    before = frozen.detach().clone()
    opt.step()
    assert torch.equal(frozen, before)
    assert len(opt.param_groups[0]["optimizer"].param_groups[0]["params"]) == 4


def test_an_lr_of_0_leaves_the_traces():
    """An update of 0 says nothing of one per lr: here the trace fades, while the library's own level goes on."""
    problem = Regression(8)
    stack = hx.Wrap(torch.optim.AdamW, lr=0.02, weight_decay=0.1, learn=("lr", "weight_decay"), horizon=4) / hx.SGD()
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.0 if t == 5 else 1.0)
    p = problem.model[0].weight
    for i in range(7):
        before = {name: t.clone() for name, t in opt.state[p].items() if name.startswith("trace")}
        w = p.detach().clone()
        problem.train(opt, range(i, i + 1))
        if i == 5:
            assert torch.equal(p, w)
            for name, trace in before.items():
                torch.testing.assert_close(opt.state[p][name], 0.75 * trace, rtol=1e-12, atol=1e-15)
        scheduler.step()


def test_an_error_of_the_optimizer_leaves_the_traces():
    class Fails(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("no memory")
            super().step()

    problem = Regression(6)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Wrap(Fails, lr=0.1, horizon=4) / hx.SGD(lr=1e-4))
    problem.train(opt, range(3))
    inner = opt.param_groups[0]["optimizer"]
    p = problem.model[0].weight
    trace, w = opt.state[p]["trace_lr"].clone(), p.detach().clone()
    inner.fails = True
    with pytest.raises(RuntimeError, match="no memory"):
        problem.train(opt, range(3, 4))
    torch.testing.assert_close(opt.state[p]["trace_lr"], 0.75 * trace, rtol=1e-9, atol=1e-12)
    assert torch.equal(p, w)
    inner.fails = False
    problem.train(opt, range(4, 6))


def test_a_tick_is_the_step_of_the_tower():
    problem = Regression(6)
    first, *others = problem.model.parameters()
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Wrap(torch.optim.Adam, lr=0.01) / hx.SGD(lr=1e-5))
    problem.train(opt, range(2))
    problem.loss(2).backward()
    first.grad = None
    opt.step()
    assert [(opt.state[p]["step"].item(), opt.state[p]["tick"].item()) for p in (first, others[0])] == [(2, 2), (3, 3)]
    problem.train(opt, range(3, 4))
    assert {(opt.state[p]["step"].item(), opt.state[p]["tick"].item()) for p in (first, others[0])} == {(3, 4), (4, 4)}


def test_what_is_written_to_the_group_reaches_the_optimizer():
    ours, theirs = Regression(8), Regression(8)
    opt = hx.HyperOptimizer(ours.model.parameters(), hx.Wrap(torch.optim.SGD, lr=0.02, momentum=0.5))
    other = torch.optim.SGD(theirs.model.parameters(), lr=0.02, momentum=0.5)
    ours.train(opt, range(2))
    theirs.train(other, range(2))
    for group in (opt.param_groups[0], other.param_groups[0]):
        group.update(momentum=0.9, nesterov=True, weight_decay=0.1)
    ours.train(opt, range(2, 5))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    ours.train(opt, range(5, 8))
    theirs.train(other, range(2, 8))
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-15)
    opt.param_groups[0]["horizon"] = 10
    with pytest.raises(ValueError, match="horizon does nothing here"):
        opt.step()


def test_an_optimizer_that_is_capturable_gets_a_tensor_and_nothing_else():
    """So that it waits for nothing: others read a tensor once for each parameter."""
    seen = []

    class Looks(torch.optim.Optimizer):
        def __init__(self, params, lr: float | torch.Tensor = 0.1, weight_decay=0.0, capturable=False, fused=False):
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

        def step(self, closure=None):
            seen.append({name: type(value) for name, value in self.param_groups[0].items() if name != "params"})

    for arguments, learn, lr in [
        ({"capturable": True}, "lr", torch.Tensor),
        ({"capturable": True}, ("lr", "weight_decay"), float),
        ({"capturable": True, "fused": True}, "lr", float),
        ({}, "lr", float),
    ]:
        problem = Regression(2)
        opt = hx.HyperOptimizer(problem.model.parameters(), hx.Wrap(Looks, learn=learn, **arguments) / hx.SGD())
        problem.train(opt, range(2))
        assert seen[-1] == {"lr": lr, "weight_decay": float}


def test_without_a_level_above_it_is_the_optimizer_itself():
    ours, theirs = Regression(10), Regression(10)
    ours.train(hx.HyperOptimizer(ours.model.parameters(), hx.Wrap(torch.optim.Adam, lr=0.02, eps=1e-6)), range(10))
    theirs.train(torch.optim.Adam(theirs.model.parameters(), lr=0.02, eps=1e-6), range(10))
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_maximize_is_left_to_the_optimizer():
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    stack = hx.Wrap(torch.optim.SGD, lr=0.1) / hx.SGD(lr=0.01)
    up, down = hx.HyperOptimizer([p], stack, maximize=True), hx.HyperOptimizer([q], stack)
    for _ in range(3):
        p.grad, q.grad = -q.detach(), q.detach().clone()
        up.step()
        down.step()
    assert torch.equal(p, q)
    assert up.hyperparameters() == down.hyperparameters()
    with pytest.raises(ValueError, match="Muon has no maximize"):
        hx.HyperOptimizer([torch.nn.Parameter(torch.ones(2, 2))], hx.Wrap(torch.optim.Muon), maximize=True)


def test_grad_scaler():
    problem, plain = Regression(6, torch.float32), Regression(6, torch.float32)
    stack = hx.Wrap(torch.optim.AdamW, lr=0.01) / hx.SGD(lr=1e-4)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), stack) for p in (problem, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(6):
        opt.zero_grad()
        scaler.scale(problem.loss(i) * (float("inf") if i == 3 else 1.0)).backward()
        scaler.step(opt)
        scaler.update()
        if i != 3:
            plain.train(expected, range(i, i + 1))
    assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), plain.model.parameters(), strict=True))
    assert opt.hyperparameters() == expected.hyperparameters()


WRONG = [
    (lambda: hx.Wrap("muon"), TypeError, "optimizer must be a class such as torch.optim.Muon"),
    (lambda: hx.Wrap(torch.optim.SGD([torch.ones(1)])), TypeError, "such as torch.optim.Muon, not a SGD"),
    (lambda: hx.Wrap(torch.optim.Muon, 0.02), TypeError, "given by name, as lr=0.02"),
    (lambda: hx.Wrap(hx.Adam), TypeError, "Adam is a level already"),
    (lambda: hx.Wrap(torch.optim.Muon, momentun=0.9), TypeError, "Muon has no argument 'momentun'"),
    (
        lambda: hx.HyperOptimizer([torch.nn.Parameter(torch.ones(1))], hx.Wrap(torch.optim.LBFGS) / hx.SGD()),
        TypeError,
        "LBFGS evaluates the loss in its step",
    ),
    (lambda: hx.Wrap(torch.optim.LBFGS, learn="beta1"), ValueError, "learn names 'beta1'"),
    (lambda: hx.Wrap(torch.optim.LBFGS, learn="weight_decay"), ValueError, "LBFGS has no weight_decay to learn"),
    (lambda: hx.Wrap(torch.optim.Muon, lr=-1.0), ValueError, "lr must be in"),
    (lambda: hx.Wrap(torch.optim.Muon, trust=0.1), ValueError, "trust measures an update before it is made"),
    (lambda: hx.Wrap(torch.optim.Muon, granularity="tensor"), ValueError, "granularity must be 'group'"),
    (lambda: hx.SGD() / hx.Wrap(torch.optim.SGD), ValueError, "can only be the first level"),
    (lambda: hx.Wrap(lambda params: None), TypeError, "has no argument lr"),
    (lambda: hx.Wrap(lambda params, lr: None), TypeError, "has no default; give one"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_what_is_wrong_is_said(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_what_the_optimizer_does_not_take_leaves_no_group_behind():
    problem = Regression(1)
    opt = hx.HyperOptimizer(matrices(problem), hx.Wrap(torch.optim.Muon) / hx.SGD())
    with pytest.raises(ValueError, match="Muon only supports 2D"):
        opt.add_param_group({"params": [problem.model[0].bias]})
    assert len(opt.param_groups) == 1


def test_a_parameter_that_was_appended_is_saved():
    """As in torch.optim, whose groups are lists."""
    runs = [Regression(6) for _ in range(2)]
    stack = hx.Wrap(torch.optim.AdamW, lr=0.01) / hx.SGD(lr=1e-5)
    for problem, resumes in zip(runs, (False, True), strict=True):
        first, *others = problem.model.parameters()
        opt = hx.HyperOptimizer([first], stack)
        opt.param_groups[0]["params"].extend(others)
        problem.train(opt, range(3))
        if resumes:
            state_dict, opt = opt.state_dict(), hx.HyperOptimizer(problem.model.parameters(), stack)
            opt.load_state_dict(state_dict)
        problem.train(opt, range(3, 6))
    for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_dict_of_another_optimizer_is_refused():
    problem = Regression(3)
    opt = hx.HyperOptimizer(matrices(problem), hx.Wrap(torch.optim.Muon) / hx.SGD())
    other = hx.HyperOptimizer(matrices(problem), hx.Wrap(torch.optim.Adafactor) / hx.SGD())
    with pytest.raises(ValueError, match=r"is of the stack 'Wrap\[Adafactor\].*this optimizer's is 'Wrap\[Muon\]"):
        opt.load_state_dict(other.state_dict())
    for inner in (None, {"param_groups": []}):
        state_dict, tower = opt.state_dict(), opt.param_groups[0]["tower"].clone()
        state_dict["param_groups"][0]["optimizer"] = inner
        with pytest.raises(ValueError, match="param group 0 has no state dict of its Muon"):
            opt.load_state_dict(state_dict)
        assert torch.equal(opt.param_groups[0]["tower"], tower)


def test_printing():
    level = hx.Wrap(torch.optim.Muon, lr=0.02, momentum=0.9, normalize=True)
    assert repr(level) == "Wrap(Muon, lr=0.02, momentum=0.9, normalize=True)"
    assert str(level / hx.SGD()) == "Muon/SGD"
    assert level == copy.deepcopy(level)
    assert "Muon/SGD" in repr(hx.HyperOptimizer([torch.nn.Parameter(torch.ones(2, 2))], level / hx.SGD()))


def test_the_sign_of_the_objective_may_change():
    p = torch.nn.Parameter(torch.ones(3))
    opt = hx.HyperOptimizer([p], hx.Wrap(torch.optim.SGD, lr=0.1) / hx.SGD(lr=0.01))
    for maximize, expected in ((True, 1.1), (False, 1.03)):
        opt.param_groups[0]["maximize"] = maximize
        p.grad = torch.ones(3)
        opt.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), expected), atol=0.02, rtol=0)
    p = torch.nn.Parameter(torch.ones(2, 2))
    opt = hx.HyperOptimizer([p], hx.Wrap(torch.optim.Muon) / hx.SGD())
    opt.param_groups[0]["maximize"] = True
    p.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="has no maximize; change the sign"):
        opt.step()


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD], ids=lambda make: make.__name__)
def test_foreach(make):
    problem, plain = Regression(3), Regression(3)
    problem.train(
        hx.HyperOptimizer(problem.model.parameters(), hx.Wrap(make, lr=0.01, foreach=True) / hx.SGD(0.0)), range(3)
    )
    plain.train(make(plain.model.parameters(), lr=0.01, foreach=True), range(3))
    for p, q in zip(problem.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_names_do_not_tell_where_in_memory_it_is():
    class Make:
        def __call__(self, params, lr=0.1):
            return torch.optim.SGD(params, lr=lr)

    made = [partial(torch.optim.SGD, nesterov=False), partial(partial(Make(), lr=0.2)), Make()]
    assert [str(hx.Wrap(make)) for make in made] == ["SGD", "Make", "Make"]


def test_what_the_wrapped_optimizer_does_not_load_changes_nothing():
    problem = Regression(6)
    groups = [{"params": [p]} for p in problem.model.parameters()]
    opt = hx.HyperOptimizer(groups, hx.Wrap(torch.optim.Adam, lr=0.01) / hx.SGD(lr=1e-4))
    problem.train(opt, range(2))
    early = copy.deepcopy(opt.state_dict())
    problem.train(opt, range(2, 4))
    before = copy.deepcopy(opt.state_dict())
    early["param_groups"][1]["optimizer"]["param_groups"][0].pop("params")
    with pytest.raises((KeyError, ValueError)):
        opt.load_state_dict(early)

    def load(_):
        raise KeyError("no")

    early = copy.deepcopy(before)
    early["param_groups"][0]["optimizer"]["state"][0]["step"] += 5
    opt.param_groups[1]["optimizer"].load_state_dict = load
    with pytest.raises(KeyError, match="no"):
        opt.load_state_dict(early)
    after = opt.state_dict()
    assert after["param_groups"][0]["optimizer"]["state"][0]["step"] == 4
    assert torch.equal(after["param_groups"][0]["tower"], before["param_groups"][0]["tower"])
    problem.train(opt, range(4, 6))
