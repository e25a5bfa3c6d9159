"""The CUDA kernels do what the CPU kernels do: on a GPU, and, on any machine, run on the host thread by thread.

Where there is nvcc, also as the PTX that it makes of them.
"""

from __future__ import annotations

import contextlib
import copy
import runpy
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest
import torch
from cases import CASES, safeguarded_stacks
from emulation import ROOT, emulated, replaced_places
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import relative_error

import hyperopt_ext as hx
from hyperopt_ext import _C
from hyperopt_ext.stack import RULES

every_rule = pytest.mark.parametrize("case", CASES, ids=str)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.fixture(
    params=["emulated", pytest.param("ptx", marks=pytest.mark.nvcc), pytest.param("cuda", marks=pytest.mark.cuda)]
)
def device(request) -> str:
    """Where the kernels run that are compared with those of the CPU."""
    return request.param


@contextlib.contextmanager
def on(device: str, foreign: Collection[str] = ()) -> Iterator[None]:
    """Tensors and operators are those of the device; the tower treats the rules in `foreign` as if not built in."""
    if device != "cuda":
        with emulated(foreign, kind=device):
            yield
    else:
        with torch.device(device), replaced_places(lambda name, place: -1 if name in foreign else place):
            yield


def place(t: torch.Tensor) -> torch.Tensor:
    """Where tensors are made now, strides and offset kept."""
    device = torch.get_default_device()
    if device.type == "cpu":
        return t
    base = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype)
    base.copy_(torch.empty(0, dtype=t.dtype, device="cpu").set_(t.untyped_storage()))
    return base.as_strided(t.shape, t.stride(), t.storage_offset())


