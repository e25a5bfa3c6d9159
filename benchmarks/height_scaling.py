"""How the time of a training step grows with the height of the tower.

    python benchmarks/height_scaling.py

Towers of Adams, each level learning lr and both betas of the one below, train the same model on the same batches:

    fused        ``hx.HyperOptimizer``: no graph, the whole tower in one call
    functional   ``hx.functional.tower``: each level's step is a function that autograd differentiates, as in the paper
    package      the paper's package, gradient-descent-the-ultimate-optimizer, with the same start values. It is run
                 with a plain ``backward()``: the graph of the backward that its authors ask for only costs time

and the first two also compiled: forward, gradients, tower and update as one graph. Timed is the whole training step,
since the package does part of the tower's work in the model's backward pass; for the fused form also ``step()`` alone,
in training, and as a floor the model's forward and backward without any optimizer. All forms of all heights are timed
in one interleaved run. The lines time = a + b height are fitted to the medians from height 2 on: at height 1 there is
nothing to learn, and the fused form saves its pass over the parameters. Before all that the fused and the functional
form are run side by side in float64, and must agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch._dynamo
from gradient_descent_the_ultimate_optimizer import gdtuo
from harness import (
    Contender,
    compiled,
    describe_machine,
    fit_line,
    format_seconds,
    interleave,
    median,
    output,
    save,
    timing_options,
)
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from mlp import MLP, batches, mlp, training_step
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import hyperopt_ext as hx

HEIGHTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
QUICK = (1, 2, 5, 10)
LR = 1e-3  # of every level

FORMS = {
    "fused": "hx.HyperOptimizer",
    "fused, compiled": "hx.HyperOptimizer, compiled",
    "functional": "hx.functional.tower",
    "functional, compiled": "hx.functional.tower, compiled",
    "package": "the paper's package",
    "model": "model alone: forward and backward",
    "fused step()": "hx.HyperOptimizer.step() alone",
}
# Beyond, a round would take a second or more, or a compilation a minute.
HIGHEST = {"functional": 200, "functional, compiled": 20, "package": 50}


def fused(height: int, dtype: torch.dtype = torch.float32) -> tuple[MLP, hx.HyperOptimizer]:
    model = MLP(dtype)
    return model, hx.HyperOptimizer(model.parameters(), hx.Stack.of(hx.Adam(lr=LR), height=height))


def fused_step(height: int) -> tuple[Contender, hx.HyperOptimizer]:
    """``step()`` alone, on the gradients that training leaves."""
    model, optimizer = fused(height)
    data = batches()

    def prepare() -> None:
        x, y = next(data)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return Contender(optimizer.step, prepare), optimizer


def fused_compiled(height: int) -> tuple[Callable[[], None], hx.HyperOptimizer]:
    model, optimizer = fused(height)
    params, data = list(model.parameters()), batches()

    def step(x: Tensor, y: Tensor) -> None:
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        optimizer.step()

    return compiled(step, lambda step: lambda: step(*next(data)), calls=1)["run"], optimizer


def functional(height: int, dtype: torch.dtype = torch.float32) -> tuple[Callable[..., Any], Any]:
    """A training step (params, state, x, y) -> (params, state), and its start."""
    tower = hx.functional.tower(hx.Stack.of(hx.Adam(lr=LR), height=height))

    def loss_of(params: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(mlp(x, *params), y)

    def step(params: list[Tensor], state: Any, x: Tensor, y: Tensor) -> Any:
        return tower.step(params, torch.func.grad(loss_of)(params, x, y), state)

    return step, tower.init(list(MLP(dtype).parameters()))


def functional_training(height: int, compile: bool = False) -> Callable[[], None]:
    step, start = functional(height)
    data = batches()

    def drive(step: Callable[..., Any]) -> Callable[[], None]:
        held = start

        def run() -> None:
            nonlocal held
            held = step(*held, *next(data))

        return run

    return compiled(step, drive, calls=1)["run"] if compile else drive(step)


def package_training(height: int) -> Callable[[], None]:
    optimizer = gdtuo.NoOpOptimizer()
    for _ in range(height):
        optimizer = gdtuo.Adam(alpha=LR, optimizer=optimizer)
    wrapper = gdtuo.ModuleWrapper(MLP(), optimizer=optimizer)
    wrapper.initialize()
    data = batches()

    def step() -> None:
        x, y = next(data)
        wrapper.begin()
        loss = F.cross_entropy(wrapper.forward(x), y)
        wrapper.zero_grad()
        loss.backward()
        wrapper.step()

    return step


def model_alone() -> Callable[[], None]:
    model = MLP()
    data = batches()

    def step() -> None:
        x, y = next(data)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return step


def disagreement(height: int, steps: int = 30) -> float:
    """The largest difference between the parameters of the fused and the functional form, in float64."""
    model, optimizer = fused(height, torch.float64)
    function, held = functional(height, torch.float64)
    data = batches(torch.float64)
    worst = 0.0
    for _ in range(steps):
        x, y = next(data)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        held = function(*held, x, y)
        differences = [(p - q).abs().max() for p, q in zip(model.parameters(), held[0], strict=True)]
        worst = max(worst, torch.stack(differences).max().item())
    return worst


def measure(heights: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """One row for each form and height."""
    contenders = {("model", 0): Contender(model_alone())}
    optimizers = []
    for height in heights:
        contenders["fused", height] = Contender(training_step(*fused(height)))
        contenders["fused step()", height], optimizer = fused_step(height)
        optimizers.append(optimizer)
        run, optimizer = fused_compiled(height)
        contenders["fused, compiled", height] = Contender(run)
        optimizers.append(optimizer)
        if height <= HIGHEST["functional"]:
            contenders["functional", height] = Contender(functional_training(height))
        if height <= HIGHEST["functional, compiled"]:
            contenders["functional, compiled", height] = Contender(functional_training(height, compile=True))
        if height <= HIGHEST["package"]:
            contenders["package", height] = Contender(package_training(height))
    samples = interleave(contenders, rounds, "rounds")
    for optimizer in optimizers:
        assert optimizer.skipped_steps() == optimizer.held_steps() == 0
    return [{"form": form, "height": height, **median("seconds", samples[form, height])} for form, height in contenders]


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The line of each form that has a tower, from height 2 on, in microseconds."""
    lines = {}
    for form in FORMS:
        shown = [row for row in rows if row["form"] == form and row["height"] >= 2]
        if len(shown) > 2:
            line = fit_line([row["height"] for row in shown], [row["seconds"] * 1e6 for row in shown])
            lines[form] = {
                "microseconds_per_level": line["slope"],
                "microseconds_at_height_0": line["intercept"],
                "r_squared": line["r_squared"],
            }
    return lines


