"""Object recognition from good and bad first guesses: a ResNet on CIFAR-10, with lr and momentum constant or learned.

    python benchmarks/cifar_resnet.py --data FOLDER     # FOLDER: has cifar-10-batches-bin

The experiment of Chandra et al. (NeurIPS 2022, section 4.2): SGD with momentum from step sizes and momenta that are too
small, right and too large. With each of the nine first guesses

    constant      as given
    learned       lr and momentum moved by an SGD above, as in the paper
    hx.auto       from this lr, with this momentum

From the right guess alone, lr divided by 10 after half and after three quarters of the training, the schedule of He et
al. (CVPR 2016), and a tower of the package of the paper. Beside them ``hx.auto`` without a guess.

The network, the crops and flips, the batches of 128 and the weight decay of 1e-4 are those of He et al.; by default the
pictures, their number, the layers' widths and the epochs are smaller. The set-up of the paper, for which one needs
another machine than two cores, is

    python benchmarks/cifar_resnet.py --data FOLDER --images 50000 --pixels 32 --width 16 --epochs 200 --seeds 3
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments import Result, cifar10, mean_and_sd, options, save, sweep, trainer
from harness import describe_machine, output
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from hyperopt_ext.demo import Data

BATCH = 128
SIZE = 32  # of a picture
PAD = 4
MEAN, SD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # of CIFAR-10's red, green and blue in [0, 1]
BLOCKS = 3  # for each of the three sizes: 6 * 3 + 2 = 20 layers
LRS = (0.01, 0.1, 1.0)
MOMENTA = (0.09, 0.9, 0.99)
RIGHT = (0.1, 0.9)
CEILING = 3.0  # of the losses that are drawn: guessing has 2.3
DECAY = "weight_decay=0.0001"
GUESS = "hx.SGD(lr={lr}, momentum={momentum}, " + DECAY
# Treatment: the stack from a first guess.
TREATMENTS = {
    "constant": GUESS + ")",
    "schedule": GUESS + ")",
    "learned": GUESS + ") / hx.SGD(lr={above})",
    "hx.auto": 'hx.auto(params, "sgd", lr={lr}, momentum={momentum}, ' + DECAY + ")",
}
STYLES = {"constant": ("k", "-"), "schedule": ("C2", "--"), "learned": ("C0", "-"), "hx.auto": ("C3", "-")}
# Without a first guess, or from the right one: row, form, optimizer. The package has no weight decay.
OTHERS = [
    ("hx.auto, no lr given", "optimizer", f'hx.auto(params, "sgd", {DECAY})'),
    ("learned, no weight decay", "hyperopt_ext", "gdtuo.SGD(alpha=0.1, mu=0.9) / gdtuo.SGD(alpha={above})"),
    ("learned, no weight decay, package", "package", "SGD(alpha=0.1, mu=0.9) / SGD(alpha={above})"),
]


@dataclass(frozen=True)
class Run:
    """One training run; ``form`` and ``spec`` as in :class:`experiments.Run`.

    Args:
        schedule: whether lr is divided by 10 after half and after three quarters of the steps.
        images: how many of the training set, from its first on.
        pixels: the side of a picture that the network sees: 32, or 16 or 8 for means over squares.
        width: channels of the first of the three sizes.
        epochs: how often it sees these images.
        seed: of the weights, the order of the batches, the crops and the flips.
    """

    form: str
    spec: str
    schedule: bool
    images: int
    pixels: int
    width: int
    epochs: int
    seed: int


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters, which leaves out pixels and adds channels of 0."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.more = stride, outputs - inputs
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(shortcut + self.layers(x))


def resnet(width: int) -> nn.Sequential:
    """The ResNet-20 of He et al. for pictures [n, 3, pixels, pixels], whose layers are 16, 32 and 64 wide there."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for outputs in (width, 2 * width, 4 * width):
        for _ in range(BLOCKS):
            layers.append(Block(inputs, outputs, 1 if inputs == outputs else 2))
            inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


def load(folder: Path) -> Data:
    """Pictures [n, 3, 32, 32] as bytes, and their labels [n]."""
    train, test = (
        (torch.from_numpy(pictures), torch.from_numpy(labels).long()) for pictures, labels in cifar10(folder)
    )
    return Data("CIFAR-10", train, test, BATCH, epochs=200)


