"""HyperOptimizer as the torch.optim.Optimizer that a training loop takes it for."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from problems import Regression

import hyperopt_ext as hx
from hyperopt_ext import _C, optimizer
from hyperopt_ext.update import Group

STACK = hx.Adam(lr=1e-2) / hx.SGD(lr=1e-4, momentum=0.5) / hx.SGD(lr=1e-6)
LR_ONLY = hx.Adam(lr=1e-2, learn="lr") / hx.SGD(lr=1e-4)
SGD = hx.SGD(lr=1e-2, momentum=0.9) / hx.Adam(lr=1e-4)
ADAMW = hx.AdamW(lr=1e-2, weight_decay=0.1, learn=("lr", "beta1", "weight_decay")) / hx.SGD(lr=1e-4)
LION = hx.Lion(lr=1e-3, weight_decay=0.1) / hx.SGD(lr=1e-6)
TRACED = hx.Adam(lr=1e-2, learn=("lr", "beta1"), horizon=5) / hx.SGD(lr=1e-5, learn="lr", horizon=3) / hx.SGD(lr=1e-8)
TENSORS = hx.Adam(lr=1e-2, granularity="tensor") / hx.Adam(lr=1e-4, learn="lr") / hx.SGD(lr=1e-8)
LEARNING = {
    "adam": STACK,
    "lr": LR_ONLY,
    "sgd": SGD,
    "adamw": ADAMW,
    "lion": LION,
    "traced": TRACED,
    "tensors": TENSORS,
}
every_learning_stack = pytest.mark.parametrize("stack", LEARNING.values(), ids=LEARNING)
every_stack = pytest.mark.parametrize("stack", [*LEARNING.values(), hx.Adam(lr=1e-2)], ids=[*LEARNING, "plain"])


def values(opt, group=0):
    return [{k: v.tolist() for k, v in level.items()} for level in opt.hyperparameters(group)]


def same(problem, other):
    return all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), other.model.parameters(), strict=True))


def test_it_learns():
    problem = Regression(300)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam(lr=1e-5) / hx.SGD(lr=1e-4))
    problem.train(opt, range(300))
    fixed = Regression(300)
    fixed.train(torch.optim.Adam(fixed.model.parameters(), lr=1e-5), range(300))
    assert opt.hyperparameters()[0]["lr"] > 1e-3
    assert problem.loss(0) < 0.5 * fixed.loss(0)


@every_stack
def test_a_group_may_be_empty(stack):
    problem, alone = Regression(4), Regression(4)
    opt = hx.HyperOptimizer([{"params": problem.model.parameters()}, {"params": []}], stack)
    problem.train(opt, range(4))
    alone.train(hx.HyperOptimizer(alone.model.parameters(), stack), range(4))
    assert same(problem, alone)
    opt.load_state_dict(opt.state_dict())
    assert opt.skipped_steps(1) == 0


def test_parameters_stay_leaves_and_gradients_stay_as_they_were():
    problem = Regression(2)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    for i in range(2):
        opt.zero_grad()
        problem.loss(i).backward()
        grads = [p.grad.clone() for p in problem.model.parameters()]
        opt.step()
        for p, g in zip(problem.model.parameters(), grads, strict=True):
            assert isinstance(p, torch.nn.Parameter)
            assert p.is_leaf
            assert p.grad_fn is None
            assert torch.equal(p.grad, g)


@every_stack
def test_reused_gradient_buffers_do_not_corrupt_the_hypergradient(stack):
    a, b = Regression(20), Regression(20)
    opt = hx.HyperOptimizer(a.model.parameters(), stack)
    reuse = hx.HyperOptimizer(b.model.parameters(), stack)
    a.train(opt, range(20))
    for i in range(20):
        reuse.zero_grad(set_to_none=False)
        b.loss(i).backward()
        reuse.step()
        for p in b.model.parameters():
            p.grad.fill_(float("nan"))  # the caller's own use of the buffer
            p.grad.zero_()
    assert same(a, b)
    assert values(opt) == values(reuse)


def test_closure():
    a, b = Regression(10), Regression(10)
    opt, closed = (hx.HyperOptimizer(p.model.parameters(), STACK) for p in (a, b))
    for i in range(10):

        def closure(i=i):
            closed.zero_grad()
            loss = b.loss(i)
            loss.backward()
            return loss

        expected = a.loss(i)
        a.train(opt, range(i, i + 1))
        assert closed.step(closure) == expected
    assert same(a, b)


def test_hooks():
    problem = Regression(3)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    opt.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "extra": 1})
    opt.register_load_state_dict_pre_hook(lambda _, state_dict: {k: v for k, v in state_dict.items() if k != "extra"})
    problem.train(opt, range(1))
    assert seen == ["before", "after"]
    state_dict = opt.state_dict()
    assert state_dict["extra"] == 1
    opt.load_state_dict(state_dict)


def test_param_groups_have_their_own_hyperparameters():
    both, alone = Regression(20), Regression(20)
    first, second = (list(layer.parameters()) for layer in (both.model[0], both.model[2]))
    opt = hx.HyperOptimizer([{"params": first}, {"params": second, "lr": 1e-3, "betas": (0.8, 0.9)}], STACK)
    assert values(opt)[0]["lr"] == 1e-2
    assert values(opt, 1)[0] == {"lr": 1e-3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.0}
    others = [
        hx.HyperOptimizer(alone.model[0].parameters(), STACK),
        hx.HyperOptimizer(alone.model[2].parameters(), hx.Adam(lr=1e-3, betas=(0.8, 0.9)) / STACK[1] / STACK[2]),
    ]
    for i in range(20):
        both.train(opt, range(i, i + 1))
        for other in others:
            other.zero_grad()
        alone.loss(i).backward()
        for other in others:
            other.step()
    assert same(both, alone)
    assert [values(opt, 0), values(opt, 1)] == [values(other) for other in others]


def test_a_group_may_have_a_stack_of_its_own_and_come_later():
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model[0].parameters(), STACK)
    problem.train(opt, range(5))
    lr = opt.param_groups[0]["lr"]
    opt.add_param_group({"params": problem.model[2].parameters(), "stack": hx.SGD(lr=0.1) / hx.SGD(lr=1e-3)})
    before = problem.model[2].weight.detach().clone()
    problem.train(opt, range(5, 10))
    assert not torch.equal(problem.model[2].weight, before)
    assert opt.param_groups[1]["lr"] != 0.1
    assert lr == opt.param_groups[0]["lr"]  # still live


def test_a_group_costs_as_much_as_the_one_before(monkeypatch):
    made = []
    monkeypatch.setattr(optimizer, "Group", lambda group: made.append(group) or Group(group))
    opt = hx.HyperOptimizer([{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(30)], STACK)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert len(made) == 31


def test_a_group_that_was_taken_out_is_not_trained():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    opt = hx.HyperOptimizer([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)], SGD)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    before = [p.clone() for p in params]
    opt.param_groups[2]["lr"] = 0.5
    del opt.param_groups[1]
    assert [opt.hyperparameters(i)[0]["lr"].item() for i in range(2)] == [opt.param_groups[0]["lr"].item(), 0.5]
    opt.step()
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [False, True, False]


@pytest.mark.parametrize("change", [lambda params, p: params.append(p), lambda params, p: [*params, p]])
def test_a_tensor_too_many_for_towers_of_their_own(change):
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    opt = hx.HyperOptimizer([p], TENSORS)
    p.grad = q.grad = torch.ones(2)
    opt.step()
    group = opt.param_groups[0]
    group["params"] = change(group["params"], q) or group["params"]
    for _ in range(2):
        with pytest.raises(ValueError, match="for each of 1 tensors, but there are 2 now; use add_param_group"):
            opt.step()


def test_the_policy_of_a_group_can_be_changed():
    p = torch.nn.Parameter(torch.ones(2))
    opt = hx.HyperOptimizer([p], hx.Adam() / hx.SGD(lr=1e-5))
    p.grad = torch.full((2,), float("nan"))
    opt.param_groups[0]["nonfinite"] = "raise"
    with pytest.raises(FloatingPointError):
        opt.step()
    opt.param_groups[0]["nonfinite"] = "ignore"
    for _ in range(2):
        with pytest.raises(ValueError, match="nonfinite is 'ignore', but the policies are 'hold', 'skip', 'raise'"):
            opt.step()
    opt.param_groups[0]["nonfinite"] = "skip"
    opt.step()
    assert opt.skipped_steps() == 1


def test_a_tensor_in_the_place_of_another_has_its_tower():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(2)), p], TENSORS)
    p.grad, q.grad = torch.ones(2), torch.ones(3)
    opt.step()
    opt.param_groups[0]["params"][1] = q
    opt.param_groups[0]["lr"][1] = 0.5
    opt.step()
    torch.testing.assert_close(q.detach(), torch.full((3,), 0.5))


def test_named_parameters():
    problem = Regression(3)
    opt = hx.HyperOptimizer(problem.model.named_parameters(), STACK)
    problem.train(opt, range(3))
    assert opt.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_live_values():
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    lr = opt.param_groups[0]["lr"]
    assert lr.shape == ()
    assert lr.dtype == torch.float64
    problem.train(opt, range(3))
    assert lr == opt.hyperparameters()[0]["lr"] != 1e-2
    assert [list(level) for level in opt.hyperparameters()] == [
        ["lr", "beta1", "beta2", "eps", "weight_decay"],
        ["lr", "momentum", "dampening", "weight_decay"],
        ["lr", "weight_decay"],
    ]


def test_the_next_step_starts_from_what_the_user_wrote():
    """The last update is still differentiated at the values that it used."""
    a, b = Regression(10), Regression(10)
    opt = hx.HyperOptimizer(a.model.parameters(), hx.SGD(lr=1e-2, momentum=0.5) / hx.SGD(lr=0.0))
    fixed = torch.optim.SGD(b.model.parameters(), lr=1e-2, momentum=0.5)
    for i in range(10):
        opt.param_groups[0]["lr"].fill_(0.01 * (i + 1))
        opt.hyperparameters()[0]["momentum"].fill_(0.05 * i)
        fixed.param_groups[0].update(lr=0.01 * (i + 1), momentum=0.05 * i or 1e-300)
        a.train(opt, range(i, i + 1))
        b.train(fixed, range(i, i + 1))
        for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_assigning_to_a_group_is_writing():
    problem = Regression(6)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.SGD(lr=1e-2, momentum=0.5) / hx.SGD(lr=0.0))
    problem.train(opt, range(2))
    live = opt.hyperparameters()[0]["lr"]
    for value in (0.1, 1, torch.tensor(0.2), torch.tensor([0.3])):
        opt.param_groups[0]["lr"] = value
        problem.train(opt, range(2, 3))
        assert live == opt.param_groups[0]["lr"] == pytest.approx(float(value), rel=1e-6)
    opt.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="param group: lr must be a number"):
        opt.step()


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.int64(1), 1])
def test_numbers_of_numpy_are_numbers(number):
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(2))], hx.SGD(lr=number, bounds={"lr": (number, 2 * number)}))
    assert opt.hyperparameters()[0]["lr"] == float(number)
    opt.param_groups[0]["weight_decay"] = number
    opt.step()
    assert opt.hyperparameters()[0]["weight_decay"] == float(number)


def test_the_default_device_does_not_matter():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with torch.device("meta"):
        opt = hx.HyperOptimizer([p], STACK)
        recorder = hx.Recorder(opt)
        opt.param_groups[0]["lr"] = 0.25
        opt.step()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.step()
        assert recorder.steps.tolist() == [1, 2]
    assert opt.hyperparameters()[0]["lr"].device == p.device
    assert bool((p < 0.6).all())


def test_a_first_step_of_an_lr_of_0_is_a_step():
    """Though torch.distributed.checkpoint lets an optimizer create its state by a step of such an lr."""
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    opt = hx.HyperOptimizer([p], hx.SGD(lr=0.1, momentum=0.9) / hx.SGD(lr=0.0))
    plain = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for lr in (0.0, 0.1, 0.1):
        p.grad, q.grad = p.detach().clone(), q.detach().clone()
        for o in (opt, plain):
            o.param_groups[0]["lr"] = torch.tensor(lr)
            o.step()
    torch.testing.assert_close(p, q)


def test_betas_are_beta1_and_beta2():
    problem = Regression(6)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam(lr=1e-2) / hx.SGD(lr=0.0))
    assert opt.defaults["betas"] == (0.9, 0.999)
    opt.param_groups[0]["betas"] = (0.5, torch.tensor(0.75))
    problem.train(opt, range(1))
    assert values(opt)[0]["beta1"] == pytest.approx(0.5, rel=1e-12)
    assert values(opt)[0]["beta2"] == pytest.approx(0.75, rel=1e-12)
    assert opt.param_groups[0]["betas"][0] is opt.param_groups[0]["beta1"]
    opt.param_groups[0]["betas"] = 0.9
    with pytest.raises(TypeError, match="param group: betas must be two numbers"):
        opt.step()


@pytest.mark.parametrize("space", ["linear", "log", "square"])
@pytest.mark.parametrize("learn", ["lr", ()])
def test_what_is_written_is_projected(space, learn):
    problem = Regression(4)
    stack = hx.Adam(lr=0.1, learn=learn, space={"lr": space}, bounds={"lr": (0.01, 1.0)}) / hx.SGD(lr=0.0)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    lr, beta1 = opt.hyperparameters()[0]["lr"], opt.hyperparameters()[0]["beta1"]
    for written, taken in [(-1.0, 0.01), (5.0, 1.0), (float("nan"), 1.0), (0.5, 0.5)]:
        lr.fill_(written)
        beta1.fill_(1.5)
        problem.train(opt, range(1))
        assert lr.item() == pytest.approx(taken, rel=1e-12)
        assert 0.999 < beta1 < 1


def test_schedulers_write_through():
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam(lr=0.1, learn=()) / hx.SGD())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for i in range(3):
        problem.train(opt, range(i, i + 1))
        scheduler.step()
    assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(0.1 * 0.5**3)


@every_stack
def test_parameters_without_a_gradient_are_skipped(stack):
    """The hypergradient is that of the parameters that moved in the last step and have a gradient in this one."""
    problem = Regression(12)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    expected = Regression(12)
    separate = [
        hx.HyperOptimizer([p], stack.levels[0] if isinstance(stack, hx.Stack) else stack)
        for p in expected.model.parameters()
    ]
    idle = {3: [0], 4: [0, 1], 5: [], 8: [2, 3], 9: [2]}
    for i in range(12):
        opt.zero_grad()
        problem.loss(i).backward()
        params = list(problem.model.parameters())
        before = [p.detach().clone() for p in params]
        for j in idle.get(i, []):
            params[j].grad = None
        opt.step()
        # the same updates by optimizers that learn nothing, at the values just used
        for j, (q, other) in enumerate(zip(expected.model.parameters(), separate, strict=True)):
            q.grad = params[j].grad
            for name, value in opt.hyperparameters()[0].items():
                other.param_groups[0][name].copy_(value[j] if value.dim() else value)
            other.step()
            if j in idle.get(i, []):
                assert torch.equal(params[j], before[j])
            torch.testing.assert_close(params[j], q, rtol=1e-10, atol=1e-12)
    assert opt.state[params[0]]["step"] == 10
    assert opt.state[params[2]]["step"] == 10


def test_a_returning_parameter_adds_nothing_to_the_hypergradient():
    w, u = (torch.nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (1.0, 2.0))
    opt = hx.HyperOptimizer([w, u], hx.SGD(lr=0.1) / hx.SGD(lr=0.01))
    script = [(1.0, 10.0), (2.0, None), (3.0, 20.0), (4.0, 30.0)]
    expected, lr = [], 0.1
    previous = (None, None)
    for g in script:
        lr += 0.01 * sum(a * b for a, b in zip(previous, g, strict=True) if a is not None and b is not None)
        expected.append(lr)
        previous = g
    for g, value in zip(script, expected, strict=True):
        w.grad, u.grad = (None if x is None else torch.tensor([x], dtype=torch.float64) for x in g)
        opt.step()
        assert opt.hyperparameters()[0]["lr"].item() == pytest.approx(value, rel=1e-14)


def test_frozen_parameters_never_move():
    problem = Regression(6)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    problem.train(opt, range(3))
    problem.loss(3).backward()
    frozen = problem.model[0].weight
    frozen.requires_grad_(False)  # with a gradient still there
    before = frozen.detach().clone()
    opt.step()
    problem.train(opt, range(4, 6))
    assert torch.equal(frozen, before)


def test_tied_weights():
    linear = torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.Sequential(linear, torch.nn.Tanh(), linear)
    opt = hx.HyperOptimizer(model.parameters(), STACK)
    assert len(opt.param_groups[0]["params"]) == 1
    for _ in range(3):
        opt.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        opt.step()
    assert model[0].weight is model[2].weight


def test_no_gradients_at_all():
    problem = Regression(1)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    opt.step()
    assert not opt.state
    assert values(opt)[0]["lr"] == 1e-2


@every_stack
@pytest.mark.parametrize("way", ["memory", "file", "deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_for_bit(stack, way, dtype):
    whole = Regression(20, dtype)
    opt = hx.HyperOptimizer(whole.model.parameters(), stack)
    whole.train(opt, range(7))
    whole.model[0].bias.grad = None
    opt.step()  # one parameter is idle when the run is cut
    part = copy.deepcopy(whole)
    if way == "deepcopy":
        part.model, resumed = copy.deepcopy((whole.model, opt))
    elif way == "pickle":
        part.model, resumed = pickle.loads(pickle.dumps((whole.model, opt)))
    else:
        state_dict = copy.deepcopy(opt.state_dict())
        if way == "file":
            buffer = io.BytesIO()
            torch.save(state_dict, buffer)
            buffer.seek(0)
            state_dict = torch.load(buffer, weights_only=True)
        resumed = hx.HyperOptimizer(part.model.parameters(), stack)
        lr = resumed.param_groups[0]["lr"]
        resumed.load_state_dict(state_dict)
        assert torch.equal(lr, opt.param_groups[0]["lr"])  # a view taken before stays live
        assert all(
            torch.equal(a, b)
            for s, t in zip(opt.state.values(), resumed.state.values(), strict=True)
            for a, b in zip(s.values(), t.values(), strict=True)
        )
    whole.train(opt, range(8, 20))
    part.train(resumed, range(8, 20))
    assert same(whole, part)
    assert values(opt) == values(resumed)


@pytest.mark.parametrize("stack", [hx.SGD(lr=0.1), STACK, TENSORS], ids=str)
def test_copies_have_what_was_assigned_before_the_next_step(stack):
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(2))], stack)
    opt.param_groups[0]["lr"] = 0.25
    if "betas" in opt.param_groups[0]:
        opt.param_groups[0]["betas"] = (0.5, 0.75)
    copies = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))]
    for each in [*copies, opt]:
        level = each.hyperparameters()[0]
        assert level["lr"].item() == 0.25
        assert level.get("beta1", 0.5) == 0.5
        assert each.param_groups[0]["lr"] is level["lr"]


def test_a_loaded_state_is_not_shared():
    problem = Regression(5)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    problem.train(opt, range(3))
    other = hx.HyperOptimizer(problem.model.parameters(), STACK)
    other.load_state_dict(opt.state_dict())
    before = copy.deepcopy(opt.state_dict())
    problem.train(other, range(3, 5))
    for a, b in zip(before["state"].values(), opt.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_an_edited_value_in_a_state_dict_counts():
    problem = Regression(5)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    problem.train(opt, range(3))
    state_dict = copy.deepcopy(opt.state_dict())
    state_dict["param_groups"][0]["lr"] = 0.25
    opt.load_state_dict(state_dict)
    assert opt.hyperparameters()[0]["lr"] == 0.25
    for edit in ({"betas": (0.5, 0.75)}, {"beta1": 0.5, "beta2": torch.tensor([0.75])}):
        other = copy.deepcopy(state_dict)
        other["param_groups"][0].update(edit)
        opt.load_state_dict(other)
        assert [opt.hyperparameters()[0][name].item() for name in ("lr", "beta1", "beta2")] == [0.25, 0.5, 0.75]


@every_learning_stack
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing_but_a_count(stack, bad):
    problem, clean = Regression(10), Regression(10)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), stack) for p in (problem, clean))
    for i in range(10):
        if i == 5:
            before = copy.deepcopy(opt.state_dict())
            opt.zero_grad()
            (problem.loss(i) * bad).backward()
            opt.step()
            after = opt.state_dict()
            for a, b in zip(before["state"].values(), after["state"].values(), strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))
            assert (opt.skipped_steps() == 1).all()
        problem.train(opt, range(i, i + 1))
        clean.train(expected, range(i, i + 1))
    assert same(problem, clean)
    assert values(opt) == values(expected)


def test_a_non_finite_first_gradient_is_skipped_too():
    problem, clean = Regression(5), Regression(5)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), STACK) for p in (problem, clean))
    (problem.loss(0) * float("nan")).backward()
    opt.step()
    assert opt.skipped_steps() == 1
    problem.train(opt, range(5))
    clean.train(expected, range(5))
    assert same(problem, clean)
    assert values(opt) == values(expected)


@pytest.mark.parametrize("stack", [hx.Adam(), hx.Adam(learn="lr") / hx.SGD(), hx.Adam() / hx.SGD()], ids=repr)
def test_a_second_moment_that_overflows_is_as_harmless_as_in_torch(stack):
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizers = [hx.HyperOptimizer(params[:1], stack), torch.optim.Adam(params[1:])]
    for size in (1.0, 1e30, 1.0, 1.0):
        for p, opt in zip(params, optimizers, strict=True):
            p.grad = torch.full_like(p, size)
            opt.step()
    assert torch.isfinite(params[0]).all()
    assert all(torch.isfinite(value) for level in optimizers[0].hyperparameters() for value in level.values())
    if len(optimizers[0].stack) == 1:
        torch.testing.assert_close(*params)


def test_an_overflow_in_the_tower_holds_it_and_passes():
    """Once a level has run away, its hypergradient may overflow; the parameters still train, and the tower recovers."""
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    problem.train(opt, range(4))
    top = _C.tower_offsets(STACK.plan())[2][0] - 2 * len(values(opt)[2])  # where the block of level 2 starts
    opt.param_groups[0]["tower"][0, top - len(values(opt)[1])] = float("inf")  # before it: d beta2 / d lr of level 1
    before = values(opt)
    weight = problem.model[2].weight.detach().clone()
    problem.train(opt, range(4, 5))
    assert opt.held_steps() == 1
    assert opt.skipped_steps() == 0
    assert values(opt) == before
    assert not torch.equal(problem.model[2].weight, weight)
    problem.train(opt, range(5, 10))
    assert opt.held_steps() == 1
    assert values(opt) != before


def test_printing():
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(1))], STACK)
    text = repr(opt)
    assert text.startswith("HyperOptimizer")
    assert "Parameter Group 0" in text
    assert "Adam/SGD/SGD" in text
    assert "tower" not in text


def test_state_that_was_looked_at_and_entries_of_others_are_no_state_of_ours():
    """A read of ``opt.state[p]`` leaves an empty dict there, and wrappers (Lookahead) keep tensors of their own."""
    problem, plain = Regression(4), Regression(4)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), STACK) for p in (problem, plain))
    first, second = list(problem.model.parameters())[:2]
    assert opt.state[first] == {}
    opt.load_state_dict(opt.state_dict())
    opt.state[second]["slow"] = torch.ones(2)
    problem.train(opt, range(2))
    plain.train(expected, range(2))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert torch.equal(opt.state[second]["slow"], torch.ones(2))
    opt.state[first] = {}  # starts anew
    problem.train(opt, range(2, 4))
    assert opt.state[first]["step"] == 2
    assert opt.state[second]["step"] == 4


@pytest.mark.parametrize("alias", [lambda t: t.detach(), lambda t: t.data, lambda t: t.view(1), lambda t: t[None][0]])
def test_another_view_of_a_live_value_may_be_assigned(alias):
    problem, plain = Regression(4), Regression(4)
    opt, expected = (hx.HyperOptimizer(p.model.parameters(), STACK) for p in (problem, plain))
    for i in range(4):
        opt.param_groups[0]["lr"] = alias(opt.param_groups[0]["lr"])
        problem.train(opt, range(i, i + 1))
        plain.train(expected, range(i, i + 1))
    assert same(problem, plain)


def test_an_assigned_tensor_is_a_constant():
    opt = hx.HyperOptimizer(Regression(1).model.parameters(), STACK)
    opt.param_groups[0]["lr"] = torch.tensor(0.1, requires_grad=True)
    assert not opt.hyperparameters()[0]["lr"].requires_grad
    copy.deepcopy(opt)


@pytest.mark.parametrize("high", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_no_bound_lets_a_beta_reach_1(name, high):
    p = torch.nn.Parameter(torch.randn(20))
    opt = hx.HyperOptimizer([p], hx.Adam(learn=name, bounds={name: (0.5, high)}) / hx.SGD(lr=1e4))
    for _ in range(50):
        p.grad = 2 * p.detach()
        opt.step()
    opt.param_groups[0][name] = 5.0
    opt.step()
    assert opt.hyperparameters()[0][name] < 1
    assert p.isfinite().all()


def test_state_dict_hooks_see_the_whole_and_may_replace_it():
    opt = hx.HyperOptimizer(Regression(1).model.parameters(), STACK)
    seen = []
    opt.register_state_dict_post_hook(lambda _, state_dict: seen.append(state_dict["param_groups"][0]["stack"]))
    opt.register_state_dict_post_hook(lambda _, state_dict: {"replaced": state_dict})
    assert list(opt.state_dict()) == ["replaced"]
    assert seen == [opt.stack.structure()]


def test_a_group_may_hold_entries_of_others():
    """As of a wrapper that hands its own groups on (SAM, with a ``rho``); what looks like a mistake is a warning."""
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="Adam has no rho, which does nothing; its arguments are .*lr, betas"):
        opt = hx.HyperOptimizer([{"params": [p], "rho": 0.05, "adaptive": False}], hx.Adam() / hx.SGD())
    assert opt.param_groups[0]["rho"] == 0.05


def test_a_name_that_is_nearly_an_argument_is_a_warning():
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match=r"AdamW has no weigth_decay \(is it weight_decay\?\), which does") as warned:
        hx.HyperOptimizer([{"params": [p], "weigth_decay": 0.0}], hx.AdamW() / hx.SGD())
    assert warned[0].filename == __file__
    for entries, name in (({"betas": (0.9, 0.9)}, "betas"), ({"amsgrad": True, 1: 2}, "amsgrad")):
        with pytest.warns(UserWarning, match=f"SGD has no {name}, which does nothing"):
            hx.HyperOptimizer([{"params": [p], **entries}], hx.SGD() / hx.SGD())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hx.HyperOptimizer(torch.optim.Adam([{"params": [p]}]).param_groups, hx.Adam() / hx.SGD())


@pytest.mark.parametrize(
    ("level", "names"),
    [
        (hx.Adam(learn="lr", horizon=100), "learn, horizon"),
        (hx.SGD(normalize=True), "normalize"),
        (hx.SGD(learn="weight_decay"), "learn"),
        (hx.Wrap(torch.optim.Muon, learn="weight_decay"), "learn"),
    ],
    ids=str,
)
def test_a_level_that_nothing_tunes_though_it_says_how_is_a_warning(level, names):
    params = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.warns(UserWarning, match=f"{level}: nothing heeds {names}, since no level stands above"):
        hx.HyperOptimizer(params, level)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hx.HyperOptimizer(params, level / hx.SGD())
        hx.HyperOptimizer(params, hx.Adam(learn=(), trust=0.1, bounds={"lr": (0.0, 1.0)}))
        for alone in (hx.Wrap(torch.optim.Muon), hx.SGD(learn="lr"), hx.compat.gdtuo.Adam()):
            hx.HyperOptimizer(params, alone)


def test_all_levels_are_printed():
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(2))], hx.SGD(lr=0.1) / hx.Adam(lr=0.5) / hx.SGD(lr=0.25))
    assert "    1/Adam/lr: 0.5\n" in repr(opt)
    assert "    2/SGD/lr: 0.25\n" in repr(opt)
    tall = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(2))], hx.Stack.of(hx.Adam(), 100))
    assert "    and 91 levels more\n" in repr(tall)
    assert len(repr(tall)) < 2500
    opt.param_groups[0]["lr"] = "high"  # an error for step() to raise
    assert "    lr: high\n" in repr(opt)


def test_a_group_keeps_its_stack():
    problem = Regression(2)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    opt.param_groups[0]["stack"] = hx.Stack.coerce(hx.Adam())
    with pytest.raises(ValueError, match="its stack stays what it is"):
        problem.train(opt, range(1))
    problem.train(opt, range(2))
    opt.load_state_dict(opt.state_dict())


def test_what_the_last_level_would_learn_is_no_part_of_a_checkpoint():
    opt, other = (
        hx.HyperOptimizer(Regression(1).model.parameters(), hx.Adam() / top) for top in (hx.SGD(), hx.SGD(learn=()))
    )
    other.load_state_dict(opt.state_dict())


def test_whole_numbers_of_numpy():
    level = hx.Adam(horizon=np.int64(3), burn_in=np.int32(2))
    assert level.horizons() == (3.0, 0.0)
