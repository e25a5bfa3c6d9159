"""What test_distributed.py checks inside a process group: started by torchrun, once for each number of processes.

    torchrun --nproc-per-node 2 python_tests/ranks.py FOLDER [NAME ...]

runs the checks for that number of processes, in the order of this file, and writes FOLDER/NAME.RANK.txt for each: "ok",
or the traceback. A check that fails ends the run, since the processes may no longer be in step.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import re
import runpy
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from problems import Regression, relative_error
from test_schedulers import SCHEDULERS
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import hyperopt_ext as hx
from hyperopt_ext.zero import ZeroRedundancyOptimizer

EXAMPLES = Path(__file__).parents[1] / "examples" / "distributed"

STACKS = {
    "adam": hx.Adam(lr=1e-2) / hx.SGD(lr=1e-4, momentum=0.5) / hx.SGD(lr=1e-6),
    "adamw": hx.AdamW(lr=1e-2, weight_decay=0.1, learn=("lr", "beta1", "weight_decay")) / hx.SGD(lr=1e-4),
    "auto": hx.Adam(lr=1e-2, learn="lr", space={"lr": "log"}, normalize=True, horizon=(10, 0.1), trust=0.03)
    / hx.Adam(lr=0.02, learn="lr"),
    "tensors": hx.SGD(lr=1e-2, momentum=0.9, granularity="tensor", trust=0.1) / hx.Adam(lr=1e-4) / hx.SGD(lr=1e-8),
    "plain": hx.Adam(lr=1e-2, trust=0.05),
}
FEW = {name: STACKS[name] for name in ("adamw", "auto", "tensors")}
BY_GROUP = {name: stack for name, stack in STACKS.items() if name != "tensors"}

# Names of the checks by the number of processes that they need.
CHECKS: dict[int, dict[str, object]] = {2: {}, 4: {}}


def check(world):
    def register(function):
        CHECKS[world][function.__name__] = function
        return function

    return register


def full(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def values(opt, group=0):
    """All that a tower holds, as bits."""
    tower = (opt.optim if isinstance(opt, ZeroRedundancyOptimizer) else opt).param_groups[group]["tower"]
    return tower.detach().clone()


def assert_same_on_all(*tensors):
    for tensor in tensors:
        mine = full(tensor).detach().contiguous()
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        assert all(torch.equal(mine, other) for other in gathered)


class Half(Regression):
    """The regression of problems.py, of which each of some processes sees its part of the batch."""

    def __init__(self, steps, dtype=torch.float64, rank=None, world=None):
        super().__init__(steps, dtype)
        rank, world = (dist.get_rank(), dist.get_world_size()) if rank is None else (rank, world)
        self.whole = (self.x, self.y)
        self.x, self.y = (t.chunk(world, 1)[rank] for t in self.whole)


def train(problem, opt, steps, model=None):
    for i in steps:
        opt.zero_grad()
        problem.loss(i, model).backward()
        opt.step()


def alone(stack, steps, dtype=torch.float64, **options):
    """One process on the whole batch."""
    problem = Regression(steps, dtype)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack, **options)
    train(problem, opt, range(steps))
    return problem.model, opt


def assert_equal_to(expected, model, opt, tolerance=1e-12):
    """Parameters and the values of all levels, which are the same bits on all processes."""
    other_model, other = expected
    assert_same_on_all(values(opt), *model.parameters())
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        torch.testing.assert_close(full(p).detach(), q.detach(), rtol=0, atol=tolerance)
    for level, expected_level in zip(opt.hyperparameters(), other.hyperparameters(), strict=True):
        for name, value in expected_level.items():
            assert relative_error(level[name], value) <= tolerance, name


def sharded(problem, mesh=None):
    for layer in problem.model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(problem.model, mesh=mesh)


@check(2)
def ddp():
    """300 steps: the same bits on both, and what one process makes of the whole batch."""
    for stack in STACKS.values():
        problem = Half(300, torch.float32)
        model = DistributedDataParallel(problem.model)
        opt = hx.HyperOptimizer(model.parameters(), stack)
        train(problem, opt, range(300), model)
        assert_equal_to(alone(stack, 300, torch.float32), model, opt, 1e-6)


@check(2)
def fsdp2():
    """Of the last layer, with one row, the second process holds nothing."""
    for stack in STACKS.values():
        for dtype, steps, tolerance in ((torch.float32, 60, 1e-6), (torch.float64, 10, 1e-12)):
            problem = Half(steps, dtype)
            model = sharded(problem)
            assert (model[2].weight.to_local().numel() == 0) == (dist.get_rank() == 1)
            opt = hx.HyperOptimizer(model.parameters(), stack)
            train(problem, opt, range(steps))
            assert_equal_to(alone(stack, steps, dtype), model, opt, tolerance)
            for p, state in opt.state.items():
                for name, t in state.items():
                    assert isinstance(t, DTensor) == (name not in ("step", "tick"))
                    assert not isinstance(t, DTensor) or t.placements == p.placements


@check(2)
def fsdp2_after_the_optimizer():
    """As accelerate does it: the model is sharded last, and the param groups get the new parameters."""
    for stack in FEW.values():
        problem = Half(10)
        opt = hx.HyperOptimizer(problem.model.parameters(), stack)
        opt.param_groups[0]["params"] = list(sharded(problem).parameters())
        train(problem, opt, range(10))
        assert_equal_to(alone(stack, 10), problem.model, opt)


@check(2)
def fsdp2_with_param_groups_that_come_and_go():
    """One group has a gradient in every other step only, and one parameter of the other misses a step."""
    models, optimizers = [], []
    for problem in (Half(12), Regression(12)):
        model = sharded(problem) if isinstance(problem, Half) else problem.model
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e-3}]
        opt = hx.HyperOptimizer(groups, STACKS["adam"])
        for i in range(12):
            opt.zero_grad()
            problem.loss(i).backward()
            model[2].bias.grad = None if i == 5 else model[2].bias.grad
            for p in model[0].parameters():
                p.grad = p.grad if i % 2 else None
            opt.step()
        models.append(model)
        optimizers.append(opt)
    for group in (0, 1):
        torch.testing.assert_close(values(optimizers[0], group), values(optimizers[1], group), rtol=1e-12, atol=1e-14)
    assert_equal_to((models[1], optimizers[1]), models[0], optimizers[0])


@check(2)
def all_processes_agree_on_what_is_not_finite():
    """One NaN, in what the second process holds, does what it does in a whole gradient."""
    for name in ("adam", "tensors"):
        for policy in ("hold", "skip", "raise"):
            models, optimizers = [], []
            for problem in (Half(6), Regression(6)):
                model = sharded(problem) if isinstance(problem, Half) else problem.model
                opt = hx.HyperOptimizer(model.parameters(), STACKS[name], nonfinite=policy)
                train(problem, opt, range(3))
                before = values(opt)
                problem.loss(3).backward()
                if not isinstance(problem, Half):
                    model[0].weight.grad[3, 0] = float("nan")
                elif dist.get_rank() == 1:
                    model[0].weight.grad.to_local()[0, 0] = float("nan")
                if policy == "raise":
                    with pytest.raises(FloatingPointError):
                        opt.step()
                    assert torch.equal(before, values(opt))
                else:
                    opt.step()
                    assert (opt.skipped_steps() > 0).any()
                train(problem, opt, range(3, 6))
                models.append(model)
                optimizers.append(opt)
            assert_equal_to((models[1], optimizers[1]), models[0], optimizers[0])
            torch.testing.assert_close(values(optimizers[0]), values(optimizers[1]), rtol=1e-12, atol=1e-14)


@check(2)
def fsdp2_compiled():
    torch._dynamo.reset()
    problem, eager = Half(20), Half(20)
    optimizers = [hx.HyperOptimizer(sharded(p).parameters(), STACKS["auto"]) for p in (problem, eager)]
    step = torch.compile(optimizers[0].step, fullgraph=True, backend="aot_eager")
    if torch.__version__ >= "2.14":  # cannot make guards of DTensors whose gradients are views of something flat
        problem.loss(0).backward()
        with pytest.raises(IndexError):
            step()
        return
    for i in range(20):
        optimizers[0].zero_grad()
        problem.loss(i).backward()
        step()
    train(eager, optimizers[1], range(20))
    torch.testing.assert_close(values(optimizers[0]), values(optimizers[1]), rtol=1e-12, atol=1e-14)
    for p, q in zip(problem.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(full(p), full(q), rtol=1e-12, atol=1e-14)


@check(2)
def fsdp1():
    """Flat shards are plain tensors: ``shard_group`` says that they are parts."""
    for stack in BY_GROUP.values():
        problem = Half(20)
        model = FullyShardedDataParallel(problem.model, use_orig_params=True, device_id=torch.device("cpu"))
        opt = hx.HyperOptimizer(model.parameters(), stack, shard_group=dist.group.WORLD)
        train(problem, opt, range(20), model)
        with FullyShardedDataParallel.summon_full_params(model):
            assert_equal_to(alone(stack, 20), model, opt)


@check(2)
def fsdp2_with_grad_scaler():
    """An inf in the shard of one process makes all sit the step out."""
    for stack in FEW.values():
        for unscale in (False, True):
            problem, single = Half(12), Regression(12)
            model = sharded(problem)
            opt = hx.HyperOptimizer(model.parameters(), stack)
            other = hx.HyperOptimizer(single.model.parameters(), stack)
            scaler, expected = (torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2))
            for i in range(12):
                for p, o, s in ((problem, opt, scaler), (single, other, expected)):
                    o.zero_grad()
                    s.scale(p.loss(i)).backward()
                    if i == 5:
                        grad = next(iter(p.model.parameters())).grad
                        if o is other:
                            grad[-1] = torch.inf
                        elif dist.get_rank() == 1:
                            grad.to_local()[-1] = torch.inf
                    if unscale:
                        s.unscale_(o)
                    s.step(o)
                    s.update()
            assert scaler.get_scale() == expected.get_scale() == 512.0
            assert bool((opt.skipped_steps() == 1).all())
            assert_equal_to((single.model, other), model, opt)


@check(2)
def zero():
    for as_buckets in (False, True):
        for stack in BY_GROUP.values():
            problem, resumed = Half(20), Half(20)
            model = DistributedDataParallel(problem.model)
            opt = ZeroRedundancyOptimizer(model.parameters(), stack, parameters_as_bucket_view=as_buckets)
            train(problem, opt, range(10), model)
            opt.consolidate_state_dict(to=0)
            saved = [
                opt.state_dict() if dist.get_rank() == 0 else None,
                resumed.model.load_state_dict(problem.model.state_dict()),
            ]
            dist.broadcast_object_list(saved)
            assert len(opt.optim.state) < len(saved[0]["state"]) == 4
            other = ZeroRedundancyOptimizer(resumed.model.parameters(), stack)
            other.load_state_dict(saved[0])
            single = Regression(20)
            single.model.load_state_dict(resumed.model.state_dict())
            unsharded = hx.HyperOptimizer(single.model.parameters(), stack)
            unsharded.load_state_dict(saved[0])
            for a, b in ((model, opt), (DistributedDataParallel(resumed.model), other)):
                train(problem if a is model else resumed, b, range(10, 20), a)
                assert_equal_to(alone(stack, 20), a, b)
            train(single, unsharded, range(10, 20))
            assert_equal_to((single.model, unsharded), model, opt)


@check(2)
def zero_with_schedulers():
    """A scheduler is made for the groups of all processes, and scales what the tower of each has learned."""
    for stack in (STACKS["adamw"], hx.SGD(lr=0.02) / hx.SGD(lr=1e-5)):
        for schedule in SCHEDULERS.values():
            problem, single = Half(12), Regression(12)
            model = DistributedDataParallel(problem.model)
            opt = ZeroRedundancyOptimizer(model.parameters(), stack)
            other = hx.HyperOptimizer(single.model.parameters(), stack)
            scheduler, expected = schedule(opt), schedule(other)
            for i in range(12):
                train(problem, opt, [i], model)
                train(single, other, [i])
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # SequentialLR uses what torch has deprecated
                    scheduler.step()
                    expected.step()
            assert_equal_to((single.model, other), model, opt)


@check(2)
def zero_with_fewer_tensors_than_processes():
    """One process has no parameter of a group, and follows its tower all the same."""
    problem = Half(20)
    model = DistributedDataParallel(problem.model)
    groups = [{"params": [p], "lr": 10.0**-k} for k, p in enumerate(model.parameters(), 1)]
    opt = ZeroRedundancyOptimizer(groups, STACKS["auto"])
    single = Regression(20)
    other = hx.HyperOptimizer(
        [{"params": [p], "lr": 10.0**-k} for k, p in enumerate(single.model.parameters(), 1)], STACKS["auto"]
    )
    train(problem, opt, range(20), model)
    train(single, other, range(20))
    assert_equal_to((single.model, other), model, opt)
    for group in range(4):
        assert_same_on_all(values(opt, group))
        torch.testing.assert_close(values(opt, group), values(other, group), rtol=1e-12, atol=1e-14)


@check(2)
def zero_add_param_group():
    problem, single = Half(20), Regression(20)
    model = DistributedDataParallel(problem.model)
    optimizers = []
    for params, make in ((model.parameters(), ZeroRedundancyOptimizer), (single.model.parameters(), hx.HyperOptimizer)):
        first, *others = params
        opt = make([first], STACKS["adamw"])
        with pytest.raises(ValueError, match="lr must be in"):
            opt.add_param_group({"params": others, "lr": -1.0})
        assert len(opt.param_groups) == 1
        optimizers.append((opt, others))
    for train_more in (range(10), range(10, 20)):
        if train_more.start > 0:
            for opt, others in optimizers:
                opt.add_param_group({"params": others, "lr": 0.05})
                assert float(opt.param_groups[1]["lr"]) == 0.05
        train(problem, optimizers[0][0], train_more, model)
        train(single, optimizers[1][0], train_more)
    assert_equal_to((single.model, optimizers[1][0]), model, optimizers[0][0])


def save(problem, opt, folder):
    model = problem.model
    dcp.save({"model": get_model_state_dict(model), "opt": get_optimizer_state_dict(model, opt)}, checkpoint_id=folder)


def load(problem, opt, folder, **options):
    model, options = problem.model, StateDictOptions(**options)
    state = {
        "model": get_model_state_dict(model, options=options),
        "opt": get_optimizer_state_dict(model, opt, options=options),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, opt, state["opt"], options=options)


@check(2)
def checkpoints(folder):
    """Saved by two, resumed by two bit for bit; and what one process saved before, resumed by two."""
    for name, stack in STACKS.items():
        problem = Half(20)
        opt = hx.HyperOptimizer(sharded(problem).parameters(), stack)
        train(problem, opt, range(10))
        save(problem, opt, folder / f"by_two_{name}")
        resumed = Half(20)
        other = hx.HyperOptimizer(sharded(resumed).parameters(), stack)
        load(resumed, other, folder / f"by_two_{name}")
        for p, q in ((problem, opt), (resumed, other)):
            train(p, q, range(10, 20))
        assert torch.equal(values(opt), values(other))
        for p, q in zip(problem.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(full(p), full(q))

        resumed = Half(20)
        other = hx.HyperOptimizer(sharded(resumed).parameters(), stack)
        load(resumed, other, folder / f"by_one_{name}")
        train(resumed, other, range(10, 20))
        assert_equal_to(alone(stack, 20), resumed.model, other)


@check(2)
def checkpoints_in_every_form():
    """Whole tensors on the CPU, flat names, sent out by the first process."""
    for stack in FEW.values():
        problem = Half(20)
        opt = hx.HyperOptimizer(sharded(problem).parameters(), stack)
        train(problem, opt, range(10))
        forms = {  # what is saved, and what it is loaded with
            "whole, on the CPU of the first process": ({"cpu_offload": True}, {"broadcast_from_rank0": True}),
            "whole": ({}, {}),
            "flat": ({"flatten_optimizer_state_dict": True},) * 2,
            "sharded": ({}, {}),
        }
        saved = {}
        for name, options in forms.items():
            both = [StateDictOptions(full_state_dict="whole" in name, **some) for some in options]
            saved[name] = copy.deepcopy(get_optimizer_state_dict(problem.model, opt, options=both[0])), both[1]
        weights = copy.deepcopy(get_model_state_dict(problem.model))
        train(problem, opt, range(10, 20))
        for name, (state_dict, options) in saved.items():
            resumed = Half(20)
            other = hx.HyperOptimizer(sharded(resumed).parameters(), stack)
            set_model_state_dict(resumed.model, weights)
            set_optimizer_state_dict(resumed.model, other, state_dict, options=options)
            train(resumed, other, range(10, 20))
            assert torch.equal(values(opt), values(other)), name
            for p, q in zip(problem.model.parameters(), resumed.model.parameters(), strict=True):
                assert torch.equal(full(p), full(q)), name


@check(2)
def asking_for_the_state_changes_nothing():
    """torch.distributed.checkpoint lets a fresh optimizer make a step with an lr of 0."""
    for stack in STACKS.values():
        problem = Half(10)
        opt = hx.HyperOptimizer(sharded(problem).parameters(), stack)
        before = [values(opt), *(full(p).clone() for p in problem.model.parameters())]
        state_dict = get_optimizer_state_dict(problem.model, opt)
        assert len(state_dict["state"]) == 4
        after = [values(opt), *(full(p).clone() for p in problem.model.parameters())]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        train(problem, opt, range(10))
        assert_equal_to(alone(stack, 10), problem.model, opt)


@check(2)
def state_may_be_asked_for_where_one_process_has_none():
    """Of two stages, one is frozen, or has no parameters: torch.distributed.checkpoint makes a step there alone."""
    first = dist.get_rank() == 0
    stages = {
        "both": lambda: nn.Linear(3, 2),
        "one is frozen": lambda: nn.Linear(3, 2).requires_grad_(first),
        "one is empty": lambda: nn.Linear(3, 2) if first else nn.ReLU(),
    }
    stacks = [STACKS["adam"], hx.Adam(lr=0.01), hx.Wrap(torch.optim.Adam, lr=0.01) / hx.SGD(lr=1e-5)]
    for new_stage, stack, asked in itertools.product(stages.values(), stacks, [(0, 0), (0, 2), (2, 2), (3, 4)]):
        stage = new_stage()
        groups = [{"params": [*stage.parameters()]}]
        opt = hx.HyperOptimizer(groups, stack, shard_group=dist.group.WORLD)
        for i in range(5):
            for _ in range(asked.count(i)):
                stage.zero_grad()
                before = values(opt)
                state_dict = get_optimizer_state_dict(stage, opt)
                assert len(state_dict["state"]) == sum(p.requires_grad for p in stage.parameters())
                assert torch.equal(values(opt), before)
            for p in stage.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            opt.step()
            if stack != hx.Adam(lr=0.01):  # which has nothing to agree on
                assert_same_on_all(values(opt))


@check(2)
def an_lr_of_0_is_a_step_on_all():
    """It is what torch.distributed.checkpoint makes state with, but from a caller it is a step, gradient or not."""
    mesh = init_device_mesh("cpu", (2,))
    for stack in (STACKS["adam"], STACKS["plain"]):
        for row in (None, 3):  # of four rows, the last two are on the second process
            weight = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
            opt = hx.HyperOptimizer([weight], stack)
            grad = torch.zeros(4, 2)
            if row is not None:
                grad[row] = 1
            weight.grad = distribute_tensor(grad, mesh, [Shard(0)])
            opt.param_groups[0]["lr"] = torch.tensor(0.0)
            opt.step()
            assert opt.state[weight]["step"].item() == 1
            assert_same_on_all(values(opt))
    first = dist.get_rank() == 0
    stage = nn.Linear(3, 2).requires_grad_(first)
    opt = hx.HyperOptimizer(stage.parameters(), STACKS["adam"], shard_group=dist.group.WORLD)
    for i in range(4):
        for p in stage.parameters():
            p.grad = torch.ones_like(p) if first else None
        if i % 2:
            opt.param_groups[0]["lr"] = torch.tensor(0.0)
        opt.step()
        assert_same_on_all(values(opt))


@check(2)
def errors():
    mesh = init_device_mesh("cpu", (2,))
    problem = Half(4)
    model = sharded(problem)
    opt = hx.HyperOptimizer(model.parameters(), STACKS["adam"])
    train(problem, opt, range(2))
    before = [values(opt), *(full(p).detach().clone() for p in model.parameters())]

    def unchanged():
        after = [values(opt), *(full(p).detach() for p in model.parameters())]
        return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    whole, whole_opt = alone(STACKS["adam"], 2)
    with pytest.raises(
        ValueError, match=r"exp_avg of parameter 0 of group 0 is a plain tensor, but the parameter is a DT"
    ):
        opt.load_state_dict(whole_opt.state_dict())
    with pytest.raises(ValueError, match=r"is a DTensor .* set_optimizer_state_dict"):
        whole_opt.load_state_dict(opt.state_dict())
    other = hx.HyperOptimizer(model.parameters(), STACKS["adamw"])
    with pytest.raises(ValueError, match="state_dict: param group 0 is of the stack"):
        set_optimizer_state_dict(model, opt, get_optimizer_state_dict(model, other))
    assert unchanged()
    # A bias that is replicated counts on the first process alone, and is checked on both.
    replicated = nn.Parameter(distribute_tensor(torch.ones(3), init_device_mesh("cpu", (2,)), [Replicate()]))
    opt2 = hx.HyperOptimizer([replicated], STACKS["adam"])
    for _ in range(2):
        replicated.grad = torch.ones_like(replicated)
        opt2.step()
    opt2.state[replicated]["exp_avg"] = torch.zeros(7, dtype=torch.float64)
    tower = values(opt2)
    with pytest.raises(ValueError, match=r"state\[0\] must .* belongs to parameter 0"):
        opt2.step()
    assert torch.equal(values(opt2), tower)

    weight = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match="cannot be wrapped around DTensors"):
        hx.HyperOptimizer([weight], hx.Wrap(torch.optim.SGD, lr=0.1) / hx.SGD())
    bare = hx.HyperOptimizer([weight], STACKS["adam"])
    weight.grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])
    bare.step()  # laid out anew
    assert bare.state[weight]["last_grad"].placements == (Shard(0),)
    with pytest.raises(TypeError, match=r"a DTensor .* is a pending sum"):
        hx.HyperOptimizer([nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Partial()]))], STACKS["adam"])
    elsewhere = init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
    foreign = nn.Parameter(distribute_tensor(torch.ones(4, 4), elsewhere, [Shard(0)]))
    with pytest.raises(ValueError, match="not parts of one mesh"):
        bare.add_param_group({"params": [foreign]})
    assert len(bare.param_groups) == 1
    plain = nn.Parameter(torch.ones(4, 4))
    bare.add_param_group({"params": [plain]})
    plain.grad = weight.grad
    before_step = values(bare)
    with pytest.raises(ValueError, match=r"params\[0\] is a plain tensor, but its gradient is a DTensor"):
        bare.step()
    assert torch.equal(before_step, values(bare))
    with pytest.raises(ValueError, match="with a shard_group, granularity must be 'group'"):
        hx.HyperOptimizer(whole.parameters(), STACKS["tensors"], shard_group=dist.group.WORLD)
    with pytest.raises(TypeError, match="with a shard_group cannot be copied or pickled"):
        copy.deepcopy(hx.HyperOptimizer(whole.parameters(), STACKS["adam"], shard_group=dist.group.WORLD))
    zero = ZeroRedundancyOptimizer(Regression(1).model.parameters(), STACKS["adamw"])
    with pytest.raises(ValueError, match="state_dict: param group 0 is of the stack"):
        zero.load_state_dict(whole_opt.state_dict())
    with pytest.raises(TypeError, match="state_dict must be what state_dict"):
        zero.load_state_dict([])
    with pytest.raises(ValueError, match="state_dict has no dict 'state'"):
        zero.load_state_dict({"param_groups": whole_opt.state_dict()["param_groups"]})
    _, trained_opt = alone(STACKS["adamw"], 2)
    for key in range(4):  # of which each process takes some
        wrong = trained_opt.state_dict()
        wrong["state"][key] = {**wrong["state"][key], "exp_avg": torch.ones(1, 1, 1)}
        with pytest.raises(ValueError, match=f"exp_avg of parameter {key} of group 0 has the shape"):
            zero.load_state_dict(wrong)
    assert float(zero.param_groups[0]["lr"]) != float(trained_opt.param_groups[0]["lr"])
    zero.load_state_dict(trained_opt.state_dict())
    assert float(zero.param_groups[0]["lr"]) == float(trained_opt.param_groups[0]["lr"])
    wrapped = hx.Wrap(torch.optim.Adam, lr=0.1) / hx.SGD()
    with pytest.raises(TypeError, match=r"ZeroRedundancyOptimizer: Wrap\(Adam, .*\) keeps a state of its own"):
        ZeroRedundancyOptimizer(Regression(1).model.parameters(), wrapped)
    with pytest.raises(TypeError, match="keeps a state of its own"):
        zero.add_param_group({"params": [nn.Parameter(torch.ones(2).double())], "stack": wrapped})
    assert len(zero.param_groups) == len(zero.optim.param_groups) == 1


class Block(nn.Module):
    """A residual MLP behind a norm, and a head, for tensor parallelism."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(x + self.down(torch.tanh(self.up(self.norm(x)))))


