"""ZeRO, stage 1: each process keeps the optimizer state of some of the parameters."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.optim
from torch import Tensor

from hyperopt_ext.optimizer import HyperOptimizer
from hyperopt_ext.stack import Level, Stack
from hyperopt_ext.state_dict import check_mapping, check_state_dict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ZeroRedundancyOptimizer(torch.distributed.optim.ZeroRedundancyOptimizer):
    """torch's ``ZeroRedundancyOptimizer`` (Rajbhandari et al., "ZeRO", SC 2020) around :class:`HyperOptimizer`.

    Each process updates its share of the parameters and sends them to the others; hypergradients are summed over all
    shares, so that all processes have the same towers. :meth:`consolidate_state_dict` and the state dict do not depend
    on the number of processes.

    ``opt.optim`` is this process's :class:`HyperOptimizer`, of its share of the parameters, for ``opt.optim.in_use()``,
    ``hx.Recorder(opt.optim)``, ``hx.summary(opt.optim)``. To export all of the model, load the consolidated state dict
    into a :class:`HyperOptimizer` of all parameters.

    Args:
        params: as in torch: parameters or param groups, all of one dtype, the same on all processes.
        stack: as in :class:`HyperOptimizer`, as are ``maximize`` and ``nonfinite``; with ``granularity="group"``.
        process_group: the processes that share the state. Default: all.
        parameters_as_bucket_view: as in torch. Default: False.

    Raises:
        TypeError: the first level wraps another optimizer.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        stack: Level | Stack,
        *,
        process_group: ProcessGroup | None = None,
        parameters_as_bucket_view: bool = False,
        maximize: bool = False,
        nonfinite: str | None = None,
    ) -> None:
        group = dist.group.WORLD if process_group is None else process_group
        super().__init__(
            params,
            partial(HyperOptimizer, shard_group=group),  # type: ignore[arg-type]
            process_group=group,
            parameters_as_bucket_view=parameters_as_bucket_view,
            stack=Stack.coerce(stack),
            maximize=maximize,
            nonfinite=nonfinite,
        )
        for own in self.optim.param_groups:
            self._check_level(own["stack"])

    @staticmethod
    def _check_level(stack: Level | Stack) -> None:
        level = Stack.coerce(stack)[0]
        if level.first_only:
            raise TypeError(f"ZeroRedundancyOptimizer: {level!r} keeps a state of its own, which could not be gathered")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As in torch.optim. A scheduler finds an lr of its own, as in :class:`HyperOptimizer`."""
        groups: list[dict[str, Any]] = self.__dict__["param_groups"]
        inner = self.optim.param_groups if hasattr(self, "optim") else []
        if len(inner) != len(groups):  # while torch's class makes or adds them
            return groups
        if any("initial_lr" in ours and "initial_lr" not in own for ours, own in zip(groups, inner, strict=True)):
            self._sync_param_groups(groups, inner)  # type: ignore[attr-defined]
            self._sync_param_groups(self.optim.param_groups, groups)  # type: ignore[attr-defined]  # with lrs of their own
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in :class:`HyperOptimizer`; on all processes."""
        if isinstance(param_group, dict) and "stack" in param_group:
            self._check_level(param_group["stack"])
        groups = self.__dict__["param_groups"]
        before = len(groups)
        try:
            super().add_param_group(param_group)
        except Exception:
            del groups[before:]
            raise
        if hasattr(self, "optim"):
            self._sync_param_groups(self.optim.param_groups, groups)  # type: ignore[attr-defined]

    def hyperparameters(self, group: int = 0) -> list[dict[str, Tensor]]:
        """As in :class:`HyperOptimizer`; the same on all processes."""
        hyperparameters: list[dict[str, Tensor]] = self.optim.hyperparameters(group)
        return hyperparameters

    def state_dict(self) -> dict[str, Any]:
        """That of a :class:`HyperOptimizer` of all parameters, where :meth:`consolidate_state_dict` has brought it."""
        state_dict: dict[str, Any] = super().state_dict()
        for group in state_dict["param_groups"]:
            group["stack"] = group["stack"].structure()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes this process's share of a consolidated state dict, or of that of a :class:`HyperOptimizer`.

        Raises:
            ValueError: the state dict is of another stack, or of parameters of other shapes. Nothing is changed then on
                any process.
            TypeError: it is no dict.
        """
        check_mapping(state_dict)
        groups, saved = self.param_groups, state_dict.get("param_groups", [])
        inner = self.optim._groups
        check_state_dict(state_dict, inner, [group["params"] for group in groups])  # what others take, too
        key_of = {
            p: key
            for ours, theirs in zip(groups, saved, strict=True)
            for p, key in zip(ours["params"], theirs["params"], strict=True)
        }
        own = [
            {**theirs, "params": [key_of[p] for p in mine["params"]]}
            for mine, theirs in zip(self.optim.param_groups, saved, strict=True)
        ]
        state = {key: state_dict["state"][key] for g in own for key in g["params"] if key in state_dict["state"]}
        self.optim.load_state_dict({"state": state, "param_groups": own})
        self._sync_param_groups(self.optim.param_groups, groups)  # type: ignore[attr-defined]
