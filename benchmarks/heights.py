"""Does a taller tower need less of a guess? The test error over the initial step size, for heights 0 to 5.

    python benchmarks/heights.py --data FOLDER

The figure of Chandra et al. (NeurIPS 2022, section 4.4) on MNIST: towers of SGDs and of Adams that start from the same
step size at every level, from 1e-6 to 10. Height 0 has nothing above the optimizer of the parameters. Three series:

    package        the package of the paper
    plain          this library with that package's conventions (``hx.compat.gdtuo``)
    safeguards     this library with what keeps a tower in bounds: see :func:`safeguarded`

Beside them, over the same step sizes, ``hx.auto``, also without one, and what others offer to those who do not know the
right one: Prodigy, whose first estimate is that step size, and schedule-free AdamW, whose lr it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from experiments import Run, mean_and_sd, options, save, sweep
from harness import describe_machine, output
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

MODEL = "128 tanh 10 tanh"
STEP_SIZES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
HEIGHTS = (0, 1, 2, 3, 4, 5)
BASES = ("SGD", "Adam")
SERIES = {
    "package": "the package of the paper",
    "plain": "this library, plain",
    "safeguards": "this library, safeguards",
}
OTHERS = {
    "hx.auto": 'hx.auto(params, base="{base}", lr={lr})',
    "hx.auto, no lr given": 'hx.auto(params, base="{base}")',
    "Prodigy": "prodigyopt.Prodigy(params, d0={lr})",
    "schedule-free AdamW": "schedulefree.AdamWScheduleFree(params, lr={lr})",
}
STYLES = {
    "hx.auto": ("C3", "--"),
    "hx.auto, no lr given": ("C4", ":"),
    "Prodigy": ("C2", ":"),
    "schedule-free AdamW": ("C1", "-."),
}
NEAR = 1.0  # points of test error


def plain(base: str, lr: float, height: int) -> str:
    return " / ".join([f"gdtuo.{base}(alpha={lr})"] * (height + 1))


def package(base: str, lr: float, height: int) -> str:
    return plain(base, lr, height).replace("gdtuo.", "")


def safeguarded(base: str, lr: float, height: int) -> str:
    """A tower that moves step sizes by a part of themselves, after a look far back, and bounds every update.

    The first level gets what ``hx.auto`` is made of. Above it a step size is a relative change in one step: it starts
    from ``lr``, within the range of what makes sense for one.
    """
    relative = 'learn="lr", space={"lr": "log"}, normalize=True'
    horizon, trust, low, high = {"SGD": (100, 0.1, 0.15, 0.3), "Adam": ((125, 0.25), 0.03, 0.045, 0.055)}[base]
    first = f"hx.{base}(lr={lr}, {relative}, horizon={horizon}, trust={trust})"
    above = f'hx.{base}(lr={min(max(lr, low), high)}, {relative}, bounds={{"lr": ({low}, {high})}})'
    return " / ".join([first, *[above] * height])


def run(series: str, base: str, lr: float, height: int, epochs: int, seed: int) -> Run:
    if height == 0:
        series = "plain"  # with nothing to learn, all series are the same
    form = "package" if series == "package" else "hyperopt_ext"
    spec = {"package": package, "plain": plain, "safeguards": safeguarded}[series](base, lr, height)
    return Run(form, spec, MODEL, epochs, seed)


def plan(options: argparse.Namespace) -> dict[tuple[str, str, int], dict[float, list[Run]]]:
    """The runs of each curve, by initial step size: towers by series, base and height; others by name, base and 0."""
    step_sizes, heights = (STEP_SIZES[::3], HEIGHTS[::2]) if options.quick else (STEP_SIZES, HEIGHTS)
    seeds = range(options.seeds)
    curves: dict[tuple[str, str, int], dict[float, list[Run]]] = {}
    for base in BASES:
        for series in (name for name in SERIES if name in options.series):
            for height in heights:
                curves[series, base, height] = {
                    lr: [run(series, base, lr, height, options.epochs, seed) for seed in seeds] for lr in step_sizes
                }
        for name in (name for name in OTHERS if name in options.series):
            curves[name, base, 0] = {
                lr: [
                    Run("optimizer", OTHERS[name].format(base=base.lower(), lr=lr), MODEL, options.epochs, seed)
                    for seed in seeds
                ]
                for lr in step_sizes
            }
    return curves


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each curve: the means over the seeds, by initial step size."""
    curves = plan(options)
    result = sweep("heights", [r for curve in curves.values() for group in curve.values() for r in group], options)
    rows = []
    for (series, base, height), curve in curves.items():
        groups = [[result(r) for r in group] for group in curve.values()]
        errors = [mean_and_sd([r["test_error"] for r in group]) for group in groups]
        rows.append(
            {
                "series": series,
                "base": base,
                "height": height,
                "step_size": list(curve),
                "test_error": [mean for mean, _ in errors],
                "test_error_sd": [sd for _, sd in errors],
                "diverged": [sum(not r["finite"] for r in group) for group in groups],
                "learned": [[r["hyperparameters"] for r in group] for group in groups],
                "seconds": float(np.median([r["seconds"] for group in groups for r in group])),
            }
        )
    return rows


