"""What a tower learned, step by step: recorded without waiting, and shown as curves, scalars and one line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from hyperopt_ext.optimizer import HyperOptimizer
from hyperopt_ext.stack import Stack
from hyperopt_ext.update import is_capturing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

# What is allocated at once: so many records, but no more than so many numbers.
_CHUNK, _CHUNK_NUMBERS = 1024, 2**20
_IN_USE = " in use"
_STATE = ("calls", "every", "written", "stacks", "records")  # of a state dict


class _Track:
    """The columns of a group's tower that are recorded, in chunks on the tower's device."""

    def __init__(self, opt: HyperOptimizer, group: int) -> None:
        self.stack: Stack = opt.param_groups[group]["stack"]
        self.group = opt.param_groups[group]
        self.fields: list[tuple[str, int, str, bool]] = []  # kind, level, name, one for each tensor
        columns = []
        for kind, levels in (("learned", opt.hyperparameters(group)), ("used", opt.in_use(group)[:1])):
            for k, (level, values) in enumerate(zip(self.stack, levels, strict=False)):
                for name, view in values.items():
                    self.fields.append((kind, k, name, level.granularity == "tensor"))
                    columns.append(view.storage_offset())
        self.columns = torch.tensor(columns, device=self.tower.device)
        self.chunks: list[Tensor] = []
        self.free: list[Tensor] = []

    @property
    def tower(self) -> Tensor:
        """The present one: what moves an optimizer puts another in its place."""
        tower: Tensor = self.group["tower"]
        return tower

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def record(self) -> None:
        if is_capturing(self.tower):
            raise RuntimeError(
                "Recorder: a CUDA graph would write each record to the same place; use hook=False, and call record() "
                "after each replay"
            )
        if not self.free:
            rows, columns = self.tower.size(0), self.columns.numel()
            records = max(1, min(_CHUNK, _CHUNK_NUMBERS // (rows * columns)))
            self.chunks.append(self.tower.new_empty((records, rows, columns)))
            self.free = list(self.chunks[-1].unbind())[::-1]
        torch.index_select(self.tower, 1, self.columns, out=self.free.pop())

    def records(self) -> Tensor:
        """All of them, on the CPU, in memory of their own: float64 [records, rows of the tower, columns]."""
        chunks = [chunk[: len(chunk) - (len(self.free) if chunk is self.chunks[-1] else 0)] for chunk in self.chunks]
        return torch.cat([self.tower.new_empty((0, self.tower.size(0), self.columns.numel())), *chunks]).cpu()

    def check(self, records: object, stack: object, count: int) -> None:
        shape = (count, self.tower.size(0), self.columns.numel())
        if stack != self.stack.structure():
            raise ValueError(f"state_dict is of the stack {stack!r}, but here it is {self.stack.structure()!r}")
        if not isinstance(records, Tensor) or records.shape != shape or records.dtype != torch.float64:
            raise ValueError(f"state_dict must have float64 records of the shape {shape}")

    def read(self, kind: str) -> list[dict[str, Tensor]]:
        every = self.records()
        levels: list[dict[str, Tensor]] = [{} for _ in range(1 + max(k for _, k, _, _ in self.fields))]
        for i, (of, k, name, own) in enumerate(self.fields):
            if of == kind:
                levels[k][name] = every[:, :, i] if own else every[:, 0, i]
        return [level for level in levels if level]


def _not_compiling() -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError("Recorder: a compiled step cannot be recorded; use hook=False, call record() after it")


def _check_optimizer(me: str, opt: object) -> None:
    if isinstance(opt, HyperOptimizer):
        return
    # ZeRO's, Accelerate's
    inside = [name for name in ("optim", "optimizer") if isinstance(getattr(opt, name, None), HyperOptimizer)]
    hint = f"; it has one in .{inside[0]}" if inside else ""
    raise TypeError(f"{me}: opt must be a HyperOptimizer, not {type(opt).__name__}{hint}")


class Recorder:
    """Keeps the hyperparameters of a :class:`HyperOptimizer` after each step.

    ``recorder = hx.Recorder(opt)`` before the training is all: it is called after each ``opt.step()``, and copies, by
    one small operator a param group, what it keeps to a buffer on the device of the parameters. Nothing waits for a
    value until it is read. The buffer grows by 8 bytes a record for each hyperparameter of each level (and once more
    for those of the first level; of a level for each tensor, times the tensors).

    Args:
        opt: the optimizer, with all of its param groups. They keep the numbers that they have now, should some be
            taken out.
        every: records the first step and every so many after it, > 0. Default: 1.
        hook: is called by each ``opt.step()``; False: :meth:`record` is yours to call. Default: True.

    A compiled step cannot be recorded from inside: compile a function that does not hold ``opt.step()``, or pass
    ``hook=False`` and call :meth:`record` after each step.

    Raises:
        TypeError: ``opt`` is no HyperOptimizer.
        ValueError: ``every`` is less than 1.
    """

    def __init__(self, opt: HyperOptimizer, every: int = 1, *, hook: bool = True) -> None:
        _check_optimizer("Recorder", opt)
        number: object = every  # numpy's are integral, too
        if isinstance(number, bool) or not isinstance(number, Integral) or every < 1:
            raise ValueError(f"Recorder: every must be a whole number of steps, at least 1, not {every!r}")
        self.opt, self.every = opt, int(every)
        self._tracks = [_Track(opt, i) for i in range(len(opt.param_groups))]
        self._calls = 0
        self._written = 0
        me = ref(self)  # which holds the optimizer: with the hook a cycle, that only the garbage collector would break

        def record(opt: HyperOptimizer, *_: object) -> None:
            _not_compiling()
            if (recorder := me()) is not None and not opt._rehearses:
                recorder.record()

        self._handle = opt.register_step_post_hook(record) if hook else None

    def record(self) -> None:
        """Records the present values; what the optimizer calls after each step."""
        _not_compiling()
        self._calls += 1
        if (self._calls - 1) % self.every == 0:
            for track in self._tracks:
                track.record()

    def __getstate__(self) -> dict[str, object]:
        raise TypeError("a Recorder cannot be copied or pickled; use state_dict(), and make one of the new optimizer")

    def state_dict(self) -> dict[str, Any]:
        """All that was recorded, as tensors and plain values, for the checkpoint of the run. Waits for the device."""
        records = [track.records() for track in self._tracks]
        values = [self._calls, self.every, self._written, [track.stack.structure() for track in self._tracks], records]
        return dict(zip(_STATE, values, strict=True))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from what another one recorded, in the place of what this one did.

        Raises:
            ValueError: it is no Recorder's, or that of one with other stacks, tensors, or another ``every``. Nothing is
                changed then.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) != set(_STATE):
            raise ValueError("state_dict must be what Recorder.state_dict() gave")
        calls, every, written, stacks, records = (state_dict[name] for name in _STATE)
        if every != self.every:
            raise ValueError(f"state_dict is of a Recorder with every={every!r}, but here it is {self.every}")
        if not all(isinstance(number, int) and number >= 0 for number in (calls, written)):
            raise ValueError(f"state_dict must have whole numbers of calls and written, not {calls!r}, {written!r}")
        if not len(stacks) == len(records) == len(self._tracks):
            raise ValueError(f"state_dict has {len(records)} param groups, but this Recorder has {len(self._tracks)}")
        for track, own, stack in zip(self._tracks, records, stacks, strict=True):
            track.check(own, stack, -(-calls // every))
        for track, own in zip(self._tracks, records, strict=True):
            track.chunks, track.free = [own.to(track.tower.device, copy=True)], []
        self._calls, self._written = calls, written

    def _track(self, group: int) -> _Track:
        if not -len(self._tracks) <= group < len(self._tracks):
            raise IndexError(
                f"group is {group}, but {len(self._tracks)} param groups are recorded, those that the optimizer had "
                "when the Recorder was made"
            )
        return self._tracks[group]

    def close(self) -> None:
        """Records no more. What was recorded stays."""
        if self._handle is not None:
            self._handle.remove()

    def __len__(self) -> int:
        """The number of records."""
        return -(-self._calls // self.every)

    @property
    def steps(self) -> Tensor:
        """The step of each record, from 1: int64 [records]."""
        return torch.arange(len(self), device="cpu") * self.every + 1

    def hyperparameters(self, group: int = 0) -> list[dict[str, Tensor]]:
        """What :meth:`HyperOptimizer.hyperparameters` gave after each step, on the CPU.

        Float64 [records], or, of a level with ``granularity="tensor"``, [records, parameters].
        """
        return self._track(group).read("learned")

    def in_use(self, group: int = 0) -> dict[str, Tensor]:
        """The values of the first level that each step was made with, as :meth:`HyperOptimizer.in_use`."""
        return self._track(group).read("used")[0]

    def number_of(self, tower: Tensor) -> int:
        """The number of the param group of this ``tower``, by which it is known here."""
        for i, track in enumerate(self._tracks):
            if track.tower is tower:
                return i
        raise ValueError("a param group was not recorded: it was added after the Recorder was made")

    def curves(self) -> dict[str, Tensor]:
        """All that was learned, or changed otherwise, by name: float64 [records] or [records, parameters].

        The names are ``"lr"`` of the first level, ``"1/SGD/lr"`` of the second, and so on, with ``"group 0/"`` in front
        if there are several param groups; ``"lr in use"`` where that is another value than the learned one.
        """
        result = {}
        for i in range(len(self._tracks)):
            prefix = f"group {i}/" if len(self._tracks) > 1 else ""
            stack = self._tracks[i].stack
            levels, used = self.hyperparameters(i), self.in_use(i)
            for k, (level, values) in enumerate(zip(stack, levels, strict=True)):
                place = prefix + (f"{k}/{level}/" if k > 0 else "")
                for name, curve in values.items():
                    learned = k + 1 < len(stack) and name in level.learn_names
                    if learned or bool((curve != curve[:1]).any()):
                        result[place + name] = curve
                    if k == 0 and not torch.equal(curve, used[name]):
                        result[place + name + _IN_USE] = used[name]
        return result

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """All curves over the steps, as a ``matplotlib`` figure, saved if there is a ``path``.

        One panel for each hyperparameter; the value in use, where it is another one, is the dashed line.

        Where each tensor has values of its own: their median, and the range from the 10th to the 90th percentile.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        panels: dict[str, dict[str, Tensor]] = {}
        for name, curve in self.curves().items():
            panels.setdefault(name.removesuffix(_IN_USE), {})[name] = curve
        columns = min(3, max(1, len(panels)))
        rows = max(1, -(-len(panels) // columns))
        figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        if not panels:
            figure.text(0.5, 0.5, "nothing was learned or changed", ha="center", va="center")
        x = self.steps.numpy()
        for i, (title, curves) in enumerate(panels.items()):
            axes = figure.add_subplot(rows, columns, i + 1)
            for name, curve in curves.items():
                middle, used = curve, name.endswith(_IN_USE)
                if curve.dim() > 1:
                    low, middle, high = curve.quantile(curve.new_tensor([0.1, 0.5, 0.9]), dim=1)
                    axes.fill_between(x, low.numpy(), high.numpy(), alpha=0.2, linewidth=0)
                axes.plot(
                    x, middle.numpy(), "--" if used else "-", linewidth=1.2, label="in use" if used else "learned"
                )
            points = torch.cat([curve.flatten() for curve in curves.values()])
            least, most = points.aminmax() if len(points) else (0, 0)
            if 0 < least < most / 10:
                axes.set_yscale("log")
            if len(curves) > 1:
                axes.legend(fontsize=8)
            axes.set_title(title, fontsize=10, loc="right")
            axes.set_xlabel("step", fontsize=9)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def write_scalars(self, writer: SummaryWriter, prefix: str = "hyperparameters/") -> None:
        """Adds what was recorded since the last call to TensorBoard, under the names of :meth:`curves`.

        Where each tensor has values of its own: ``.../median``, ``.../min`` and ``.../max``.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar``.
            prefix: of each tag. Default: ``"hyperparameters/"``.

        Raises:
            TypeError: ``writer`` has no ``add_scalar``.
        """
        if not hasattr(writer, "add_scalar"):
            raise TypeError(f"write_scalars: writer must be a SummaryWriter, as SummaryWriter('runs'), not {writer!r}")
        if len(self) == self._written:
            return
        steps = self.steps[self._written :].tolist()
        for name, whole in self.curves().items():
            tag, curve = prefix + name, whole[self._written :]
            curves = {tag: curve}
            if curve.dim() > 1:
                of = {"median": curve.quantile(0.5, dim=1), "min": curve.amin(1), "max": curve.amax(1)}
                curves = {f"{tag}/{kind}": values for kind, values in of.items()}
            for key, values in curves.items():
                for step, value in zip(steps, values.tolist(), strict=True):
                    writer.add_scalar(key, value, step)
        self._written = len(self)


def summary(opt: HyperOptimizer, group: int = 0) -> dict[str, str]:
    """The learned hyperparameters in short, lowest level first, for ``bar.set_postfix(hx.summary(opt))``.

    ``{"lr": "0.0031", "beta1": "0.91"}``; a second level's are ``"1/lr"``, and so on. Of a level with a value for each
    tensor: the smallest and the largest. Reads all values at once, which waits for the device: not at every step.
    """
    _check_optimizer("summary", opt)
    learned = opt.hyperparameters(group)
    stack = opt.param_groups[group]["stack"]
    names, views = [], []
    for k, (level, values) in enumerate(zip(stack.levels[:-1], learned, strict=False)):
        for name in level.learn_names:
            names.append(name if k == 0 else f"{k}/{name}")
            views.append(torch.stack(values[name].reshape(-1).aminmax()))
    if not names:
        return {}
    return {
        name: f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}"
        for name, (low, high) in zip(names, torch.stack(views).tolist(), strict=True)
    }