def shaped(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Less than a vector, ragged ends, more than a chunk, none, a view that is not aligned, one with gaps."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

    tensors = [values(), values(3), values(0), values(5, 7), values(8192), values(8195), values(20001)]
    tensors += [values(1001)[1:], values(20, 30).T, values(12, 8)[:, :5], values(2, 3, 4, 5).permute(0, 3, 1, 2)]
    return [torch.nn.Parameter(place(t)) for t in tensors]


def train(
    stack: hx.Stack | hx.Level,
    params: list[torch.nn.Parameter] | list[dict],
    steps: int = 5,
    silent: dict[int, int] | None = None,
    **options,
) -> hx.HyperOptimizer:
    """Steps on gradients that depend on the parameters; at step s, the parameter silent[s] has none."""
    generator = torch.Generator().manual_seed(1)
    opt = hx.HyperOptimizer(params, stack, **options)
    flat = [p for group in opt.param_groups for p in group["params"]]
    for step in range(steps):
        for i, p in enumerate(flat):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu").to(p.device)
            p.grad = (0.1 * p.detach().double() + noise).to(p.dtype)
            if p.dim() == 1:
                p.grad[:2] = 0  # elements that never saw a gradient
            if (silent or {}).get(step) == i:
                p.grad = None
        opt.step()
    return opt


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return relative_error(got.detach().double().cpu(), expected.detach().double())


def assert_same(expected: hx.HyperOptimizer, got: hx.HyperOptimizer, tolerance: float, hyper_tolerance: float) -> None:
    for x, y in zip(expected.param_groups, got.param_groups, strict=True):
        for p, q in zip(x["params"], y["params"], strict=True):
            if not p.numel():
                continue
            assert error(q, p) <= tolerance
            assert list(expected.state[p]) == list(got.state[q])
            for name, value in expected.state[p].items():
                assert error(got.state[q][name], value) <= 10 * tolerance, name
    for i in range(len(expected.param_groups)):
        for x, y in zip(expected.hyperparameters(i), got.hyperparameters(i), strict=True):
            for name in x:
                assert error(y[name], x[name]) <= hyper_tolerance, name
        assert torch.equal(expected.skipped_steps(i), got.skipped_steps(i).cpu())
        assert torch.equal(expected.held_steps(i), got.held_steps(i).cpu())


def both(
    device: str,
    make: Callable[[], hx.HyperOptimizer],
    tolerance: float,
    hyper_tolerance: float = 1e-9,
    foreign: tuple[str, ...] = (),
) -> None:
    expected = make()
    with on(device, foreign):
        got = make()
    assert_same(expected, got, tolerance, hyper_tolerance)


@every_rule
@pytest.mark.parametrize("learn", ["none", "lr", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_step_of_every_rule(device, case, learn, dtype):
    names = {"none": (), "lr": "lr", "all": case.names}[learn]
    level = case.level(learn=names)
    both(
        device,
        lambda: train(level / hx.SGD(lr=1e-9), shaped(dtype), silent={1: 3, 3: 5}),
        TOLERANCE[dtype],
        1e-9 if dtype == torch.float64 else 1e-5,
    )


@every_rule
def test_traces_of_every_rule(device, case):
    level = case.level(learn=case.names, horizon=(2, 0.6))
    both(device, lambda: train(level / hx.SGD(lr=1e-9), shaped(torch.float64), silent={1: 3, 3: 5}), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "level", [hx.Adam(lr=0.01), hx.AdamW(lr=0.01), hx.SGD(lr=0.01), hx.Adam(lr=0.01, horizon=3, trust=0.1)], ids=repr
)
def test_half_precision(device, level, dtype):
    """All but the rounding of the parameters themselves is exact, so they agree but for single last bits."""
    both(device, lambda: train(level / hx.SGD(lr=1e-9), shaped(dtype)), TOLERANCE[dtype], 1e-4)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stack=safeguarded_stacks(), foreign=st.sets(st.sampled_from(sorted(RULES))))
def test_random_towers(device, stack, foreign):
    """Safeguards, granularities and horizons, with any rules treated as if they came from another library."""
    both(device, lambda: train(stack, shaped(torch.float64)[:6], steps=6), 1e-9, 1e-6, tuple(foreign))


def test_a_count_of_blocks_that_was_cut_short_is_mended(device):
    """By a launch that failed, or by a copy of the tower that was made in the middle of a pass."""
    with on(device):
        opt = train(hx.Adam(lr=0.01) / hx.SGD(lr=1e-9), shaped(torch.float64))
        arrived = opt.param_groups[0]["tower"].view(torch.int64)[0, _C.ARRIVED]
        arrived.fill_(3)
        opt.step()
        assert arrived == 0
        state_dict = copy.deepcopy(opt.state_dict())
        state_dict["param_groups"][0]["tower"].view(torch.int64)[0, _C.ARRIVED] = 3
        opt.load_state_dict(state_dict)
        assert arrived == 0


def test_more_tensors_and_towers_than_fit_into_a_launch(device):
    def make():
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 7 + i, dtype=torch.float64)) for i in range(200)]
        groups = [{"params": params[i : i + 2], "lr": 0.01 * (i + 1)} for i in range(0, 200, 2)]
        return train(hx.Adam(lr=0.01) / hx.SGD(lr=1e-6), groups)

    both(device, make, 1e-12)

    def one_group():
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 7 + i, dtype=torch.float64)) for i in range(200)]
        return train(hx.Adam(lr=0.01) / hx.SGD(lr=1e-6), params)

    both(device, one_group, 1e-12)


def test_more_elements_than_fit_into_small_chunks(device):
    """A block takes more of them where there are many, here 3072 and 8192 at a time."""
    for elements in (600_001, 4_300_001):

        def make(elements=elements):
            params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (elements, 5000)]
            return train(hx.SGD(lr=0.01) / hx.SGD(lr=1e-9), params, steps=2)

        both(device, make, 1e-6, 1e-5)


def test_more_chunks_than_one_block_adds_up(device):
    def make():
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 1 + i % 3, dtype=torch.float64)) for i in range(2100)]
        return train(hx.Adam(lr=0.01) / hx.SGD(lr=1e-6), params, steps=2)

    both(device, make, 1e-12)


