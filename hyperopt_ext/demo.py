"""Trains a small MLP from good and bad first guesses of the learning rate, with towers of growing height."""

from __future__ import annotations

import argparse
import gzip
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import hyperopt_ext as hx

try:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    package = str(error.name).partition(".")[0]
    raise SystemExit(f"demo: {package} is missing; type: pip install matplotlib rich scikit-learn") from None

GUESSES = ("far too small", "right", "far too large")
# The logarithm of every learned step size is what moves: from 1e-6 to 1e-5 is as far as from 0.1 to 1.
BASES: list[tuple[hx.Level, tuple[float, float, float]]] = [
    (hx.Adam(learn="lr", space={"lr": "log"}), (1e-6, 1e-2, 0.5)),
    (hx.SGD(learn="lr", space={"lr": "log"}), (1e-4, 0.5, 3.0)),
]
# One spec for all levels above: it changes the step size below it by about 3 % a step. That is a guess too, for the
# next level to improve, up to 10 % a step.
ABOVE = hx.Adam(lr=0.03, learn="lr", space={"lr": "log"}, bounds={"lr": (0.0, 0.1)})
HEIGHTS = (0, 1, 2, 3)
HIDDEN = 128

COLOURS = ("#8c8c8c", "#f2a33a", "#cf3f5b", "#35206e")  # by height
WIDTHS = (3.0, 3.4, 2.4, 1.2)  # taller towers thinner and on top, so that curves that coincide stay visible
WINDOW = 20  # steps that a point of the loss curves is the mean of


@dataclass(frozen=True)
class Data:
    """Images as rows of floats [n, pixels] in [0, 1], and their labels [n]."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batch: int
    epochs: int


@dataclass(frozen=True)
class Run:
    """What one training run gave: loss and lr of every step, the test error in %, and the time that it took."""

    stack: hx.Stack
    losses: Tensor
    lrs: Tensor
    error: float
    seconds: float


def digits() -> Data:
    x, y = load_digits(return_X_y=True)
    split = train_test_split(x / 16, y, test_size=0.25, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = (torch.from_numpy(part) for part in split)
    return Data("digits", (x_train.float(), y_train), (x_test.float(), y_test), batch=64, epochs=100)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """An array of bytes in the idx format: magic number 0x08dd with dd dimensions, big-endian sizes, then the bytes."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    start = 4 + 4 * dimensions
    magic = int.from_bytes(content[:4], "big")
    if magic != 0x0800 + dimensions or len(content) < start:
        raise ValueError(f"{path} has the magic number {magic} instead of {0x0800 + dimensions}")
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    if len(content) != start + shape.prod(dtype=np.int64):
        raise ValueError(f"{path} does not hold the {' x '.join(map(str, shape))} bytes that it announces")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def mnist(folder: Path) -> Data:
    def part(name: str) -> tuple[Tensor, Tensor]:
        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz", 3)
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz", 1)
        if not 0 < len(images) == len(labels):
            raise ValueError(f"{folder} holds {len(images)} images and {len(labels)} labels in {name}-*.gz")
        return images.flatten(1).float() / 255, labels.long()

    train = part("train")
    return Data("MNIST", train, part("t10k"), batch=min(256, len(train[0])), epochs=5)


def first_guess(stack: hx.Stack) -> float:
    return stack[0].values()["lr"]


def stacks() -> Iterator[hx.Stack]:
    for base, lrs in BASES:
        for lr in lrs:
            for height in HEIGHTS:
                first = hx.Stack.coerce(base.replace(lr=lr))
                yield first / hx.Stack.of(ABOVE, height=height) if height else first


def train(data: Data, stack: hx.Stack, epochs: int, seed: int, advance: Callable[[], None]) -> Run:
    """One run; with the same seed, all runs start from the same weights and see the same batches."""
    torch.manual_seed(seed)
    x, y = data.train
    model = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10))
    optimizer = hx.HyperOptimizer(model.parameters(), stack)
    lr = optimizer.hyperparameters()[0]["lr"]  # live: it changes in step()
    losses, lrs = [], []
    start = time.perf_counter()
    for _ in range(epochs):
        for i in torch.randperm(len(x))[: len(x) // data.batch * data.batch].view(-1, data.batch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[i]), y[i])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
            lrs.append(lr.clone())
        advance()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        wrong = model(data.test[0]).argmax(1) != data.test[1]
    return Run(stack, torch.stack(losses), torch.stack(lrs), 100 * wrong.float().mean().item(), seconds)


def train_all(data: Data, epochs: int, seed: int, console: Console) -> list[Run]:
    runs, todo = [], list(stacks())
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=len(todo) * epochs)
        for stack in todo:
            progress.update(task, description=f"{f'{stack} from {first_guess(stack):g}':30}")
            runs.append(train(data, stack, epochs, seed, lambda: progress.advance(task)))
    return runs


