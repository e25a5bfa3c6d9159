"""torch's own checks of optimizers, by the inputs of ``torch.testing._internal.common_optimizers``.

Of the checks of torch's test suite (test/test_optim.py), those that are not here make no sense for HyperOptimizer:

- foreach, fused, differentiable, capturable, their defaults and peak memory: there is one implementation, and no such
  argument (`test_there_is_one_implementation` holds that).
- sparse gradients and complex parameters: not supported, an error (`test_errors.py`).
- several devices: a param group is on one device; needs two.
- loading state dicts of older versions, and steps that are no tensors: there is none.
- LBFGS's closures, SparseAdam, Rprop, ASGD, Adamax, RAdam: no such level.
- `test_cpu_load_state_dict` and CUDA's capture tests: need a GPU.
- the variants of optimizers that are wrapped: their arguments are their own.
- lr and betas as tensors (EXCLUDED): a level takes numbers, and what is learned is a tensor in any case.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from problems import float64_by_default
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import hyperopt_ext as hx

LEVELS: dict[str, type[hx.Level]] = {
    "Adadelta": hx.Adadelta,
    "Adagrad": hx.Adagrad,
    "Adam": hx.Adam,
    "AdamW": hx.AdamW,
    "NAdam": hx.NAdam,
    "RMSprop": hx.RMSprop,
    "SGD": hx.SGD,
}
WRAPPED = ("Adafactor", "Muon")
INFOS = [info for info in optim_db if info.name in (*LEVELS, *WRAPPED)]

# By the descriptions of torch: what is no input of a level, and why.
EXCLUDED = {
    "Tensor lr": "a level takes numbers; the lr that is learned is a tensor",
    "tensor lr": "the same",
    ("AdamW", "amsgrad"): "there is no such level",
}
# Bad input that is judged in another way, and why: the type and the text of our error.
OTHER_ERRORS = {
    "a param group cannot have duplicate parameters": (ValueError, "is the same parameter as", "torch only warns"),
    "Tensor lr must be 1-element": (TypeError, "lr must be a number", "no tensor is a start value"),
    "lr as Tensor doesn't work with foreach & not capturable": (TypeError, "no argument 'foreach'", "no such argument"),
    "betas must be either both floats or both Tensors": (TypeError, "beta[12] must be a number", "numbers alone"),
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": (
        TypeError,
        "no argument 'foreach'",
        "no such argument",
    ),
    "all optimizer param groups should be with/without names.": (ValueError, "with/without names", "a group has lr"),
    "does not support complex parameters": (TypeError, "only .* can be trained", "said when the optimizer is made"),
}


def level_of(name: str, kwargs: dict[str, Any]) -> hx.Level:
    kwargs = {key: value for key, value in kwargs.items() if key != "maximize"}
    if name in WRAPPED:
        return hx.Wrap(getattr(torch.optim, name), **kwargs)
    if kwargs.pop("amsgrad", False):
        return hx.AMSGrad(**kwargs)
    return LEVELS[name](**kwargs)


def inputs():
    for info in INFOS:
        for entry in info.optim_inputs_func(device="cpu"):
            variant = info.name in WRAPPED and entry.desc != "default" and "weight_decay" not in entry.kwargs
            if not variant and entry.desc not in EXCLUDED and (info.name, entry.desc) not in EXCLUDED:
                yield pytest.param(info, entry.kwargs, id=f"{info.name}-{entry.desc}")


every_input = pytest.mark.parametrize(("info", "kwargs"), list(inputs()))


def make(info, kwargs, params, learns=True):
    level = level_of(info.name, kwargs)
    stack = level / hx.SGD(lr=1e-7) if learns else level
    return hx.HyperOptimizer(params, stack, maximize=kwargs.get("maximize", False))


class Problem:
    """A line, or for Muon a matrix alone, as torch's tests have it."""

    def __init__(self, info, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(10, 5, generator=generator, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.randn(10, generator=generator, dtype=dtype))
        self.x = torch.randn(5, generator=generator, dtype=dtype)
        self.params = [self.weight] if info.name == "Muon" else [self.weight, self.bias]

    def loss(self):
        return (self.weight.mv(self.x) + self.bias).square().sum()

    def train(self, opt, steps=1):
        for _ in range(steps):
            opt.zero_grad()
            self.loss().backward()
            opt.step()


@every_input
def test_equals_torch(info, kwargs):
    if info.name == "Muon":
        kwargs = {**kwargs, "lr": kwargs.get("lr", 1e-3)}
    ours, theirs = Problem(info), Problem(info)
    opt = make(info, kwargs, ours.params, learns=False)
    twin = info.optim_cls(theirs.params, **kwargs)
    with float64_by_default():
        for _ in range(20):
            ours.train(opt)
            theirs.train(twin)
    for p, q in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@every_input
def test_it_goes_in_the_right_direction_with_every_scheduler(info, kwargs):
    for schedulers, groups in [([], False), *((schedulers, True) for schedulers in info.scheduler_inputs)]:
        problem = Problem(info)
        params = [{"params": [p], "weight_decay": 0.0} for p in problem.params] if groups else problem.params
        opt = make(info, kwargs, params)
        made = [scheduler(opt) for scheduler in schedulers]
        first = problem.loss().item()
        for _ in range(20):
            problem.train(opt)
            for scheduler in made:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*(problem.loss().item(),) if plateau else ())
        last = problem.loss().item()
        assert last > first if kwargs.get("maximize", False) else last < first