@pytest.mark.parametrize("options", [{}, {"trust": 0.01}, {"horizon": 3}], ids=str)
def test_a_row_of_the_tower_without_a_gradient(device, options):
    """Rows of their own for the tensors, of which each is left out once, and has several chunks or few elements."""

    def make():
        stack = hx.Adam(lr=0.01, granularity="tensor", **options) / hx.SGD(lr=1e-6)
        return train(stack, shaped(torch.float64)[3:7], steps=6, silent={1: 0, 2: 3, 3: 1, 4: 2})

    both(device, make, 1e-12)


def test_a_pass_of_many_launches_of_both_arithmetics(device):
    def make(granularity: str):
        dtypes = [torch.float32, torch.float64]
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 5 + i, dtype=dtypes[i % 2])) for i in range(130)]
        return train(hx.Adam(lr=0.01, granularity=granularity) / hx.SGD(lr=1e-6), params, steps=3, silent={1: 77})

    both(device, lambda: make("group"), 1e-6, 1e-5)
    both(device, lambda: make("tensor"), 1e-6, 1e-5)


def test_parameters_of_a_row_need_not_follow_each_other(device):
    """The operators take the rows in any order."""

    def made() -> list[torch.Tensor]:
        owners = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
        tower = hx.HyperOptimizer(owners, hx.SGD(lr=0.1, granularity="tensor") / hx.SGD())._groups[0].tower
        params = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in (5, 3000, 7, 1, 1025, 9)]
        grads = [p.cos() for p in params]
        steps, ticks = ([torch.tensor(value) for _ in params] for value in (0, -1))
        arguments = (params, grads, [], [], steps, ticks, tower, [1, 0, 1, 2, 0, 1], 0, 1.0, 0.0, 1.0)
        ops = torch.ops.hyperopt_ext
        results = [ops.sgd_norms(*arguments), ops.sgd_hypergradient(*arguments, True, True)]
        ops.sgd_step_(*arguments)
        return [*results, *params, *steps]

    expected = made()
    with on(device):
        got = made()
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_are_not_aligned(device, dtype):
    """As those of DistributedDataParallel, which lie one after the other in a bucket."""

    def make():
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n).to(dtype)) for n in (3, 4000, 17)]
        opt = hx.HyperOptimizer(params, hx.Adam(lr=0.01) / hx.SGD(lr=1e-9))
        bucket = torch.linspace(1, 2, sum(p.numel() for p in params)).to(dtype)
        for p, grad in zip(params, bucket.split([p.numel() for p in params]), strict=True):
            p.grad = grad.view_as(p)
        for _ in range(3):
            opt.step()
        return opt

    both(device, make, TOLERANCE[dtype], 1e-4)


def test_dtypes_can_be_mixed_in_a_group(device):
    def make():
        params = [p for dtype in (torch.float32, torch.float64, torch.float32) for p in shaped(dtype)[:5]]
        return train(hx.Adam(lr=0.01) / hx.SGD(lr=1e-9), params)

    both(device, make, 1e-6, 1e-5)


@pytest.mark.parametrize("nonfinite", ["hold", "skip"])
def test_a_gradient_that_is_not_finite_changes_nothing(device, nonfinite):
    def make():
        params = [torch.nn.Parameter(torch.ones(10, dtype=torch.float64)) for _ in range(3)]
        opt = hx.HyperOptimizer(params, hx.Adam(lr=0.1) / hx.SGD(lr=1e-3), nonfinite=nonfinite)
        for value in (1.0, 2.0, float("inf"), 3.0, float("nan"), -1.0):
            for p in params:
                p.grad = torch.full_like(p, value)
            opt.step()
        assert opt.skipped_steps() == 2
        return opt

    both(device, make, 1e-12)