def table(runs: list[Run], title: str) -> Table:
    result = Table(title=title, caption="Looking one step ahead only, a tower may settle at a low rate.")
    result.add_column("stack")
    for name in ("initial lr", "test error %", "learned lr", "seconds"):
        result.add_column(name, justify="right")
    for i, run in enumerate(runs, start=1):
        learned = f"{run.lrs[-1]:.1e}" if len(run.stack) > 1 else "constant"
        row = str(run.stack), f"{first_guess(run.stack):g}", f"{run.error:.1f}", learned, f"{run.seconds:.1f}"
        result.add_row(*row, end_section=i % len(HEIGHTS) == 0)
    return result


def smooth(values: Tensor) -> Tensor:
    """The mean of the last ``WINDOW`` values at every step, of all so far where there are fewer."""
    sums = nn.functional.pad(values.double().cumsum(0), (WINDOW, 0))
    return (sums[WINDOW:] - sums[:-WINDOW]) / torch.arange(1, len(values) + 1).clamp(max=WINDOW)


def draw_guess(loss_axes: Axes, lr_axes: Axes, runs: list[Run]) -> None:
    """One column of the figure: the runs from one first guess, a tower of each height."""
    for run, colour, width in zip(runs, COLOURS, WIDTHS, strict=True):
        label = str(run.stack) if len(run.stack) > 1 else f"{run.stack}, constant"
        for axes, values in (loss_axes, smooth(run.losses)), (lr_axes, run.lrs):
            axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=width, label=label)
        x = 0.03 + 0.19 * (len(run.stack) - 1)
        loss_axes.text(x, 0.04, f"{run.error:.1f} %", color=colour, weight="bold", transform=loss_axes.transAxes)
    loss_axes.text(0.03, 0.12, "final test error", transform=loss_axes.transAxes)


def draw_base(figure: SubFigure, columns: list[list[Run]], right: float) -> None:
    """One half of the figure: the runs of one base optimizer, loss above learning rate, one column a first guess."""
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row")
    for (loss_axes, lr_axes), runs, guess in zip(axes.T, columns, GUESSES, strict=True):
        draw_guess(loss_axes, lr_axes, runs)
        loss_axes.set_title(f"{runs[0].stack}, first guess {guess}: lr = {first_guess(runs[0].stack):g}")
        lr_axes.axhline(right, color="black", linewidth=1, linestyle=":", label="right first guess")
        lr_axes.set_xlabel("training step")
    for ax in axes.flat:
        ax.set(xscale="log", yscale="log")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"training loss (nats, {WINDOW}-step mean)")
    axes[1, 0].set_ylabel("learning rate")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)


def draw(runs: list[Run], title: str, out: Path) -> None:
    figure = Figure(figsize=(13, 13.5), layout="constrained")
    figure.suptitle(f"From three first guesses of the learning rate, with 0 to 3 levels above it\n{title}", fontsize=14)
    columns = [runs[i : i + len(HEIGHTS)] for i in range(0, len(runs), len(HEIGHTS))]
    halves = figure.subfigures(len(BASES), squeeze=False, hspace=0.03).flat
    for i, (half, (_, lrs)) in enumerate(zip(halves, BASES, strict=True)):
        draw_base(half, columns[i * len(lrs) :][: len(lrs)], lrs[GUESSES.index("right")])
    figure.savefig(out, format="png", dpi=120)


def check_out(out: Path) -> None:
    """Finds out before the training whether the plot can be written after it."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, unlike {out}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("ab").close()
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror}") from None


def arguments() -> tuple[Data, argparse.Namespace]:
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
        return int(text)

    parser = argparse.ArgumentParser("python -m hyperopt_ext.demo", description=__doc__)
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="MNIST as .gz files; default: the digits of scikit-learn"
    )
    parser.add_argument("--epochs", type=positive, help="of each run; default: 100 on the digits, 5 on MNIST")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order of the batches; default: 0")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the plot, a PNG; default: demo.png")
    args = parser.parse_args()
    try:
        data = mnist(args.data) if args.data else digits()
        check_out(args.out)
    except ValueError as error:
        parser.exit(2, f"demo: error: {error}\n")
    return data, args


def main() -> None:
    data, args = arguments()
    torch.set_num_threads(1)  # the matrices are too small to share
    epochs, console = args.epochs or data.epochs, Console()
    runs = train_all(data, epochs, args.seed, console)
    pixels = data.train[0].shape[1]
    title = f"MLP {pixels}-{HIDDEN}-10 on {data.name}: {epochs} epochs in batches of {data.batch}, seed {args.seed}"
    console.print(table(runs, title))
    draw(runs, title, args.out)
    print(f"Loss and learning rate of every step: {args.out}")


if __name__ == "__main__":
    main()
