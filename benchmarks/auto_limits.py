"""Where `hx.auto` needs help: seven synthetic tasks that it does badly on, and what mends it.

    python benchmarks/auto_limits.py

Beside torch's Adam and SGD (Nesterov's momentum 0.9) at constant learning rates, a grid of half decades, it trains each
task by ``hx.auto`` as it is, and by ``hx.auto`` with the help that the README names.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from auto_tasks import CONSTANT, LRS, beside_constants, draw
from experiments import options, save, sweep
from harness import describe_machine, output
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import hyperopt_ext as hx


@dataclass(frozen=True)
class LimitRun:
    """One training run: the optimizer as a Python expression, the name of the task, and the seed."""

    spec: str
    task: str
    seed: int


@dataclass(frozen=True)
class Task:
    """What is trained, the loss of step ``i``, and what is judged in the end, the lower the better."""

    model: nn.Module
    loss: Callable[[int], Tensor]
    judge: Callable[[], float]
    steps: int


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Linear(narrow, wide), activation()]
    return nn.Sequential(*layers[:-1])


def fixed(model: nn.Sequential, scale: float) -> nn.Sequential:
    """A teacher: weights of its own, the same for all seeds."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return model.requires_grad_(False)


def embeddings(seed: int) -> Task:
    """Who likes what: 40000 embeddings, of which a batch touches a few hundred. Judged by the loss on fresh pairs."""
    generator, many = torch.Generator().manual_seed(seed), 20_000
    truth = torch.randn(2, many, 8, generator=torch.Generator().manual_seed(7))
    model = nn.ModuleList([nn.Embedding(many, 16), nn.Embedding(many, 16), mlp(32, 64, 64, 1)])

    def error(pairs: int) -> Tensor:
        users, items = (many ** torch.rand(2, pairs, generator=generator)).long() - 1  # the first ones far more often
        likes = ((truth[0][users] * truth[1][items]).sum(1) > -1.5).float()
        scores = model[2](torch.cat([model[0](users), model[1](items)], 1))[:, 0]
        return F.binary_cross_entropy_with_logits(scores, likes)

    return Task(model, lambda i: error(256), lambda: error(50_000).item(), steps=1500)


def regression(seed: int, mean: float, outliers: float) -> Task:
    """A teacher's outputs around ``mean``. Judged by the squared error without outliers."""
    generator, teacher = torch.Generator().manual_seed(seed), fixed(mlp(20, 32, 1, activation=nn.Tanh), 1.5)
    model = mlp(20, 64, 64, 1)
    nn.init.constant_(model[-1].bias, mean)

    def loss(i: int) -> Tensor:
        x = torch.randn(32, 20, generator=generator)
        wrong = float(torch.rand((), generator=generator) < outliers) * 100 * torch.randn((), generator=generator)
        return F.mse_loss(model(x), teacher(x) + mean + wrong)

    x_test = torch.randn(2000, 20, generator=generator)
    return Task(model, loss, lambda: F.mse_loss(model(x_test), teacher(x_test) + mean).item(), steps=2000)


def game(seed: int) -> Task:
    """A GAN of eight points on a circle, both sides at once. Judged by the distance from samples to the next point."""
    generator, angles = torch.Generator().manual_seed(seed), torch.arange(8) * math.pi / 4
    points = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    maker, judge = mlp(8, 64, 64, 2), mlp(2, 64, 64, 1)

    def loss(i: int) -> Tensor:
        chosen = torch.randint(8, (128,), generator=generator)
        real = points[chosen] + 0.05 * torch.randn(128, 2, generator=generator)
        made = maker(torch.randn(128, 8, generator=generator))
        judges = F.softplus(-judge(real)).mean() + F.softplus(judge(made.detach())).mean()
        frozen = {name: p.detach() for name, p in judge.named_parameters()}
        return judges + F.softplus(-torch.func.functional_call(judge, frozen, (made,))).mean()

    def distance() -> float:
        """Of the points to the samples, too: all eight count."""
        far = torch.cdist(maker(torch.randn(2000, 8, generator=generator)), points)
        return (far.amin(1).mean() + far.amin(0).mean()).item()

    return Task(nn.ModuleList([maker, judge]), loss, distance, steps=2500)


def interpolation(seed: int) -> Task:
    """256 samples that can be learned by heart, full batch. Judged by the loss on others."""
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(2256, 20, generator=generator), torch.randn(20, generator=generator)
    y, model = (x @ w > 0).long(), mlp(20, 64, 2)
    return Task(
        model,
        lambda i: F.cross_entropy(model(x[:256]), y[:256]),
        lambda: F.cross_entropy(model(x[256:]), y[256:]).item(),
        steps=4000,
    )


