"""Stacks that learn, of every kind, and what two runs are compared by."""

from __future__ import annotations

import pytest
import torch

import hyperopt_ext as hx

STACK = hx.Adam(lr=1e-2) / hx.SGD(lr=1e-4, momentum=0.5) / hx.SGD(lr=1e-6)
LR_ONLY = hx.Adam(lr=1e-2, learn="lr") / hx.SGD(lr=1e-4)
SGD = hx.SGD(lr=1e-2, momentum=0.9) / hx.Adam(lr=1e-4)
ADAMW = hx.AdamW(lr=1e-2, weight_decay=0.1, learn=("lr", "beta1", "weight_decay")) / hx.SGD(lr=1e-4)
LION = hx.Lion(lr=1e-3, weight_decay=0.1) / hx.SGD(lr=1e-6)
TRACED = hx.Adam(lr=1e-2, learn=("lr", "beta1"), horizon=5) / hx.SGD(lr=1e-5, learn="lr", horizon=3) / hx.SGD(lr=1e-8)
TENSORS = hx.Adam(lr=1e-2, granularity="tensor") / hx.Adam(lr=1e-4, learn="lr") / hx.SGD(lr=1e-8)
LEARNING = {
    "adam": STACK,
    "lr": LR_ONLY,
    "sgd": SGD,
    "adamw": ADAMW,
    "lion": LION,
    "traced": TRACED,
    "tensors": TENSORS,
}
every_learning_stack = pytest.mark.parametrize("stack", LEARNING.values(), ids=LEARNING)
every_stack = pytest.mark.parametrize("stack", [*LEARNING.values(), hx.Adam(lr=1e-2)], ids=[*LEARNING, "plain"])


def values(opt, group=0):
    return [{k: v.tolist() for k, v in level.items()} for level in opt.hyperparameters(group)]


def same(problem, other):
    return all(torch.equal(p, q) for p, q in zip(problem.model.parameters(), other.model.parameters(), strict=True))
