"""What a tower learned, as an ordinary optimizer and an ordinary schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from hyperopt_ext import _C, levels
from hyperopt_ext.stack import Level
from hyperopt_ext.update import check_no_module
from hyperopt_ext.wrap import Wrap

if TYPE_CHECKING:
    from hyperopt_ext.optimizer import HyperOptimizer
    from hyperopt_ext.recorder import Recorder

# The torch.optim class of each level, with what it needs to be the same method.
_TORCH: dict[type[Level], tuple[type[Optimizer], dict[str, Any]]] = {
    levels.SGD: (torch.optim.SGD, {}),
    levels.Adam: (torch.optim.Adam, {}),
    levels.AdamW: (torch.optim.AdamW, {}),
    levels.AMSGrad: (torch.optim.Adam, {"amsgrad": True}),
    levels.NAdam: (torch.optim.NAdam, {}),
    levels.Adagrad: (torch.optim.Adagrad, {}),
    levels.Adadelta: (torch.optim.Adadelta, {}),
    levels.RMSprop: (torch.optim.RMSprop, {}),
}


class Schedule:
    """A recorded schedule, for ``LambdaLR``: what lr is multiplied by in each epoch (call) from 0.

    The last factor holds for all that come after. A plain object, so that ``LambdaLR.state_dict()`` saves it.
    """

    def __init__(self, factors: Sequence[float], every: int = 1) -> None:
        self.factors = list(factors)
        self.every = every

    def __call__(self, epoch: int) -> float:
        return self.factors[min(epoch // self.every, len(self.factors) - 1)]


def export(
    opt: HyperOptimizer,
    recorder: Recorder | None = None,
    *,
    values: str = "final",
    schedule: bool = True,
    params: Iterable[Any] | None = None,
) -> tuple[Optimizer, LambdaLR]:
    """See :meth:`HyperOptimizer.export`."""
    if values not in ("final", "mean"):
        raise ValueError(f"export: values is {values!r}, but they are 'final' or 'mean'")
    if values == "mean" and recorder is None:
        raise ValueError("export: a mean needs what was recorded; pass a Recorder of this optimizer")
    if recorder is not None and getattr(recorder, "opt", None) is not opt:
        raise ValueError("export: recorder must be a Recorder of this optimizer")
    if recorder is not None and len(recorder) == 0:
        raise ValueError("export: nothing was recorded; make a step first, or export without the recorder")
    capped = any(group["stack"][0].trust is not None for group in opt.param_groups)
    if capped and not any(bool(group["tower"][:, _C.TICKS].any()) for group in opt.param_groups):
        raise ValueError("export: what a level with trust starts from shows in its first step; make one first")
    makes = {_target(group["stack"][0]) for group in opt.param_groups}
    if len(makes) > 1:
        raise TypeError("export: the param groups have different methods; no single torch.optim optimizer has them all")
    make, _ = makes.pop()

    lists = _param_lists(opt, params)
    groups, factors, starts = [], [], []
    for i, (group, tensors) in enumerate(zip(opt.param_groups, lists, strict=True)):
        level: Level = group["stack"][0]
        record = None if recorder is None else recorder.in_use(recorder.number_of(group["tower"]))
        own = level.granularity == "tensor"
        for j, part in enumerate([[p] for p in tensors] if own else [tensors]):
            curves = None if record is None else {k: v[:, j] if own else v for k, v in record.items()}
            final = {k: v[j] if v.dim() else v for k, v in opt.in_use(i)[0].items()}
            arguments, factor = _arguments(level, group, final, curves, values, schedule)
            groups.append({"params": part, **arguments})
            starts.append(level.start())
            factors.append(Schedule(factor, recorder.every if recorder is not None else 1))
    optimizer = make(groups)
    for made, start in zip(optimizer.param_groups, starts, strict=True):
        for p in made["params"]:
            for name in start.keys() & optimizer.state.get(p, {}).keys():  # Adagrad's sum starts as for the first group
                optimizer.state[p][name].fill_(start[name])
    return optimizer, LambdaLR(optimizer, factors)  # type: ignore[arg-type]


def _target(level: Level) -> tuple[Callable[..., Optimizer], str]:
    if isinstance(level, Wrap):
        return level.optimizer, str(level)
    if type(level) not in _TORCH:
        known = ", ".join(spec.__name__ for spec in _TORCH)
        raise TypeError(f"export: torch.optim has no {level}; it has what {known} are")
    if getattr(level, "eps_root", 0.0) != 0.0 or any(level.initial_state.values()):
        raise TypeError(f"export: {level!r} has an eps_root, or an initial_state, which no torch.optim optimizer has")
    return _TORCH[type(level)][0], type(level).__name__


def _param_lists(opt: HyperOptimizer, params: Iterable[Any] | None) -> list[list[Tensor]]:
    own = [list(group["params"]) for group in opt.param_groups]
    check_no_module(params)
    if params is None:
        return own

    def unnamed(entries: Iterable[Any]) -> list[Any]:
        return [entry[1] if isinstance(entry, tuple) and isinstance(entry[0], str) else entry for entry in entries]

    given = unnamed(params)
    if given and isinstance(given[0], Tensor):
        given = [given]
    lists = [unnamed(entry["params"] if isinstance(entry, dict) else entry) for entry in given]
    if [len(entry) for entry in lists] != [len(entry) for entry in own]:
        raise ValueError(
            f"export: params has groups of {[len(entry) for entry in lists]} tensors, but the optimizer's are of "
            f"{[len(entry) for entry in own]}"
        )
    return lists


def _arguments(
    level: Level,
    group: dict[str, Any],
    final: dict[str, Tensor],
    curves: dict[str, Tensor] | None,
    values: str,
    schedule: bool,
) -> tuple[dict[str, Any], list[float]]:
    """The arguments of the torch.optim class for one group, and the factors of its lr."""
    chosen: dict[str, Any] = {name: value.item() for name, value in final.items()}
    if curves is not None and values == "mean":
        chosen = {name: curve.mean().item() for name, curve in curves.items()}
    factors = [1.0]
    if curves is not None and schedule:
        chosen["lr"] = curves["lr"].max().item()
        factors = (curves["lr"] / chosen["lr"]).tolist() if chosen["lr"] > 0 else [0.0]
    if "beta1" in chosen:
        chosen["betas"] = (chosen.pop("beta1"), chosen.pop("beta2"))
    chosen.pop("eps_root", None)
    if isinstance(level, Wrap):
        if not level.has_weight_decay():
            chosen.pop("weight_decay")
        return {**level.own, **chosen, **({"maximize": True} if group["maximize"] else {})}, factors
    structure = {name: getattr(level, name) for name in level.structural()}
    if isinstance(level, levels.Adagrad):
        structure["initial_accumulator_value"] = level.initial_accumulator_value
    return {**chosen, **structure, **_TORCH[type(level)][1], "maximize": group["maximize"]}, factors