@functools.cache
def pretrained() -> tuple[nn.Sequential, nn.Sequential]:
    teacher = fixed(mlp(20, 64, 10), 2.0)
    torch.manual_seed(0)
    model = mlp(20, 256, 256, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    for _ in range(3000):
        x = torch.randn(128, 20)
        optimizer.zero_grad()
        F.cross_entropy(model(x), teacher(x).argmax(1)).backward()
        optimizer.step()
        scheduler.step()
    return model, teacher


def fine_tuning(seed: int) -> Task:
    """A trained model goes on with 512 samples of a problem that has shifted, 20 epochs. Judged by the error in %."""
    (model, teacher), generator = pretrained(), torch.Generator().manual_seed(seed)
    model, shift = copy.deepcopy(model), 0.3 * torch.randn(20, generator=generator)
    x, x_test = torch.randn(512, 20, generator=generator), torch.randn(5000, 20, generator=generator)
    y, y_test = (teacher(x + shift).argmax(1) for x in (x, x_test))

    def loss(i: int) -> Tensor:
        batch = torch.randint(512, (32,), generator=generator)
        return F.cross_entropy(model(x[batch]), y[batch])

    return Task(model, loss, lambda: 100 * (model(x_test).argmax(1) != y_test).float().mean().item(), steps=320)


class Adder(nn.Module):
    """Reads a sequence of pairs, and answers with a number."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 48, batch_first=True), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def plateau(seed: int) -> Task:
    """An LSTM adds the two marked numbers of 40; for long it knows their mean alone. Judged by the squared error."""
    generator, model, length = torch.Generator().manual_seed(seed), Adder(), 40

    def error(samples: int) -> Tensor:
        numbers, rows = torch.rand(samples, length, generator=generator), torch.arange(samples)
        marks = torch.zeros(samples, length)
        places = torch.randint(length // 2, (2, samples), generator=generator)
        places[1] += length // 2
        marks[rows, places[0]] = marks[rows, places[1]] = 1.0
        return F.mse_loss(model(torch.stack([numbers, marks], 2))[:, 0], (numbers * marks).sum(1))

    return Task(model, lambda i: error(32), lambda: error(2000).item(), steps=1500)


def clipped(optimizer: torch.optim.Optimizer, norm: float) -> torch.optim.Optimizer:
    """Clips the gradients before each step."""

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], norm)

    optimizer.register_step_pre_hook(clip)
    return optimizer


# What is judged, the task, and the help by base.
TENSORS = {base: f'hx.auto(params, "{base}", granularity="tensor")' for base in CONSTANT}
TASKS: dict[str, tuple[str, Callable[[int], Task], dict[str, str]]] = {
    "embeddings": ("loss", embeddings, TENSORS),
    "a bias of 1000": ("loss", functools.partial(regression, mean=1000.0, outliers=0.0), TENSORS),
    "outliers": (
        "loss",
        functools.partial(regression, mean=0.0, outliers=0.01),
        {base: f'clipped(hx.auto(params, "{base}"), 1.0)' for base in CONSTANT},
    ),
    "GAN": (
        "distance",
        game,
        {"adam": 'hx.auto(params, "adam", betas=(0.5, 0.99))', "sgd": 'hx.auto(params, "sgd", momentum=0.5)'},
    ),
    "learned by heart": (
        "loss",
        interpolation,
        {base: f'hx.auto(params, "{base}", weight_decay=1e-3)' for base in CONSTANT},
    ),
    "fine-tuning": (
        "error %",
        fine_tuning,
        {
            "adam": 'hx.auto(params, "adam", lr=1e-4, bounds={"lr": (0, 1e-4)})',
            "sgd": 'hx.auto(params, "sgd", lr=3e-3, bounds={"lr": (0, 3e-3)})',
        },
    ),
    "plateau": ("loss", plateau, {base: f'hx.auto(params, "{base}", horizon=1000)' for base in CONSTANT}),
}


def train(run: LimitRun, _: object) -> dict[str, Any]:
    torch.manual_seed(run.seed)
    task = TASKS[run.task][1](run.seed)
    params = task.model.parameters()
    if run.task == "GAN":
        params = [{"params": side.parameters()} for side in task.model.children()]
    optimizer = eval(run.spec, {"hx": hx, "torch": torch, "params": params, "clipped": clipped})
    for i in range(task.steps):
        optimizer.zero_grad()
        task.loss(i).backward()
        optimizer.step()
    with torch.no_grad():
        return {"result": task.judge(), "lr": float(torch.as_tensor(optimizer.param_groups[0]["lr"]).mean())}


def plan(options: argparse.Namespace) -> dict[tuple[str, str], dict[str, list[LimitRun]]]:
    """The runs of each task and base, by contender."""
    curves = {}
    for task in ["outliers"] if options.quick else TASKS:
        for base in CONSTANT:
            specs = {f"lr {lr:g}": CONSTANT[base].format(lr=lr) for lr in LRS[base]}
            specs |= {"auto": f'hx.auto(params, "{base}")', "help": TASKS[task][2][base]}
            curves[task, base] = {
                name: [LimitRun(spec, task, seed) for seed in range(options.seeds)] for name, spec in specs.items()
            }
    return curves


def no_data(_: object) -> None:
    """All tasks are made up."""


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    curves = plan(options)
    runs = [run for curve in curves.values() for group in curve.values() for run in group]
    result = sweep("auto_limits", runs, options, train, no_data)
    rows = []
    for (task, base), curve in curves.items():
        metric, _, help_by_base = TASKS[task]
        row = {"task": task, "base": base, "metric": metric, "helped_by": help_by_base[base]}
        rows.append({**row, **beside_constants(curve, result)})
    return rows


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("task", "base", "", "best lr", "constant", "auto", "help", "with", box=box.SIMPLE, pad_edge=False)
    for row in rows:
        cells = [f"{row[name]:.3g}" for name in ("constant", "auto", "help")]
        best = row["best"].removeprefix("lr ")
        table.add_row(row["task"], row["base"], row["metric"], best, *cells, row["helped_by"])
    console.print(table)


def main() -> None:
    chosen = options(__doc__, seeds=3, data=None).parse_args()
    rows = collect(chosen)
    console = output()
    console.print(describe_machine(), highlight=False)
    print_table(console, rows)
    contenders = {"auto": ("o", "hx.auto"), "help": ("*", "with help")}
    save("auto_limits", chosen, rows, draw(rows, contenders, worst=100, height=4))


if __name__ == "__main__":
    main()
