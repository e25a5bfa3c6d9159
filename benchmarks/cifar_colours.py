"""Table 3 of "Analysis of the Effectiveness of Hypergradient Descent on New Optimization Algorithms".

    python benchmarks/cifar_colours.py --data FOLDER    # FOLDER: has cifar-10-batches-bin

A small UNet colours the horses of CIFAR-10: it sees the grey picture and gives each pixel one of 24 colours, which are
the k-means of the training pixels. The paper leaves the set-up to the authors' notebook
(github.com/JackSun72/CSC413-Final-Project): 32 filters, batches of 100 in an order that is drawn once, 50 epochs, and
the step sizes of the paper's Table 6. An error is the part of the test pixels that get another colour than their own.

The colours are this script's: those of the notebook are a file of its course. So the errors need not be the paper's to
the tenth of a point; what can be compared is the optimizers. Beside them stand the package of Chandra et al., from the
same weights on the same batches, where it has the method, and ``hx.auto``, which is not in the paper.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments import Result, Run, cifar10, mean_and_sd, options, save, sweep, trainer
from harness import describe_machine, output
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from mnist_tables import adabelief, amsgrad
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from hyperopt_ext.demo import Data

HORSE = 7
COLOURS = 24
BATCH = 100

# Name, validation error in the paper, stack.
ROWS: list[tuple[str, float | None, str]] = [
    ("SGD", 58.8, "gdtuo.SGD(alpha=0.01)"),
    ("SGD / SGD", 58.5, "gdtuo.SGD(alpha=0.01) / gdtuo.SGD(alpha=0.01)"),
    ("SGD / Adam", 57.0, "gdtuo.SGD(alpha=0.01) / gdtuo.Adam(alpha=1e-05)"),
    ("SGD / AMSGrad", 55.1, f"gdtuo.SGD(alpha=0.01) / {amsgrad(1e-5)}"),
    ("Adam", 39.3, "gdtuo.Adam(alpha=0.01)"),
    ("Adam / Adam", 38.4, "gdtuo.Adam(alpha=0.01) / gdtuo.Adam(alpha=1e-05)"),
    ("Adam / AMSGrad", 38.1, f"gdtuo.Adam(alpha=0.01) / {amsgrad(1e-5)}"),
    ("AdaBelief", 39.0, adabelief(0.01)),
    ("AdaBelief / SGD", 39.1, f"{adabelief(0.01)} / gdtuo.SGD(alpha=1e-06)"),
    ("AdaBelief / Adam", 39.3, f"{adabelief(0.01)} / gdtuo.Adam(alpha=1e-06)"),
    ("AdaBelief / AdaBelief", 38.8, f"{adabelief(0.01)} / {adabelief(1e-6)}"),
    ("AMSGrad", 40.4, amsgrad(0.02)),
    ("AMSGrad / SGD", 40.2, f"{amsgrad(0.02)} / gdtuo.SGD(alpha=1e-05)"),
    ("AMSGrad / Adam", 39.7, f"{amsgrad(0.02)} / gdtuo.Adam(alpha=0.0001)"),
    ("AMSGrad / AMSGrad", 39.3, f"{amsgrad(0.02)} / {amsgrad(1e-5)}"),
    ("hx.auto", None, "hx.auto(params)"),
    ('hx.auto, base="sgd"', None, 'hx.auto(params, "sgd")'),
]
# What else the paper may mean by AdaBelief: in the table, and not in the figure.
READINGS: list[tuple[str, float | None, str]] = [
    ("AdaBelief, lr = 0.001", 39.0, adabelief(0.001)),
    ("AdaBelief, eps = 1e-16", 39.0, adabelief(0.01, 1e-16)),
    ("AdaBelief, eps = 1e-16, rectified", 39.0, adabelief(0.01, 1e-16, rectify=True)),
]


class UNet(nn.Module):
    """Grey pictures [n, 1, 32, 32] to logits of the colours [n, 24, 32, 32]."""

    def __init__(self, filters: int = 32) -> None:
        super().__init__()

        def block(layer: nn.Module, channels: int) -> nn.Sequential:
            return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU())

        def up(inputs: int, outputs: int) -> nn.Sequential:
            return block(nn.ConvTranspose2d(inputs, outputs, 3, 2, padding=1, output_padding=1), outputs)

        self.down_1 = block(nn.Conv2d(1, filters, 3, 2, padding=1), filters)
        self.down_2 = block(nn.Conv2d(filters, 2 * filters, 3, 2, padding=1), 2 * filters)
        self.up_1 = up(2 * filters, filters)
        self.up_2 = up(2 * filters, COLOURS)
        self.last = nn.Conv2d(COLOURS + 1, COLOURS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        half = self.down_1(x)
        whole = self.up_2(torch.cat([half, self.up_1(self.down_2(half))], dim=1))
        return self.last(torch.cat([x, whole], dim=1))


def load(folder: Path) -> Data:
    """Grey pictures [n, 1, 32, 32], and the colour of each pixel [n, 32, 32]."""
    train, test = (pictures[labels == HORSE].astype(np.float32) / 256 for pictures, labels in cifar10(folder))
    pixels = train.transpose(0, 2, 3, 1).reshape(-1, 3)
    some = np.random.default_rng(0).choice(pixels, 50_000, replace=False)
    colours = KMeans(COLOURS, n_init=1, random_state=0).fit(some)

    def pair(pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        names = colours.predict(pictures.transpose(0, 2, 3, 1).reshape(-1, 3)).reshape(-1, 32, 32)
        return torch.from_numpy(pictures.mean(1, keepdims=True)), torch.from_numpy(names).long()

    return Data("CIFAR-10 horses", pair(train), pair(test), batch=BATCH, epochs=50)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss, and the part of the pixels with a wrong colour, in %."""
    loss = wrong = 0.0
    for part, colours in zip(x.split(BATCH), y.split(BATCH), strict=True):
        outputs = model(part)
        loss += F.cross_entropy(outputs, colours, reduction="sum").item()
        wrong += (outputs.argmax(1) != colours).sum().item()
    return loss / y.numel(), 100 * wrong / y.numel()


