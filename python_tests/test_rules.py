"""Each rule by itself: its operators against the fp64 twin in plain torch, and what torch asks of operators.

The properties are those of ``hyperopt_ext.testing``, which holds them for rules from outside, too.
"""

from __future__ import annotations

import pytest
import torch
from cases import CASES, RULE_CASES
from reference import TWINS

import hyperopt_ext as hx
from hyperopt_ext.stack import RULES
from hyperopt_ext.testing import checks

BUILT_IN = set(RULES)  # before any test loads another one
OPS = torch.ops.hyperopt_ext
every_rule = pytest.mark.parametrize("case", CASES, ids=str)
every_precision = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])

AT_ZERO = [
    pytest.param(case, zeroed, id="-".join([case.rule, *zeroed])) for case in CASES for zeroed in checks.points(case)
]


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize(("case", "zeroed"), AT_ZERO)
def test_hypergradients_equal_autograd(case, zeroed, steps):
    checks.hypergradients_equal_autograd(case, zeroed, steps)


@every_rule
def test_fp32_hypergradients_are_close_to_fp64(case):
    checks.fp32_hypergradients_are_close_to_fp64(case)


@every_rule
@every_precision
def test_functional_form_equals_autograd(case, dtype):
    checks.functional_form_equals_autograd(case, dtype)


@every_rule
def test_functional_form_passes_gradcheck(case):
    checks.functional_form_passes_gradcheck(case)


@every_rule
@every_precision
def test_unrolled_steps_equal_autograd(case, dtype):
    checks.unrolled_steps_equal_autograd(case, dtype)


@every_rule
@pytest.mark.parametrize("detach", [True, False])
def test_second_derivatives_are_an_error_not_a_wrong_number(case, detach):
    checks.second_derivatives_are_an_error(case, detach)


@every_rule
def test_the_step_is_proportional_to_lr(case):
    checks.the_step_is_proportional_to_lr(case)


@every_rule
@pytest.mark.parametrize("learn", ["lr", "all"])
def test_opcheck(case, learn):
    checks.operators_pass_opcheck(case, case.names if learn == "all" else ("lr",))


def test_opcheck_of_the_tower():
    opt = hx.HyperOptimizer([torch.nn.Parameter(torch.ones(2))], hx.Adam() / hx.SGD() / hx.SGD())
    group = opt._groups[0]
    for op, columns in [(OPS.tower_, 11), (OPS.cap_, 3)]:
        sums = torch.ones(1, columns, dtype=torch.float64)
        torch.library.opcheck(op.default, ([group.tower], [sums], [group.plan], [group.bounds], [group.settings]))


@pytest.mark.parametrize(("beta1", "momentum_decay"), [(0.9, 4e-3), (0.999, 1.0), (0.9999, 0.3), (0.99999, 50.0)])
@pytest.mark.parametrize("step", [400, 20_000])
def test_the_product_of_nadam_is_that_of_all_steps(beta1, momentum_decay, step):
    """It is not made of all of them: see csrc/rules/nadam.h."""
    case = RULE_CASES["nadam"]
    values = {**case.hyper, "beta1": beta1, "momentum_decay": momentum_decay}
    results = []
    for name in ("nadam", "twin"):
        h = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in values.items()}
        w, g, m, v = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        if name == "twin":
            new, _ = TWINS["nadam"](w, g, {"exp_avg": m, "exp_avg_sq": v}, h, step)
        else:
            [new], _ = hx.functional.nadam([w], [g], {"exp_avg": [m], "exp_avg_sq": [v]}, h, torch.tensor(step))
        results.append([new.detach(), *torch.autograd.grad(new.sum(), list(h.values()))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


def test_every_rule_is_in_the_table():
    assert BUILT_IN == set(RULE_CASES) == set(TWINS)
    for case in CASES:
        checks.the_case_is_complete(case)