class Sequences:
    """A regression on sequences [batch, 4, 6]: `loss(step, model)` of the part of the batch of one replica."""

    def __init__(self, steps, rank=0, world=1):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(steps, 4, 4, 6, generator=generator, dtype=torch.float64).chunk(world, 1)[rank]
        self.y = self.x.sin().cumsum(-1)[..., :4]
        torch.manual_seed(1)
        self.model = Block().double()

    def loss(self, step, model=None):
        return ((self.model if model is None else model)(self.x[step]) - self.y[step]).square().mean()


def tensor_parallel(model, mesh, sequences):
    """With the norm on parts of the sequences, so that its gradient is a pending sum, or as a plain module."""
    cut = Shard(1)
    plan = {
        "up": ColwiseParallel(input_layouts=cut if sequences else None),
        "down": RowwiseParallel(output_layouts=cut if sequences else None),
        "head": ColwiseParallel(input_layouts=cut if sequences else None, output_layouts=Replicate()),
    }
    if sequences:
        plan["norm"] = SequenceParallel()
        plan[""] = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=cut, use_local_output=True)
    return parallelize_module(model, mesh, plan)


def compare_sequences(build, stack, replicas, replica, steps=10):
    problem, single = Sequences(steps, replica, replicas), Sequences(steps)
    model = build(problem.model)
    opt = hx.HyperOptimizer(model.parameters(), stack)
    other = hx.HyperOptimizer(single.model.parameters(), stack)
    train(problem, opt, range(steps), model)
    train(single, other, range(steps))
    assert_equal_to((single.model, other), model, opt)
    return model


