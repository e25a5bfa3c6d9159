"""Parameters that several processes share out: whose sums count, and the one all-reduce of a step that adds them up."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def is_dtensor(t: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # a heavy import, not needed where there is none
    return module is not None and isinstance(t, module.DTensor)


def local(t: Any) -> Tensor:
    """What this process holds of a tensor."""
    part: Tensor = t.to_local() if is_dtensor(t) else t
    return part


def local_grad(p: Any, name: str) -> Tensor:
    """The gradient of what this process holds of ``p``, summed where autograd left the sum pending."""
    grad: Any = p.grad
    if is_dtensor(grad) != is_dtensor(p):
        kinds = ("a plain tensor", "a DTensor")
        raise ValueError(
            f"{name} is {kinds[is_dtensor(p)]}, but its gradient is {kinds[is_dtensor(grad)]}; "
            "give the gradient the layout of the parameter (distribute_tensor, or full_tensor)"
        )
    if is_dtensor(grad):
        if grad.device_mesh != p.device_mesh:
            raise ValueError(f"{name} is on {p.device_mesh}, but its gradient is on {grad.device_mesh}")
        if grad.placements != p.placements:
            grad = grad.redistribute(placements=p.placements)
    return local(grad)


def check_group(group: object) -> None:
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"shard_group must be a ProcessGroup, as torch.distributed.group.WORLD, not {type(group).__name__}"
        )


def device_of(group: ProcessGroup) -> torch.device:
    """Where a process without parameters has what the group adds up: on the accelerator, if both have one."""
    kinds = [device.type for device in group._device_types if device.type != "cpu"]
    if not kinds or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(kinds[0], torch.accelerator.current_device_index())


def check_layout(name: str, value: Tensor, p: Any) -> None:
    """Raises unless a saved tensor of the parameter's shape is shared out as the parameter is."""

    def layout(t: Any) -> str:
        return f"a DTensor {t.placements} on {t.device_mesh}" if is_dtensor(t) else "a plain tensor"

    if layout(value) != layout(p):
        raise ValueError(
            f"{name} is {layout(value)}, but the parameter is {layout(p)}; torch.distributed.checkpoint and its "
            "set_optimizer_state_dict() load it in any layout"
        )


class Reduction:
    """The sums of a step over all processes that share the parameters out.

    A DTensor adds what it has on each process of its mesh, but once where it is replicated: on the first of those that
    hold the same piece. A plain tensor beside DTensors counts on the first process of their mesh. One all-reduce over
    that mesh, replicated dimensions included, gives all processes the same bits, so that their towers stay the same.

    Args:
        params: all parameters of an optimizer.
        shard_group: processes that hold other parameters, or other parts of them.

    Raises:
        ValueError: the parameters are on meshes that are not parts of one.
        TypeError: a parameter is a pending sum.
    """

    def __init__(self, params: Iterable[Any], shard_group: ProcessGroup | None) -> None:
        self.groups: list[Any] = [] if shard_group is None else [shard_group]
        self._uncounted: set[Tensor] = set()
        params = list(params)
        meshes = list(dict.fromkeys(p.device_mesh for p in params if is_dtensor(p)))
        if meshes:
            whole = _smallest_common(meshes)
            self.groups.insert(0, _group_of(whole))
            self._uncounted.update(p for p in params if not _counts(p, whole))

    @classmethod
    def of(cls, params: Iterable[Tensor], shard_group: ProcessGroup | None) -> Reduction | None:
        """None if every process has all parameters, or there is one process."""
        reduction = cls(params, shard_group)
        return reduction if reduction.groups else None

    def counted(self, params: Sequence[Tensor]) -> list[int]:
        """Which of the parameters count on this process."""
        return [i for i, p in enumerate(params) if p not in self._uncounted]

    def hypergradients(self, sums: list[Tensor]) -> list[Tensor]:
        """Adds up what pass A gave: float64 [rows, 2 hypers + 1] for each param group (csrc/pass.h).

        The last column stays -1, "without parameters in this step", only where it is that on every process.
        """
        present = [s[:, -1:] != -1 for s in sums]
        flagged = [
            torch.cat((s[:, :-1], s[:, -1:].where(p, 0.0), p.to(s.dtype)), 1)
            for s, p in zip(sums, present, strict=True)
        ]
        return [torch.cat((t[:, :-2], t[:, -2:-1].where(t[:, -1:] > 0, -1.0)), 1) for t in self.add_up(flagged)]

    def add_up(self, parts: list[Tensor]) -> list[Tensor]:
        """The sum over the processes of each float64 tensor, all in one buffer."""
        if not parts:
            return parts
        buffer = torch.cat([part.to(parts[0].device).flatten() for part in parts])
        for group in self.groups:
            dist.all_reduce(buffer, group=group)
        totals = torch.split(buffer, [part.numel() for part in parts])
        return [total.view(part.shape).to(part.device) for total, part in zip(totals, parts, strict=True)]


def _ranks(mesh: DeviceMesh) -> list[int]:
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def _root(mesh: DeviceMesh) -> DeviceMesh:
    return mesh._get_root_mesh()


def _smallest_common(meshes: list[DeviceMesh]) -> DeviceMesh:
    """The mesh of which all others are parts: one of them, or a slice of the one that they are slices of."""
    whole = max(meshes, key=lambda mesh: mesh.size())
    root = _root(whole)
    names = {name for mesh in meshes for name in mesh.mesh_dim_names or ()}
    own = root.mesh_dim_names or ()
    if not all(set(_ranks(mesh)) <= set(_ranks(whole)) for mesh in meshes) and names <= set(own):
        whole = root[tuple(name for name in own if name in names)]
    for mesh in meshes:
        same = _ranks(mesh) == _ranks(whole)
        part = set(_ranks(mesh)) <= set(_ranks(whole)) and _root(mesh) == root
        if not same and not part:
            raise ValueError(
                f"params are on {mesh} and on {whole}, which are not parts of one mesh; slice them from one "
                "init_device_mesh(), or use one optimizer a mesh"
            )
    return whole


def _group_of(mesh: DeviceMesh) -> ProcessGroup:
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size() and dist.group.WORLD is not None:
        return dist.group.WORLD
    return mesh._flatten().get_group()


def _counts(p: Any, whole: DeviceMesh) -> bool:
    """Whether this process is the first of those that hold what it holds of ``p``."""
    first = _ranks(whole)[0]
    if not is_dtensor(p):
        return dist.get_rank() == first
    if any(placement.is_partial() for placement in p.placements):
        raise TypeError(f"params: a DTensor {p.placements} is a pending sum, which no optimizer can update")
    coordinate = p.device_mesh.get_coordinate()
    return (
        coordinate is not None
        and first in _ranks(p.device_mesh)
        and all(i == 0 for i, placement in zip(coordinate, p.placements, strict=True) if placement.is_replicate())
    )
