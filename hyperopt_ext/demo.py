"""Trains a small network on real digits from first step sizes that are far too small, right and far too large.

python -m hyperopt_ext.demo                  scikit-learn's bundled digits
python -m hyperopt_ext.demo --data FOLDER    MNIST, from its four idx .gz files

Beside constant Adam and SGD, towers with one, two and three levels above them learn the step size, all with the same
settings. A table and one PNG show what became of each first guess.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import hyperopt_ext as hx

try:
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f'The demo needs {error.name}; type: pip install "hyperopt_ext[demo]"')

GUESSES = ("far too small", "about right", "far too large")
BASES: dict[str, tuple[Callable[..., hx.Level], tuple[float, float, float]]] = {
    "Adam": (hx.Adam, (1e-5, 3e-3, 1.0)),
    "SGD": (hx.SGD, (1e-3, 0.3, 3.0)),
}
LEVELS_ABOVE = (0, 1, 2, 3)
COLORS = ("0.55", "#9ecae1", "#3182bd", "#08306b")  # constant; one, two and three levels above


@dataclass(frozen=True)
class Data:
    name: str
    x: Tensor  # [n, pixels], in [0, 1]
    y: Tensor  # [n]
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class Run:
    base: str
    guess: int
    above: int
    stack: hx.Stack
    first_lr: float
    loss: Tensor  # [epochs], the mean over an epoch
    lr: Tensor  # [steps]
    error: float  # on the test set, in percent
    seconds: float


def digits() -> Data:
    bunch = load_digits()
    x, y = torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:-360], order[-360:]
    return Data("digits", x[train], y[train], x[test], y[test])


def mnist(folder: Path) -> Data:
    def read(name: str) -> Tensor:
        path = folder / name
        try:
            raw = gzip.decompress(path.read_bytes())
        except OSError as error:
            sys.exit(f"--data: cannot read {path}: {error.strerror or error}")
        dimensions = raw[3] if raw[:3] == b"\0\0\x08" else 0
        shape = np.frombuffer(raw, ">i4", dimensions, 4)
        if not dimensions or len(raw) != 4 + 4 * dimensions + shape.prod():
            sys.exit(f"--data: {path} is not an idx file of bytes")
        return torch.tensor(np.frombuffer(raw, np.uint8, -1, 4 + 4 * dimensions).reshape(shape))

    tensors = [read(f"{part}-{kind}-ubyte.gz") for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    x, y, x_test, y_test = tensors
    return Data("MNIST", x.flatten(1) / 255, y.long(), x_test.flatten(1) / 255, y_test.long())


def tower(base: Callable[..., hx.Level], lr: float, above: int) -> hx.Stack:
    """Every learned step size is moved in its logarithm, by Adam: a step of 0.05 is about five percent."""
    level = hx.Adam(lr=0.05, learn="lr", space={"lr": "log"}, bounds={"lr": (1e-4, 0.1)})
    return hx.Stack((base(lr=lr, learn="lr", space={"lr": "log"}), *(level,) * above))


def train(data: Data, name: str, guess: int, above: int, epochs: int, batch: int, seed: int) -> Run:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(data.x.shape[1], 128), torch.nn.Tanh(), torch.nn.Linear(128, 10))
    base, lrs = BASES[name]
    stack = tower(base, lrs[guess], above)
    opt = hx.HyperOptimizer(model.parameters(), stack)
    live = opt.hyperparameters()[0]["lr"]
    losses, rates = [], []
    start = time.perf_counter()
    for _ in range(epochs):
        total = torch.zeros(())
        batches = torch.randperm(len(data.x)).split(batch)  # type: ignore[no-untyped-call]
        for index in batches:
            opt.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(data.x[index]), data.y[index])
            loss.backward()  # type: ignore[no-untyped-call]
            opt.step()
            total += loss.detach()
            rates.append(live.clone())
        losses.append(total / len(batches))
    seconds = time.perf_counter() - start
    with torch.no_grad():
        error = 100 * (model(data.x_test).argmax(1) != data.y_test).double().mean().item()
    return Run(name, guess, above, stack, lrs[guess], torch.stack(losses), torch.stack(rates), error, seconds)


def table(runs: list[Run]) -> Table:
    result = Table("first guess", title="Test error, and the step size that was learned", title_justify="left")
    result.add_column("stack", min_width=len("Adam/Adam/Adam/Adam"))
    for column in ("first lr", "last lr", "test error", "s"):
        result.add_column(column, justify="right")
    for run in runs:
        result.add_row(
            GUESSES[run.guess] if run.above == 0 else "",
            str(run.stack),
            f"{run.first_lr:g}",
            f"{run.lr[-1].item():.2g}",
            f"{run.error:.1f} %",
            f"{run.seconds:.1f}",
            end_section=run.above == LEVELS_ABOVE[-1],
        )
    return result


def draw(data: Data, runs: list[Run]) -> Figure:
    figure = Figure(figsize=(12, 12), layout="constrained")
    axes = figure.subplots(4, 3, sharex=True, sharey="row")
    for run in runs:
        row, label = 2 * list(BASES).index(run.base), f"{run.above} level{'s' * (run.above > 1)} above"
        style = {"color": COLORS[run.above], "lw": 1.8, "label": label if run.above else "constant"}
        epochs = len(run.loss)
        axes[row, run.guess].plot(range(1, epochs + 1), run.loss, **style)
        axes[row + 1, run.guess].plot(np.arange(1, len(run.lr) + 1) * epochs / len(run.lr), run.lr, **style)
    for i, (name, (_, lrs)) in enumerate(BASES.items()):
        for guess in range(3):
            loss, rate = axes[2 * i, guess], axes[2 * i + 1, guess]
            loss.set_title(f"{name}, first lr {GUESSES[guess]}: {lrs[guess]:g}", fontsize=11)
            loss.set_yscale("log")
            rate.set_yscale("log")
            for ax in (loss, rate):
                ax.grid(alpha=0.3)
                ax.spines[["top", "right"]].set_visible(False)
        worst = max(float(run.loss.max()) for run in runs if run.base == name)
        axes[2 * i, 0].set(ylabel="training loss", ylim=(1e-4, min(2 * worst, 1e3)))
        axes[2 * i + 1, 0].set_ylabel(f"lr of {name}")
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    figure.suptitle(f"An MLP on {data.name}: what a tower makes of the first guess", fontsize=13)
    return figure


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hyperopt_ext.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="MNIST, in its standard idx .gz files")
    parser.add_argument("--epochs", type=positive, help="default: 100 for the digits, 3 for MNIST")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches, default: 0")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the plot, default: demo.png")
    options = parser.parse_args()
    data = mnist(options.data) if options.data else digits()
    epochs = options.epochs or (3 if options.data else 100)
    batch = 256 if options.data else 64
    options.out.parent.mkdir(parents=True, exist_ok=True)

    torch.set_num_threads(1)  # the network is too small for more
    console = Console()
    jobs = [(name, guess, above) for name in BASES for guess in range(3) for above in LEVELS_ABOVE]
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    runs = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(jobs))
        for name, guess, above in jobs:
            progress.update(task, description=f"{name}, lr {GUESSES[guess]}, {above} above")
            runs.append(train(data, name, guess, above, epochs, batch, options.seed))
            progress.advance(task)
    console.print(table(runs))
    mpl.use("Agg")
    draw(data, runs).savefig(options.out, dpi=110)
    console.print(f"{options.out}: the loss and the learned lr over time", highlight=False)


if __name__ == "__main__":
    main()