def print_tables(console: Console, rows: Sequence[dict[str, Any]], lines: dict[str, dict[str, float]]) -> None:
    heights = list(dict.fromkeys(row["height"] for row in rows))
    title = "Median time of a training step"
    table = Table("height", title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for form in FORMS:
        table.add_column(form, justify="right")
    times = {(row["form"], row["height"]): format_seconds(row["seconds"]) for row in rows}
    for height in heights:
        table.add_row(str(height), *(times.get((form, height), "") for form in FORMS))
    table.add_section()
    for key, label in [("microseconds_per_level", "µs a level"), ("r_squared", "R²")]:
        table.add_row(label, *(f"{lines[form][key]:.4g}" if form in lines else "" for form in FORMS))
    console.print(table)


def draw(rows: Sequence[dict[str, Any]], lines: dict[str, dict[str, float]]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    panels = [
        (
            left,
            1e3,
            {
                "package": ("C3", "s"),
                "functional": ("C1", "^"),
                "functional, compiled": ("C4", "v"),
                "fused": ("C0", "o"),
                "fused, compiled": ("C2", "D"),
            },
        ),
        (right, 1e6, {"fused step()": ("C0", "o")}),
    ]
    for ax, unit, styles in panels:
        for form, (color, marker) in styles.items():
            shown = [row for row in rows if row["form"] == form]
            if not shown:
                continue
            heights = np.array([row["height"] for row in shown])
            medians = np.array([row["seconds"] for row in shown]) * unit
            quartiles = np.array([row["seconds_quartiles"] for row in shown]).T * unit
            label = FORMS[form]
            if form in lines:
                slope, intercept, r_squared = lines[form].values()
                label += f"\n{slope:.3g} µs a level, R² = {r_squared:.4f}"
                grid = np.geomspace(2, heights.max(), 200)
                ax.plot(grid, (intercept + slope * grid) * 1e-6 * unit, color=color, linewidth=1)
            ax.errorbar(heights, medians, np.abs(quartiles - medians), color=color, fmt=marker, capsize=2, label=label)
        ax.set_xlabel("height of the tower of Adams (levels)")
        ax.grid(alpha=0.3)
    [floor] = [row["seconds"] for row in rows if row["form"] == "model"]
    left.axhline(floor * 1e3, color="0.5", linestyle="--", label=FORMS["model"])
    left.set(xscale="log", yscale="log", ylabel="ms", title="Whole training step")
    left.xaxis.set_major_formatter("{x:g}")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    right.set(ylim=(0, None), ylabel="µs", title="step() alone")
    for ax in (left, right):
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    title = f"MLP 784-128-10, batch 256: medians, quartiles and fitted lines; {describe_machine()}"
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], parents=[timing_options()])
    parser.add_argument("--heights", nargs="+", type=int, metavar="N", help=f"default: {' '.join(map(str, HEIGHTS))}")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    options = parser.parse_args()
    heights = options.heights or (QUICK if options.quick else HEIGHTS)
    rounds = options.rounds or (7 if options.quick else 51)
    torch.set_num_threads(options.threads)

    worst = max(disagreement(height) for height in range(1, 5))
    assert worst < 1e-9, f"the functional tower differs from the fused one by {worst:g}"
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        rows = measure(heights, rounds)
    lines = fit(rows)
    console = output()
    console.print(describe_machine(), highlight=False)
    print_tables(console, rows, lines)
    results = {"rounds": rounds, "fused_minus_functional_in_float64": worst, "lines": lines, "rows": rows}
    save("height_scaling", results, draw(rows, lines), options.out)


if __name__ == "__main__":
    main()
