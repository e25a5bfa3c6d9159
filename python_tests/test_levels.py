"""Levels, stacks and the notation."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from cases import CASES

import hyperopt_ext as hx
from hyperopt_ext.compat import gdtuo
from hyperopt_ext.stack import RULES


def test_notation():
    stack = hx.Adam(lr=1e-3) / hx.Adam(lr=1e-4) / hx.SGD(lr=1e-5)
    assert str(stack) == "Adam/Adam/SGD"
    assert [level.lr for level in stack] == [1e-3, 1e-4, 1e-5]
    assert stack == hx.Stack([hx.Adam(lr=1e-3), hx.Adam(lr=1e-4), hx.SGD(lr=1e-5)])
    assert stack == hx.Adam(lr=1e-3) / (hx.Adam(lr=1e-4) / hx.SGD(lr=1e-5))
    assert len(stack) == 3
    assert stack[2] == hx.SGD(lr=1e-5)
    assert str(hx.Stack.of(hx.Adam(), height=3)) == "Adam/Adam/Adam"
    assert eval(repr(stack), vars(hx)) == stack


@pytest.mark.parametrize(
    "level",
    [hx.SGD(), hx.Adam(lr=0.1, learn="lr"), hx.SGD(momentum=0.9, space={"lr": "log"}, bounds={"lr": (1e-8, 1.0)})],
)
def test_levels_are_values(level):
    assert eval(repr(level), vars(hx)) == level
    assert copy.deepcopy(level) == level == pickle.loads(pickle.dumps(level))
    assert hash(copy.deepcopy(level)) == hash(level)
    assert level.replace(lr=1) == level.replace(lr=1.0)
    assert hash(level.replace(lr=1)) == hash(level.replace(lr=1.0))
    assert level != level.replace(lr=0.123)
    with pytest.raises(AttributeError):
        level.lr = 1.0


@pytest.mark.parametrize("make", [hx.SGD, hx.Adam, lambda lr: hx.Wrap(torch.optim.SGD, lr=lr)])
def test_equal_levels_have_equal_hashes(make):
    assert make(lr=1) == make(lr=1.0)
    assert len({make(lr=1), make(lr=1.0), make(lr=2)}) == 2
    assert len({make(lr=1) / hx.SGD(), make(lr=1.0) / hx.SGD()}) == 1


@pytest.mark.parametrize("learn", [("beta1", "lr"), ["lr", "beta1", "lr"], {"lr": 0, "beta1": 0}.keys()])
def test_the_order_of_what_is_learned_says_nothing(learn):
    assert hx.Adam(learn=learn) == hx.Adam(learn=("lr", "beta1"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_defaults_are_those_of_the_rule_and_of_the_published_optimizer(case):
    """The C++ rule, the Python spec and torch.optim cannot drift apart."""
    cls = type(case.make(**case.options[0]))
    published = inspect.signature(type(case.published([torch.zeros(1)], **case.options[0]))).parameters
    ours = inspect.signature(cls).parameters
    spec = cls()
    positional = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    published_order = [name for name in list(published)[1:] if name in positional]
    assert positional == published_order
    for name in positional:
        assert ours[name].default == published[name].default
    for h in RULES[case.rule]["hypers"]:
        assert h["initial"] == getattr(spec, h["name"])


def test_what_is_learned_by_default():
    assert hx.Adam().learn_names == ("lr", "beta1", "beta2")
    assert hx.SGD().learn_names == ("lr",)
    assert hx.SGD(momentum=0.9).learn_names == ("lr", "momentum")
    assert hx.AdamW().learn_names == hx.AMSGrad().learn_names == hx.AdaBelief().learn_names == ("lr", "beta1", "beta2")
    assert hx.Adagrad().learn_names == hx.Lion().learn_names == ("lr",)
    assert hx.Adadelta().learn_names == ("lr", "rho")
    assert hx.RMSprop(momentum=0.9).learn_names == ("lr", "alpha")
    assert hx.SGD(learn=("momentum", "lr")).rule == "sgd_momentum"
    assert hx.RMSprop(learn="momentum", centered=True).rule == "rmsprop_centered_momentum"
    assert hx.SGD(momentum=0.9).replace(momentum=0.0).learn_names == ("lr",)


def test_gdtuo_defaults_are_those_of_the_package():
    from gradient_descent_the_ultimate_optimizer import gdtuo as package

    for name in ("SGD", "AdaGrad", "RMSProp", "RMSPropAlpha", "Adam", "AdamBaydin"):
        theirs = {
            k: p.default for k, p in inspect.signature(getattr(package, name)).parameters.items() if k != "optimizer"
        }
        assert {k: p.default for k, p in inspect.signature(getattr(gdtuo, name)).parameters.items()} == theirs
