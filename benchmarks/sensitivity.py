"""How much the final loss depends on the initial learning rate: constant, halved on a schedule, or learned.

    python benchmarks/sensitivity.py --data FOLDER

The sensitivity curves of "Combining Adaptive Algorithms and Hypergradient Method: a Performance and Robustness Study"
on MNIST: SGD, SGD with Nesterov's momentum 0.9 and Adam, with L2 regularization 1e-4, over the initial learning rates
of its Appendix A. Each of them with

    constant    that learning rate
    decay       lr halved at regular intervals (Wilson et al., NeurIPS 2017), 8 times in all
    HD          lr learned by an SGD of step size beta above it (Baydin et al., ICLR 2018), for several beta

The default is a small network and few epochs. The study's own set-up, which takes days on two cores, is

    python benchmarks/sensitivity.py --data FOLDER --model "1000 relu 1000 relu 10" --epochs 200 --seeds 5
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

SGD_LRS = (1e-5, 1e-4, 1e-3, 5e-3, 0.01, 0.05, 0.1, 0.5, 1.0)
ADAM_LRS = (1e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.1, 1.0)
SGD_BETAS = (1e-6, 1e-5, 1e-4, 1e-3, 0.01)
ADAM_BETAS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
# Method: the start of its level, the initial learning rates, the step sizes of the SGD above.
METHODS = {
    "SGD": ("hx.SGD(weight_decay=0.0001", SGD_LRS, SGD_BETAS),
    "SGDN": ("hx.SGD(momentum=0.9, nesterov=True, weight_decay=0.0001", SGD_LRS, SGD_BETAS),
    "Adam": ("hx.Adam(weight_decay=0.0001", ADAM_LRS, ADAM_BETAS),
}
TITLES = {"SGD": "SGD", "SGDN": "SGD, Nesterov's momentum 0.9", "Adam": "Adam"}
METRICS = {"train_loss": "final training loss (nats)", "test_error": "final test error (%)"}
CEILING = {"train_loss": 3.0, "test_error": 91.0}  # guessing has 2.3 and about 90
FIXED: dict[str, dict[str, Any]] = {
    "constant": {"color": "black", "linewidth": 2.2},
    "decay": {"color": "C2", "linewidth": 2.2, "linestyle": "--"},
}
NEAR = 1.0  # points of test error


def plan(options: argparse.Namespace) -> dict[tuple[str, str, float], list[Run]]:
    """The runs of each method, treatment of lr, and initial lr."""
    halve_every = options.halve_every or max(1, options.epochs // 8)
    runs = {}
    for method, (level, lrs, betas) in METHODS.items():
        treatments = {"constant": (0, ")"), "decay": (halve_every, ")")}
        treatments |= {f"HD, beta = {beta:g}": (0, f', learn="lr") / hx.SGD(lr={beta})') for beta in betas}
        if options.quick:
            treatments = {name: treatments[name] for name in ("constant", "decay", f"HD, beta = {betas[2]:g}")}
            lrs = lrs[1::3]
        for treatment, (halving, end) in treatments.items():
            for lr in lrs:
                spec = f"{level}, lr={lr}{end}"
                runs[method, treatment, lr] = [
                    Run("hyperopt_ext", spec, options.model, options.epochs, seed, halving)
                    for seed in range(options.seeds)
                ]
    return runs


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each curve: the means over the seeds, by initial lr. What diverged counts as the ceiling."""
    runs = plan(options)
    result = sweep("sensitivity", [run for group in runs.values() for run in group], options)
    rows = []
    for method, treatment in dict.fromkeys((method, treatment) for method, treatment, _ in runs):
        lrs = [lr for m, t, lr in runs if (m, t) == (method, treatment)]
        row: dict[str, Any] = {"method": method, "treatment": treatment, "lr": lrs}
        groups = [[result(run) for run in runs[method, treatment, lr]] for lr in lrs]
        for metric, ceiling in CEILING.items():
            values = [[r[metric] if r["finite"] else ceiling for r in group] for group in groups]
            row[metric], row[f"{metric}_sd"] = map(list, zip(*(mean_and_sd(v) for v in values), strict=True))
        row["learned_lr"] = [mean_and_sd([r["hyperparameters"][0]["lr"] for r in group])[0] for group in groups]
        row["diverged"] = [sum(not r["finite"] for r in group) for group in groups]
        row["seconds"] = float(np.median([r["seconds"] for group in groups for r in group]))
        rows.append(row)
    return rows


def print_table(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = Table("method", "lr", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in (
        "best lr",
        "train loss",
        "best lr",
        "test error",
        "± sd",
        f"lrs within {NEAR:g} point",
        "median error",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        cells = []
        for metric in METRICS:
            best = int(np.argmin(row[metric]))
            cells += [f"{row['lr'][best]:g}", f"{row[metric][best]:.3g}"]
        errors = np.array(row["test_error"])
        near = int((errors <= errors.min() + NEAR).sum())
        cells += [f"{row['test_error_sd'][best]:.2g}", f"{near} of {len(errors)}", f"{np.median(errors):.3g}"]
        table.add_row(row["method"], row["treatment"], *cells)
    console.print(table)


def draw_curves(ax: Axes, rows: Sequence[dict[str, Any]], metric: str) -> None:
    learned = [row["treatment"] for row in rows if row["treatment"].startswith("HD")]
    colors = dict(zip(learned, colormaps["plasma"](np.linspace(0, 0.85, len(learned))), strict=True))
    for row in rows:
        values = np.clip(row[metric], None, CEILING[metric])
        x = np.array(row["lr"]) / row["lr"][int(np.argmin(values))]
        style = FIXED.get(row["treatment"]) or {"color": colors[row["treatment"]], "linewidth": 1.2}
        ax.plot(x, values, marker="o", markersize=3, label=row["treatment"], **style)
    ax.axvline(1, color="0.6", linewidth=0.8, linestyle=":")
    ax.set(xscale="log", yscale="log", xlabel="lr / best lr of the curve")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.grid(alpha=0.3)


def draw(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> Figure:
    figure, axes = plt.subplots(2, len(METHODS), figsize=(14, 9.5), sharey="row", layout="constrained")
    for column, method in zip(axes.T, METHODS, strict=True):
        shown = [row for row in rows if row["method"] == method]
        for ax, metric in zip(column, METRICS, strict=True):
            draw_curves(ax, shown, metric)
        column[0].set_title(TITLES[method])
        column[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    for ax, label in zip(axes[:, 0], METRICS.values(), strict=True):
        ax.set_ylabel(label)
    axes[1, 0].set_yticks([2, 3, 5, 10, 20, 50, 90])
    figure.suptitle(
        f'MNIST, MLP "{options.model}", {options.epochs} epochs, L2 0.0001, {options.seeds} seed(s); '
        f"diverged: at the top; {describe_machine()}",
        fontsize=10,
    )
    return figure


def main() -> None:
    parser = options(__doc__, seeds=1, epochs=8)
    parser.add_argument(
        "--model", default="128 relu 128 relu 10", help="widths and activations; default: 128 relu 128 relu 10"
    )
    parser.add_argument("--halve-every", type=int, metavar="N", help="epochs, for decay; default: an eighth of all")
    chosen = parser.parse_args()
    rows = collect(chosen)
    console = output()
    console.print(describe_machine(), highlight=False)
    print_table(console, rows)
    save("sensitivity", chosen, rows, draw(rows, chosen))


if __name__ == "__main__":
    main()