@every_input
def test_a_state_dict_makes_the_same_steps(info, kwargs):
    a, b = Problem(info), Problem(info)
    opt, other = make(info, kwargs, a.params), make(info, kwargs, b.params)
    a.train(opt, 5)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    state_dict = torch.load(file, weights_only=True)
    kept = copy.deepcopy(state_dict)
    with torch.no_grad():
        for p, q in zip(b.params, a.params, strict=True):
            p.copy_(q)
    other.load_state_dict(state_dict)
    a.train(opt, 5)
    b.train(other, 5)
    assert all(torch.equal(p, q) for p, q in zip(a.params, b.params, strict=True))
    assert_same(opt.state_dict(), other.state_dict())
    assert_same(state_dict, kept)  # the caller's own is not touched


def assert_same(a: Any, b: Any) -> None:
    """Nested dicts, lists and tensors, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@every_input
def test_a_deepcopy_has_all_public_attributes_and_goes_on(info, kwargs):
    problem = Problem(info)
    opt = make(info, kwargs, problem.params)
    problem.train(opt, 3)
    other, copied = copy.deepcopy((problem, opt))
    assert {key for key in vars(opt) if key[0] != "_"} == {key for key in vars(copied) if key[0] != "_"}
    problem.train(opt, 3)
    other.train(copied, 3)
    assert all(torch.equal(p, q) for p, q in zip(problem.params, other.params, strict=True))


@every_input
def test_it_can_be_printed(info, kwargs):
    problem = Problem(info)
    opt = make(info, kwargs, [{"params": [p]} for p in problem.params])
    text = repr(opt)
    assert text.startswith("HyperOptimizer")
    for i, group in enumerate(opt.param_groups):
        assert f"Parameter Group {i}" in text
        assert f"maximize: {group['maximize']}" in text


@every_input
def test_without_gradients_a_step_does_nothing(info, kwargs):
    problem = Problem(info)
    opt = make(info, kwargs, problem.params)
    before = [p.detach().clone() for p in problem.params]
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(before, problem.params, strict=True))
    problem.train(opt)
    assert len(opt.state) == len(problem.params)


@every_input
def test_state_dicts_with_and_without_names(info, kwargs):
    problem = Problem(info)
    names = ["weight", "bias"][: len(problem.params)]
    named = make(info, kwargs, list(zip(names, problem.params, strict=True)))
    plain = make(info, kwargs, problem.params)
    problem.train(named, 2)
    assert named.state_dict()["param_groups"][0]["param_names"] == names
    plain.load_state_dict(named.state_dict())
    named.load_state_dict(plain.state_dict())
    problem.train(named)
    problem.train(plain)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_param_groups_have_their_own_lr_and_weight_decay(info):
    for name, value in [("lr", 0.0), ("weight_decay", 0.3)]:
        problem = Problem(info)
        opt = make(info, {}, [{"params": [p], name: value} for p in problem.params], learns=False)
        twin = Problem(info)
        theirs = info.optim_cls([{"params": [p], name: value} for p in twin.params])
        with float64_by_default():
            problem.train(opt, 3)
            twin.train(theirs, 3)
        for p, q in zip(problem.params, twin.params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_hooks(info):
    """Pre- and post-hooks of steps, of all optimizers, and of state dicts, in torch's order."""
    problem = Problem(info)
    opt = make(info, {}, problem.params)
    seen: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append("global pre") if o is opt else None),
        register_optimizer_step_post_hook(lambda o, *_: seen.append("global post") if o is opt else None),
        opt.register_step_pre_hook(lambda *_: seen.append("pre")),
        opt.register_step_post_hook(lambda *_: seen.append("post")),
    ]
    problem.train(opt)
    assert seen == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    seen.clear()
    for prepend in (False, True):
        opt.register_state_dict_pre_hook(lambda _, p=prepend: seen.append(("state pre", p)), prepend=prepend)
        opt.register_load_state_dict_pre_hook(lambda *_, p=prepend: seen.append(("load pre", p)), prepend=prepend)
        opt.register_load_state_dict_post_hook(lambda _, p=prepend: seen.append(("load post", p)), prepend=prepend)
    opt.register_state_dict_post_hook(lambda _, state_dict: state_dict.update(mark=1))
    state_dict = opt.state_dict()
    assert state_dict.pop("mark") == 1
    opt.load_state_dict(state_dict)
    assert seen == [(kind, p) for kind in ("state pre", "load pre", "load post") for p in (True, False)]
    problem.train(opt)