def unrolled(case, detach: bool) -> list[torch.Tensor]:
    """Three steps in the functional form: the parameters after them, and gradients of a loss on these, or None."""
    params, targets = shaped(torch.float64)[:8], [p.detach() for p in shaped(torch.float64)[:8]]
    hyper = {name: torch.tensor(v, dtype=torch.float64, requires_grad=True) for name, v in case.hyper.items()}
    w, state = params, None
    for step in range(1, 4):
        grads = [torch.sin(p) * 0.5 + 0.1 * (p - 1) for p in w]
        w, state = case.function(w, grads, state, hyper, torch.tensor(step), detach=detach)
    loss = sum((p * t).sum() for p, t in zip(w, targets, strict=True))
    return [*w, *torch.autograd.grad(loss, [*hyper.values(), *([] if detach else params)], allow_unused=True)]


@every_rule
def test_the_functional_form_of_every_rule(device, case):
    for detach in (True, False):
        expected = unrolled(case, detach)
        with on(device):
            got = unrolled(case, detach)
        for one, other in zip(got, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None and one.numel():
                assert error(one, other) <= 1e-10


def test_the_steps_for_the_sanitizers_work():
    with on("emulated"):
        runpy.run_path(str(ROOT / "benchmarks" / "gpu_step.py"))["main"]("cpu")


def test_sums_do_not_depend_on_how_often_they_are_made(device):
    def hyperparameters():
        opt = train(hx.Adam(lr=0.01) / hx.SGD(lr=1e-6), shaped(torch.float32))
        return torch.stack(list(opt.hyperparameters()[0].values()))

    with on(device):
        assert torch.equal(hyperparameters(), hyperparameters())


class TestTheOrderOfThreadsDoesNotMatter:
    """What a thread writes, no other reads before the next barrier; else results would differ in some order."""

    @staticmethod
    def in_every_order(make: Callable[[], Any]) -> list[Any]:
        results = []
        for order in range(3):
            with emulated(order=order):
                results.append(make())
        return results

    def assert_equal(self, make: Callable[[], hx.HyperOptimizer]) -> None:
        expected, *others = self.in_every_order(make)
        for got in others:
            assert_same(expected, got, 0.0, 0.0)

    @every_rule
    @pytest.mark.parametrize("horizon", [1, 3])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_for_a_rule(self, case, horizon, dtype):
        level = case.level(learn=case.names, horizon=horizon, trust=0.1)
        self.assert_equal(lambda: train(level / hx.SGD(lr=1e-9), shaped(dtype), 3, silent={1: 3}))

    @every_rule
    @pytest.mark.parametrize("detach", [True, False])
    def test_for_the_functional_form(self, case, detach):
        expected, *others = self.in_every_order(lambda: unrolled(case, detach))
        for got in others:
            for one, other in zip(expected, got, strict=True):
                assert one is other or torch.equal(one, other)

    @settings(max_examples=20)
    @given(stack=safeguarded_stacks())
    def test_for_towers(self, stack):
        self.assert_equal(lambda: train(stack, shaped(torch.float64)[:6], steps=4))


def test_the_operators_are_those_of_the_device(device):
    with on(device):
        p = torch.nn.Parameter(torch.ones(3))
        opt = train(hx.Adam() / hx.SGD(), [p])
    namespace = opt._groups[0].step.name().split("::")[0]
    assert (namespace, p.device.type) == (
        ("hyperopt_ext", "cuda") if device == "cuda" else (f"hyperopt_ext_{device}", "cpu")
    )


def test_a_scaled_gradient_is_divided_on_the_device(device):
    def make(scale: float | None):
        with on(device):
            params = shaped(torch.float32)[:6]
            opt = hx.HyperOptimizer(params, hx.Adam(lr=0.01) / hx.SGD(lr=1e-6))
            for step in range(3):
                for p in params:
                    p.grad = torch.full_like(p, step - 0.5) * (scale or 1.0)
                if scale is not None:
                    opt.grad_scale = torch.tensor([scale])
                    opt.found_inf = torch.zeros(1)
                opt.step()
        return opt

    plain, scaled = make(None), make(1024.0)
    for p, q in zip(plain.param_groups[0]["params"], scaled.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
class TestOnlyOnAGPU:
    STACK = hx.Adam(lr=0.01) / hx.Adam(lr=1e-4) / hx.SGD(lr=1e-6)

    def test_a_step_never_waits_for_the_device(self):
        with torch.device("cuda"):
            opt = train(hx.Adam(lr=0.01, trust=0.1) / self.STACK, shaped(torch.float32)[:6], steps=2)
            with waiting_is_an_error():
                opt.step()
                opt.param_groups[0]["lr"] = torch.tensor(0.02, device="cpu")
                opt.step()

    def test_a_step_can_be_captured_and_replayed(self):
        with torch.device("cuda"):
            graphed, eager = (train(self.STACK, shaped(torch.float32)[:6], steps=3) for _ in range(2))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                graphed.step()
            for _ in range(5):
                graph.replay()
                eager.step()
            torch.cuda.synchronize()
        for p, q in zip(graphed.param_groups[0]["params"], eager.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)
        for x, y in zip(graphed.hyperparameters(), eager.hyperparameters(), strict=True):
            assert all(torch.equal(x[name], y[name]) for name in x)

    def test_a_first_step_is_not_captured(self):
        """Each replay would start from new state."""
        with torch.device("cuda"):
            [p] = params = [torch.nn.Parameter(torch.ones(3))]
            opt = hx.HyperOptimizer(params, self.STACK)
            p.grad = torch.ones(3)
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                p.grad.mul_(1.0)  # a graph is not empty
                with pytest.raises(RuntimeError, match="step once before"):
                    opt.step()
            assert not opt.state
            opt.step()

    @pytest.mark.parametrize("arguments", [{}, {"foreach": True}, {"fused": True}, {"capturable": True}], ids=str)
    def test_wrapped_optimizers(self, arguments):
        def make(level):
            params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (1, 7, 3000)]
            return train(level / hx.SGD(lr=1e-6), params, steps=5)

        with torch.device("cuda"):
            wrapped = make(hx.Wrap(torch.optim.AdamW, lr=0.01, **arguments))
            own = make(hx.AdamW(lr=0.01, learn="lr"))
            for p, q in zip(wrapped.param_groups[0]["params"], own.param_groups[0]["params"], strict=True):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
            assert wrapped.param_groups[0]["lr"].item() != 0.01
            if "capturable" in arguments:
                with waiting_is_an_error():
                    wrapped.step()

    def test_the_functional_form_waits_for_nothing(self):
        with torch.device("cuda"):
            w, lr, step = [torch.ones(5)], torch.tensor(0.1), torch.tensor(1)
            hx.functional.adam(w, w, None, {"lr": lr}, step)
            with waiting_is_an_error():
                hx.functional.adam(w, w, None, {"lr": lr}, step)

    def test_a_step_runs_on_the_current_stream(self):
        with torch.device("cuda"):
            opt, other = (train(self.STACK, shaped(torch.float32)[:6], steps=2) for _ in range(2))
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
                for p in opt.param_groups[0]["params"]:
                    p.grad = torch.ones_like(p)
                opt.step()
            torch.cuda.current_stream().wait_stream(stream)
            for p in other.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            other.step()
        for p, q in zip(opt.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            assert torch.equal(p, q)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
    def test_a_hundred_steps_agree_with_the_cpu(self, dtype, tolerance):
        both("cuda", lambda: train(hx.Adam(lr=1e-3) / hx.SGD(lr=1e-6), shaped(dtype)[3:], steps=100), tolerance, 1e-5)

    def test_tensors_on_two_devices_are_an_error(self):
        cpu, cuda = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, device="cuda"))
        with pytest.raises(ValueError, match="one param group a device"):
            hx.HyperOptimizer([cpu, cuda], hx.Adam())
        opt = hx.HyperOptimizer([{"params": [cpu]}, {"params": [cuda]}], hx.Adam() / hx.SGD())
        cpu.grad, cuda.grad = torch.ones(3), torch.ones(3, device="cuda")
        opt.step()
        assert torch.allclose(cpu, cuda.cpu())
