"""Tables 1 and 2 of "Analysis of the Effectiveness of Hypergradient Descent on New Optimization Algorithms".

    python benchmarks/mnist_tables.py --data FOLDER

The reproduction of Chandra et al. (NeurIPS 2022) by Sun, Zhu and Wang: MLP 784-128-10 with tanh after both layers,
MNIST in [0, 1], 5 epochs in batches of 256, step sizes of its Tables 4 and 5. Three columns of test errors: the
paper's; this library's, with the conventions of the package of Chandra et al. (``hx.compat.gdtuo``) where that package
has the method; and that package's, from the same weights and on the same batches. Rows further than a point from the
paper are marked. Times are those of the fastest of the seeds, without evaluation.

A second table measures other readings of a row, among them what the authors' published notebook
(github.com/JackSun72/CSC413-Final-Project, Code_without_results.ipynb) runs, where that is not what the paper says:

- the first level always has the default step size of its class: 0.001 for Adam, AdaBelief and AMSGrad, 0.01 for others;
- AdaBelief has eps = 1e-8, from which its second moment starts, and no rectification;
- AMSGrad has no bias corrections, and its maximum is that of the last two second moments, not of all;
- it has no Adadelta: there is an Adagrad / Adagrad in that place.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from experiments import Result, Run, mean_and_sd, options, save, sweep
from harness import describe_machine, output
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

MODEL = "128 tanh 10 tanh"
FAR = 1.0  # points of test error

LINEAR = '{"lr": (-inf, inf)}'  # the package's step sizes may turn negative
UNCORRECTED = "UncorrectedAMSGrad"


@dataclass(frozen=True)
class Row:
    """A row of the paper's tables, or another reading of one; ``spec`` and ``form`` as in :class:`Run`.

    ``notebook``: this is what the authors' notebook runs. ``seeds``: how many at least.
    """

    name: str
    paper: float
    spec: str
    form: str = "hyperopt_ext"
    reading: str = ""
    notebook: bool = False
    seeds: int = 0

    def runs(self, options: argparse.Namespace) -> list[Run]:
        seeds = range(max(self.seeds, options.seeds))
        return [Run(self.form, self.spec, MODEL, options.epochs, seed) for seed in seeds]

    def of_package(self) -> Row | None:
        """The same in the package, if it has the methods."""
        return None if "hx." in self.spec else replace(self, spec=self.spec.replace("gdtuo.", ""), form="package")


def adabelief(lr: float, eps: float = 1e-8, rectify: bool = False) -> str:
    arguments = f'lr={lr}, eps={eps}, rectify={rectify}, initial_state={{"exp_avg_var": {eps}}}'
    return f"hx.AdaBelief({arguments}, bounds={LINEAR})"


def amsgrad(lr: float) -> str:
    start = '{"exp_avg_sq": 1e-08, "max_exp_avg_sq": 1e-08}'
    return f"hx.AMSGrad(lr={lr}, initial_state={start}, bounds={LINEAR})"


TABLES = {
    "Table 1": [
        Row("SGD", 13.45, "gdtuo.SGD(alpha=0.01)"),
        Row("SGD / SGD", 7.81, "gdtuo.SGD(alpha=0.01) / gdtuo.SGD(alpha=0.01)"),
        Row("SGD / Adam", 8.46, "gdtuo.SGD(alpha=0.01) / gdtuo.Adam(alpha=0.1)"),
        Row("SGD / Adagrad", 8.21, "gdtuo.SGD(alpha=0.01) / gdtuo.AdaGrad(alpha=0.01)"),
        Row("Adagrad", 10.46, "gdtuo.AdaGrad(alpha=0.01)"),
        Row("Adagrad / SGD", 7.82, "gdtuo.AdaGrad(alpha=0.01) / gdtuo.SGD(alpha=0.01)"),
        Row("Adagrad / Adadelta", 7.57, "gdtuo.AdaGrad(alpha=0.01) / hx.Adadelta(lr=0.01)"),
        Row("Adam", 4.66, "gdtuo.Adam(alpha=0.001)"),
        Row("Adam / SGD", 3.02, "gdtuo.Adam(alpha=0.01) / gdtuo.SGD(alpha=1e-05)"),
        Row("Adam / Adam", 3.14, "gdtuo.Adam(alpha=0.001) / gdtuo.Adam(alpha=0.001)"),
        Row("Adamᵅ / SGD", 2.93, "gdtuo.AdamBaydin(alpha=0.01) / gdtuo.SGD(alpha=1e-05)"),
        Row("Adamᵅ / Adam", 2.99, "gdtuo.AdamBaydin(alpha=0.001) / gdtuo.Adam(alpha=0.001)"),
        Row("RMSProp", 6.25, "gdtuo.RMSProp(alpha=0.01)"),
        Row("RMSProp / SGD", 3.10, "gdtuo.RMSProp(alpha=0.01) / gdtuo.SGD(alpha=0.0001)"),
        Row("RMSProp / RMSProp", 3.23, "gdtuo.RMSProp(alpha=0.01) / gdtuo.RMSProp(alpha=0.0001)"),
        Row("RMSPropᵅ / SGD", 3.68, "gdtuo.RMSPropAlpha(alpha=0.01) / gdtuo.SGD(alpha=0.0001)"),
        Row("RMSPropᵅ / RMSProp", 3.18, "gdtuo.RMSPropAlpha(alpha=0.01) / gdtuo.RMSProp(alpha=0.0001)"),
    ],
    "Table 2": [
        Row("AdaBelief", 6.61, adabelief(0.01)),
        Row("AdaBelief / SGD", 2.98, f"{adabelief(0.01)} / gdtuo.SGD(alpha=0.0001)"),
        Row("AdaBelief / Adam", 4.43, f"{adabelief(0.01)} / gdtuo.Adam(alpha=0.0001)"),
        Row("AMSGrad", 3.70, amsgrad(0.01)),
        Row("AMSGrad / SGD", 3.93, f"{amsgrad(0.01)} / gdtuo.SGD(alpha=0.0001)"),
        Row("AMSGrad / Adam", 3.31, f"{amsgrad(0.01)} / gdtuo.Adam(alpha=0.0001)"),
    ],
}
ROWS = [row for rows in TABLES.values() for row in rows]
PAPER = {row.name: row.paper for row in ROWS}


def other(name: str, reading: str, spec: str, form: str = "hyperopt_ext", notebook: bool = False) -> Row:
    return Row(name, PAPER[name], spec, form, reading, notebook)


def above_adaptive(base: str) -> dict[str, tuple[str, str]]:
    """The two towers of a half of Table 2: what stands above, for this library and for the package."""
    return {
        base: ("", ""),
        f"{base} / SGD": (" / gdtuo.SGD(alpha=0.0001)", " / SGD(alpha=0.0001)"),
        f"{base} / Adam": (" / gdtuo.Adam(alpha=0.0001)", " / Adam(alpha=0.0001)"),
    }


def adabelief_readings() -> list[Row]:
    result = []
    for name, (above, _) in above_adaptive("AdaBelief").items():
        result += [
            other(name, "lr = 0.001", adabelief(0.001) + above, notebook=True),
            other(name, "lr = 0.001, eps = 1e-16", adabelief(0.001, 1e-16) + above),
            other(name, "lr = 0.001, eps = 1e-16, rectified", adabelief(0.001, 1e-16, True) + above),
        ]
    return result


def amsgrad_readings() -> list[Row]:
    result = []
    for name, (ours, theirs) in above_adaptive("AMSGrad").items():
        result += [
            other(name, "lr = 0.001", amsgrad(0.001) + ours),
            other(name, "lr = 0.001, no bias correction", f"{UNCORRECTED}(alpha=0.001){theirs}", "package"),
            other(name, "lr = 0.01, no bias correction", f"{UNCORRECTED}(alpha=0.01){theirs}", "package"),
            other(
                name,
                "lr = 0.001, no bias correction, maximum of two",
                f"{UNCORRECTED}(alpha=0.001, forget=True){theirs}",
                "package",
                notebook=True,
            ),
        ]
    return result


OTHERS = [
    other("Adagrad / Adadelta", "Adadelta(lr = 1)", "gdtuo.AdaGrad(alpha=0.01) / hx.Adadelta(lr=1.0)"),
    other(
        "Adagrad / Adadelta",
        "Adagrad / Adagrad",
        "gdtuo.AdaGrad(alpha=0.01) / gdtuo.AdaGrad(alpha=0.01)",
        notebook=True,
    ),
    other("Adam / SGD", "lr = 0.001", "gdtuo.Adam(alpha=0.001) / gdtuo.SGD(alpha=1e-05)", notebook=True),
    other("Adamᵅ / SGD", "lr = 0.001", "gdtuo.AdamBaydin(alpha=0.001) / gdtuo.SGD(alpha=1e-05)", notebook=True),
    Row("RMSProp", PAPER["RMSProp"], "gdtuo.RMSProp(alpha=0.01)", reading="30 seeds", seeds=30),
    other("RMSProp", "torch.optim", "torch.optim.RMSprop(params, lr=0.01)", "optimizer"),
    *adabelief_readings(),
    *amsgrad_readings(),
]


def summary(results: list[Result]) -> dict[str, Any]:
    mean, sd = mean_and_sd([r["test_error"] for r in results])
    learned: list[dict[str, float]] = [
        {name: mean_and_sd([r["hyperparameters"][k][name] for r in results])[0] for name in level}
        for k, level in enumerate(results[0]["hyperparameters"])
    ]
    return {
        "test_error": mean,
        "test_error_sd": sd,
        "test_errors": [r["test_error"] for r in results],
        "train_loss": mean_and_sd([r["train_loss"] for r in results])[0],
        "seconds": min(r["seconds"] for r in results),
        "finite": all(r["finite"] for r in results),
        "learned": learned,
    }


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for each row of the tables and for each other reading."""
    rows = [(title, row) for title, rows in TABLES.items() for row in rows] + [
        ("other readings", row) for row in OTHERS
    ]
    if options.quick:
        rows = [rows[1], rows[8], rows[17], rows[-1]]
    ours = {row: row.runs(options) for _, row in rows}
    theirs = {
        row: twin.runs(options) for title, row in rows if title in TABLES and (twin := row.of_package()) is not None
    }
    result = sweep("mnist_tables", [run for runs in (*ours.values(), *theirs.values()) for run in runs], options)
    entries = []
    for title, row in rows:
        measured = summary([result(run) for run in ours[row]])
        entry = {"table": title, "row": row.name, "form": row.form, "spec": row.spec, "paper": row.paper, **measured}
        entry["off"] = abs(measured["test_error"] - row.paper) > FAR
        if title not in TABLES:
            entry |= {"reading": row.reading, "notebook": row.notebook}
        if row in theirs:
            entry["package"] = summary([result(run) for run in theirs[row]])
        entries.append(entry)
    return entries


