"""Whether an optimizer can go on from a state dict: all that is checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hyperopt_ext import distributed
from hyperopt_ext.stack import is_number
from hyperopt_ext.update import Group, check_policy


def check_mapping(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be what state_dict() gave, not {type(state_dict).__name__}")


def check_state_dict(state_dict: Mapping[str, Any], groups: list[Group], params: list[list[Tensor]]) -> None:
    """``params``, by group, are those that the state dict is of: with ZeRO, of all processes."""
    saved_groups = state_dict.get("param_groups", [])
    if not isinstance(saved_groups, list | tuple) or not all(isinstance(saved, Mapping) for saved in saved_groups):
        raise ValueError("state_dict: 'param_groups' must be a list of dicts, as state_dict() gave it")
    if len(saved_groups) != len(groups):
        raise ValueError(f"state_dict has {len(saved_groups)} param groups, but this optimizer has {len(groups)}")
    if not isinstance(state_dict.get("state"), Mapping):
        raise ValueError("state_dict has no dict 'state': it is a part of what state_dict() gave")
    for i, (saved, group, own) in enumerate(zip(saved_groups, groups, params, strict=True)):
        _check_group(i, saved, group, own, state_dict["state"])


def _check_dense(what: str, value: Tensor, own: Tensor) -> None:
    """Whether numbers can be copied from it."""
    if value.layout != torch.strided:
        raise ValueError(f"state_dict: {what} is {value.layout}, but must be dense")
    if value.is_meta and not own.is_meta:
        raise ValueError(f"state_dict: {what} is on the device meta, which holds no numbers")


def _check_group(i: int, saved: dict[str, Any], group: Group, params: list[Tensor], state: Mapping[Any, Any]) -> None:
    ours = group.stack.structure()
    if "stack" not in saved:
        raise ValueError("state_dict is not that of a HyperOptimizer: its param groups name no stack")
    for name in ("params", "maximize", "nonfinite"):
        if name not in saved:
            raise ValueError(f"state_dict: param group {i} has no {name!r}, which state_dict() gave it")
    if saved["stack"] != ours:
        raise ValueError(
            f"state_dict: param group {i} is of the stack {saved['stack']!r}, but this optimizer's is {ours!r} "
            "(traced: with a horizon of more than one step)"
        )
    if not isinstance(saved["params"], list | tuple):
        raise ValueError(f"state_dict: 'params' of param group {i} must be a list, not {saved['params']!r}")
    if not isinstance(saved["maximize"], bool):
        raise ValueError(f"state_dict: maximize of param group {i} must be True or False, not {saved['maximize']!r}")
    if len(saved["params"]) != len(params):
        raise ValueError(
            f"state_dict: param group {i} has {len(saved['params'])} parameters, but this optimizer's has {len(params)}"
        )
    shape, expected = getattr(saved.get("tower"), "shape", None), group.tower.shape
    if shape != expected:
        found = "no tower" if shape is None else f"a tower of the shape {tuple(shape)}"
        raise ValueError(f"state_dict: param group {i} has {found}, but this optimizer needs {tuple(expected)}")
    _check_dense(f"the tower of param group {i}", saved["tower"], group.tower)
    group.edited(saved)
    check_policy(saved["nonfinite"])
    initial = saved.get("initial_lr", 1.0)
    if not is_number(initial) and not (isinstance(initial, Tensor) and initial.numel() == 1):
        raise ValueError(f"state_dict: initial_lr of param group {i} must be a number, not {initial!r}")
    if group.scales_lr() and not bool(initial > 0):
        raise ValueError(f"state_dict: initial_lr of param group {i} must be greater than 0, not {float(initial)}")
    inner = saved.get("optimizer")
    if "optimizer" in group.group and not (isinstance(inner, Mapping) and {"state", "param_groups"} <= inner.keys()):
        raise ValueError(f"state_dict: param group {i} has no state dict of its {group.stack[0]}")
    for j, (key, p) in enumerate(zip(saved["params"], params, strict=True)):
        _check_param_state(f"parameter {j} of group {i}", state.get(key, {}), p, group.state_names())


def _check_param_state(of: str, state: Any, p: Tensor, names: list[str]) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"state_dict: the state of {of} must be a dict of tensors")
    if not any(name in state for name in names):  # there may be entries of others
        return
    for name in names:
        value = state.get(name)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"state_dict: the state of {of} must have a tensor {name!r}, as {', '.join(names)}; it holds "
                f"{', '.join(state)}"
            )
        shape = () if name in ("step", "tick") else p.shape
        if value.shape != shape:
            raise ValueError(
                f"state_dict: {name} of {of} has the shape {tuple(value.shape)}, but the parameter needs {tuple(shape)}"
            )
        _check_dense(f"{name} of {of}", value, p)
        if name not in ("step", "tick"):
            distributed.check_layout(f"state_dict: {name} of {of}", value, p)