def inputs(pictures: Tensor, pixels: int) -> Tensor:
    """What the network sees [n, 3, pixels, pixels] of pictures in bytes [n, 3, 32, 32]."""
    x = (pictures / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(SD).view(3, 1, 1)
    return F.avg_pool2d(x, SIZE // pixels)


def crops_and_flips(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to 4 pixels, with black around it, and every other one mirrored, at random."""
    windows = F.pad(pictures, (PAD, PAD, PAD, PAD)).unfold(2, SIZE, 1).unfold(3, SIZE, 1)  # [n, 3, 9, 9, 32, 32]
    n = len(pictures)
    down, right = torch.randint(2 * PAD + 1, (2, n), generator=generator)
    moved = windows[torch.arange(n), :, down, right]
    mirrored = torch.rand(n, generator=generator) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), moved.flip(3), moved)


@torch.no_grad()
def test_error(model: nn.Module, pictures: Tensor, labels: Tensor, pixels: int) -> float:
    """In %; of a model that has diverged about 90, as of any fixed answer."""
    answers = torch.cat([model(inputs(part, pixels)).argmax(1) for part in pictures.split(1000)])
    return 100 * (answers != labels).float().mean().item()


def train(run: Run, data: Data) -> Result:
    pictures, labels = (part[: run.images] for part in data.train)
    torch.manual_seed(run.seed)
    model = resnet(run.width)
    training = trainer(run, model)
    schedule = None
    if run.schedule:
        milestones = [run.epochs // 2, run.epochs * 3 // 4]
        schedule = torch.optim.lr_scheduler.MultiStepLR(training.optimizer, milestones, gamma=0.1)
    generator = torch.Generator().manual_seed(run.seed)
    losses, learned, seconds = [], [], 0.0
    for _ in range(run.epochs):
        start = time.perf_counter()
        epoch = []
        for i in torch.randperm(len(pictures), generator=generator).split(BATCH):
            x = inputs(crops_and_flips(pictures[i], generator), run.pixels)
            epoch.append(training.step(x, labels[i]))
        seconds += time.perf_counter() - start
        if schedule is not None:
            schedule.step()
        losses.append(torch.stack(epoch).mean().item())
        learned.append(training.hyperparameters()[0])
        if not all(p.isfinite().all() for p in model.parameters()):
            break  # it cannot come back
    model.eval()
    return {
        "test_error": test_error(model, *data.test, run.pixels),
        "train_losses": losses,
        "hyperparameters": learned,
        "seconds": seconds,
    }


def plan(options: argparse.Namespace) -> dict[tuple[str, float | None, float | None], list[Run]]:
    """The runs by treatment, first lr and first momentum; of the others by name."""
    lrs, momenta = ([RIGHT[0]], [RIGHT[1]]) if options.quick else (LRS, MOMENTA)

    def seeds(form: str, spec: str, schedule: bool = False) -> list[Run]:
        size = options.images, options.pixels, options.width, options.epochs
        return [Run(form, spec, schedule, *size, seed) for seed in range(options.seeds)]

    runs: dict[tuple[str, float | None, float | None], list[Run]] = {
        (treatment, lr, momentum): seeds(
            "optimizer" if "params" in spec else "hyperopt_ext",
            spec.format(lr=lr, momentum=momentum, above=options.above),
            treatment == "schedule",
        )
        for lr in lrs
        for momentum in momenta
        for treatment, spec in TREATMENTS.items()
        if treatment != "schedule" or (lr, momentum) == RIGHT
    }
    return runs | {(name, None, None): seeds(form, spec.format(above=options.above)) for name, form, spec in OTHERS}


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each treatment of each first guess: the means over the seeds."""
    runs = plan(options)
    result = sweep("cifar_resnet", [run for group in runs.values() for run in group], options, train, load)
    rows = []
    for (treatment, lr, momentum), group in runs.items():
        results = [result(run) for run in group]
        mean, sd = mean_and_sd([r["test_error"] for r in results])
        epochs = min(len(r["train_losses"]) for r in results)
        rows.append(
            {
                "treatment": treatment,
                "first_lr": lr,
                "first_momentum": momentum,
                "test_error": mean,
                "test_error_sd": sd,
                "train_losses": np.mean([r["train_losses"][:epochs] for r in results], axis=0).tolist(),
                "hyperparameters": results[0]["hyperparameters"],
                "seconds": float(np.median([r["seconds"] for r in results])),
            }
        )
    return rows


def guess(row: dict[str, Any]) -> str:
    return f"{row['first_lr']:g}, {row['first_momentum']:g}"


def print_tables(console: Console, rows: list[dict[str, Any]]) -> None:
    guesses = list(dict.fromkeys(guess(row) for row in rows if row["first_lr"]))
    errors = {(row["treatment"], guess(row)): row for row in rows if row["first_lr"]}
    table = Table("first lr, momentum", title="Test error, %", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for treatment in TREATMENTS:
        table.add_column(treatment, justify="right")
    table.add_column("learned: lr, momentum", justify="right")
    for name in guesses:
        here = [errors.get((treatment, name)) for treatment in TREATMENTS]
        cells = [f"{row['test_error']:.1f}" if row else "" for row in here]
        last = errors["learned", name]["hyperparameters"][-1]
        table.add_row(name, *cells, f"{last['lr']:.2g}, {last['momentum']:.3g}")
    console.print(table)
    table = Table("without a first guess, or from the right one", "test error, %", box=box.SIMPLE, pad_edge=False)
    for row in rows:
        if not row["first_lr"]:
            table.add_row(row["treatment"], f"{row['test_error']:.1f}")
    console.print(table)


def draw(rows: list[dict[str, Any]], options: argparse.Namespace) -> Figure:
    guesses = list(dict.fromkeys((row["first_lr"], row["first_momentum"]) for row in rows if row["first_lr"]))
    lrs, momenta = (sorted({pair[i] for pair in guesses}) for i in (0, 1))
    figure, axes = plt.subplots(
        len(momenta), len(lrs), figsize=(13, 10.5), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    [auto] = (row for row in rows if row["treatment"] == "hx.auto, no lr given")
    for line, momentum in zip(axes, momenta, strict=True):
        for ax, lr in zip(line, lrs, strict=True):
            here = [row for row in rows if (row["first_lr"], row["first_momentum"]) == (lr, momentum)]
            shown = [(row, *STYLES[row["treatment"]]) for row in here] + [(auto, "C4", ":")]
            for row, color, style in shown:
                losses = np.minimum(row["train_losses"], CEILING)
                label = f"{row['treatment']}: {row['test_error']:.1f} %"
                ax.plot(range(1, len(losses) + 1), losses, style, color=color, label=label)
            ax.legend(frameon=False, fontsize=8, loc="upper right", title="test error", title_fontsize=8)
            ax.set_title(f"from lr {lr:g}, momentum {momentum:g}", fontsize=10)
            ax.grid(alpha=0.3)
    figure.supxlabel("epochs")
    figure.supylabel("training loss (nats, mean of an epoch)")
    pictures = f"{options.images} pictures of {options.pixels} x {options.pixels}, {options.epochs} epochs"
    seeds = f"{options.seeds} seed{'s' * (options.seeds > 1)}"
    title = f"CIFAR-10, ResNet-20 of width {options.width}, {pictures}, {seeds}; {describe_machine()}"
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    parser = options(__doc__, seeds=2, epochs=15, data="that cifar-10-batches-bin lies in")
    parser.add_argument("--images", type=int, default=5000, metavar="N", help="to train with; default: 5000")
    parser.add_argument("--pixels", type=int, default=16, choices=(8, 16, 32), help="side of a picture; default: 16")
    parser.add_argument("--width", type=int, default=8, metavar="N", help="of the first layers; default: 8")
    parser.add_argument("--above", type=float, default=1e-3, metavar="LR", help="lr of the SGD above; default: 1e-3")
    chosen = parser.parse_args()
    rows = collect(chosen)
    console = output()
    console.print(describe_machine(), highlight=False)
    print_tables(console, rows)
    save("cifar_resnet", chosen, rows, draw(rows, chosen), BATCH)


if __name__ == "__main__":
    main()
