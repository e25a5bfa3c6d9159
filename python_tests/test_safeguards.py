"""What goes beyond the paper, against a transcription whose derivatives come from autograd."""

from __future__ import annotations

import pytest
from cases import safeguarded_stacks
from hypothesis import given
from problems import Regression, relative_error
from reference import TranscribedTower

import hyperopt_ext as hx

STEPS = 15


def assert_equals_transcription(stack, steps=STEPS, tolerance=1e-9):
    problem = Regression(steps)
    reference = TranscribedTower(problem.model.parameters(), stack)
    opt = hx.HyperOptimizer(problem.model.parameters(), stack)
    for i in range(steps):
        reference.step(lambda params, i=i: problem.loss_of(i, params))
        problem.train(opt, range(i, i + 1))
    for p, q in zip(problem.model.parameters(), reference.params, strict=True):
        assert relative_error(p.detach(), q) <= tolerance
    for level, expected in zip(opt.hyperparameters(), reference.hyperparameters(), strict=True):
        for name, values in expected.items():
            assert level[name].flatten().tolist() == pytest.approx(values, rel=tolerance, abs=1e-300), name
    for level, expected in zip(opt.bounded_steps(), reference.bounded(), strict=True):
        for name, counts in expected.items():
            assert level[name].flatten().tolist() == counts, name


@given(stack=safeguarded_stacks())
def test_equals_the_transcription(stack):
    assert_equals_transcription(stack)
