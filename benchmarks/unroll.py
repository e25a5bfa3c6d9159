"""Gradients through K unrolled steps of Adam: what time and memory they take.

    python benchmarks/unroll.py

A million parameters take K steps on a loss, and the loss that they reach is differentiated with respect to where they
started and to lr:

    torch          ``torch.optim.Adam(differentiable=True)``
    TorchOpt       ``torchopt.adam`` 0.7.3; "accelerated" with its fused operators, whose lr is a number, not a tensor
    hx             ``hx.functional.adam(detach=False)``
    hx, segments   the same, with torch.utils.checkpoint around every sqrt(K) steps: only what goes from segment to
                   segment is kept, and the steps of a segment are made a second time on the way back

The loss is sum log cosh (w - target), whose gradient tanh(w - target) keeps one tensor for its own derivative and costs
two passes over memory: the optimizers, not the model, are what is measured. Time is that of forward and backward
together; memory is the peak of what tensors hold at a time. All gradients are compared in float64 before that.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchopt
from harness import (
    Contender,
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
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hyperopt_ext as hx

STEPS = (1, 2, 4, 8, 16, 32, 64)
QUICK = (1, 4, 16)
BASELINE = "torch"

Unroll = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (start, lr, target, K) -> the parameters after K steps


def gradient(w: Tensor, target: Tensor) -> Tensor:
    return torch.tanh(w - target)


def by_torch(w: Tensor, lr: Tensor, target: Tensor, steps: int) -> Tensor:
    w = w.clone()
    optimizer = torch.optim.Adam([w], lr, differentiable=True)
    for _ in range(steps):
        w.grad = gradient(w, target)
        optimizer.step()
    return w


def by_torchopt(w: Tensor, lr: Tensor | float, target: Tensor, steps: int, accelerated: bool = False) -> Tensor:
    optimizer = torchopt.adam(lr, use_accelerated_op=accelerated)
    params = [w]
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update([gradient(params[0], target)], state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params[0]


def by_torchopt_accelerated(w: Tensor, lr: Tensor, target: Tensor, steps: int) -> Tensor:
    return by_torchopt(w, lr.item(), target, steps, accelerated=True)


def by_hx(w: Tensor, lr: Tensor, target: Tensor, steps: int) -> Tensor:
    params, state = [w], None
    for t in range(1, steps + 1):
        grads = [gradient(params[0], target)]
        params, state = hx.functional.adam(params, grads, state, {"lr": lr}, torch.tensor(t), detach=False)
    return params[0]


def by_hx_in_segments(w: Tensor, lr: Tensor, target: Tensor, steps: int) -> Tensor:
    def segment(w: Tensor, m: Tensor, v: Tensor, lr: Tensor, numbers: range) -> tuple[Tensor, Tensor, Tensor]:
        params, state = [w], {"exp_avg": [m], "exp_avg_sq": [v]}
        for t in numbers:
            grads = [gradient(params[0], target)]
            params, state = hx.functional.adam(params, grads, state, {"lr": lr}, torch.tensor(t), detach=False)
        return params[0], state["exp_avg"][0], state["exp_avg_sq"][0]

    length = math.isqrt(steps)
    kept = (w, torch.zeros_like(w, requires_grad=False), torch.zeros_like(w, requires_grad=False))
    for begin in range(1, steps + 1, length):
        numbers = range(begin, min(begin + length, steps + 1))
        kept = checkpoint(segment, *kept, lr, numbers, use_reentrant=False, preserve_rng_state=False)
    return kept[0]


FORMS: dict[str, Unroll] = {
    "torch": by_torch,
    "TorchOpt": by_torchopt,
    "TorchOpt, accelerated": by_torchopt_accelerated,
    "hx": by_hx,
    "hx, segments": by_hx_in_segments,
}


def gradients(unroll: Unroll, steps: int, size: int, dtype: torch.dtype = torch.float32) -> Callable[[], list[Tensor]]:
    """A call that unrolls, and returns d loss / d start and, of the forms that give it, d loss / d lr."""
    generator = torch.Generator().manual_seed(0)
    start, target = (torch.randn(size, dtype=dtype, generator=generator) for _ in range(2))
    with_lr = unroll is not by_torchopt_accelerated

    def run() -> list[Tensor]:
        w, lr = start.clone().requires_grad_(), torch.tensor(1e-2, dtype=dtype, requires_grad=True)
        distance = unroll(w, lr, target, steps) - target
        loss = torch.logaddexp(distance, -distance).sum()
        return list(torch.autograd.grad(loss, [w, lr] if with_lr else [w]))

    return run


def disagreements(steps: int = 5, size: int = 1000) -> dict[str, float]:
    """How far each form is from torch, in float64: the largest relative difference of a gradient."""
    torch.set_default_dtype(torch.float64)  # of the step count, from which torch makes the bias corrections
    expected = gradients(by_torch, steps, size, torch.float64)()
    worst = {}
    for name, unroll in FORMS.items():
        got = gradients(unroll, steps, size, torch.float64)()
        worst[name] = max(((g - e).abs().max() / e.abs().max()).item() for g, e in zip(got, expected, strict=False))
    torch.set_default_dtype(torch.float32)
    return worst


def measure(steps: Sequence[int], size: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each form and K."""
    rows = []
    for k in steps:
        runs = {name: gradients(unroll, k, size) for name, unroll in FORMS.items()}
        memory = {name: peak_bytes(run) for name, run in runs.items()}
        samples = interleave({name: Contender(run) for name, run in runs.items()}, rounds, f"{k} steps")
        for name in FORMS:
            rows.append(
                {
                    "form": name,
                    "steps": k,
                    **median("seconds", samples[name]),
                    **median("ratio", samples[name] / samples[BASELINE]),
                    "peak_bytes": memory[name],
                    "memory_ratio": memory[name] / memory[BASELINE],
                }
            )
    return rows


