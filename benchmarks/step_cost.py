"""What a step of this library costs beside the fused, foreach and for-loop optimizers of torch.

    python benchmarks/step_cost.py

Timed is the public ``optimizer.step()``, Python included, on parameters of several sizes and counts, with 1 and 2
threads; and, as ``training-step``, everything from ``zero_grad()`` to ``step()`` for a small model. Every contender has
tensors of its own, of the same sizes and values, and all are timed in one interleaved run. Adams are compared with
torch's fused Adam, SGDs with torch's fused SGD. For the steps alone the gradients stay as they are, and the step sizes
of the levels above the first are tiny: all the work is done, but the values stay sane for any number of steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from harness import Contender, describe_machine, format_seconds, interleave, median, output, save, timing_options
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlp import MLP, SHAPES, training_step
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import hyperopt_ext as hx

TINY = hx.SGD(lr=1e-14)  # the sums that it multiplies grow with the number of elements
# What hx.auto does, at an lr that stays.
AS_AUTO = hx.Adam(learn="lr", space={"lr": "log"}, normalize=True, horizon=(125, 0.25), trust=0.03)

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]

# The first of each family is the baseline.
FAMILIES: dict[str, dict[str, MakeOptimizer]] = {
    "Adam": {
        "torch fused Adam": lambda p: torch.optim.Adam(p, fused=True),
        "torch foreach Adam": lambda p: torch.optim.Adam(p, foreach=True),
        "torch for-loop Adam": lambda p: torch.optim.Adam(p, foreach=False),
        "hx Adam": lambda p: hx.HyperOptimizer(p, hx.Adam()),
        "hx Adam^lr/SGD": lambda p: hx.HyperOptimizer(p, hx.Adam(learn="lr") / TINY),
        "hx Adam/SGD": lambda p: hx.HyperOptimizer(p, hx.Adam() / TINY),
        "as hx.auto": lambda p: hx.HyperOptimizer(p, AS_AUTO / TINY),
    },
    "SGD": {
        "torch fused SGD": lambda p: torch.optim.SGD(p, fused=True),
        "torch foreach SGD": lambda p: torch.optim.SGD(p, foreach=True),
        "torch for-loop SGD": lambda p: torch.optim.SGD(p, foreach=False),
        "hx SGD": lambda p: hx.HyperOptimizer(p, hx.SGD()),
        "hx SGD/SGD": lambda p: hx.HyperOptimizer(p, hx.SGD() / TINY),
    },
}

COLORS = {
    "torch foreach Adam": "0.65",
    "torch foreach SGD": "0.65",
    "torch for-loop Adam": "0.82",
    "torch for-loop SGD": "0.82",
    "hx Adam": "C0",
    "hx SGD": "C0",
    "hx Adam^lr/SGD": "C1",
    "hx Adam/SGD": "C2",
    "hx SGD/SGD": "C2",
    "as hx.auto": "C3",
    "hx.auto": "C3",
}

TRAINING_STEP: dict[str, MakeOptimizer] = {
    "torch fused Adam": lambda p: torch.optim.Adam(p, fused=True),
    "hx Adam^lr/SGD": lambda p: hx.HyperOptimizer(p, hx.Adam(learn="lr") / hx.SGD(lr=1e-7)),
    "hx Adam/SGD": lambda p: hx.HyperOptimizer(p, hx.Adam() / hx.SGD(lr=1e-7)),
    "hx.auto": lambda p: hx.auto(p),
}

CASES: dict[str, Sequence[tuple[int, ...]]] = {
    "1x0.1M": [(100_000,)],
    "1x1.6M": [(1_600_000,)],
    "1x20M": [(20_000_000,)],
    "300x2500": [(2500,)] * 300,
    "3000x250": [(250,)] * 3000,
    "mlp": SHAPES,
}
QUICK = ("1x0.1M", "300x2500", "mlp", "training-step")


def parameters(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Leaf tensors with gradients, the same in every call; no gradient is near 0, so no square is denormal."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.randn(shape, generator=generator).requires_grad_()
        p.grad = torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
        params.append(p)
    return params


def check(optimizer: torch.optim.Optimizer) -> None:
    """All steps were made, and nothing went to infinity on the way."""
    for group in optimizer.param_groups:
        assert all(torch.isfinite(p).all() for p in group["params"])
    if isinstance(optimizer, hx.HyperOptimizer):
        assert optimizer.skipped_steps() == optimizer.held_steps() == 0
        assert all(torch.isfinite(h) for level in optimizer.hyperparameters() for h in level.values())


def optimizers_of(case: str) -> tuple[dict[str, dict[str, Contender]], list[torch.optim.Optimizer]]:
    """The contenders of a case by family, and their optimizers."""
    optimizers = []
    if case == "training-step":
        contenders = {}
        for name, make in TRAINING_STEP.items():
            model = MLP()
            optimizers.append(make(list(model.parameters())))
            contenders[name] = Contender(training_step(model, optimizers[-1]))
        return {"Adam": contenders}, optimizers
    families: dict[str, dict[str, Contender]] = {}
    for family, makers in FAMILIES.items():
        families[family] = {}
        for name, make in makers.items():
            optimizers.append(make(parameters(CASES[case])))
            families[family][name] = Contender(optimizers[-1].step)
    return families, optimizers


def measure(case: str, threads: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """One row for each contender and number of threads."""
    families, optimizers = optimizers_of(case)
    contenders = {name: contender for family in families.values() for name, contender in family.items()}
    for count in threads:
        torch.set_num_threads(count)
        samples = interleave(contenders, rounds, f"{case}, {with_threads(count)}", batch_of=next(iter(contenders)))
        for family, members in families.items():
            baseline = next(iter(members))
            for name in members:
                yield {
                    "case": case,
                    "threads": count,
                    "family": family,
                    "contender": name,
                    "baseline": baseline,
                    **median("seconds", samples[name]),
                    **median("ratio", samples[name] / samples[baseline]),
                }
    for optimizer in optimizers:
        check(optimizer)


def select(rows: Sequence[dict[str, Any]], **values: object) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def unique(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def with_threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def print_tables(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """A table for each case; a cell is the median time, the ratio to the baseline, and the quartiles of the ratio."""
    threads = unique(rows, "threads")
    for case in unique(rows, "case"):
        table = Table(title=case, title_justify="left", box=box.SIMPLE, pad_edge=False)
        table.add_column(no_wrap=True)
        for count in threads:
            table.add_column(with_threads(count), justify="right", no_wrap=True)
        for family in unique(select(rows, case=case), "family"):
            shown = select(rows, case=case, family=family)
            for name in unique(shown, "contender"):
                table.add_row(name, *(cell(row) for row in select(shown, contender=name)))
            table.add_section()
        console.print(table)


def cell(row: dict[str, Any]) -> str:
    low, high = row["ratio_quartiles"]
    quartiles = "" if row["contender"] == row["baseline"] else f"({low:.2f}-{high:.2f})"
    return f"{format_seconds(row['seconds'])} {row['ratio']:5.2f} {quartiles:11}"


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Ratios to the baseline: a row of panels for each number of threads, a column for each family."""
    families, threads = unique(rows, "family"), unique(rows, "threads")
    size = (9 * len(families), 3.6 * len(threads) + 0.6)
    figure, axes = plt.subplots(len(threads), len(families), figsize=size, squeeze=False, layout="constrained")
    for i, count in enumerate(threads):
        for j, family in enumerate(families):
            draw_panel(axes[i][j], select(rows, threads=count, family=family))
            axes[i][j].set_title(f"{family}, {with_threads(count)}")
    for j in range(len(families)):
        handles, labels = axes[0][j].get_legend_handles_labels()
        axes[-1][j].legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    figure.suptitle(f"optimizer.step(): medians and quartiles of the ratios; {describe_machine()}", fontsize=10)
    return figure


