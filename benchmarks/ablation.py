"""What each part of `hx.auto` is for: the problem of `heights.py` with one of them changed or left out.

python benchmarks/ablation.py --data FOLDER
"""

from __future__ import annotations

import argparse
from typing import Any

from experiments import Run, mean_and_sd, options, save, sweep
from harness import describe_machine, output
from heights import MODEL
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

FIRST_LRS = (1e-6, 1e-3, 10.0)
# Arguments of hx.auto that differ from its own.
CHANGES = {
    "as it is": "",
    "no cap on the update": "trust=None",
    "cap of 0.3": "trust=0.3",
    "cap of 0.003": "trust=0.003",
    "horizon 1, as the paper": "horizon=1",
    "horizon 10": "horizon=10",
    "horizon 1000": "horizon=1000",
    "horizon that does not grow": "horizon={n}",
    "lr multiplied by 1 + move": 'space={{"lr": "multiplicative"}}',
    "lr for each tensor": 'granularity="tensor"',
    "lr grows by 2 % at most": "growth=1.02",
}
HORIZONS = {"adam": 125, "sgd": 400}


def spec(base: str, lr: float, change: str) -> str:
    return (
        ", ".join([f'hx.auto(params, "{base}", lr={lr}', *([change.format(n=HORIZONS[base])] if change else [])]) + ")"
    )


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    changes = dict(list(CHANGES.items())[:2]) if options.quick else CHANGES
    runs = {
        (base, name, lr): [
            Run("optimizer", spec(base, lr, change), MODEL, options.epochs, s) for s in range(options.seeds)
        ]
        for base in HORIZONS
        for name, change in changes.items()
        for lr in FIRST_LRS
    }
    result = sweep("ablation", [run for group in runs.values() for run in group], options)
    rows = []
    for base in HORIZONS:
        for name in changes:
            errors = [mean_and_sd([result(r)["test_error"] for r in runs[base, name, lr]]) for lr in FIRST_LRS]
            means, deviations = map(list, zip(*errors, strict=True))
            rows.append(
                {"base": base, "change": name, "lr": FIRST_LRS, "test_error": means, "test_error_sd": deviations}
            )
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    figure, axes = plt.subplots(1, len(HORIZONS), figsize=(12, 4.5), sharey=True, layout="constrained")
    for ax, base in zip(axes, HORIZONS, strict=True):
        shown = [row for row in rows if row["base"] == base]
        for i, lr in enumerate(FIRST_LRS):
            ax.plot([row["test_error"][i] for row in shown], range(len(shown)), "<o>"[i], label=f"first lr {lr:g}")
        ax.set(xscale="log", xlabel="test error (%)", title=base, xlim=(2.5, 100))
        ax.set_yticks(range(len(shown)), [row["change"] for row in shown])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False)
    figure.suptitle(describe_machine(), fontsize=10)
    return figure


def main() -> None:
    chosen = options(__doc__, seeds=2, epochs=3).parse_args()
    rows = collect(chosen)
    table = Table("base", "change", *(f"{lr:g}" for lr in FIRST_LRS), box=box.SIMPLE, pad_edge=False)
    for row in rows:
        table.add_row(row["base"], row["change"], *(f"{error:.1f}" for error in row["test_error"]))
    output().print(table)
    save("ablation", chosen, rows, draw(rows))


if __name__ == "__main__":
    main()