def print_tables(console: Console, rows: Sequence[dict[str, Any]], size: int) -> None:
    for title, cell in [
        ("Time, and its ratio to torch", lambda r: f"{format_seconds(r['seconds'])} {r['ratio']:5.2f}"),
        (
            "Peak of memory, in tensors of the size of the parameters, and its ratio to torch",
            lambda r: f"{r['peak_bytes'] / (4 * size):.0f} {r['memory_ratio']:5.2f}",
        ),
    ]:
        table = Table("steps", title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
        for name in FORMS:
            table.add_column(name, justify="right")
        for k in dict.fromkeys(row["steps"] for row in rows):
            table.add_row(str(k), *(cell(row) for row in rows if row["steps"] == k))
        console.print(table)


def draw(rows: Sequence[dict[str, Any]], size: int) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    styles = {"torch": ("0.4", "s"), "TorchOpt": ("C3", "^"), "TorchOpt, accelerated": ("C1", "v")}
    styles |= {"hx": ("C0", "o"), "hx, segments": ("C2", "D")}
    for name, (color, marker) in styles.items():
        shown = [row for row in rows if row["form"] == name]
        k = [row["steps"] for row in shown]
        left.plot(k, [row["seconds"] * 1e3 for row in shown], color=color, marker=marker, label=name)
        right.plot(k, [row["peak_bytes"] / 2**20 for row in shown], color=color, marker=marker, label=name)
    left.set(title="Forward and backward", ylabel="ms")
    right.set(title="Peak of memory", ylabel="MiB")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log", xlabel="unrolled steps")
        ax.set_xticks(k, map(str, k))
        ax.set_xticks([], minor=True)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.suptitle(f"Gradients through Adam on {size / 1e6:g} M parameters; {describe_machine()}", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], parents=[timing_options()])
    parser.add_argument("--steps", nargs="+", type=int, metavar="K", help=f"default: {' '.join(map(str, STEPS))}")
    parser.add_argument("--size", type=int, default=1_000_000, metavar="N", help="parameters (default: 1000000)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    options = parser.parse_args()
    steps = options.steps or (QUICK if options.quick else STEPS)
    rounds = options.rounds or (3 if options.quick else 11)
    torch.set_num_threads(options.threads)

    worst = disagreements()
    for name, difference in worst.items():
        limit = 1e-5 if name == "TorchOpt, accelerated" else 1e-9  # its operators are not that exact
        assert difference < limit, f"the gradients of {name} differ by {difference:g}"
    rows = measure(steps, options.size, rounds)
    console = output()
    console.print(describe_machine(), highlight=False)
    print_tables(console, rows, options.size)
    results = {"rounds": rounds, "size": options.size, "differences_in_float64": worst, "rows": rows}
    save("unroll", results, draw(rows, options.size), options.out)


if __name__ == "__main__":
    main()