def print_table(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = Table("base", "series", title="Test error in %", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("height", *(f"{lr:g}" for lr in rows[0]["step_size"]), "± sd", f"within {NEAR:g} of best", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    best = {base: min(min(row["test_error"]) for row in rows if row["base"] == base) for base in BASES}
    for i, row in enumerate(rows):
        errors = row["test_error"]
        near = sum(error <= best[row["base"]] + NEAR for error in errors)
        label = (row["base"], row["series"], str(row["height"]) if row["series"] in SERIES else "")
        cells = [f"{error:.1f}" for error in errors]
        last = i + 1 == len(rows) or row["series"] != rows[i + 1]["series"]
        spread = f"{np.median(row['test_error_sd']):.2f}"
        table.add_row(*label, *cells, spread, f"{near} of {len(errors)}", f"{row['seconds']:.1f}", end_section=last)
    console.print(table)


def draw_panel(ax: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        if row["series"] in SERIES:
            color, style = colormaps["viridis"](row["height"] / max(HEIGHTS) * 0.95), "-"
            label = f"height {row['height']}"
        else:
            (color, style), label = STYLES[row["series"]], row["series"]
        ax.plot(row["step_size"], row["test_error"], style, color=color, marker="o", markersize=3, label=label)
    ax.set(xscale="log", yscale="log", ylim=(2, 100))
    ax.set_yticks([2, 3, 5, 10, 20, 50, 90])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.grid(alpha=0.3)


def draw(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> Figure:
    figure, axes = plt.subplots(
        len(BASES), len(SERIES), figsize=(15, 9), sharex=True, sharey=True, layout="constrained"
    )
    for line, base in zip(axes, BASES, strict=True):
        for ax, series in zip(line, SERIES, strict=True):
            others = OTHERS if series == "safeguards" else {}
            draw_panel(ax, [row for row in rows if row["base"] == base and row["series"] in (series, *others)])
            ax.set_title(f"towers of {base}: {SERIES[series]}", fontsize=11)
        line[0].set_ylabel("final test error (%)")
    for ax in axes[-1]:
        ax.set_xlabel("initial step size, the same at every level")
    labels = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=10, frameon=False)
    title = f'MNIST, MLP "{MODEL}", {options.epochs} epochs, {options.seeds} seed(s); {describe_machine()}'
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    parser = options(__doc__, seeds=2, epochs=3)
    names = [*SERIES, *OTHERS]
    parser.add_argument("--series", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    chosen = parser.parse_args()
    rows = collect(chosen)
    console = output()
    console.print(describe_machine(), highlight=False)
    print_table(console, rows)
    save("heights", chosen, rows, draw(rows, chosen))


if __name__ == "__main__":
    main()
