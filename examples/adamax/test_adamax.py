"""All that hyperopt_ext tests of its own rules."""

import torch
from hyperopt_adamax import Adamax

from hyperopt_ext.testing import check_rule, larger


def adamax(w, g, s, h, step):
    """One step in torch ops."""
    g = g + h["weight_decay"] * w
    m = h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g
    u = larger(h["beta2"] * s["exp_inf"], g.abs() + h["eps"])
    return w - h["lr"] / (1 - h["beta1"] ** step) * m / u, {"exp_avg": m, "exp_inf": u}


def test_adamax():
    check_rule(
        Adamax,
        twin=adamax,
        published=torch.optim.Adamax,
        options=[
            {},
            {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.2},
            {"lr": 0.1, "betas": (0.0, 0.9)},
            {"lr": 0.01, "betas": (0.9, 0.0), "eps": 0.1},
        ],
        hyper={"lr": 0.1, "beta1": 0.6, "beta2": 0.8, "eps": 1e-2, "weight_decay": 0.3},
    )