def show(entry: dict[str, Any]) -> str:
    return f"{entry['test_error']:.2f} ± {entry['test_error_sd']:.2f}"


def learned(entry: dict[str, Any]) -> str:
    """What has been learned: everything of a first level that has one above it."""
    if len(entry["learned"]) == 1:
        return ""
    names = {"lr": "lr", "alpha": "gamma", "beta1": "beta1", "beta2": "beta2"}
    if entry["form"] == "package":
        names["alpha"] = "lr"
    values = entry["learned"][0]
    if "gdtuo.AdamBaydin" in entry["spec"] or "RMSPropAlpha" in entry["spec"]:
        values = {"lr": values["lr"]}
    return ", ".join(f"{names[name]} {value:.4g}" for name, value in values.items() if name in names)


def print_tables(console: Console, entries: list[dict[str, Any]]) -> None:
    for title in TABLES:
        table = Table("row", title=f"{title}: test error in %", title_justify="left", box=box.SIMPLE, pad_edge=False)
        for name in ("paper", "this library", "- paper", "package", "s", "package, s"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("learned")
        for entry in (entry for entry in entries if entry["table"] == title):
            difference = f"{entry['test_error'] - entry['paper']:+.2f}{' *' if entry['off'] else '  '}"
            twin = entry.get("package")
            package = (show(twin), f"{twin['seconds']:.1f}") if twin else ("", "")
            cells = f"{entry['paper']:.2f}", show(entry), difference, package[0], f"{entry['seconds']:.1f}", package[1]
            table.add_row(entry["row"], *cells, learned(entry))
        console.print(table)
    table = Table("row", "reading", title="Other readings", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("paper", "test error", "- paper", "from, to"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("learned")
    for entry in (entry for entry in entries if entry["table"] not in TABLES):
        difference = f"{entry['test_error'] - entry['paper']:+.2f}{' *' if entry['off'] else '  '}"
        reading = entry["reading"] + " (notebook)" * entry["notebook"]
        ends = f"{min(entry['test_errors']):.2f}, {max(entry['test_errors']):.2f}"
        table.add_row(entry["row"], reading, f"{entry['paper']:.2f}", show(entry), difference, ends, learned(entry))
    console.print(table)
    console.print(f"* further than {FAR:g} point from the paper", highlight=False)


def draw(entries: list[dict[str, Any]], options: argparse.Namespace) -> Figure:
    rows = [entry for entry in entries if entry["table"] in TABLES]
    place = {entry["row"]: i for i, entry in enumerate(rows)}
    figure, ax = plt.subplots(figsize=(10, 0.36 * len(rows) + 2), layout="constrained")
    series = [
        ("the paper", "k", "|", 0.0, [(place[e["row"]], e["paper"], 0.0) for e in rows]),
        ("this library", "C0", "o", -0.15, [(place[e["row"]], e["test_error"], e["test_error_sd"]) for e in rows]),
        (
            "the package of Chandra et al., same seeds",
            "C1",
            "s",
            0.15,
            [
                (place[e["row"]], e["package"]["test_error"], e["package"]["test_error_sd"])
                for e in rows
                if "package" in e
            ],
        ),
        (
            "as the authors' notebook runs it, where that differs",
            "C2",
            "D",
            0.15,
            [
                (place[e["row"]], e["test_error"], e["test_error_sd"])
                for e in entries
                if e.get("notebook") and e["row"] in place
            ],
        ),
    ]
    for label, color, marker, shift, points in series:
        if points:
            y, x, error = np.array(points).T
            size = 14 if marker == "|" else 5
            ax.errorbar(x, y + shift, xerr=error, fmt=marker, color=color, markersize=size, capsize=2, label=label)
    ax.set_yticks(range(len(rows)), [entry["row"] for entry in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(alpha=0.3)
    ax.set(xscale="log", xlabel="test error (%)")
    ax.set_xticks([2, 3, 4, 5, 6, 8, 10, 14])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    title = (
        f"MNIST, {options.epochs} epochs; mean and standard deviation of {options.seeds} seeds; {describe_machine()}"
    )
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    chosen = options(__doc__, seeds=3, epochs=5).parse_args()
    entries = collect(chosen)
    console = output()
    console.print(describe_machine(), highlight=False)
    print_tables(console, entries)
    save("mnist_tables", chosen, entries, draw(entries, chosen))


if __name__ == "__main__":
    main()
