"""State dicts and copies: a run goes on from them bit for bit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from problems import Regression
from stacks import STACK, TENSORS, every_stack, same, values

import hyperopt_ext as hx


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


def test_state_dict_hooks_see_the_whole_and_may_replace_it():
    opt = hx.HyperOptimizer(Regression(1).model.parameters(), STACK)
    seen = []
    opt.register_state_dict_post_hook(lambda _, state_dict: seen.append(state_dict["param_groups"][0]["stack"]))
    opt.register_state_dict_post_hook(lambda _, state_dict: {"replaced": state_dict})
    assert list(opt.state_dict()) == ["replaced"]
    assert seen == [opt.stack.structure()]


def test_what_the_last_level_would_learn_is_no_part_of_a_checkpoint():
    opt, other = (
        hx.HyperOptimizer(Regression(1).model.parameters(), hx.Adam() / top) for top in (hx.SGD(), hx.SGD(learn=()))
    )
    other.load_state_dict(opt.state_dict())
