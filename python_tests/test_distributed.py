"""Several processes, started by torchrun, with gloo: the checks of ranks.py, one start for each number of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from problems import Regression

import hyperopt_ext as hx

HERE = Path(__file__).parent


def torchrun(processes, *command, timeout=300):
    """What a shell's `torchrun --nproc-per-node PROCESSES COMMAND` does, on a free port."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    return subprocess.run([*run, *map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the reports of all checks for a number of processes, which are run at the first call."""
    folders = {}

    def run(processes):
        if processes not in folders:
            folders[processes] = tmp_path_factory.mktemp(f"ranks{processes}")
            if processes == 2:
                for name, stack in ranks.STACKS.items():
                    problem, opt = train_alone(stack, range(10))
                    ranks.save(problem, opt, folders[2] / f"by_one_{name}")
            torchrun(processes, HERE / "ranks.py", folders[processes])
        return folders[processes]

    return run


def train_alone(stack, steps):
    problem = Regression(20)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    problem.train(opt, steps)
    return problem, opt


@pytest.mark.parametrize(("processes", "name"), [(n, name) for n, names in ranks.CHECKS.items() for name in names])
def test_processes(runs, processes, name):
    folder = runs(processes)
    for rank in range(processes):
        report = folder / f"{name}.{rank}.txt"
        assert report.exists(), "did not run, because a check before it failed"
        text = report.read_text()
        assert text == "ok", f"process {rank}: {text}"


@pytest.mark.parametrize("name", ranks.STACKS)
def test_one_process_resumes_what_two_saved(runs, name):
    whole, expected = train_alone(ranks.STACKS[name], range(20))
    problem = Regression(20)
    opt = hx.HyperOptimizer(problem.model.parameters(), ranks.STACKS[name])
    ranks.load(problem, opt, runs(2) / f"by_two_{name}")
    problem.train(opt, range(10, 20))
    torch.testing.assert_close(ranks.values(opt), ranks.values(expected), rtol=1e-12, atol=1e-14)
    for p, q in zip(problem.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
