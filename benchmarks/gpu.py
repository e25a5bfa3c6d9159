"""What the kernels reach on a GPU: the passes beside the memory's bandwidth, the tower by its height, a small model.

    python benchmarks/gpu.py

All times are those of the device (CUDA events around a batch of calls), as medians of one interleaved run. "Bytes" are
what a pass has to move for a parameter, each number once; "copy" is a tensor copied to another one, counted as read and
written. Steps of the small model are replays of a CUDA graph of everything from the forward pass to the step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from harness import (
    WARM_UP_CALLS,
    Contender,
    describe_machine,
    fit_line,
    interleave,
    median,
    output,
    save,
    timing_options,
)
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from mlp import BATCH, MLP
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import hyperopt_ext as hx
from hyperopt_ext.update import Update

TINY = hx.SGD(lr=1e-14)  # the sums that it multiplies grow with the number of elements
HEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HEAD_START = 20_000_000  # cycles of the GPU, some ten milliseconds
MOST_CALLS = 16  # in a batch: no more launches than can be queued

# Bytes that a step moves for an fp32 parameter: pass A, then pass B. Of torch: in one pass.
STACKS: dict[str, tuple[Callable[[list[Tensor]], torch.optim.Optimizer], tuple[int, int]]] = {
    "torch fused Adam": (lambda p: torch.optim.Adam(p, fused=True), (0, 28)),
    "hx Adam": (lambda p: hx.HyperOptimizer(p, hx.Adam()), (0, 28)),
    "hx Adam^lr/SGD": (lambda p: hx.HyperOptimizer(p, hx.Adam(learn="lr") / TINY), (12, 28)),
    "hx Adam/SGD": (lambda p: hx.HyperOptimizer(p, hx.Adam() / TINY), (16, 36)),
    "torch fused SGD": (lambda p: torch.optim.SGD(p, fused=True), (0, 12)),
    "hx SGD": (lambda p: hx.HyperOptimizer(p, hx.SGD()), (0, 12)),
    "hx SGD/SGD": (lambda p: hx.HyperOptimizer(p, hx.SGD() / TINY), (8, 16)),
}


class DeviceContender(Contender):
    """Timed by the device's clock. The host queues the calls while the device sleeps: its own time does not count."""

    head_start = HEAD_START

    def seconds(self, calls: int) -> float:
        while self.head_start <= 64 * HEAD_START:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(self.head_start)
            start.record()
            for _ in range(calls):
                self.run()
            late = start.query()
            end.record()
            end.synchronize()
            if not late:
                return start.elapsed_time(end) / calls / 1e3
            self.head_start *= 2
        raise RuntimeError(f"the host takes longer to queue {calls} calls than the device sleeps")


