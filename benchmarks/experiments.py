"""What the scripts that train models share: runs, the training loop, and a sweep over runs that can be interrupted.

A :class:`Run` names everything that its result depends on. With the same seed and model, all optimizers start from the
same weights and see the same batches. A sweep writes every result to a file as soon as it is there, and what it finds
in that file it does not train again; delete the file to start afresh.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from gradient_descent_the_ultimate_optimizer import gdtuo as package
from matplotlib.figure import Figure
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F
from uncorrected_amsgrad import UncorrectedAMSGrad

import hyperopt_ext as hx
from hyperopt_ext.compat import gdtuo
from hyperopt_ext.demo import Data, mnist

BATCH = 256
WINDOW = 100  # steps that the last loss is the mean of
EXTRAS = ("gradient-descent-the-ultimate-optimizer", "prodigyopt", "schedulefree")

Result = dict[str, Any]
AnyRun = Any  # a frozen dataclass of what JSON has: a Run, or one that names another training problem
Train = Callable[[AnyRun, Data], Result]


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        form: who reads ``spec``.
            ``"hyperopt_ext"``: a stack of this library, its levels being those of ``hx`` and, as ``gdtuo.Adam``, of
            ``hx.compat.gdtuo``: ``"gdtuo.Adam(alpha=0.001) / hx.SGD(lr=1e-05)"``.
            ``"package"``: a tower of the package of the paper, ``"Adam(alpha=0.001) / SGD(alpha=1e-05)"``.
            ``"optimizer"``: an optimizer made of ``params``, ``"torch.optim.Adam(params, lr=0.001)"``.
        spec: the optimizer, as a Python expression.
        model: widths and activations from the first layer on: ``"128 tanh 10"``.
        epochs: how often it sees the training set.
        seed: of the weights and the order of the batches.
        halve_every: after so many epochs lr is halved, again and again; 0 is never.
    """

    form: str
    spec: str
    model: str
    epochs: int
    seed: int
    halve_every: int = 0


class Trainer:
    """A model and ``torch.optim`` optimizer; the base of the adapters."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One training step. Returns the loss before it."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def mode(self, training: bool) -> None:
        """Schedule-free optimizers evaluate the model at another point than they train it at."""
        switch = getattr(self.optimizer, "train" if training else "eval", None)
        if switch is not None:
            switch()

    def hyperparameters(self) -> list[dict[str, Any]]:
        """The present values, one dict a level; a list where each tensor has its own."""
        if isinstance(self.optimizer, hx.HyperOptimizer):
            levels = self.optimizer.hyperparameters()
            return [{name: value.tolist() for name, value in level.items()} for level in levels]
        [group] = self.optimizer.param_groups
        return [{name: float(group[name]) for name in ("lr", "d") if name in group}]


class PackageTrainer(Trainer):
    """The same for a tower of the package of the paper."""

    def __init__(self, model: nn.Module, tower: package.Optimizable) -> None:
        self.model = model
        self.wrapper = package.ModuleWrapper(model, optimizer=tower)
        self.wrapper.initialize()

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.wrapper.begin()
        loss = F.cross_entropy(self.wrapper.forward(x), y)
        self.wrapper.zero_grad()
        # The graph of the backward that its authors ask for changes nothing but time.
        loss.backward()
        self.wrapper.step()
        return loss.detach()

    def mode(self, training: bool) -> None:
        pass

    def hyperparameters(self) -> list[dict[str, float]]:
        result, level = [], self.wrapper.optimizer
        while not isinstance(level, package.NoOpOptimizer):
            values = {name: value.item() for name, value in level.parameters.items()}
            if isinstance(level, package.RMSProp | package.RMSPropAlpha):
                values["alpha"] **= 2
            for name in {"beta1", "beta2", "gamma"} & set(values):
                values[name] = (math.tanh(values[name]) + 1) / 2
            result.append(values)
            level = level.optimizer
        return result


def trainer(run: Run, model: nn.Module) -> Trainer:
    if run.form == "hyperopt_ext":
        stack = eval(run.spec, {"hx": hx, "gdtuo": gdtuo, "inf": math.inf})
        return Trainer(model, hx.HyperOptimizer(model.parameters(), stack))
    if run.form == "package":
        tower = package.NoOpOptimizer()
        for level in reversed(run.spec.split(" / ")):
            names = {**vars(package), "UncorrectedAMSGrad": UncorrectedAMSGrad, "tower": tower}
            tower = eval(f"{level.removesuffix(')')}, optimizer=tower)", names)
        return PackageTrainer(model, tower)
    if run.form == "optimizer":
        modules = {name: importlib.import_module(name) for name in re.findall(r"prodigyopt|schedulefree", run.spec)}
        names = {"hx": hx, "torch": torch, "params": model.parameters(), **modules}
        return Trainer(model, eval(run.spec, names))
    raise ValueError(f"there is no form {run.form!r}")


def make_model(description: str, width: int) -> nn.Sequential:
    """The model of a description such as ``"128 tanh 10"``, for inputs of ``width`` numbers."""
    layers: list[nn.Module] = []
    for word in description.split():
        if word.isdecimal():
            layers.append(nn.Linear(width, int(word)))
            width = int(word)
        else:
            layers.append({"tanh": nn.Tanh, "relu": nn.ReLU}[word]())
    return nn.Sequential(*layers)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss, and the error in %: 90 or so if the outputs are not finite, as of any fixed answer."""
    outputs = torch.cat([model(part) for part in x.split(10_000)])
    wrong = int((outputs.argmax(1) != y).sum())
    return F.cross_entropy(outputs, y).item(), 100 * wrong / len(y)


