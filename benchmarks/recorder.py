"""What a recorder adds to a training step.

    python benchmarks/recorder.py

Timed are a whole training step of a small MLP, with and without an ``hx.Recorder``, and ``record()`` alone, which is
all that the recorder adds: too little to be told from the difference of two steps, so the share is that of ``record()``
in the step. One thread; all of it in one interleaved run.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from harness import Contender, describe_machine, format_seconds, interleave, median, output, save, timing_options
from matplotlib.figure import Figure
from mlp import MLP, training_step

import hyperopt_ext as hx

STACKS = {
    "Adam^lr/SGD": hx.Adam(learn="lr") / hx.SGD(lr=1e-7),
    "Adam/Adam/SGD": hx.Adam() / hx.Adam(lr=1e-7) / hx.SGD(lr=1e-7),
    "Adam^lr/SGD, one lr a tensor": hx.Adam(learn="lr", granularity="tensor") / hx.SGD(lr=1e-7),
}


def contenders() -> dict[tuple[str, str], Contender]:
    result = {}
    for name, stack in STACKS.items():
        for what in ("step", "step, recorded"):
            model = MLP()
            opt = hx.HyperOptimizer(model.parameters(), stack)
            recorder = hx.Recorder(opt) if what == "step, recorded" else None
            result[name, what] = Contender(training_step(model, opt))
            if recorder is not None:
                result[name, "record"] = Contender(hx.Recorder(opt, hook=False).record)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], parents=[timing_options()])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = arguments.rounds or (15 if arguments.quick else 301)
    samples = interleave(contenders(), rounds, "recorder", batch_of=(next(iter(STACKS)), "step"))

    console = output()
    console.print(f"Training step of the MLP 784-128-10, batch 256; medians of {rounds} rounds, {describe_machine()}")
    results: dict[str, Any] = {}
    for name in STACKS:
        share = samples[name, "record"] / samples[name, "step"]
        results[name] = {
            **median("step_seconds", samples[name, "step"]),
            **median("recorded_step_seconds", samples[name, "step, recorded"]),
            **median("record_seconds", samples[name, "record"]),
            **median("share", share),
        }
        step, record = (format_seconds(float(np.median(samples[name, what]))) for what in ("step", "record"))
        console.print(f"{name:32} step {step:>8}   record {record:>8}   {100 * results[name]['share']:.2f} %")

    figure = Figure(figsize=(6.5, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(results), [100 * entry["share"] for entry in results.values()], height=0.5)
    axes.axvline(1, color="0.4", linestyle="--", linewidth=1)
    axes.set_xlabel("cost of recording, % of a training step (MLP 784-128-10, batch 256)")
    axes.invert_yaxis()
    save("recorder", {"rounds": rounds, "results": results}, figure, arguments.out)


if __name__ == "__main__":
    main()
