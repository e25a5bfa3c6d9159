"""What `hx.auto` is worth away from the problem of `heights.py`: ten small tasks that have little in common.

    python benchmarks/auto_tasks.py --data FOLDER [--text FILE]

Each is trained by torch's Adam and SGD (Nesterov's momentum 0.9) at constant learning rates, a grid of half decades, by
``hx.auto`` without a first lr and from one that is far too small and far too large, and by Prodigy at its defaults. The
settings of ``hx.auto`` were chosen on tasks like these, so this shows what it does, not what it will do elsewhere.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments import options, save, sweep
from harness import describe_machine, output
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import hyperopt_ext as hx
from hyperopt_ext.demo import Data

LRS = {"adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1), "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)}
CONSTANT = {
    "adam": "torch.optim.Adam(params, lr={lr})",
    "sgd": "torch.optim.SGD(params, lr={lr}, momentum=0.9, nesterov=True)",
}
FIRST_LRS = (None, 1e-6, 1.0)
PRODIGY = "prodigyopt.Prodigy(params)"


@dataclass(frozen=True)
class TaskRun:
    """One training run: the optimizer as a Python expression, the name of the task, and the seed."""

    spec: str
    task: str
    seed: int
    text: str = ""


@dataclass(frozen=True)
class Task:
    """A model, its loss on the batch of a step, and what it is judged by in the end, the lower the better."""

    model: nn.Module
    loss: Callable[[], Tensor]
    judge: Callable[[], float]
    steps: int


def classifier(model: nn.Module, data: Data, batch: int, steps: int, seed: int, by_loss: bool = False) -> Task:
    """Judged by its test error in %, or by its test loss."""
    (x, y), (x_test, y_test) = data.train, data.test
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        i = torch.randint(len(x), (batch,), generator=generator)
        return F.cross_entropy(model(x[i]), y[i])

    def judge() -> float:
        outputs = model(x_test)
        wrong = (outputs.argmax(1) != y_test).float().mean().item()
        return F.cross_entropy(outputs, y_test).item() if by_loss else 100 * wrong

    return Task(model, loss, judge, steps)


def regression(model: nn.Module, target: Callable[[Tensor], Tensor], width: int, steps: int, seed: int) -> Task:
    """Batches of 8 with noise, judged by the squared error on inputs of their own."""
    generator = torch.Generator().manual_seed(seed)
    x_test = torch.randn(2000, width, generator=generator)

    def loss() -> Tensor:
        x = torch.randn(8, width, generator=generator)
        return F.mse_loss(model(x), target(x) + torch.randn(8, 1, generator=generator))

    return Task(model, loss, lambda: F.mse_loss(model(x_test), target(x_test)).item(), steps)


def conv(data: Data, seed: int) -> Task:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for narrow, wide in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(narrow, wide, 3, 2, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    return classifier(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), data, 64, 500, seed)


def layer_norm(data: Data, seed: int) -> Task:
    layers: list[nn.Module] = []
    for narrow, wide in ((784, 64), (64, 64)):
        layers += [nn.Linear(narrow, wide), nn.LayerNorm(wide), nn.ReLU()]
    return classifier(nn.Sequential(*layers, nn.Linear(64, 10)), data, 64, 1500, seed)


def deep(data: Data, seed: int) -> Task:
    layers: list[nn.Module] = []
    for narrow, wide in ((784, 48), *((48, 48),) * 5):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return classifier(nn.Sequential(*layers, nn.Linear(48, 10)), data, 32, 1500, seed)


def small_batches(data: Data, seed: int) -> Task:
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    return classifier(model, data, 8, 3000, seed)


def logistic(data: Data, seed: int) -> Task:
    model = nn.Linear(784, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return classifier(model, data, 128, 600, seed, by_loss=True)


def full_batch(data: Data, seed: int) -> Task:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float() / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Task(
        model,
        lambda: F.cross_entropy(model(x[train]), y[train]),
        lambda: 100 * (model(x[test]).argmax(1) != y[test]).float().mean().item(),
        steps=400,
    )


def autoencoder(data: Data, seed: int) -> Task:
    widths = ((784, 96), (96, 16), (16, 96), (96, 784))
    encode_1, encode_2, decode_1, decode_2 = (nn.Linear(a, b) for a, b in widths)
    model = nn.Sequential(encode_1, nn.ReLU(), encode_2, decode_1, nn.ReLU(), decode_2)
    generator = torch.Generator().manual_seed(seed)
    (x, _), (x_test, _) = data.train, data.test

    def loss() -> Tensor:
        part = x[torch.randint(len(x), (64,), generator=generator)]
        return F.mse_loss(model(part), part)

    return Task(model, loss, lambda: F.mse_loss(model(x_test), x_test).item(), steps=1000)


def noisy(data: Data, seed: int) -> Task:
    direction = torch.randn(20, 1)
    model = nn.Sequential(nn.Linear(20, 64), nn.SiLU(), nn.Linear(64, 1))
    return regression(model, lambda x: 10 * torch.sin(x @ direction / 2) + 5 * x[:, :1] + 30, 20, 3000, seed)


def factors(data: Data, seed: int) -> Task:
    """Matrix completion from half of the entries of a matrix of rank 5."""
    matrix = torch.randn(200, 5) @ torch.randn(5, 150) / 5**0.5
    model = nn.ModuleList([nn.Embedding(200, 8), nn.Embedding(150, 8)])
    for side in model:
        nn.init.normal_(side.weight, std=0.01)
    generator = torch.Generator().manual_seed(seed)
    known = torch.rand(200, 150, generator=generator) < 0.5
    seen, hidden = known.nonzero(), (~known).nonzero()

    def error(i: Tensor, noise: float = 0.0) -> Tensor:
        entries = matrix[i[:, 0], i[:, 1]] + noise * torch.randn(len(i), generator=generator)
        return F.mse_loss((model[0](i[:, 0]) * model[1](i[:, 1])).sum(1), entries)

    def loss() -> Tensor:
        return error(seen[torch.randint(len(seen), (256,), generator=generator)], noise=0.1)

    return Task(model, loss, lambda: error(hidden).item(), steps=1500)


class Block(nn.Module):
    """A layer of a decoder, the normalisation first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True, bias=False)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h, mask = self.norms[0](x), nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    """A transformer of two layers over characters."""

    def __init__(self, characters: int, length: int, width: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(Block(width), Block(width), nn.LayerNorm(width), nn.Linear(width, characters))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.tokens(x) + self.places.weight[: x.shape[1]])