def train(run: Run, data: Data) -> Result:
    x, y = data.train
    torch.manual_seed(run.seed)
    model = make_model(run.model, x.shape[1])
    training = trainer(run, model)
    schedule = None
    if run.halve_every:
        schedule = torch.optim.lr_scheduler.StepLR(training.optimizer, run.halve_every, gamma=0.5)
    order = torch.Generator().manual_seed(run.seed)
    losses: list[Tensor] = []
    seconds = 0.0
    training.mode(True)
    for _ in range(run.epochs):
        batches = torch.randperm(len(x), generator=order).split(BATCH)
        start = time.perf_counter()
        losses += [training.step(x[i], y[i]) for i in batches]
        seconds += time.perf_counter() - start
        if schedule is not None:
            schedule.step()
        if not all(p.isfinite().all() for p in model.parameters()):
            break  # it cannot come back
    training.mode(False)
    train_loss, train_error = evaluate(model, x, y)
    test_loss, test_error = evaluate(model, *data.test)
    history = torch.stack(losses)
    return {
        "test_error": test_error,
        "test_loss": test_loss,
        "train_error": train_error,
        "train_loss": train_loss,
        "last_losses": history[-WINDOW:].mean().item(),
        "finite": bool(history.isfinite().all()) and math.isfinite(train_loss),
        "seconds": seconds,
        "steps": len(losses),
        "hyperparameters": training.hyperparameters(),
    }


def cifar10(folder: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Pictures [n, 3, 32, 32] and labels [n], as bytes, to train and to test with."""

    def part(*names: str) -> tuple[np.ndarray, np.ndarray]:
        records = np.concatenate([np.fromfile(folder / "cifar-10-batches-bin" / name, np.uint8) for name in names])
        records = records.reshape(-1, 1 + 3 * 32 * 32)
        return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]

    return part(*(f"data_batch_{i}.bin" for i in range(1, 6))), part("test_batch.bin")


_data: Data


def _start_worker(load: Callable[[Path], Any], folder: Path) -> None:
    global _data
    torch.set_num_threads(1)
    _data = load(folder)


def _work(train: Train, run: AnyRun) -> Result:
    return train(run, _data)


def _key(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True)


class Log:
    """Results as lines of JSON, ``{"run": ..., "result": ...}``; one that an interruption tore is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[str, Result] = {}
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.results[_key(entry["run"])] = entry["result"]
            except (ValueError, TypeError, KeyError):
                continue
        if text and not text.endswith("\n"):
            path.write_text(text + "\n")

    def add(self, run: AnyRun, result: Result) -> None:
        self.results[_key(asdict(run))] = result
        with self.path.open("a") as file:
            file.write(json.dumps({"run": asdict(run), "result": result}) + "\n")

    def __contains__(self, run: AnyRun) -> bool:
        return _key(asdict(run)) in self.results

    def __getitem__(self, run: AnyRun) -> Result:
        return self.results[_key(asdict(run))]


def sweep(
    name: str,
    runs: Iterable[AnyRun],
    options: argparse.Namespace,
    train: Train = train,
    load: Callable[[Path], Any] = mnist,
) -> Callable[[AnyRun], Result]:
    """Trains all runs, several at a time, that OUT/NAME.jsonl does not have. Returns the result of each run."""
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    log, todo = Log(options.out / f"{name}.jsonl"), list(dict.fromkeys(runs))
    missing = [run for run in todo if run not in log]
    if missing:
        load(options.data)  # what is wrong with the folder is said once, and here
    progress = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    # A forked worker would inherit the locks of torch's threads.
    pool = ProcessPoolExecutor(options.jobs, get_context("spawn"), _start_worker, (load, options.data))
    with progress, pool:
        task = progress.add_task(name, total=len(todo), completed=len(todo) - len(missing))
        futures = {pool.submit(_work, train, run): run for run in missing}
        try:
            for future in as_completed(futures):
                log.add(futures[future], future.result())
                progress.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return log.__getitem__


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Of a single value the standard deviation is 0."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def options(
    description: str | None, seeds: int, epochs: int | None = None, data: str | None = "MNIST as .gz files"
) -> argparse.ArgumentParser:
    """The options that every experiment has, with --epochs and --data unless there are none to set."""
    summary = (description or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary, parents=[harness.common_options()])
    parser.set_defaults(data=None)
    if data is not None:
        parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help=data)
    if epochs is not None:
        parser.add_argument("--epochs", type=int, default=epochs, metavar="N", help=f"of each run; default: {epochs}")
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help=f"how many; default: {seeds}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes; default: the cores")
    return parser


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(
    name: str, options: argparse.Namespace, rows: list[dict[str, Any]], figure: Figure, batch: int = BATCH
) -> None:
    """Writes OUT/NAME.json and OUT/NAME.png."""
    installed = {d.name for d in importlib.metadata.distributions()}  # not all scripts need all of them
    versions = {name: importlib.metadata.version(name) for name in EXTRAS if name in installed}
    settings = {"epochs": options.epochs, "batch": batch} if "epochs" in options else {}
    settings |= {"seeds": options.seeds, "packages": versions}
    harness.save(name, {**settings, "rows": _finite(rows)}, figure, options.out)