def parameters(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    params = []
    for shape in shapes:
        p = torch.randn(shape, device="cuda").requires_grad_()
        p.grad = torch.empty_like(p).uniform_(0.5, 1.5)
        params.append(p)
    return params


def timed(runs: Mapping[Any, Callable[[], object]], rounds: int, title: str) -> dict[Any, Any]:
    for run in runs.values():
        for _ in range(WARM_UP_CALLS):  # what a first call loads would be taken for a host that is late
            run()
    torch.cuda.synchronize()
    contenders = {name: DeviceContender(run) for name, run in runs.items()}
    return interleave(contenders, rounds, title, batch_of=next(iter(contenders)), most=MOST_CALLS)


def copy_bandwidth(elements: int, rounds: int) -> float:
    """Bytes a second of a copy, read and written."""
    a, b = torch.ones(elements, device="cuda"), torch.empty(elements, device="cuda")
    return 8 * elements / float(np.median(timed({"copy": lambda: b.copy_(a)}, rounds, "copy")["copy"]))


def steps(case: str, shapes: Sequence[tuple[int, ...]], rounds: int, bandwidth: float) -> list[dict[str, Any]]:
    """``step()`` of each stack, as long as the device takes for it.

    300 tensors of 2500 numbers lie in the second cache of a large GPU: their share of the bandwidth says little.
    """
    elements = sum(int(np.prod(shape)) for shape in shapes)
    rows = []
    for group in ("Adam", "SGD"):
        members = [name for name in STACKS if group in name.partition("/")[0]]
        optimizers = {name: STACKS[name][0](parameters(shapes)) for name in members}
        samples = timed({name: opt.step for name, opt in optimizers.items()}, rounds, f"{case}, {group}")
        for name in members:
            bytes_moved = sum(STACKS[name][1]) * elements
            rows.append(
                {
                    "case": case,
                    "contender": name,
                    "baseline": members[0],
                    **median("seconds", samples[name]),
                    **median("ratio", samples[name] / samples[members[0]]),
                    "of_copy_bandwidth": bytes_moved / float(np.median(samples[name])) / bandwidth,
                }
            )
        del optimizers
        torch.cuda.empty_cache()
    return rows


def passes(elements: int, rounds: int, bandwidth: float) -> list[dict[str, Any]]:
    """Each pass alone, on the state that a few steps left."""
    rows = []
    for name, (make, moved) in STACKS.items():
        if name.startswith("torch"):
            continue
        opt = make(parameters([(elements,)]))
        assert isinstance(opt, hx.HyperOptimizer)
        for _ in range(3):
            opt.step()
        for which, run, per_element in pass_calls(opt, moved):
            samples = timed({which: run}, rounds, f"{name}, pass {which}")[which]
            seconds = float(np.median(samples))
            rows.append(
                {
                    "stack": name,
                    "pass": which,
                    "bytes": per_element,
                    **median("seconds", samples),
                    "of_copy_bandwidth": per_element * elements / seconds / bandwidth,
                }
            )
        del opt
        torch.cuda.empty_cache()
    return rows


def pass_calls(opt: hx.HyperOptimizer, moved: tuple[int, int]) -> list[tuple[str, Callable[[], object], int]]:
    """The operators of the passes, by name, and the bytes that they move for an element."""
    group = opt._groups[0]
    arguments = Update(group, group.group["params"], opt.state).active
    no_sums = group.hypergradient(*arguments, True, group.normalize).zero_()
    tower = ([group.tower], [no_sums], [group.plan], [group.bounds], [group.settings])

    def step() -> None:
        torch.ops.hyperopt_ext.tower_(*tower)  # a few microseconds: pass B belongs to the tower's next tick
        group.step(*arguments)

    calls: list[tuple[str, Callable[[], object], int]] = [("B", step, moved[1])]
    if moved[0]:
        calls.insert(0, ("A", lambda: group.hypergradient(*arguments, True, group.normalize), moved[0]))
    return calls


def heights(rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The tower's kernel by the number of levels above the first."""
    runs = {}
    for height in HEIGHTS:
        stack = hx.Stack.of(hx.Adam(lr=1e-9), height=height + 1)
        opt = hx.HyperOptimizer(parameters([(10,)]), stack)
        opt.step()
        g = opt._groups[0]
        sums = torch.full((1, 11), 1e-9, dtype=torch.float64, device="cuda")
        arguments = ([g.tower], [sums], [g.plan], [g.bounds], [g.settings])
        runs[height] = lambda arguments=arguments: torch.ops.hyperopt_ext.tower_(*arguments)
    samples = timed(runs, rounds, "heights")
    rows = [{"height": height, **median("seconds", samples[height])} for height in HEIGHTS]
    return rows, fit_line(HEIGHTS, [row["seconds"] for row in rows])


def small_model(rounds: int) -> list[dict[str, Any]]:
    """A training step of the MLP 784-128-10 as a CUDA graph."""
    makers = {
        "torch fused Adam": lambda p: torch.optim.Adam(p, fused=True, capturable=True),
        "hx Adam^lr/SGD": lambda p: hx.HyperOptimizer(p, hx.Adam(learn="lr") / hx.SGD(lr=1e-7)),
        "hx Adam/SGD": lambda p: hx.HyperOptimizer(p, hx.Adam() / hx.SGD(lr=1e-7)),
    }
    x, y = torch.randn(BATCH, 784, device="cuda"), torch.randint(10, (BATCH,), device="cuda")
    graphs, kept = {}, []
    for name, make in makers.items():
        model = MLP().cuda()
        opt = make(list(model.parameters()))
        kept += [model, opt]

        def step(model: MLP = model, opt: torch.optim.Optimizer = opt) -> None:
            opt.zero_grad(set_to_none=False)
            F.cross_entropy(model(x), y).backward()
            opt.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            step()
    samples = timed({name: graph.replay for name, graph in graphs.items()}, rounds, "small model")
    baseline = samples["torch fused Adam"]
    return [{"contender": name, **median("seconds", s), **median("ratio", s / baseline)} for name, s in samples.items()]


def draw(results: Mapping[str, Any], title: str) -> Figure:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    rows = [row for row in results["steps"] if row["contender"] != row["baseline"]]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for k, name in enumerate(names):
        mine = [row for row in rows if row["contender"] == name]
        places = [cases.index(row["case"]) + (k - (len(names) - 1) / 2) * 0.85 / len(names) for row in mine]
        left.bar(places, [row["ratio"] for row in mine], 0.85 / len(names), label=name)
    left.axhline(1, color="black", linewidth=1)
    left.set(ylabel="time / time of torch's fused optimizer", title="step()")
    left.set_xticks(range(len(cases)), cases)
    left.legend(frameon=False)
    labels = [f"{row['stack']}\npass {row['pass']}" for row in results["passes"]]
    middle.barh(labels, [100 * row["of_copy_bandwidth"] for row in results["passes"]], color="C2")
    middle.axvline(85, color="0.5", linestyle=":")
    middle.set(xlabel="% of the bandwidth of a copy", title="passes alone")
    right.plot(HEIGHTS, [1e6 * row["seconds"] for row in results["heights"]], "o-")
    fit = results["height_fit"]
    slope = f"{1e6 * fit['slope']:.2f} µs a level, R² {fit['r_squared']:.3f}"
    right.set(xlabel="levels above the first", ylabel="µs", title=f"the tower: {slope}")
    figure.suptitle(title, fontsize=10)
    return figure


def print_tables(console: Console, results: Mapping[str, Any]) -> None:
    for key in ("steps", "passes", "small_model"):
        rows = results[key]
        columns = [name for name in rows[0] if not name.endswith("quartiles")]
        table = Table(*columns, title=key, box=box.SIMPLE)
        for row in rows:
            table.add_row(*(f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
        console.print(table)
    console.print({k: f"{v:.4g}" for k, v in results["height_fit"].items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], parents=[timing_options()])
    parser.add_argument("--elements", type=int, default=100_000_000, help="of the large tensor; default: 100 million")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use")
    elements = 10_000_000 if options.quick else options.elements
    rounds = options.rounds or (7 if options.quick else 51)
    bandwidth = copy_bandwidth(elements, rounds)
    many = [(2500,)] * 300
    rows = [
        *steps(f"1x{elements / 1e6:g}M", [(elements,)], rounds, bandwidth),
        *steps("300x2500", many, rounds, bandwidth),
    ]
    tower, fit = heights(rounds)
    results = {
        "gpu": torch.cuda.get_device_name(),
        "rounds": rounds,
        "copy_bytes_per_second": bandwidth,
        "steps": rows,
        "passes": passes(elements, rounds, bandwidth),
        "heights": tower,
        "height_fit": fit,
        "small_model": small_model(rounds),
    }
    title = f"{results['gpu']}; {describe_machine()}"
    console = output()
    console.print(title, highlight=False)
    print_tables(console, results)
    save("gpu", results, draw(results, title), options.out)


if __name__ == "__main__":
    main()