@check(4)
def hsdp():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for stack in FEW.values():
        problem = Half(15)
        opt = hx.HyperOptimizer(sharded(problem, mesh).parameters(), stack)
        train(problem, opt, range(15))
        assert_equal_to(alone(stack, 15), problem.model, opt)


@check(4)
def tensor_parallelism():
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    for stack in FEW.values():
        for sequences in (True, False):
            model = compare_sequences(lambda model, s=sequences: tensor_parallel(model, mesh, s), stack, 1, 0)
            assert not sequences or model.norm.weight.grad.placements == (Partial(),)


@check(4)
def tensor_parallelism_and_fsdp():
    """Norms that are plain for one are sharded by the other alone: two meshes in a group."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for stack in FEW.values():
        for sequences in (True, False):

            def build(model, sequences=sequences):
                model = tensor_parallel(model, mesh["tp"], sequences)
                fully_shard(model.up, mesh=mesh["dp"])
                return fully_shard(model, mesh=mesh["dp"])

            compare_sequences(build, stack, 2, mesh["dp"].get_local_rank())


@check(4)
def two_pipelines():
    """Each stage is sharded over a mesh of its own, and ``shard_group`` makes one tower of the stages' towers."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    for stack in BY_GROUP.values():
        problem = Half(15, rank=mesh["dp"].get_local_rank(), world=2)
        layers = (problem.model[0], problem.model[2])
        for layer in layers:
            fully_shard(layer, mesh=mesh["dp"])
        mine = layers[mesh["pp"].get_local_rank()]
        opt = hx.HyperOptimizer(mine.parameters(), stack, shard_group=mesh["pp"].get_group())
        single, other = Regression(15), None
        other = hx.HyperOptimizer(single.model.parameters(), stack)
        for i in range(15):
            problem.model.zero_grad()
            problem.loss(i).backward()
            opt.step()
            for stage, layer in enumerate(layers):  # what a pipeline would have computed
                for p in layer.parameters():
                    dist.broadcast(p.to_local().detach(), group=mesh["pp"].get_group(), group_src=stage)
            train(single, other, range(i, i + 1))
        assert_equal_to((single.model, other), problem.model, opt)