def train(run: Run, data: Data) -> Result:
    (x, y), test = data.train, data.test
    torch.manual_seed(run.seed)
    model = UNet()
    training = trainer(run, model)
    batches = torch.randperm(len(x), generator=torch.Generator().manual_seed(run.seed)).split(BATCH)
    losses, errors, seconds = [], [], 0.0
    for _ in range(run.epochs):
        model.train()
        start = time.perf_counter()
        steps = [training.step(x[i], y[i]) for i in batches]
        seconds += time.perf_counter() - start
        model.eval()
        losses.append(torch.stack(steps).mean().item())
        errors.append(evaluate(model, *test)[1])
    return {
        "test_error": errors[-1],
        "test_errors": errors,
        "train_losses": losses,
        "seconds": seconds,
        "hyperparameters": training.hyperparameters(),
    }


def runs(spec: str, form: str, options: argparse.Namespace) -> list[Run]:
    return [Run(form, spec, "unet 32", options.epochs, seed) for seed in range(options.seeds)]


def summary(results: list[Result]) -> dict[str, Any]:
    mean, sd = mean_and_sd([r["test_error"] for r in results])
    return {
        "test_error": mean,
        "test_error_sd": sd,
        "test_errors": np.mean([r["test_errors"] for r in results], axis=0).tolist(),
        "train_loss": float(np.mean([r["train_losses"][-1] for r in results])),
    }


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry for each row of the table."""
    rows = [ROWS[1], ROWS[-2]] if options.quick else [*ROWS, *READINGS]
    ours = {name: runs(spec, "optimizer" if "params" in spec else "hyperopt_ext", options) for name, _, spec in rows}
    theirs = {name: runs(spec.replace("gdtuo.", ""), "package", options) for name, _, spec in rows if "hx." not in spec}
    result = sweep(
        "cifar_colours", [run for all in (*ours.values(), *theirs.values()) for run in all], options, train, load
    )
    entries = []
    for name, paper, spec in rows:
        results = [result(run) for run in ours[name]]
        lr = float(np.mean([r["hyperparameters"][0]["lr"] for r in results]))
        entry = {"row": name, "spec": spec, "paper": paper, **summary(results), "lr": lr}
        if name in theirs:
            entry["package"] = summary([result(run) for run in theirs[name]])
        entries.append(entry)
    return entries


def print_table(console: Console, entries: list[dict[str, Any]]) -> None:
    table = Table("row", title="Wrong pixels, %", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("paper", "this library", "package", "lr learned"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        twin = entry.get("package")
        table.add_row(
            entry["row"],
            "" if entry["paper"] is None else f"{entry['paper']:.1f}",
            f"{entry['test_error']:.1f}",
            f"{twin['test_error']:.1f}" if twin else "",
            f"{entry['lr']:.4g}" if "/" in entry["row"] or entry["paper"] is None else "",
        )
    console.print(table)


def draw(entries: list[dict[str, Any]], options: argparse.Namespace) -> Figure:
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 6.5), layout="constrained", gridspec_kw={"width_ratios": [1, 1.2]}
    )
    families = ("SGD", "Adam", "AdaBelief", "AMSGrad", "hx.auto")
    styles = dict(zip(families, ("C0", "C1", "C2", "C3", "k"), strict=True))
    readings = {name for name, _, _ in READINGS}
    entries = [entry for entry in entries if entry["row"] not in readings]
    lines: dict[str, int] = {}
    for entry in entries:
        family = entry["row"].partition(" / ")[0].partition(",")[0]
        line = ("-", "--", "-.", ":")[lines.get(family, 0)]
        lines[family] = lines.get(family, 0) + 1
        epochs = range(1, len(entry["test_errors"]) + 1)
        left.plot(epochs, entry["test_errors"], line, color=styles[family], label=entry["row"])
    left.set(xlabel="epochs", ylabel="wrong pixels of the test set, %", title="while it trains")
    left.set_ylim(top=min(82.0, left.get_ylim()[1]))
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=6)
    measured = [(i, e["package"]["test_error"]) for i, e in enumerate(entries) if "package" in e]
    published = [(i, e["paper"]) for i, e in enumerate(entries) if e["paper"] is not None]
    for points, marker, color, label in (
        ([(i, e["test_error"]) for i, e in enumerate(entries)], "o", "C0", "this library"),
        (measured, "s", "C1", "the package of Chandra et al., same seeds"),
        (published, "|", "k", "the paper, 50 epochs, other colours"),
    ):
        if points:
            y, x = np.array(points).T
            right.plot(x, y, marker, color=color, markersize={"o": 8, "s": 4, "|": 14}[marker], label=label)
    right.grid(alpha=0.3)
    right.set_yticks(range(len(entries)), [e["row"] for e in entries])
    right.set_ylim(len(entries) - 0.5, -0.5)
    right.set(xlabel="wrong pixels of the test set, %", title=f"after {options.epochs} epochs")
    right.legend(frameon=False, loc="center right")
    title = f"UNet that colours the horses of CIFAR-10; {options.seeds} seed{'s' * (options.seeds > 1)}"
    figure.suptitle(f"{title}; {describe_machine()}", fontsize=10)
    return figure


def main() -> None:
    parser = options(__doc__, seeds=1, epochs=50, data="that cifar-10-batches-bin lies in")
    chosen = parser.parse_args()
    entries = collect(chosen)
    console = output()
    console.print(describe_machine(), highlight=False)
    print_table(console, entries)
    save("cifar_colours", chosen, entries, draw(entries, chosen), BATCH)


if __name__ == "__main__":
    main()
