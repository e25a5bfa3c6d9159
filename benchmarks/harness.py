"""What the benchmark scripts share: interleaved timing, a straight-line fit, and files that say how they were made.

All contenders of a comparison are timed in one process and in rounds. In a round each of them has one turn, in an order
that is shuffled anew for each round, so that a change of clock rate or another program's work meets all of them alike
and nobody always comes after the same neighbour. A turn is one call that is not timed, which brings the contender's
own data back into the caches, and then a timed batch of calls; Python's garbage collector is off, as in timeit. Ratios
are taken within a round. What is reported are medians over the rounds, with the quartiles beside them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shlex
import sys
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter
from types import FunctionType
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch._dynamo.utils import counters

mpl.use("Agg")

Key = TypeVar("Key", bound=Hashable)
Samples = NDArray[np.float64]

_numbers = count()

WARM_UP_CALLS = 3  # the first steps allocate state and have no hypergradient


def output() -> Console:
    """As wide as the terminal; a file or a pipe has no width, and tables are not cut there."""
    return Console() if sys.stdout.isatty() else Console(width=160)


@dataclass(frozen=True)
class Contender:
    """``run`` is timed; ``prepare`` goes before each run, outside the clock."""

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None

    def seconds(self, calls: int) -> float:
        """The mean time of a call, over a batch of calls."""
        if self.prepare is None:
            start = perf_counter()
            for _ in range(calls):
                self.run()
            return (perf_counter() - start) / calls
        total = 0.0
        for _ in range(calls):
            self.prepare()
            start = perf_counter()
            self.run()
            total += perf_counter() - start
        return total / calls


def interleave(
    contenders: Mapping[Key, Contender],
    rounds: int,
    title: str,
    batch_of: Key | None = None,
    most: int | None = None,
) -> dict[Key, Samples]:
    """Times the contenders against each other, under a progress bar.

    Args:
        contenders: what to time, by name.
        rounds: how many turns each of them has.
        title: stands at the progress bar.
        batch_of: a contender that fixes the size of a batch, the same for all: as many calls as it makes in 2 ms.
            ``None`` is a batch of one call.
        most: calls in a batch. Default: any number.

    Returns:
        The seconds of a call of each contender, one number a round.
    """
    for contender in contenders.values():
        contender.seconds(WARM_UP_CALLS)
    batch = 1
    if batch_of is not None:
        batch = max(1, round(2e-3 / min(contenders[batch_of].seconds(1) for _ in range(5))))
        batch = batch if most is None else min(batch, most)
    samples = {name: np.empty(rounds) for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        # Without auto_refresh the bar is drawn between rounds only, not by a thread beside what is timed.
        for i in track(range(rounds), title, auto_refresh=False, transient=True):
            shuffle(order)
            for name in order:
                contenders[name].seconds(1)
                samples[name][i] = contenders[name].seconds(batch)
    finally:
        gc.enable()
    return samples


def peak_bytes(run: Callable[[], object]) -> int:
    """How much memory tensors hold at most during a call, beyond what they hold before it: what torch allocates."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def compiled(
    function: Callable[..., Any], drive: Callable[[Callable[..., Any]], Callable[[], object]], calls: int = 100
) -> dict[str, Any]:
    """``torch.compile`` of a function, and what it took.

    The function gets a code object of its own: dynamo keeps its graphs by code object, and would look through those of
    all contenders that share one at every call.

    Returns:
        ``run``, the compiled function as ``drive(function)`` calls it; ``first_call_seconds``; ``graphs`` and
        ``graph_breaks`` in all; and ``recompiles``, the graphs made after the first call, over some more calls.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = FunctionType(code, function.__globals__, closure=function.__closure__, argdefs=function.__defaults__)
    run = drive(torch.compile(own))

    def made() -> tuple[int, int]:
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    before = made()
    start = perf_counter()
    run()
    seconds = perf_counter() - start
    first = made()
    for _ in range(calls):
        run()
    after = made()
    return {
        "run": run,
        "first_call_seconds": seconds,
        "graphs": after[0] - before[0],
        "graph_breaks": after[1] - before[1],
        "recompiles": after[0] - first[0],
    }


def median(name: str, values: Samples) -> dict[str, Any]:
    """The median and the two quartiles, as ``name`` and ``name_quartiles``."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {name: middle, f"{name}_quartiles": [low, high]}


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The line intercept + slope * x of least squares, and its coefficient of determination R²."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    slope, intercept = np.polyfit(xs, ys, 1)
    residuals = ys - (intercept + slope * xs)
    r_squared = 1 - np.sum(residuals**2) / np.sum((ys - ys.mean()) ** 2)
    return {"slope": float(slope), "intercept": float(intercept), "r_squared": float(r_squared)}


def format_seconds(seconds: float) -> str:
    """Three significant digits or so, in µs or ms."""
    if seconds < 999.5e-6:
        return f"{seconds * 1e6:.{0 if seconds >= 100e-6 else 1}f} µs"
    return f"{seconds * 1e3:.{1 if seconds >= 10e-3 else 2}f} ms"


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_machine() -> str:
    return "{cpu}, {cores} cores, {instruction_set}, torch {torch}".format(**machine())


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


_RESULTS = Path(__file__).parent / "results"


class _Quick(argparse.Action):
    """Sets the flag; what is made quickly does not replace the results."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        namespace.quick = True
        if namespace.out == _RESULTS:
            namespace.out = Path(tempfile.mkdtemp(prefix="hyperopt_ext_"))


def common_options() -> argparse.ArgumentParser:
    """The options that every script has; a parent for its own parser."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--quick", action=_Quick, nargs=0, default=False, help="a small selection, to see that it works"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=_RESULTS,
        metavar="FOLDER",
        help="where the JSON and the PNG go (default: results, next to the script; with --quick, a temporary folder)",
    )
    return parser


def timing_options() -> argparse.ArgumentParser:
    """The same, and those of scripts that time."""
    parser = argparse.ArgumentParser(add_help=False, parents=[common_options()])
    parser.add_argument("--rounds", type=int, help="how often each contender is timed")
    return parser


def _command() -> str:
    """The command line, less --out: it says nothing about the numbers."""
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out")
    arguments = out.parse_known_args(sys.argv[1:])[1]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def save(name: str, results: Mapping[str, Any], figure: Figure, folder: Path) -> None:
    """Writes FOLDER/NAME.json and FOLDER/NAME.png."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {"benchmark": name, "command": _command(), "machine": machine(), **results}
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    figure.savefig(folder / f"{name}.png", dpi=150)