def characters(data: Data, seed: int, text: str) -> Task:
    """Judged by the loss on the end of the text, in nats a character."""
    path = Path(text)
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        content = file.read()
    known = {character: i for i, character in enumerate(sorted(set(content)))}
    codes = torch.tensor([known[character] for character in content])
    train, test, length = codes[:-60_000], codes[-60_000:], 64
    model = Decoder(len(known), length)
    generator, places = torch.Generator().manual_seed(seed), torch.arange(length)

    def error(source: Tensor, starts: Tensor) -> Tensor:
        i = starts[:, None] + places
        return F.cross_entropy(model(source[i]).flatten(0, 1), source[i + 1].flatten())

    def loss() -> Tensor:
        return error(train, torch.randint(len(train) - length - 1, (12,), generator=generator))

    return Task(model, loss, lambda: error(test, torch.arange(0, 59_000, 300)).item(), steps=700)


TASKS: dict[str, tuple[str, Callable[..., Task]]] = {
    "conv, batch norm": ("error %", conv),
    "MLP, layer norm": ("error %", layer_norm),
    "deep ReLU MLP": ("error %", deep),
    "MLP, batch 8": ("error %", small_batches),
    "logistic, from 0": ("loss", logistic),
    "digits, full batch": ("error %", full_batch),
    "autoencoder": ("loss", autoencoder),
    "noisy regression, batch 8": ("loss", noisy),
    "matrix factors": ("loss", factors),
    "transformer": ("loss", characters),
}


