"""Wrong input: one clear error that names the argument, before anything is changed."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import Regression
from torch.testing._internal.two_tensor import TwoTensor

import hyperopt_ext as hx
from hyperopt_ext import _C
from hyperopt_ext.compat import gdtuo

P = torch.nn.Parameter
NAN = float("nan")


def param(*shape, **kw):
    p = P(torch.zeros(shape or (2,), **kw), requires_grad=False)
    return p.requires_grad_() if p.is_floating_point() or p.is_complex() else p


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: hx.SGD(lr=-1.0), ValueError, "SGD: lr must be in .0, inf"),
        (lambda: hx.Adam(lr=NAN), ValueError, "Adam: lr"),
        (lambda: hx.Adam(lr=float("inf")), ValueError, "Adam: lr"),
        (lambda: hx.Adam(lr="fast"), TypeError, "Adam: lr must be a number"),
        (lambda: hx.Adam(lr=torch.tensor(0.1)), TypeError, r"Adam: lr must be a number, .*write float\(lr\)"),
        (
            lambda: hx.HyperOptimizer(hx.HyperOptimizer([param()], hx.Adam()).param_groups, hx.Adam()),
            ValueError,
            "it is that of another HyperOptimizer",
        ),
        (lambda: hx.Adam(lr=True), TypeError, "Adam: lr must be a number"),
        (
            lambda: hx.Adam([param()], lr=0.1),
            TypeError,
            r"takes no parameters: write hx.HyperOptimizer\(params, hx.Adam",
        ),
        (lambda: hx.SGD(torch.nn.Linear(1, 1).parameters()), TypeError, "SGD is a level of a stack"),
        (lambda: hx.Adam(horizon=(100, 25)), ValueError, "part of all steps, up to 1"),
        (lambda: hx.Adam(eps=-1e-8), ValueError, "Adam: eps"),
        (lambda: hx.Adam(eps=NAN), ValueError, "Adam: eps"),
        (lambda: hx.Adam(betas=(1.0, 0.9)), ValueError, "Adam: beta1 must be in .0, 1"),
        (lambda: hx.Adam(betas=(0.9, -0.1)), ValueError, "Adam: beta2"),
        (lambda: hx.Adam(betas=(0.9,)), TypeError, "betas must be two numbers"),
        (lambda: hx.Adam(betas=0.9), TypeError, "betas must be two numbers"),
        (lambda: hx.Adam(weight_decay=-1), ValueError, "weight_decay"),
        (lambda: hx.SGD(momentum=1.0), ValueError, "SGD: momentum"),
        (lambda: hx.SGD(momentum=-0.1), ValueError, "SGD: momentum"),
        (lambda: hx.SGD(nesterov=True), ValueError, "nesterov needs momentum"),
        (lambda: hx.SGD(nesterov=True, momentum=0.9, dampening=0.1), ValueError, "nesterov needs momentum"),
        (lambda: hx.AdamW(betas=0.9), TypeError, "AdamW: betas must be two numbers"),
        (lambda: hx.RMSprop(alpha=1.0), ValueError, "RMSprop: alpha"),
        (lambda: hx.RMSprop(eps_root=-1.0), ValueError, "RMSprop: eps_root"),
        (lambda: hx.Adagrad(initial_accumulator_value=-1.0), ValueError, "Adagrad: initial_accumulator_value"),
        (lambda: hx.Adagrad(initial_accumulator_value="1"), TypeError, "Adagrad: initial_accumulator_value"),
        (lambda: hx.Adam(learn="momentum"), ValueError, "learn names 'momentum', but this level has lr, beta1"),
        (lambda: hx.Adam(space={"beta3": "log"}), ValueError, "space names 'beta3'"),
        (lambda: hx.Adam(space={"lr": "cubic"}), ValueError, "linear, log, square, softplus, tanh"),
        (lambda: hx.SGD(lr=2.0, space={"lr": "tanh"}), ValueError, "coordinate 'tanh'"),
        (lambda: hx.Adam(bounds={"betas": (0, 1)}), ValueError, "bounds names 'betas'"),
        (lambda: hx.Adam(bounds={"lr": (1.0, 0.1)}), ValueError, "bounds.'lr'. must be"),
        (lambda: hx.Adam(bounds={"lr": 3.0}), ValueError, "bounds.'lr'. must be"),
        (lambda: hx.Adam(lr=1e-3, bounds={"lr": (0.1, 1.0)}), ValueError, "outside bounds"),
        (lambda: hx.Adam(initial_state={"momentum_buffer": 1.0}), ValueError, "initial_state names"),
        (lambda: hx.Adam(space={"lr": "ln"}), ValueError, "linear, log, square, softplus, tanh, multiplicative"),
        (lambda: hx.SGD(lr=0.0, space={"lr": "ln"}), ValueError, "but the coordinates are linear"),
        (
            lambda: hx.SGD(lr=0.0, learn="lr", space={"lr": "log"}),
            ValueError,
            "lr = 0 cannot be left in the coordinate 'log'",
        ),
        (
            lambda: hx.Adam(weigth_decay=0.1),
            TypeError,
            "no argument 'weigth_decay' .is it weight_decay..; its arguments are lr",
        ),
        (
            lambda: hx.Adam(clipping=1.0),
            TypeError,
            "Adam has no argument 'clipping' .is it clip..; its arguments are .*clip, growth",
        ),
        (lambda: hx.Adam(1e-3, gamma=1.0), TypeError, "Adam has no argument 'gamma'"),
        (lambda: hx.Adam(amsgrad=True), TypeError, "Adam has no argument 'amsgrad': use hx.AMSGrad; its arguments are"),
        (lambda: hx.AdamW(maximize=True), TypeError, "'maximize': it is an argument of HyperOptimizer"),
        (lambda: hx.SGD(fused=True), TypeError, "'fused': leave it out"),
        (lambda: hx.Adam(optimizer=hx.SGD()), TypeError, "'optimizer': write the level above after a slash"),
        (
            lambda: hx.functional.sgd([param()], [None], None, {}, torch.tensor(1)),
            TypeError,
            r"grads must be a list of tensors, but grads\[0\] is None",
        ),
        (
            lambda: gdtuo.ModuleWrapper,
            AttributeError,
            "hx.HyperOptimizer.model.parameters.., stack. stands in its place",
        ),
        (lambda: hx.Adam(learn="betas"), ValueError, "this level has .*beta1.*betas go by their names"),
        *(
            (
                lambda name=name, space=space: hx.SGD(**{"lr": 0.1, name: 0.0}, learn=name, space={name: space}),
                ValueError,
                f"{name} = 0 cannot be left in the coordinate '{space}'",
            )
            for name, space in [("lr", "softplus"), ("lr", "square"), ("momentum", "tanh"), ("lr", "multiplicative")]
        ),
        (lambda: hx.HyperOptimizer(torch.nn.Linear(1, 1), hx.Adam()), TypeError, "write model.parameters"),
        (lambda: hx.auto(torch.nn.Linear(1, 1)), TypeError, "params are those of the Linear: write model.parameters"),
        (
            lambda: hx.HyperOptimizer([param()], hx.Adam()).export(params=torch.nn.Linear(1, 1)),
            TypeError,
            "write model.parameters",
        ),
        (lambda: hx.HyperOptimizer([param()], hx.Adam), TypeError, "Adam is a class: write it with parentheses"),
        (lambda: hx.HyperOptimizer([param()], torch.optim.Adam), TypeError, r"hx.Wrap\(torch.optim.Adam, lr=...\)"),
        (lambda: hx.HyperOptimizer(hx.Adam(), [param()]), TypeError, "in the wrong order"),
        (
            lambda: torch.optim.Adam([param()]) / hx.SGD(),
            TypeError,
            "not an optimizer: write hx.Adam.*, if there is one, or hx.Wrap.torch.optim.Adam, lr=",
        ),
        (lambda: torch.optim.Muon / (hx.SGD() / hx.SGD()), TypeError, "or hx.Wrap.torch.optim.Muon, lr="),
        (lambda: hx.SGD() / hx.SGD() / torch.optim.Adam([param()]), TypeError, "not an optimizer: write hx.Adam"),
        (lambda: hx.AdamW(amsgrad=True), TypeError, "AdamW has no argument 'amsgrad'; its arguments are"),
        (lambda: hx.Stack(hx.Adam(), hx.SGD()), TypeError, "write a / b to stack two"),
        (lambda: hx.Adam(clip=0.0), ValueError, "Adam: clip must be None or a number greater than 0"),
        (lambda: hx.Adam(clip="1"), ValueError, "Adam: clip must be"),
        (lambda: hx.Adam(growth=1.0), ValueError, "Adam: growth must be None or a number greater than 1"),
        (lambda: hx.Adam(trust=-0.1), ValueError, "Adam: trust must be"),
        (lambda: hx.Adam(trust=float("inf")), ValueError, "Adam: trust must be"),
        (lambda: hx.Adam(horizon=0), ValueError, "Adam: horizon must be a whole number of steps, at least 1"),
        (lambda: hx.Adam(horizon=2.5), ValueError, "Adam: horizon must be a whole number"),
        (lambda: hx.Adam(horizon=(100, -1)), ValueError, "Adam: horizon must be a number of steps, or"),
        (lambda: hx.Adam(horizon=(100, 0.1, 3)), ValueError, "Adam: horizon must be a number of steps, or"),
        (lambda: hx.Adam(horizon=()), ValueError, "Adam: horizon must be a number of steps, or"),
        (lambda: hx.Adam(burn_in=-1), ValueError, "Adam: burn_in must be a whole number of steps, at least 0"),
        (lambda: hx.Adam(normalize=1), TypeError, "Adam: normalize must be True or False"),
        (lambda: hx.SGD(momentum=0.9, nesterov="no"), TypeError, "SGD: nesterov must be True or False, not 'no'"),
        (lambda: hx.HyperOptimizer([param()], hx.Adam(), maximize="no"), TypeError, "maximize must be True or False"),
        (
            lambda: hx.HyperOptimizer([{"params": [param()], "maximize": 1}], hx.Adam()),
            TypeError,
            "maximize must be True or False",
        ),
        (lambda: hx.HyperOptimizer([{"lr": 0.1}], hx.Adam()), ValueError, "has no 'params': it holds 'lr'"),
        (
            lambda: hx.HyperOptimizer([param()], hx.Adam()).hyperparameters(1),
            IndexError,
            "group is 1, but this optimizer has 1 param groups",
        ),
        (lambda: hx.HyperOptimizer([param()], hx.Adam()).load_state_dict("last.pt"), TypeError, "not str"),
        (lambda: hx.Adam(granularity="layer"), ValueError, "the granularities are 'group', 'tensor'"),
        (lambda: hx.Adam(converge=0.1), ValueError, "Adam: converge must be .limit >= 0, steps > 0"),
        (lambda: hx.Adam(converge=(0.1, 0)), ValueError, "Adam: converge must be"),
        (lambda: hx.SGD() / hx.SGD(trust=0.1), ValueError, "only the first level can have it"),
        (
            lambda: hx.HyperOptimizer([param()], hx.SGD(), shard_group=3),
            TypeError,
            "shard_group must be a ProcessGroup, .* not int",
        ),
        (lambda: hx.SGD() / hx.SGD(granularity="tensor"), ValueError, "the level below has one set"),
        (lambda: hx.HyperOptimizer([param()], hx.SGD(), nonfinite="stop"), ValueError, "'hold', 'skip', 'raise'"),
        (
            lambda: hx.HyperOptimizer([{"params": [param()], "nonfinite": "no"}], hx.SGD()),
            ValueError,
            "nonfinite is 'no', but the policies are",
        ),
        (lambda: hx.Level(), TypeError, "hx.SGD, hx.Adam"),
        (lambda: hx.Stack(()), ValueError, "levels is empty"),
        (lambda: hx.Stack(hx.Adam()), TypeError, "sequence of levels"),
        (lambda: hx.Stack((hx.Adam() / hx.SGD(), hx.SGD())), TypeError, "levels holds a stack"),
        (lambda: hx.Stack((hx.Adam(), 0.1)), TypeError, "must hold levels"),
        (lambda: hx.Stack.of(hx.Adam() / hx.SGD(), height=2), TypeError, "spec must be a level"),
        (lambda: hx.Stack.of(hx.Adam(), height=0), ValueError, "height must be at least 1"),
        (lambda: hx.Stack.of(hx.Adam(), height=2.0), TypeError, "height must be an int"),
        (lambda: hx.Adam() / 0.1, TypeError, "only levels can be stacked, not 0.1"),
        (lambda: hx.Adam() / hx.SGD, TypeError, "parentheses"),
        (lambda: hx.Adam(space="log"), TypeError, "space must be a dict such as"),
        (lambda: hx.Adam(bounds=(0, 1)), TypeError, "bounds must be a dict such as"),
        (lambda: hx.Adam(bounds={"lr": (None, 1)}), ValueError, "two numbers, low <= high"),
        (lambda: hx.Adam(learn=5), TypeError, "learn must be a name or several"),
        (lambda: hx.Adam(horizon=(100,)), ValueError, "horizon must be a number of steps, or .steps, part"),
        (lambda: hx.Adam(space={"lr": ["log"]}), ValueError, "but the coordinates are linear, log"),
        (lambda: hx.Adam(initial_state={"exp_avg": "0"}), ValueError, "must be a finite number, not '0'"),
        (lambda: hx.Adam(initial_state={"exp_avg": float("nan")}), ValueError, "must be a finite number, not nan"),
        (lambda: hx.functional.sgd(param(), param(), None, {}, torch.tensor(1)), TypeError, "params must be a list"),
        (lambda: hx.functional.sgd([param()], [None], None, {}, torch.tensor(1)), TypeError, "grads must be a list"),
        (lambda: hx.Adam / hx.SGD(), TypeError, "parentheses"),
        (lambda: hx.HyperOptimizer([param()], 1e-3), TypeError, "stack must be a level or a stack"),
        (lambda: hx.HyperOptimizer([param()], hx.Adam), TypeError, "stack must be a level or a stack"),
        (lambda: hx.HyperOptimizer([], hx.Adam()), ValueError, "empty parameter list"),
        (
            lambda: hx.HyperOptimizer([param(dtype=torch.complex64)], hx.Adam()),
            TypeError,
            r"params\[0\] is torch.complex64",
        ),
        (
            lambda: hx.HyperOptimizer([("w", param(dtype=torch.cfloat))], hx.Adam()),
            TypeError,
            "params: w is torch.complex",
        ),
        (
            lambda: hx.HyperOptimizer([P(TwoTensor(torch.ones(2), torch.ones(2)))], hx.SGD()),
            TypeError,
            "is a TwoTensor",
        ),
        (lambda: hx.HyperOptimizer([P(torch.eye(2).to_sparse())], hx.Adam()), TypeError, "only dense"),
        (lambda: hx.HyperOptimizer([[1.0]], hx.Adam()), TypeError, "can only optimize Tensors"),
        (
            lambda: hx.HyperOptimizer([param() + 1, torch.ones(1, requires_grad=True) * 2], hx.Adam()),
            ValueError,
            "non-leaf",
        ),
        (lambda: hx.HyperOptimizer([param(), param(device="meta")], hx.Adam()), ValueError, "one param group a device"),
        (lambda: hx.HyperOptimizer([{"params": [param()], "lr": -1.0}], hx.Adam()), ValueError, "Adam: lr"),
        (
            lambda: hx.HyperOptimizer([{"params": [param()], "beta1": 0.5}], hx.Adam()),
            ValueError,
            "beta1 is set through",
        ),
        (lambda: hx.HyperOptimizer([{"params": [param()], "stack": 3}], hx.Adam()), TypeError, "stack must be"),
        (
            lambda: hx.functional.adam([param()], [param()], None, {"lr": 0.1}, torch.tensor(1)),
            TypeError,
            "lr must be a tensor",
        ),
        (lambda: hx.functional.adam([param()], [param()], None, {}, 1), TypeError, "step must be a tensor"),
        (
            lambda: hx.functional.adam([param()], [param()], None, {"momentum": torch.tensor(0.1)}, torch.tensor(1)),
            ValueError,
            "hyper names 'momentum'",
        ),
        (
            lambda: hx.functional.adam([param()], [param()], {"momentum_buffer": []}, {}, torch.tensor(1)),
            ValueError,
            "state must hold exp_avg, exp_avg_sq",
        ),
        (lambda: hx.functional.radam, AttributeError, "functional has no 'radam'; it has sgd, "),
        (
            lambda: hx.functional.adam([param()], [param()], None, {}, torch.tensor(1), nesterov=True),
            TypeError,
            "adam has no argument 'nesterov'",
        ),
        (
            lambda: hx.functional.sgd([param()], [], None, {}, torch.tensor(1)),
            ValueError,
            "grads must have the length 1",
        ),
        (lambda: hx.functional.sgd([param(2)], [param(3)], None, {}, torch.tensor(1)), ValueError, "shape"),
        (
            lambda: hx.functional.sgd([param()], [param()], None, {}, torch.tensor(1, device="meta")),
            ValueError,
            "step must be a tensor of one number that has a value",
        ),
        (
            lambda: hx.functional.sgd(
                [param()], [param()], None, {"lr": torch.tensor(1.0, device="meta")}, torch.tensor(1)
            ),
            ValueError,
            "hyper: lr must be a tensor of one floating-point number that has a value",
        ),
        (
            lambda: hx.functional.sgd(
                [param(dtype=torch.int32)], [param(dtype=torch.int32)], None, {}, torch.tensor(1)
            ),
            TypeError,
            "float32",
        ),
    ],
)
def test_clear_errors(make, error, words):
    with pytest.raises(error, match=words) as raised:
        make()
    assert "\n" not in str(raised.value).strip()


def test_a_parameter_twice():
    p = param()
    with pytest.raises(ValueError, match=r"params\[1\] is the same parameter as params\[0\]"):
        hx.HyperOptimizer([p, p], hx.Adam())
    with pytest.raises(ValueError, match="more than one parameter group"):
        hx.HyperOptimizer([{"params": [p]}, {"params": [p]}], hx.Adam())


def snapshot(problem, opt):
    return copy.deepcopy((problem.model.state_dict(), opt.state_dict()))


def assert_unchanged(before, problem, opt):
    model, state_dict = snapshot(problem, opt)
    torch.testing.assert_close(model, before[0], rtol=0, atol=0)
    torch.testing.assert_close(state_dict["state"], before[1]["state"], rtol=0, atol=0)
    for a, b in zip(state_dict["param_groups"], before[1]["param_groups"], strict=True):
        assert a.keys() == b.keys()
        assert torch.equal(a["tower"], b["tower"])
        assert a["stack"] == b["stack"]


BAD_GRADIENTS = {
    "sparse": (lambda p: torch.ones_like(p).to_sparse(), r"grads\[\d\] is Sparse"),
    "other dtype": (lambda p: torch.ones_like(p, dtype=torch.float32), r"grads\[\d\] must be"),
}


@pytest.mark.parametrize("bad", BAD_GRADIENTS)
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("stack", [hx.Adam() / hx.SGD(), hx.Adam(learn="lr") / hx.Adam(), hx.SGD()], ids=str)
def test_bad_gradients_change_nothing(bad, steps, stack):
    problem = Regression(5)
    make, words = BAD_GRADIENTS[bad]
    opt = hx.HyperOptimizer(
        [{"params": problem.model[0].parameters()}, {"params": problem.model[2].parameters()}], stack
    )
    problem.train(opt, range(steps))
    opt.zero_grad()
    problem.loss(4).backward()
    p = problem.model[2].bias  # the last one of all
    grad = make(p)
    if bad == "other dtype":
        p.grad_dtype = None  # torch lets the two differ then
    p.grad = grad
    before = snapshot(problem, opt)
    with pytest.raises((ValueError, TypeError), match=words + ".*belongs to parameter 1 of its group, of shape"):
        opt.step()
    assert_unchanged(before, problem, opt)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_error_names_the_parameter(compiled):
    """The lists of the operators hold only what has a gradient."""
    names = ["frozen", "idle", "table"]
    params = [P(torch.zeros(5, 3), requires_grad=name != "frozen") for name in names]
    opt = hx.HyperOptimizer(zip(names, params, strict=True), hx.Adam() / hx.SGD())
    params[2].grad = torch.ones(5, 3).to_sparse()
    step = torch.compile(opt.step, backend="eager") if compiled else opt.step
    with pytest.raises(ValueError, match=r"use sparse=False \(grads\[0\] belongs to 'table', of shape \(5, 3\)\)"):
        step()


def test_a_state_that_cannot_be_written_to_changes_nothing():
    """It would be noticed when a copy of it goes back, after the parameters have moved."""
    problem = Regression(3)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam() / hx.SGD())
    problem.train(opt, range(2))
    weight = problem.model[0].weight
    opt.state[weight]["exp_avg_sq"] = torch.zeros(1, dtype=torch.float64).expand(weight.shape)  # the second slot
    before = snapshot(problem, opt)
    with pytest.raises(ValueError, match=r"state\[4\] holds several .*belongs to parameter 0 of its group, of shape"):
        problem.train(opt, range(2, 3))
    assert_unchanged(before, problem, opt)


@pytest.mark.parametrize("stack", [hx.Adam() / hx.SGD(), hx.SGD()], ids=str)
def test_a_parameter_that_overlaps_itself_changes_nothing(stack):
    first, other, second = (P(t) for t in (torch.zeros(3), torch.zeros(2), torch.ones(3).expand(4, 3)))
    opt = hx.HyperOptimizer([{"params": [first]}, {"params": [other, second]}], stack)
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones(p.shape)
    with pytest.raises(ValueError, match=r"params\[1\] holds several elements in one place .* use its clone\(\)"):
        opt.step()
    assert not opt.state
    assert torch.equal(first, torch.zeros(3))


@pytest.mark.parametrize("stack", [hx.SGD() / hx.SGD(), hx.Adam(), hx.Adam(trust=0.1)], ids=str)
def test_a_tower_without_memory_is_an_error(stack):
    """Of an optimizer that was made on the meta device, whose parameters then got theirs in place."""
    model = torch.nn.Linear(4, 2, device="meta")
    opt = hx.HyperOptimizer(model.parameters(), stack)
    for p in model.parameters():
        torch.utils.swap_tensors(p, P(torch.ones(p.shape)))
        p.grad = torch.ones_like(p)
    words = r"params\[0\] is on cpu, but the tower .* on meta; make the optimizer when .* belongs to parameter 0"
    with pytest.raises(ValueError, match=words):
        opt.step()
    assert all(bool((p == 1).all()) for p in model.parameters())


def test_a_graph_that_would_create_state_is_an_error(monkeypatch):
    """What a capture is can only be shown on a GPU (test_device.py)."""
    opt = hx.HyperOptimizer([p := param()], hx.Adam() / hx.SGD())
    recorder = hx.Recorder(opt)
    p.grad = torch.ones(2)
    with monkeypatch.context() as patch:
        patch.setattr("hyperopt_ext.update.is_capturing", lambda t: True)
        with pytest.raises(RuntimeError, match="create a parameter's state anew at every replay: step once before"):
            opt.step()
    assert not opt.state
    assert not len(recorder)
    opt.step()
    with monkeypatch.context() as patch:
        patch.setattr("hyperopt_ext.recorder.is_capturing", lambda t: True)
        with pytest.raises(RuntimeError, match="write each record to the same place; use hook=False"):
            opt.step()


def test_another_dtype_is_met_by_the_state_dict():
    problem = Regression(5)
    problem.model.float()
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam() / hx.SGD())

    def step():
        opt.zero_grad()
        for p in problem.model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()

    step()
    problem.model.double()
    with pytest.raises(ValueError, match=r"state\[0\] must be Double, not Float; .* load_state_dict"):
        step()
    opt.load_state_dict(opt.state_dict())
    step()
    assert all(opt.state[p]["exp_avg"].dtype == torch.float64 for p in problem.model.parameters())


def another_dict(change):
    def make(opt):
        state_dict = copy.deepcopy(opt.state_dict())
        change(state_dict)
        return state_dict

    return make


BAD_STATE_DICTS = {
    "another stack": (lambda opt: hx.HyperOptimizer(other(), hx.SGD()).state_dict(), "is of the stack 'sgd"),
    "another height": (lambda opt: hx.HyperOptimizer(other(), hx.Adam()).state_dict(), "stack 'adam"),
    "another space": (
        lambda opt: hx.HyperOptimizer(other(), hx.Adam(space={"lr": "log"}) / hx.SGD()).state_dict(),
        "lr: log",
    ),
    "other groups": (another_dict(lambda d: d["param_groups"].append(d["param_groups"][0])), "2 param groups"),
    "fewer parameters": (another_dict(lambda d: d["param_groups"][0]["params"].pop()), "3 parameters"),
    "another shape": (
        another_dict(lambda d: d["state"][1].update(exp_avg=torch.zeros(3))),
        r"exp_avg of parameter 1 of group 0 has the shape \(3,\), but the parameter needs \(5,\)",
    ),
    "a missing state": (another_dict(lambda d: d["state"][1].pop("last_grad")), "state of parameter 1"),
    "a torch.optim state": (lambda opt: torch.optim.Adam(other()).state_dict(), "not that of a HyperOptimizer"),
    "an empty dict": (lambda opt: {}, "0 param groups"),
    "no state": (lambda opt: {"param_groups": opt.state_dict()["param_groups"]}, "has no dict 'state'"),
    "a list of states": (another_dict(lambda d: d.update(state=[])), "has no dict 'state'"),
    "no list of groups": (
        another_dict(lambda d: d.update(param_groups=None)),
        "'param_groups' must be a list of dicts",
    ),
    "no groups in it": (another_dict(lambda d: d.update(param_groups=[1])), "'param_groups' must be a list of dicts"),
    "no list of parameters": (
        another_dict(lambda d: d["param_groups"][0].update(params=None)),
        "must be a list, not None",
    ),
    "no truth value": (another_dict(lambda d: d["param_groups"][0].update(maximize="no")), "must be True or False"),
    "a tower without numbers": (
        another_dict(lambda d: d["param_groups"][0].update(tower=d["param_groups"][0]["tower"].to("meta"))),
        "the tower of param group 0 is on the device meta",
    ),
    "a sparse state": (
        another_dict(lambda d: d["state"][1].update(exp_avg=d["state"][1]["exp_avg"].to_sparse())),
        "exp_avg of parameter 1 of group 0 is torch.sparse_coo, but must be dense",
    ),
    "no parameters": (another_dict(lambda d: d["param_groups"][0].pop("params")), "param group 0 has no 'params'"),
    "no policy": (another_dict(lambda d: d["param_groups"][0].pop("nonfinite")), "param group 0 has no 'nonfinite'"),
    "another policy": (another_dict(lambda d: d["param_groups"][0].update(nonfinite="stop")), "nonfinite is 'stop'"),
    "no number": (another_dict(lambda d: d["param_groups"][0].update(lr="0.1")), "lr must be a number"),
    "many numbers": (another_dict(lambda d: d["param_groups"][0].update(lr=torch.ones(3))), "lr must be a number"),
    "one beta": (another_dict(lambda d: d["param_groups"][0].update(betas=0.9)), "betas must be two numbers"),
    "no tensor": (
        another_dict(lambda d: d["state"][0].update(exp_avg=None)),
        "parameter 0 of group 0 must have a tensor 'exp_avg'",
    ),
    "no tower": (
        another_dict(lambda d: d["param_groups"][0].pop("tower")),
        "param group 0 has no tower, but this optimizer",
    ),
}


def other():
    return list(Regression(1).model.parameters())


@pytest.mark.parametrize("bad", BAD_STATE_DICTS)
def test_a_state_dict_that_does_not_fit_changes_nothing(bad):
    problem = Regression(5)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam() / hx.SGD())
    problem.train(opt, range(3))
    make, words = BAD_STATE_DICTS[bad]
    state_dict = make(opt)
    before = snapshot(problem, opt)
    with pytest.raises((ValueError, TypeError), match=words):
        opt.load_state_dict(state_dict)
    assert_unchanged(before, problem, opt)
    problem.train(opt, range(3, 5))


def test_an_idle_parameter_is_checked_before_anything_is_changed():
    problem = Regression(6)
    first, second = [*problem.model.parameters()][:2], [*problem.model.parameters()][2:]
    opt = hx.HyperOptimizer([{"params": first}, {"params": second}], hx.Adam() / hx.SGD(lr=1e-4))
    problem.train(opt, range(3))
    idle = second[1]
    state, opt.state[idle]["exp_avg"] = opt.state[idle]["exp_avg"], torch.zeros(7, dtype=torch.float64)
    problem.loss(3).backward()
    idle.grad = None
    before = snapshot(problem, opt)
    with pytest.raises(
        ValueError, match=r"state\[0\] must have the shape .* \(state\[0\] belongs to parameter 1 of its"
    ):
        opt.step()
    assert_unchanged(before, problem, opt)
    opt.state[idle]["exp_avg"] = state
    opt.step()


def test_state_made_in_inference_mode_is_an_error_before_anything_is_changed():
    problem = Regression(6)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam() / hx.SGD(lr=1e-4))
    problem.loss(0).backward()
    with torch.inference_mode():
        opt.step()
    before = snapshot(problem, opt)
    with pytest.raises(ValueError, match=r"state\[0\] was made in torch.inference_mode\(\) .* load_state_dict"):
        opt.step()
    assert_unchanged(before, problem, opt)
    opt.load_state_dict(opt.state_dict())
    opt.step()


def test_operators_check_their_lists():
    p = param(4)
    opt = hx.HyperOptimizer([p], hx.Adam())
    tower = opt.param_groups[0]["tower"]
    one = torch.zeros((), dtype=torch.int64)
    op, settle = torch.ops.hyperopt_ext.adam_step_, torch.ops.hyperopt_ext.adam_settle_
    for lists, words in [
        (([p], [], [p, p], [], [one], [one]), "grads must hold 1"),
        (([p], [p], [], [], [one], [one]), "state must hold 2"),
        (([p], [p], [p], [], [one], [one]), "state must hold 2"),
        (([p], [p], [p, param(5)], [], [one], [one]), r"state\[1\] must have the shape"),
        (([p], [p], [p, p], [p], [one], [one]), "record must hold 0"),
        (([p], [p], [p, p], [], [p], [one]), r"steps\[0\] must be one int64"),
        (([p], [p], [p, p[:1].expand(4)], [], [one], [one]), r"state\[1\] holds several elements in one place"),
        (([p], [p], [p, p.to("meta")], [], [one], [one]), r"state\[1\] must be on the device of its parameter, cpu"),
        (([p], [p.to("meta")], [p, p], [], [one], [one]), r"grads\[0\] must be on the device of its parameter, cpu"),
        (([p], [p], [p, p], [], [one], [one.to("meta")]), r"ticks\[0\] must be on the device of its parameter, cpu"),
    ]:
        for one_of in (op, settle, torch.ops.hyperopt_ext.adam_check):
            with pytest.raises(ValueError, match=words):
                one_of(*lists, tower, [], 0, 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="tower must be"):
        op([p], [p], [p, p], [], [one], [one], tower.float(), [], 0, 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="rows names row 1 of a tower of 1"):
        op([p], [p], [p, p], [], [one], [one], tower, [1], 0, 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="record must hold 1"):
        op([p], [p], [p, p], [], [one], [one], tower, [], 1, 10.0, 0.0, 1.0)
    for learn, words in [
        (1 << 5, "learn names hyperparameters that rule 'adam' does not have: it has 5"),
        (-1, "learn must be a set of hyperparameters, not -1"),
        (1 << 32, "learn must be a set of hyperparameters, not 4294967296"),
    ]:
        with pytest.raises(ValueError, match=words):
            op([p], [p], [p, p], [], [one], [one], tower, [], learn, 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        op([p], [p], [p, p], [], [one], [one], tower, [], 0, 0.0, 0.0, 1.0)
    assert torch.equal(p, torch.zeros(4))


def test_the_tower_operator_checks_its_lists():
    opt = hx.HyperOptimizer([param(4)], hx.Adam() / hx.SGD())
    group = opt._groups[0]
    good = {
        "towers": group.tower,
        "hypergradients": torch.zeros(1, 11, dtype=torch.float64),
        "plans": group.plan,
        "bounds": group.bounds,
        "settings": group.settings,
    }
    before = group.tower.clone()
    for name, bad in {
        "towers": group.tower[:, :-1].contiguous(),
        "hypergradients": torch.zeros(1, 5, dtype=torch.float64),
        "plans": group.plan[:, :2].contiguous(),
        "bounds": group.bounds[1:],
        "settings": group.settings[1:],
    }.items():
        arguments = [[bad if key == name else value] for key, value in good.items()]
        with pytest.raises(ValueError, match=rf"{name}\[0\] must be"):
            torch.ops.hyperopt_ext.tower_(*arguments)
    for name in good:
        arguments = [[value.to("meta") if key == name else value] for key, value in good.items()]
        with pytest.raises(ValueError, match=r"\[0\] is on (meta|cpu), but the first tower is on (cpu|meta)"):
            torch.ops.hyperopt_ext.tower_(*arguments)
    with pytest.raises(ValueError, match="one tensor for each of the 1 towers"):
        torch.ops.hyperopt_ext.tower_([group.tower], [], [group.plan], [group.bounds], [group.settings])
    learn = _C.PLAN.index("learn")
    for level, column, value in [(1, 0, 1000), (1, learn, 1), (0, learn, 1 << 5)]:  # no rule; the last learns; too many
        wrong = group.plan.clone()
        wrong[level, column] = value
        with pytest.raises(ValueError, match="not a plan of rules that are loaded"):
            torch.ops.hyperopt_ext.tower_(
                [group.tower], [good["hypergradients"]], [wrong], [group.bounds], [group.settings]
            )
    assert torch.equal(group.tower, before)


def build(folder, **env):
    (folder / "setup.py").symlink_to(Path(__file__).parents[1] / "setup.py")
    command = [sys.executable, "setup.py", "build_ext"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **env})


def test_building_without_torch_says_what_to_type(tmp_path):
    """`pip install .` in an isolated build environment has no torch."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done = build(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr
    assert "Traceback" not in done.stderr


def test_building_without_a_compiler_says_what_to_type(tmp_path):
    done = build(tmp_path, CXX="no-such-compiler")
    assert done.returncode != 0
    assert "there is no 'no-such-compiler' here" in done.stderr
    assert "Traceback" not in done.stderr
