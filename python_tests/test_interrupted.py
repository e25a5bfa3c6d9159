"""A job that is killed at any time goes on from its last checkpoint to the same bytes; a broken file harms no job."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from interrupted import TOTAL, Job
from problems import Regression
from test_torch_optim import assert_same

import hyperopt_ext as hx

HERE = Path(__file__).parent


def test_killed_twice_it_ends_with_the_same_bytes(tmp_path, threads):
    threads(1)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected = Job(tmp_path / "whole").run()
    chance = random.Random(0)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    kills = [40, 160]
    for until in [*kills, None]:
        command = [sys.executable, str(HERE / "interrupted.py"), str(tmp_path / "killed")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as job:
            for line in job.stdout:
                if until is not None and line.strip().isdigit() and int(line) >= until:
                    time.sleep(chance.uniform(0, 0.01))  # anywhere in the steps that follow
                    job.send_signal(signal.SIGKILL)
                    break
                last = line.split()
            job.stdout.read()
        assert job.returncode == (0 if until is None else -signal.SIGKILL)
    assert last == ["done", expected]
    assert Job(tmp_path / "killed").step == TOTAL - TOTAL % 3


@pytest.mark.parametrize("size", [0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_an_error_and_the_running_job_goes_on(tmp_path, size):
    problem = Regression(10)
    opt = hx.HyperOptimizer(problem.model.parameters(), hx.Adam() / hx.SGD())
    problem.train(opt, range(5))
    path = tmp_path / "checkpoint.pt"
    torch.save(opt.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(size * len(whole))])
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises((RuntimeError, EOFError, OSError)):
        opt.load_state_dict(torch.load(path, weights_only=True))
    assert_same(opt.state_dict(), before)
    problem.train(opt, range(5, 10))


def test_a_checkpoint_of_another_stack_is_an_error_and_the_running_job_goes_on(tmp_path):
    """Whichever of the groups it is that does not fit."""
    problem = Regression(10)
    layers = [{"params": layer.parameters()} for layer in (problem.model[0], problem.model[2])]
    opt = hx.HyperOptimizer(layers, hx.Adam() / hx.SGD())
    problem.train(opt, range(5))
    other = Regression(10)
    groups = [{"params": other.model[0].parameters()}, {"params": other.model[2].parameters(), "stack": hx.Adam()}]
    wrong = hx.HyperOptimizer(groups, hx.Adam() / hx.SGD())
    other.train(wrong, range(3))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"param group 1 is of the stack 'adam\(.*, but this optimizer's is"):
        opt.load_state_dict(wrong.state_dict())
    assert_same(opt.state_dict(), before)
    problem.train(opt, range(5, 10))