def train(run: TaskRun, data: Data) -> dict[str, Any]:
    torch.manual_seed(run.seed)
    make = TASKS[run.task][1]
    task = make(data, run.seed, run.text) if run.text else make(data, run.seed)
    modules = {name: importlib.import_module(name) for name in ("prodigyopt",) if name in run.spec}
    optimizer = eval(run.spec, {"hx": hx, "torch": torch, "params": task.model.parameters(), **modules})
    task.model.train()
    for _ in range(task.steps):
        optimizer.zero_grad()
        task.loss().backward()
        optimizer.step()
    task.model.eval()
    with torch.no_grad():
        return {"result": task.judge(), "lr": float(optimizer.param_groups[0]["lr"])}


def plan(options: argparse.Namespace) -> dict[tuple[str, str], dict[str, list[TaskRun]]]:
    """The runs of each task and base, by contender."""
    curves = {}
    for task in list(TASKS)[-2:-1] if options.quick else TASKS:
        if task == "transformer" and options.text is None:
            continue
        text = str(options.text) if task == "transformer" else ""
        for base in CONSTANT:
            specs = {f"lr {lr:g}": CONSTANT[base].format(lr=lr) for lr in LRS[base]}
            specs |= {f"auto {lr or 'none'}": f'hx.auto(params, "{base}", lr={lr})' for lr in FIRST_LRS}
            specs["Prodigy"] = PRODIGY
            curves[task, base] = {
                name: [TaskRun(spec, task, seed, text) for seed in range(options.seeds)] for name, spec in specs.items()
            }
    return curves


def beside_constants(curve: dict[str, list[Any]], result: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The mean of each contender over the seeds, and the best constant learning rate."""
    values = {name: float(np.mean([result(run)["result"] for run in group])) for name, group in curve.items()}
    constant = {name: value for name, value in values.items() if name.startswith("lr ")}
    best = min(constant, key=lambda name: constant[name] if np.isfinite(constant[name]) else np.inf)
    return {"best": best, "constant": constant[best], **values}


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    curves = plan(options)
    runs = [run for curve in curves.values() for group in curve.values() for run in group]
    result = sweep("auto_tasks", runs, options, train)
    return [
        {"task": task, "base": base, "metric": TASKS[task][0], **beside_constants(curve, result)}
        for (task, base), curve in curves.items()
    ]


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    names = [f"auto {lr or 'none'}" for lr in FIRST_LRS]
    table = Table("task", "base", "", "best lr", "constant", *names, "Prodigy", box=box.SIMPLE, pad_edge=False)
    for row in rows:
        cells = [f"{row[name]:.3g}" for name in ("constant", *names, "Prodigy")]
        table.add_row(row["task"], row["base"], row["metric"], row["best"].removeprefix("lr "), *cells)
    console.print(table)


def draw(rows: list[dict[str, Any]], contenders: dict[str, tuple[str, str]], worst: float, height: float) -> Figure:
    """The results over those of the best constant lr, up to ``worst``; a contender has a marker and a label."""
    figure, axes = plt.subplots(1, 2, figsize=(12, height), sharey=True, layout="constrained")
    for ax, base in zip(axes, CONSTANT, strict=True):
        shown = [row for row in rows if row["base"] == base]
        places = np.arange(len(shown))
        for name, (marker, label) in contenders.items():
            ratios = [np.clip(row[name] / row["constant"], 0.1, worst) for row in shown]
            ax.plot(ratios, places, marker, label=label)
        ax.set_yticks(places, [row["task"] for row in shown])
        ax.axvline(1, color="0.5", linewidth=0.8)
        ax.set(xscale="log", xlabel="result / that of the best constant lr (lower is better)", title=base)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(describe_machine(), fontsize=10)
    return figure


def main() -> None:
    parser = options(__doc__, seeds=1)
    parser.add_argument("--text", type=Path, metavar="FILE", help="of the transformer, plain or .gz; default: left out")
    chosen = parser.parse_args()
    rows = collect(chosen)
    console = output()
    console.print(describe_machine(), highlight=False)
    print_table(console, rows)
    marks = [
        (f"auto {lr or 'none'}", (m, f"hx.auto, first lr {lr or 'none'}"))
        for lr, m in zip(FIRST_LRS, "o<>", strict=True)
    ]
    save("auto_tasks", chosen, rows, draw(rows, {**dict(marks), "Prodigy": ("x", "Prodigy")}, worst=10, height=5))


if __name__ == "__main__":
    main()
