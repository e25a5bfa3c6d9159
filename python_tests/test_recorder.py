"""What was learned: recorded, shown, and exported as an ordinary optimizer and schedule."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import types
import weakref

import matplotlib.image
import pytest
import torch
from cases import CASES
from problems import Regression, float64_by_default, relative_error
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import hyperopt_ext as hx

STACKS = {
    "three levels": hx.Adam(lr=1e-2) / hx.SGD(lr=1e-4, momentum=0.5) / hx.SGD(lr=1e-6),
    "one level": hx.Adam(lr=1e-2),
    "tensors": hx.Adam(lr=1e-2, granularity="tensor")
    / hx.Adam(lr=1e-4, granularity="tensor", learn="lr")
    / hx.SGD(1e-8),
    "own, then shared": hx.Adam(lr=1e-2, granularity="tensor") / hx.Adam(lr=1e-4, learn="lr") / hx.SGD(1e-8),
    "converges": hx.Adam(lr=1e-2, learn="lr", converge=(1e-3, 10)) / hx.SGD(lr=1e-4),
    "auto": hx.auto([torch.nn.Parameter(torch.ones(1))]).stack,
    "wrapped": hx.Wrap(torch.optim.RMSprop, lr=1e-2) / hx.SGD(lr=1e-4),
}


def snapshot(levels):
    return [{name: value.clone() for name, value in level.items()} for level in levels]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_it_keeps_what_was_there_after_each_step(stack, every):
    problem = Regression(20)
    opt = hx.HyperOptimizer([{"params": layer.parameters()} for layer in (problem.model[0], problem.model[2])], stack)
    recorder = hx.Recorder(opt, every)
    learned, used = [], []
    for i in range(20):
        problem.train(opt, range(i, i + 1))
        if i % every == 0:
            learned.append([snapshot(opt.hyperparameters(g)) for g in (0, 1)])
            used.append([snapshot(opt.in_use(g))[0] for g in (0, 1)])
    assert len(recorder) == len(learned)
    assert recorder.steps.tolist() == list(range(1, 21, every))
    for g in (0, 1):
        for k, level in enumerate(recorder.hyperparameters(g)):
            for name, curve in level.items():
                assert torch.equal(curve, torch.stack([values[g][k][name] for values in learned]))
        for name, curve in recorder.in_use(g).items():
            assert torch.equal(curve, torch.stack([values[g][name] for values in used]))


def test_more_than_one_buffer(monkeypatch):
    monkeypatch.setattr("hyperopt_ext.recorder._CHUNK", 4)
    problem = Regression(11)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACKS["three levels"])
    recorder = hx.Recorder(opt)
    lrs = []
    for i in range(11):
        problem.train(opt, range(i, i + 1))
        lrs.append(opt.hyperparameters()[0]["lr"].item())
        assert recorder.hyperparameters()[0]["lr"].tolist() == lrs


def test_many_tensors_do_not_take_much_memory_at_once():
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(3000)]
    opt = hx.HyperOptimizer(params, hx.Adam(granularity="tensor") / hx.SGD())
    recorder = hx.Recorder(opt, hook=False)
    recorder.record()
    assert sum(chunk.nbytes for chunk in recorder._tracks[0].chunks) <= 2**23
    assert recorder.hyperparameters()[0]["lr"].shape == (1, 3000)


def test_it_goes_on_after_a_checkpoint_and_can_be_closed():
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACKS["three levels"])
    recorder = hx.Recorder(opt)
    problem.train(opt, range(3))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    copy.deepcopy(opt)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a Recorder cannot be copied or pickled"):
            copied(recorder)
    problem.train(opt, range(3, 6))
    assert recorder.hyperparameters()[0]["lr"][-1] == opt.hyperparameters()[0]["lr"]
    recorder.close()
    problem.train(opt, range(6, 8))
    assert len(recorder) == 6


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_a_run_that_was_resumed_has_all_its_records(stack):
    def start():
        problem = Regression(20)
        opt = hx.HyperOptimizer(
            [{"params": layer.parameters()} for layer in (problem.model[0], problem.model[2])], stack
        )
        return problem, opt, hx.Recorder(opt, every=2)

    problem, opt, whole = start()
    problem.train(opt, range(9))
    problem, opt, first = start()
    problem.train(opt, range(5))
    file = io.BytesIO()
    torch.save([problem.model.state_dict(), opt.state_dict(), first.state_dict()], file)
    file.seek(0)
    problem, opt, resumed = start()
    problem.train(opt, range(1))  # what it recorded is replaced
    for part, state in zip((problem.model, opt, resumed), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert file.tell() < 20_000  # and no memory that was set aside for more
    problem.train(opt, range(5, 9))
    assert torch.equal(resumed.steps, whole.steps)
    assert list(resumed.curves()) == list(whole.curves())
    for name, curve in whole.curves().items():
        assert torch.equal(resumed.curves()[name], curve), name


def test_nothing_recorded():
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(1))], STACKS["three levels"])
    recorder = hx.Recorder(opt)
    assert len(recorder) == 0
    assert recorder.steps.tolist() == []
    assert recorder.hyperparameters()[0]["lr"].shape == (0,)
    assert len(recorder.plot().axes) == 5
    assert list(recorder.curves()) == ["lr", "beta1", "beta2", "1/SGD/lr", "1/SGD/momentum"]


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_plots(stack, tmp_path):
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    recorder = hx.Recorder(opt)
    problem.train(opt, range(10))
    figure = recorder.plot(tmp_path / "curves.png")
    curves = recorder.curves()
    titles = [axes.get_title("right") for axes in figure.axes]
    assert titles == list(dict.fromkeys(name.removesuffix(" in use") for name in curves))
    assert sum(len(axes.lines) for axes in figure.axes) == len(curves)
    for axes in figure.axes:
        for line in axes.lines:
            assert line.get_xdata().tolist() == list(range(1, 11))
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_tensorboard_reads_what_was_written(stack, tmp_path):
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    recorder = hx.Recorder(opt)
    with SummaryWriter(tmp_path) as writer:
        for i in range(10):
            problem.train(opt, range(i, i + 1))
            if i % 4 == 0:
                recorder.write_scalars(writer)
        recorder.write_scalars(writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, curve in recorder.curves().items():
        curves = {name: curve}
        if curve.dim() > 1:
            curves = {
                f"{name}/min": curve.amin(1),
                f"{name}/max": curve.amax(1),
                f"{name}/median": curve.quantile(0.5, 1),
            }
        for tag, values in curves.items():
            scalars = events.Scalars(f"hyperparameters/{tag}")
            assert [event.step for event in scalars] == list(range(1, 11))
            assert [event.value for event in scalars] == pytest.approx(values.tolist(), rel=1e-6)


def test_one_line_for_a_progress_bar():
    problem = Regression(5)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACKS["three levels"])
    problem.train(opt, range(5))
    line = hx.summary(opt)
    assert list(line) == ["lr", "beta1", "beta2", "1/lr", "1/momentum"]
    assert float(line["lr"]) == pytest.approx(opt.hyperparameters()[0]["lr"].item(), rel=0.01)
    with tqdm(total=1, file=io.StringIO()) as bar:
        bar.set_postfix(line)
        assert f"lr={line['lr']}" in str(bar)
    assert hx.summary(hx.HyperOptimizer(problem.model.parameters(), hx.Adam())) == {}
    own = hx.HyperOptimizer(problem.model.parameters(), STACKS["tensors"])
    assert hx.summary(own)["lr"] == "0.01"
    problem.train(own, range(5))
    assert ".." in hx.summary(own)["lr"]


EXPORTED = [case for case in CASES if not case.rule.startswith(("adabelief", "lion"))]


@pytest.mark.parametrize("granularity", ["group", "tensor"])
@pytest.mark.parametrize("case", EXPORTED, ids=str)
def test_an_exported_run_is_the_run_again(case, granularity):
    """If lr alone is learned, training again with the plain optimizer and its schedule gives the same parameters."""
    learned, again = Regression(30), Regression(30)
    level = case.make(**case.options[-1], learn="lr", granularity=granularity)
    opt = hx.HyperOptimizer(learned.model.parameters(), level / hx.SGD(lr=1e-4))
    recorder = hx.Recorder(opt)
    learned.train(opt, range(30))
    plain, schedule = opt.export(recorder, params=again.model.named_parameters())
    assert type(plain).__module__.startswith("torch.optim")
    with float64_by_default():
        for i in range(30):
            again.train(plain, range(i, i + 1))
            schedule.step()
    lrs = recorder.in_use()["lr"]
    assert (lrs != lrs[0]).any()
    assert plain.param_groups[-1]["lr"] == pytest.approx(lrs[-1].reshape(-1)[-1].item(), rel=1e-12)
    for p, q in zip(learned.model.parameters(), again.model.parameters(), strict=True):
        assert relative_error(p.detach(), q.detach()) <= 1e-9


def test_final_and_mean_values_are_constants():
    problem = Regression(20)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.AdamW(lr=1e-2, weight_decay=0.1) / hx.SGD(lr=1e-4))
    recorder = hx.Recorder(opt)
    problem.train(opt, range(20))
    final = {name: value.item() for name, value in opt.hyperparameters()[0].items()}
    mean = {name: curve.mean().item() for name, curve in recorder.in_use().items()}
    for expected, arguments in [(final, {}), (mean, {"recorder": recorder, "values": "mean", "schedule": False})]:
        plain, schedule = opt.export(**arguments)
        assert isinstance(plain, torch.optim.AdamW)
        for _ in range(3):
            [group] = plain.param_groups
            assert group["params"] == list(problem.model.parameters())
            assert group["lr"] == pytest.approx(expected["lr"], rel=1e-14)
            assert group["betas"] == pytest.approx((expected["beta1"], expected["beta2"]), rel=1e-14)
            assert group["weight_decay"] == 0.1
            schedule.optimizer.step()
            schedule.step()
    assert final["lr"] != pytest.approx(mean["lr"], rel=1e-6)


def test_an_exported_schedule_saves_and_resumes():
    problem = Regression(20)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.SGD(lr=1e-2, momentum=0.9, learn="lr") / hx.SGD(lr=1e-3))
    recorder = hx.Recorder(opt, every=2)
    problem.train(opt, range(20))
    plain, schedule = opt.export(recorder)
    other, resumed = opt.export(recorder)
    for _ in range(5):
        plain.step()
        schedule.step()
    file = io.BytesIO()
    torch.save([plain.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    for k in range(5, 30):
        assert plain.param_groups[0]["lr"] == other.param_groups[0]["lr"]
        assert plain.param_groups[0]["lr"] == pytest.approx(recorder.in_use()["lr"][min(k // 2, 9)].item(), rel=1e-12)
        for o, s in [(plain, schedule), (other, resumed)]:
            o.step()
            s.step()


def test_groups_schedulers_and_wrapped_optimizers_are_exported():
    problem, again = Regression(20, torch.float32), Regression(20, torch.float32)
    layers = [[p for p in layer.parameters() if p.dim() == 2] for layer in (problem.model[0], problem.model[2])]
    opt = hx.HyperOptimizer(
        [{"params": layers[0], "lr": 0.01}, {"params": layers[1]}],
        hx.Wrap(torch.optim.Muon, momentum=0.9) / hx.SGD(1e-5),
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min(1.0, t / 5))
    recorder = hx.Recorder(opt)
    for i in range(20):
        problem.train(opt, range(i, i + 1))
        scheduler.step()
    other = [[p for p in layer.parameters() if p.dim() == 2] for layer in (again.model[0], again.model[2])]
    plain, schedule = opt.export(recorder, params=other)
    assert isinstance(plain, torch.optim.Muon)
    assert [group["momentum"] for group in plain.param_groups] == [0.9, 0.9]
    for i in range(20):
        again.train(plain, range(i, i + 1))
        schedule.step()
    for p, q in zip(layers[0] + layers[1], other[0] + other[1], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def optimizer(*stacks):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in stacks]
    return hx.HyperOptimizer([{"params": [p], "stack": s} for p, s in zip(params, stacks, strict=True)], hx.Adam())


def added_later():
    opt = optimizer(hx.Adam())
    recorder = hx.Recorder(opt)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    return recorder


def loaded(state_dict):
    hx.Recorder(optimizer(hx.Adam())).load_state_dict(state_dict)


WRONG = [
    (lambda: added_later().hyperparameters(1), IndexError, "but 1 param groups are recorded"),
    (lambda: hx.summary(torch.optim.SGD([torch.ones(1)])), TypeError, "summary: opt must be a HyperOptimizer, not SGD"),
    (lambda: hx.Recorder(torch.optim.SGD([torch.ones(1)])), TypeError, "opt must be a HyperOptimizer, not SGD"),
    (
        lambda: hx.Recorder(types.SimpleNamespace(optimizer=optimizer(hx.Adam()))),
        TypeError,
        "not SimpleNamespace; it has one in .optimizer",
    ),
    (lambda: hx.Recorder(optimizer(hx.Adam()), every=0), ValueError, "every must be a whole number of steps"),
    (lambda: hx.Recorder(optimizer(hx.Adam())).write_scalars("runs"), TypeError, "writer must be a SummaryWriter"),
    (lambda: loaded({}), ValueError, "must be what Recorder.state_dict.. gave"),
    (
        lambda: loaded(hx.Recorder(optimizer(hx.Adam()), every=2).state_dict()),
        ValueError,
        "with every=2, but here it is 1",
    ),
    (
        lambda: loaded(hx.Recorder(optimizer(hx.SGD())).state_dict()),
        ValueError,
        "is of the stack .*sgd.*, but here it is .*adam",
    ),
    (lambda: loaded(hx.Recorder(optimizer(hx.Adam(), hx.Adam())).state_dict()), ValueError, "has 2 param groups, but"),
    (
        lambda: loaded({**hx.Recorder(optimizer(hx.Adam())).state_dict(), "calls": 3}),
        ValueError,
        "records of the shape .3",
    ),
    (lambda: loaded({**hx.Recorder(optimizer(hx.Adam())).state_dict(), "calls": "3"}), ValueError, "whole numbers of"),
    (lambda: optimizer(hx.Lion()).export(), TypeError, "torch.optim has no Lion"),
    (
        lambda: hx.auto([torch.nn.Parameter(torch.ones(1))]).export(),
        ValueError,
        "shows in its first step; make one first",
    ),
    (lambda: optimizer(hx.AdaBelief()).export(), TypeError, "torch.optim has no AdaBelief"),
    (lambda: optimizer(hx.compat.gdtuo.Adam()).export(), TypeError, "or an initial_state"),
    (lambda: optimizer(hx.RMSprop(eps_root=0.1)).export(), TypeError, "which no torch.optim optimizer has"),
    (lambda: optimizer(hx.Adam(), hx.SGD()).export(), TypeError, "the param groups have different methods"),
    (lambda: optimizer(hx.Adam()).export(values="best"), ValueError, "values is 'best'"),
    (lambda: optimizer(hx.Adam()).export(values="mean"), ValueError, "a mean needs what was recorded"),
    (
        lambda: optimizer(hx.Adam()).export(hx.Recorder(optimizer(hx.Adam()))),
        ValueError,
        "a Recorder of this optimizer",
    ),
    (lambda: optimizer(hx.Adam()).export(params=[torch.ones(1)] * 2), ValueError, "params has groups of"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_what_is_wrong_is_said(wrong, error, message):
    with pytest.raises(error, match=message):
        wrong()


def test_an_empty_record_is_no_schedule():
    opt = optimizer(hx.Adam())
    with pytest.raises(ValueError, match="nothing was recorded"):
        opt.export(hx.Recorder(opt))


def test_groups_keep_their_numbers_when_one_is_taken_out():
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = hx.HyperOptimizer([{"params": [p], "lr": 1.0}, {"params": [q], "lr": 2.0}], hx.Adam() / hx.SGD(lr=1e-3))
    recorder = hx.Recorder(opt)
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    opt.step()
    opt.param_groups.pop(0)
    opt.step()
    assert recorder.hyperparameters(1)[0]["lr"][0] == 2.0
    assert {name.partition("/")[0] for name in recorder.curves()} == {"group 0", "group 1"}
    exported, _ = opt.export(recorder)
    assert exported.param_groups[0]["initial_lr"] >= 2.0
    opt.add_param_group({"params": [p]})
    with pytest.raises(ValueError, match="it was added after the Recorder was made"):
        opt.export(recorder)


def test_optimizer_and_recorder_go_when_nobody_holds_them():
    opt = optimizer(hx.Adam())
    recorder = hx.Recorder(opt)
    gone = weakref.ref(opt)
    gc.disable()
    try:
        del opt, recorder
        assert gone() is None
    finally:
        gc.enable()


def test_a_checkpoint_that_makes_the_state_is_no_step():
    problem = Regression(4)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACKS["three levels"])
    recorder = hx.Recorder(opt)
    get_optimizer_state_dict(problem.model, opt)  # calls step()
    assert len(recorder) == 0
    problem.train(opt, range(4))
    assert len(recorder) == 4


def test_a_tower_that_is_moved_is_followed():
    problem = Regression(8)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACKS["three levels"])
    recorder = hx.Recorder(opt)
    lrs = []
    for i in range(8):
        if i == 4:
            opt.param_groups[0]["tower"] = opt.param_groups[0]["tower"].clone()
        problem.train(opt, range(i, i + 1))
        lrs.append(opt.hyperparameters()[0]["lr"].item())
    assert recorder.hyperparameters()[0]["lr"].tolist() == lrs
    _, schedule = opt.export(recorder)
    assert len(schedule.lr_lambdas[0].factors) == 8


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "level", [case.make(**case.options[-1]) for case in EXPORTED] + [hx.Wrap(torch.optim.RMSprop, lr=0.01)], ids=str
)
def test_the_direction_is_exported(level, maximize):
    problem = Regression(2)
    opt = hx.HyperOptimizer(problem.model.parameters(), level / hx.SGD(lr=0.0), maximize=maximize)
    problem.train(opt, range(1))
    plain, _ = opt.export()
    assert plain.param_groups[0].get("maximize", False) == maximize


def test_an_lr_that_was_always_0_is_exported_as_0():
    problem = Regression(3)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.SGD(lr=0.0, learn=()))
    recorder = hx.Recorder(opt)
    problem.train(opt, range(3))
    plain, schedule = opt.export(recorder)
    plain.step()
    schedule.step()
    assert plain.param_groups[0]["lr"] == 0.0


def test_what_was_written_is_not_written_again_after_a_checkpoint(tmp_path):
    problem = Regression(6)
    opt = hx.HyperOptimizer(problem.model.parameters(), STACKS["three levels"])
    recorder = hx.Recorder(opt)
    written = []
    writer = types.SimpleNamespace(add_scalar=lambda tag, value, step: written.append((tag, step)))
    problem.train(opt, range(3))
    recorder.write_scalars(writer)
    resumed = hx.Recorder(opt)
    resumed.load_state_dict(recorder.state_dict())
    recorder.close()
    problem.train(opt, range(3, 6))
    resumed.write_scalars(writer)
    steps = [step for tag, step in written if tag == "hyperparameters/lr"]
    assert steps == [1, 2, 3, 4, 5, 6]