def draw_panel(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    top = 4.0  # bars that are longer end here; their number tells
    baseline, cases = rows[0]["baseline"], unique(rows, "case")
    names = [name for name in unique(rows, "contender") if name != baseline]
    width = 0.85 / len(names)
    ax.axhline(1, color="black", linewidth=1, label=baseline, zorder=3)
    for k, name in enumerate(names):
        bars = select(rows, contender=name)
        ratios = np.array([row["ratio"] for row in bars])
        low, high = np.array([row["ratio_quartiles"] for row in bars]).T
        places = [cases.index(row["case"]) + (k - (len(names) - 1) / 2) * width for row in bars]
        ax.bar(places, np.minimum(ratios, top), width, label=name, color=COLORS[name])
        inside = ratios < top
        for place, ratio in zip(places, ratios, strict=True):
            ax.text(place, 0.04, f"{ratio:.2f}", fontsize=7, ha="center", va="bottom", rotation=90)
        ax.vlines(np.array(places)[inside], low[inside], high[inside], color="0.3", linewidth=1)
    ax.set(ylim=(0, top), ylabel=f"time / time of {baseline}")
    ax.set_xticks(range(len(cases)), cases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], parents=[timing_options()])
    known = [*CASES, "training-step"]
    parser.add_argument("--cases", nargs="+", choices=known, metavar="CASE", help=f"some of {', '.join(known)}")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N", help="default: 1 2")
    options = parser.parse_args()
    cases = options.cases or (QUICK if options.quick else known)
    rounds = options.rounds or (7 if options.quick else 51)

    rows: list[dict[str, Any]] = []
    for case in cases:
        rows += measure(case, options.threads, rounds)
    console = output()
    console.print(describe_machine(), highlight=False)
    print_tables(console, rows)
    save("step_cost", {"rounds": rounds, "rows": rows}, draw(rows), options.out)


if __name__ == "__main__":
    main()
