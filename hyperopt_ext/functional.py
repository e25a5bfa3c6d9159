"""One step of a rule as a function that autograd can differentiate with respect to the hyperparameters.

This is the method in the form of the paper: the step is part of the graph, and ``loss.backward()`` in the next
iteration leaves the hypergradient in ``hyper["lr"].grad``. Its detach points are the paper's: parameters, gradients and
state count as constants, one step back and no further. :class:`hyperopt_ext.HyperOptimizer` computes the same numbers
without a graph.

There is one function for each class of levels, by its name in lower case: ``adam``, ``sgd``, ``rmsprop``, ...; ``of``
makes that of a class of your own.

    >>> w, lr = torch.ones(3), torch.tensor(0.1, requires_grad=True)
    >>> [w1], _ = hx.functional.sgd([w], [w], None, {"lr": lr}, torch.tensor(1))
    >>> (w1**2).sum().backward()
    >>> lr.grad
    tensor(-5.4000)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hyperopt_ext import levels
from hyperopt_ext.stack import RULES, Level

State = dict[str, list[Tensor]]


_DOC = """One step of {name}, as :class:`{name}` makes it.

Args:
    params: n dense tensors, fp32, fp64, fp16 or bf16.
    grads: their gradients, of the same shapes and dtypes.
    state: for each state tensor of the method, n tensors of the parameters' shapes, fp64 for fp64 parameters and fp32
        else. ``None`` stands for zeros.
    hyper: the hyperparameters of the method by name (``lr``, ``beta1``, ...), as floating-point tensors of one number;
        what is not named is at its default.
    step: the number of this step, from 1, a tensor of one number.
    detach: parameters, gradients and state count as constants, as in the paper, and a backward reaches the
        hyperparameters alone. ``False``: the step is differentiable with respect to all that it reads, so that several
        can be unrolled. A second derivative is an error in both cases. Default: True.
{structure}
Returns:
    The new parameters, differentiable with respect to ``hyper``, and the new state, which is not, unless ``detach`` is
    False.

Raises:
    TypeError: a hyperparameter or ``step`` is not a tensor.
    ValueError: an unknown hyperparameter or state, or tensors that do not match.
"""


def of(spec: type[Level]) -> Callable[..., tuple[list[Tensor], State]]:
    """The function of a class of levels, as of a rule from outside: ``hx.functional.of(hx.Adam)`` is ``adam``."""
    known, function = spec.structural(), spec.__name__.lower()

    def update(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Mapping[str, Sequence[Tensor]] | None,
        hyper: Mapping[str, Tensor],
        step: Tensor,
        detach: bool = True,
        **structure: bool,
    ) -> tuple[list[Tensor], State]:
        for name in structure:
            if name not in known:
                raise TypeError(f"{function} has no argument {name!r}")
        return _update(spec.rule_for(list(hyper), **structure), params, grads, state, hyper, step, detach)

    arguments = f"    {', '.join(known)}: the variant of the method, as there.\n" if known else ""
    if spec.optional:
        arguments += f"\nThere is {', '.join(spec.optional)} if ``hyper`` names it.\n"
    update.__name__ = update.__qualname__ = function
    update.__doc__ = _DOC.format(name=spec.__name__, structure=arguments)
    return update


_METHODS = {spec.__name__.lower(): of(spec) for spec in levels.methods()}
globals().update(_METHODS)


def __getattr__(name: str) -> Callable[..., tuple[list[Tensor], State]]:
    raise AttributeError(f"hyperopt_ext.functional has no {name!r}; it has {', '.join(_METHODS)}")


def _update(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Mapping[str, Sequence[Tensor]] | None,
    hyper: Mapping[str, Tensor],
    step: Tensor,
    detach: bool,
) -> tuple[list[Tensor], State]:
    slots, known = RULES[rule]["state"], RULES[rule]["hypers"]
    for argument, tensors in [("params", params), ("grads", grads)]:
        if isinstance(tensors, Tensor) or not all(isinstance(t, Tensor) for t in tensors):
            raise TypeError(f"{argument} must be a list of tensors")
    params = list(params)
    if state is None:
        state = {name: [_zeros(p) for p in params] for name in slots}
    if sorted(state) != sorted(slots):
        raise ValueError(
            f"state must hold {', '.join(slots) or 'nothing'} for {rule}, not {', '.join(state) or 'nothing'}"
        )
    names = [h["name"] for h in known]
    for name, value in {**hyper, "step": step}.items():
        if name not in [*names, "step"]:
            raise ValueError(f"hyper names {name!r}, but {rule} has {', '.join(names)}")
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor of one number, as torch.tensor({value!r}), not {value!r}")
    values = [
        hyper[h["name"]] if h["name"] in hyper else step.new_tensor(h["initial"], dtype=torch.float64) for h in known
    ]
    op = getattr(torch.ops.hyperopt_ext, rule).default
    outputs = op(params, list(grads), [t for name in slots for t in state[name]], values, step, detach)
    n = len(params)
    return outputs[:n], {name: outputs[n * (k + 1) : n * (k + 2)] for k, name in enumerate(slots)}


def _zeros(p: Tensor) -> Tensor:
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return torch.zeros_like(p, dtype=dtype, requires_grad=False)