def run_examples(folder, *lines):
    """As torchrun starts them, but in the process group that is there; what the first process printed of each."""
    sys.path.insert(0, str(EXAMPLES))
    outputs = []
    for name, *arguments in (line.split() for line in lines):
        sys.argv = [name, *(argument.format(folder=folder) for argument in arguments)]
        kept = mock.patch.multiple(dist, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT)
        with kept, contextlib.redirect_stdout(io.StringIO()) as out:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        outputs.append(out.getvalue())
    return outputs if dist.get_rank() == 0 else []


def losses(output):
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]


@check(2)
def examples_for_two(folder):
    lines = ("ddp.py", "fsdp2.py", "zero.py", *2 * ("checkpoint.py {folder}/example",))
    outputs = run_examples(folder, *lines)
    for output in outputs:
        assert losses(output)[-1] < 0.05
    assert not outputs or "resumed after 100 steps" in outputs[-1]


@check(4)
def examples_for_four(folder):
    for output in run_examples(folder, "hsdp.py", "tensor_parallel.py"):
        assert losses(output)[-1] < 0.05


def main(folder, names):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    checks = CHECKS[dist.get_world_size()]
    for name, function in ((name, checks[name]) for name in names or checks):
        report = folder / f"{name}.{dist.get_rank()}.txt"

        try:
            function(folder) if function.__code__.co_argcount else function()
        except BaseException:
            report.write_text(traceback.format_exc())
            raise
        report.write_text("ok")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
