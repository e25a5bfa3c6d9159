"""The whole training step, eager and compiled, with and without a tower.

    python benchmarks/compile.py

An MLP (784-128-10, batch 256) and a small transformer are trained with

    torch      fused Adam of ``torch.optim``, constant: what a training step costs without a tower
    hx         ``hx.HyperOptimizer`` with Adam/SGD: lr and both betas are learned
    function   the same tower as ``hx.functional.tower``: parameters and state in, parameters and state out
    plain      the same tower in plain torch ops (plain_tower.py): what Inductor makes of the method
    package    the paper's own package, gradient-descent-the-ultimate-optimizer

Forward, gradients, tower and update are one function, which runs as it is or through ``torch.compile``. Beside the
time of a step there are the time of the first call, the graphs that it made, graph breaks, recompiles over the next 100
steps, and the peak of what tensors hold. Before that the towers are run side by side in float64, and must agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import plain_tower
import torch
import torch._dynamo
import transformer
from gradient_descent_the_ultimate_optimizer import gdtuo
from harness import (
    Contender,
    compiled,
    describe_machine,
    format_seconds,
    interleave,
    median,
    output,
    peak_bytes,
    save,
    timing_options,
)
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from mlp import MLP, batches
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import hyperopt_ext as hx

LR, TOP_LR = 1e-3, 1e-7  # of Adam, and of the SGD above it
BASELINE = ("torch", "compiled")

# A training step (*carried, x, y) -> carried, and what the first step is given.
Step = tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...]]
Data = Iterator[tuple[Tensor, Tensor]]

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Data]]] = {
    "MLP": (MLP, batches),
    "transformer": (transformer.Transformer, transformer.batches),
}


def with_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    params = list(model.parameters())

    def step(x: Tensor, y: Tensor) -> tuple[()]:
        loss = F.cross_entropy(model(x), y)
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g
        optimizer.step()
        return ()

    return step, ()


def with_state(model: nn.Module, move: Callable[..., tuple[Any, ...]], start: tuple[Any, ...]) -> Step:
    names = [name for name, _ in model.named_parameters()]

    def loss_of(params: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, dict(zip(names, params, strict=True)), (x,)), y)

    def step(params: list[Tensor], state: Any, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        return move(params, torch.func.grad(loss_of)(params, x, y), state)

    return step, start


def by_torch(model: nn.Module) -> Step:
    return with_optimizer(model, torch.optim.Adam(model.parameters(), LR, fused=True))


def by_hx(model: nn.Module) -> Step:
    return with_optimizer(model, hx.HyperOptimizer(model.parameters(), hx.Adam(LR) / hx.SGD(TOP_LR)))


def by_function(model: nn.Module) -> Step:
    tower = hx.functional.tower(hx.Adam(LR) / hx.SGD(TOP_LR))
    return with_state(model, tower.step, tower.init(list(model.parameters())))


def by_plain_ops(model: nn.Module) -> Step:
    def move(params: list[Tensor], grads: list[Tensor], state: plain_tower.State) -> tuple[Any, ...]:
        return plain_tower.step(params, grads, state, TOP_LR)

    return with_state(model, move, plain_tower.start(model.parameters(), LR))


def by_package(model: nn.Module) -> Step:
    wrapper = gdtuo.ModuleWrapper(model, optimizer=gdtuo.Adam(alpha=LR, optimizer=gdtuo.SGD(TOP_LR)))
    wrapper.initialize()

    def step(x: Tensor, y: Tensor) -> tuple[()]:
        wrapper.begin()
        loss = F.cross_entropy(wrapper.forward(x), y)
        wrapper.zero_grad()
        loss.backward()
        wrapper.step()
        return ()

    return step, ()


FORMS: dict[str, Callable[[nn.Module], Step]] = {
    "torch": by_torch,
    "hx": by_hx,
    "function": by_function,
    "plain": by_plain_ops,
    "package": by_package,
}


def repeat(step: Callable[..., tuple[Any, ...]], carried: tuple[Any, ...], data: Data) -> Callable[[], None]:
    """A function that makes one training step, on the next batch."""

    def run() -> None:
        nonlocal carried
        carried = step(*carried, *next(data))

    return run


def disagreement(steps: int = 30) -> float:
    """The largest difference between the parameters of the forms of this tower, in float64."""
    results = []
    for make in (by_hx, by_function, by_plain_ops):
        model, data = MLP(torch.float64), batches(torch.float64)
        step, carried = make(model)
        for _ in range(steps):
            carried = step(*carried, *next(data))
        results.append([p.detach() for p in (carried[0] if carried else model.parameters())])
    return max((p - q).abs().max().item() for other in results[1:] for p, q in zip(other, results[0], strict=True))


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """One row for each form, eager and compiled, of a model."""
    make_model, make_data = MODELS[name]
    contenders, rows = {}, {}
    for form, make in FORMS.items():
        for mode in ("eager", "compiled"):
            step, start = make(make_model())
            row: dict[str, Any] = {"model": name, "form": form, "mode": mode}
            if mode == "compiled":
                result = compiled(step, lambda step, start=start: repeat(step, start, make_data()))
                run = result.pop("run")
                row |= result
            else:
                run = repeat(step, start, make_data())
            row["peak_bytes"] = peak_bytes(run)
            contenders[form, mode] = Contender(run)
            rows[form, mode] = row
    samples = interleave(contenders, rounds, name)
    for key, row in rows.items():
        row |= median("seconds", samples[key])
        row |= median("ratio", samples[key] / samples[BASELINE])
        row |= median("ratio_to_eager", samples[key] / samples[key[0], "eager"])
    return list(rows.values())


def print_tables(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    columns = (
        "",
        "time of a step",
        "/ compiled torch",
        "/ eager",
        "first call",
        "graphs",
        "breaks",
        "recompiles",
        "peak",
    )
    for model in dict.fromkeys(row["model"] for row in rows):
        table = Table(title=model, title_justify="left", box=box.SIMPLE, pad_edge=False)
        for column in columns:
            table.add_column(column, justify="right" if column else "left")
        for row in (row for row in rows if row["model"] == model):
            cells = [f"{row['form']}, {row['mode']}", format_seconds(row["seconds"]), f"{row['ratio']:.2f}"]
            if row["mode"] == "compiled":
                cells += [f"{row['ratio_to_eager']:.2f}", f"{row['first_call_seconds']:.1f} s"]
                cells += [str(row[key]) for key in ("graphs", "graph_breaks", "recompiles")]
            else:
                cells += [""] * 5
            table.add_row(*cells, f"{row['peak_bytes'] / 2**20:.1f} MiB")
        console.print(table)


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Bars of the ratio to the compiled step with torch's fused Adam."""
    top = 5.0  # bars that are longer end here; their number tells
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(6.5 * len(models), 4.5), squeeze=False, layout="constrained")
    for ax, model in zip(axes[0], models, strict=True):
        for shift, (mode, color) in zip((-0.2, 0.2), (("eager", "0.65"), ("compiled", "C0")), strict=True):
            shown = [row for row in rows if row["model"] == model and row["mode"] == mode]
            places = [list(FORMS).index(row["form"]) + shift for row in shown]
            ax.bar(places, [min(row["ratio"], top) for row in shown], 0.38, color=color, label=mode)
            for place, row in zip(places, shown, strict=True):
                ax.text(place, 0.05, f"{row['ratio']:.2f}", fontsize=8, ha="center", va="bottom", rotation=90)
        ax.axhline(1, color="black", linewidth=1)
        ax.set(ylim=(0, top), title=model, ylabel="time / compiled step with torch's fused Adam")
        ax.set_xticks(range(len(FORMS)), FORMS)
    axes[0][0].legend(frameon=False)
    figure.suptitle(f"Whole training step, medians; {describe_machine()}", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], parents=[timing_options()])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    options = parser.parse_args()
    models = options.models or (["MLP"] if options.quick else list(MODELS))
    rounds = options.rounds or (7 if options.quick else 51)
    torch.set_num_threads(options.threads)

    worst = disagreement()
    assert worst < 1e-9, f"the forms of the tower differ by {worst:g}"
    rows: list[dict[str, Any]] = []
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for model in models:
            rows += measure(model, rounds)
    console = output()
    console.print(describe_machine(), highlight=False)
    print_tables(console, rows)
    save("compile", {"rounds": rounds, "largest_difference_in_float64": worst, "rows": rows}, draw(rows), options.out)


if __name__ == "__main__":
    main()