def errors():
    for info in INFOS:
        for entry in info.optim_error_inputs_func("cpu", torch.float32):
            yield pytest.param(info, entry, id=f"{info.name}-{entry.optimizer_error_input.desc}")


@pytest.mark.parametrize(("info", "entry"), list(errors()))
def test_bad_input_is_an_error(info, entry):
    given = entry.optimizer_error_input
    params = given.params if given.params is not None else [torch.nn.Parameter(torch.randn(2, 2))]
    # What is wrong with an argument is said by the level, by its name; what is wrong with params in torch's own words.
    error, text = entry.error_type, entry.error_regex if not given.kwargs or info.name in WRAPPED else ""
    if given.desc in OTHER_ERRORS:
        error, text, _ = OTHER_ERRORS[given.desc]
    if given.kwargs and not text:
        text = next(name.rstrip("s") for name in given.kwargs if name != "lr")
    with pytest.raises(error, match=text):
        make(info, given.kwargs, params)
    assert entry.error_on in OptimizerErrorEnum


@pytest.mark.parametrize("argument", ["foreach", "fused", "differentiable", "capturable"])
@pytest.mark.parametrize("name", LEVELS)
def test_there_is_one_implementation(name, argument):
    with pytest.raises(TypeError, match=f"{name} has no argument '{argument}'"):
        LEVELS[name](**{argument: True})


def test_what_is_excluded_exists():
    """The reasons above are of inputs that torch has."""
    known = {entry.desc for info in INFOS for entry in info.optim_inputs_func(device="cpu")}
    assert {key if isinstance(key, str) else key[1] for key in EXCLUDED} <= known
    wrong = {e.optimizer_error_input.desc for info in INFOS for e in info.optim_error_inputs_func("cpu", torch.float32)}
    assert set(OTHER_ERRORS) <= wrong
