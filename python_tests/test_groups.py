"""Param groups: values, stacks and policies of their own, and what is done to them from outside."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from problems import Regression
from stacks import SGD, STACK, TENSORS, every_stack, same, values

import hyperopt_ext as hx
from hyperopt_ext import optimizer
from hyperopt_ext.update import Group


@every_stack
def test_a_group_may_be_empty(stack):
    problem, alone = Regression(4), Regression(4)
    opt = hx.HyperOptimizer([{"params": problem.model.parameters()}, {"params": []}], stack)
    problem.train(opt, range(4))
    alone.train(hx.HyperOptimizer(alone.model.parameters(), stack), range(4))
    assert same(problem, alone)
    opt.load_state_dict(opt.state_dict())
    assert opt.skipped_steps(1) == 0


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


def leave_and_join(opt, p, step):
    """What is done to the groups before a step."""
    if step == 3:
        del opt.param_groups[0]
        opt.add_param_group({"params": [p]})


def leave_and_return(opt, p, step):
    if step == 3:
        opt.param_groups[0]["params"].pop()
    if step == 6:
        opt.param_groups[0]["params"].append(p)


def change_the_group(opt, p, step):
    if step == 3:
        opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop())


def change_places(opt, p, step):
    if step == 3:
        a, b = (group["params"] for group in opt.param_groups)
        a[0], b[0] = b[0], a[0]
    if step == 6:
        del opt.param_groups[0]


@pytest.mark.parametrize("change", [leave_and_join, leave_and_return, change_the_group, change_places])
@pytest.mark.parametrize(
    ("method", "options", "more"),
    [
        ("Adam", {}, {}),
        ("Adam", {}, {"learn": "lr"}),
        ("Adam", {}, {"horizon": 3}),
        ("AdamW", {"weight_decay": 0.1}, {}),
        ("SGD", {"momentum": 0.9}, {}),
        ("RMSprop", {}, {}),
    ],
)
def test_a_parameter_that_leaves_its_group_has_all_of_its_state(method, options, more, change):
    """The moments of a learning tower are one step behind."""
    results = []
    for make in (
        lambda groups: hx.HyperOptimizer(groups, getattr(hx, method)(lr=0.1, **options, **more) / hx.SGD(lr=0.0)),
        lambda groups: getattr(torch.optim, method)(groups, lr=0.1, **options),
    ):
        p, q = (torch.nn.Parameter(torch.tensor([x, 1.0], dtype=torch.float64)) for x in (1.0, 2.0))
        opt = make([{"params": [p]}, {"params": [q]}])
        for step in range(9):
            change(opt, p, step)
            for w in (p, q):
                w.grad = torch.sin((step + 1) * w.detach())
            opt.step()
        results.append((p, q))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_a_tensor_with_a_tower_of_its_own_leaves_with_all_of_its_state():
    results = []
    for make in (
        lambda groups: hx.HyperOptimizer(groups, hx.Adam(lr=0.1, granularity="tensor") / hx.SGD(lr=0.0)),
        lambda groups: torch.optim.Adam(groups, lr=0.1),
    ):
        params = [torch.nn.Parameter(torch.tensor([x, 1.0], dtype=torch.float64)) for x in (1.0, 2.0, 3.0)]
        opt = make([{"params": params[:2]}, {"params": params[2:]}])
        for step in range(6):
            leave_and_join(opt, params[1], step)  # and params[0] stays away
            for w in params:
                w.grad = torch.sin((step + 1) * w.detach())
            opt.step()
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("horizon", [1, 3])
def test_what_a_parameter_did_in_another_group_says_nothing_of_this_one(horizon):
    p, q = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    opt = hx.HyperOptimizer([{"params": [p]}, {"params": [q]}], hx.SGD(lr=0.1, horizon=horizon) / hx.SGD(lr=1e-2))
    for moved in (False, True):
        if moved:
            opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop())
        p.grad, q.grad = torch.ones_like(p), torch.zeros_like(q)
        opt.step()
    assert opt.hyperparameters(1)[0]["lr"] == 0.1


def test_without_a_group_it_loads_what_was_saved_without_it():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt, other = (
        hx.HyperOptimizer([{"params": [params[0]], "stack": STACK}, {"params": [params[1]]}], SGD) for _ in range(2)
    )
    del other.param_groups[0]
    other.param_groups[0]["lr"] = 0.25
    state_dict = other.state_dict()
    del opt.param_groups[0]
    opt.load_state_dict(state_dict)  # before any step
    assert opt.hyperparameters()[0]["lr"] == 0.25


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


CHANGED = {
    "in place": lambda opt: opt.param_groups[0]["params"].reverse(),
    "another list": lambda opt: opt.param_groups[0].update(params=opt.param_groups[0]["params"][::-1]),
    "another dict": lambda opt: opt.param_groups.append(
        {**(group := opt.param_groups.pop()), "params": group["params"][::-1]}
    ),
    "one of them is new": lambda opt: opt.param_groups[0]["params"].insert(0, torch.ones(2)),
}
LOOKS = [lambda opt: opt.step(), lambda opt: opt.hyperparameters(), lambda opt: opt.state_dict()]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_tensors_with_towers_of_their_own_keep_their_places(change, look):
    problem, alone = Regression(8), Regression(8)
    opt, other = (hx.HyperOptimizer(p.model.parameters(), TENSORS) for p in (problem, alone))
    problem.train(opt, range(4))
    before = [*opt.param_groups[0]["params"]]
    change(opt)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"for each .*tensor"):
            look(opt)
    opt.param_groups[0]["params"][:] = before
    problem.train(opt, range(4, 8))
    alone.train(other, range(8))
    assert same(problem, alone)
    assert torch.equal(*(o.param_groups[0]["tower"] for o in (opt, other)))


def test_the_order_of_tensors_that_share_a_tower_is_free():
    problem = Regression(8)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam(lr=0.01) / hx.SGD(lr=1e-4))
    problem.train(opt, range(4))
    lr = opt.hyperparameters()[0]["lr"]
    opt.param_groups[0]["params"].reverse()
    problem.train(opt, range(4, 8))
    assert opt.hyperparameters()[0]["lr"] == lr
    assert {opt.state[p]["step"].item() for p in problem.model.parameters()} == {8}


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
            assert "1/SGD/lr" in repr(hx.HyperOptimizer([{"params": [p], **entries}], hx.SGD() / hx.SGD()))
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


def test_what_is_switched_on_later_is_an_error():
    """torch.optim would heed it: here it takes other operators."""
    for level, name, value in [
        (hx.SGD(), "momentum", 0.9),
        (hx.SGD(), "nesterov", True),
        (hx.RMSprop(), "momentum", torch.tensor(0.9)),
        (hx.RMSprop(), "centered", True),
        (hx.Adam(), "horizon", 10),
    ]:
        problem = Regression(4)
        opt = hx.HyperOptimizer(problem.model.parameters(), level / hx.SGD(lr=1e-6))
        problem.train(opt, range(1))
        before = [p.detach().clone() for p in problem.model.parameters()]
        opt.param_groups[0][name] = value
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"{name} does nothing here, .* write {level}\({name}="):
                problem.train(opt, range(1, 2))
        assert all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), before, strict=True))
        opt.param_groups[0][name] = False
        opt.param_groups[0]["rho"] = 0.05  # a wrapper's own
        problem.train(opt, range(1, 3))
        del opt.param_groups[0][name]
        problem.train(opt, range(3, 4))


def test_a_tower_that_is_moved_is_followed():
    """As where each tensor of a param group is put elsewhere; what was written meanwhile counts."""
    here, there = Regression(12), Regression(12)
    moved, stays = (hx.HyperOptimizer(problem.model.parameters(), STACK) for problem in (here, there))
    for steps in (range(4), range(4, 8), range(8, 12)):
        here.train(moved, steps)
        there.train(stays, steps)
        for group in moved.param_groups:
            for name, value in group.items():
                if isinstance(value, torch.Tensor):
                    group[name] = value.clone()
        if steps.stop == 8:
            moved.param_groups[0]["lr"] = 0.005
            stays.param_groups[0]["lr"] = 0.005
        assert torch.equal(moved.state_dict()["param_groups"][0]["tower"], moved._groups[0].tower)
    assert same(here, there)
    assert values(moved) == values(stays)
    assert torch.equal(moved.param_groups[0]["tower"], stays.param_groups[0]["tower"])


def test_a_group_keeps_its_stack():
    problem = Regression(2)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACK)
    opt.param_groups[0]["stack"] = hx.Stack(STACK.levels)  # an equal one
    problem.train(opt, range(1))
    opt.param_groups[0]["stack"] = hx.Stack.coerce(hx.Adam())
    with pytest.raises(ValueError, match="its stack stays what it is"):
        problem.train(opt, range(1))
    problem.train(opt, range(2))
    opt.load_state_dict(opt.state_dict())


def test_a_list_of_parameters_may_be_a_module():
    params = torch.nn.ParameterList([torch.ones(2), torch.ones(3)])
    assert len(hx.HyperOptimizer(params, hx.SGD()).param_groups[0]["params"]) == 2


def resize(p, opt):
    p.data = torch.empty(0)


def cast(p, opt):
    p.data = p.data.to(torch.bfloat16)


def forget(p, opt):
    opt.state[p].pop("exp_avg")


def replace(p, opt):
    params = opt.param_groups[0]["params"]
    params[0] = torch.nn.Parameter(p.detach().clone())
    params[0].grad = torch.ones(2)
    opt.step()
    opt.param_groups[0]["nonfinite"] = "skip"


@pytest.mark.parametrize("granularity", ["group", "tensor"])
@pytest.mark.parametrize("change", [resize, cast, forget, replace])
def test_whatever_happened_to_a_parameter_that_leaves(change, granularity):
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = hx.HyperOptimizer([{"params": [p]}, {"params": [q]}], hx.AdamW(granularity=granularity) / hx.SGD())
    for i in range(4):
        for w in (p, q):
            w.grad = torch.ones_like(w)
        if i == 2:
            change(p, opt)
            del opt.param_groups[0]
        opt.step()
    assert opt.state[q]["step"] == 4 + (change is replace)


def test_what_is_saved_between_a_move_and_a_step_is_what_goes_on():
    results = []
    for saves in (False, True):
        p, q = (torch.nn.Parameter(torch.tensor([x, 1.0])) for x in (1.0, 2.0))
        groups = [{"params": [p], "betas": (0.5, 0.6)}, {"params": [q]}]
        opt = hx.HyperOptimizer(groups, hx.Adam(lr=0.1) / hx.SGD(lr=1e-3))
        for i in range(6):
            if i == 3:
                change_the_group(opt, p, i)
                if saves:
                    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            for w in (p, q):
                w.grad = torch.sin((i + 1) * w.detach())
            opt.step()
        results.append((p.tolist(), q.tolist()))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("published", "level"),
    [
        (torch.optim.AdamW, hx.AdamW()),
        (torch.optim.AdamW, hx.Wrap(torch.optim.AdamW)),
        (partial(torch.optim.Adam, amsgrad=True), hx.AMSGrad()),
    ],
)
def test_param_groups_of_torch_are_taken_over(published, level):
    groups = published([torch.nn.Parameter(torch.ones(2))], lr=0.25).param_groups
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = hx.HyperOptimizer(groups, level / hx.SGD(lr=1e-5))
    assert opt.param_groups[0]["lr"] == 0.25
