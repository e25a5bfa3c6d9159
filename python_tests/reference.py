"""The independent truth: every rule in eager torch ops, and a transcription of what goes beyond the paper.

Nothing here knows of csrc. Towers of these rules in the paper's form are ``hyperopt_ext.testing.ReferenceTower``;
``TranscribedTower`` writes out the rest, with the derivative of each update from autograd's forward mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hyperopt_ext.testing import Twin, larger, safe_sqrt
from hyperopt_ext.testing.reference import COORDINATES, State


def sgd(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    return w - h["lr"] * (g + h["weight_decay"] * w), {}


def sgd_momentum(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    buffer = g if step == 1 else h["momentum"] * s["momentum_buffer"] + (1 - h["dampening"]) * g
    return w - h["lr"] * buffer, {"momentum_buffer": buffer}


def sgd_nesterov(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    buffer = g if step == 1 else h["momentum"] * s["momentum_buffer"] + (1 - h["dampening"]) * g
    return w - h["lr"] * (g + h["momentum"] * buffer), {"momentum_buffer": buffer}


def adam(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    m = h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g
    v = h["beta2"] * s["exp_avg_sq"] + (1 - h["beta2"]) * g * g
    m_hat = m / (1 - h["beta1"] ** step)
    v_hat = v / (1 - h["beta2"] ** step)
    return w - h["lr"] * m_hat / (safe_sqrt(v_hat) + h["eps"]), {"exp_avg": m, "exp_avg_sq": v}


def adamw(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    new, state = adam(w, g, s, {**h, "weight_decay": torch.zeros(())}, step)
    return new - h["lr"] * h["weight_decay"] * w, state


def amsgrad(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    m = h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g
    v = h["beta2"] * s["exp_avg_sq"] + (1 - h["beta2"]) * g * g
    largest = larger(s["max_exp_avg_sq"], v)
    m_hat = m / (1 - h["beta1"] ** step)
    v_hat = largest / (1 - h["beta2"] ** step)
    new = w - h["lr"] * m_hat / (safe_sqrt(v_hat) + h["eps"])
    return new, {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": largest}


def adabelief(w: Tensor, g: Tensor, s: State, h: State, step: int, rectify=False, decouple=True):
    if not decouple:
        g = g + h["weight_decay"] * w
    m = h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g
    v = h["beta2"] * s["exp_avg_var"] + (1 - h["beta2"]) * (g - m) ** 2 + h["eps"]
    state = {"exp_avg": m, "exp_avg_var": v}
    m_hat = m / (1 - h["beta1"] ** step)
    if decouple:
        w = w - h["lr"] * h["weight_decay"] * w
    if not rectify:
        return w - h["lr"] * m_hat / (safe_sqrt(v / (1 - h["beta2"] ** step)) + h["eps"]), state
    limit = 2 / (1 - h["beta2"]) - 1
    samples = limit - 2 * step * h["beta2"] ** step / (1 - h["beta2"] ** step)
    if samples < 5:
        return w - h["lr"] * m_hat, state
    factor = (samples - 4) / (limit - 4) * (samples - 2) / samples * limit / (limit - 2)
    factor = (factor * (1 - h["beta2"] ** step)).sqrt()
    return w - h["lr"] * factor * m_hat / (safe_sqrt(v) + h["eps"]), state


def adagrad(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    total = s["sum"] + g * g
    lr = h["lr"] / (1 + (step - 1) * h["lr_decay"])
    return w - lr * g / (safe_sqrt(total + h["eps_root"]) + h["eps"]), {"sum": total}


def adadelta(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    square = h["rho"] * s["square_avg"] + (1 - h["rho"]) * g * g
    delta = safe_sqrt(s["acc_delta"] + h["eps"]) / safe_sqrt(square + h["eps"]) * g
    acc_delta = h["rho"] * s["acc_delta"] + (1 - h["rho"]) * delta * delta
    return w - h["lr"] * delta, {"square_avg": square, "acc_delta": acc_delta}


def rmsprop(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    g = g + h["weight_decay"] * w
    square = h["alpha"] * s["square_avg"] + (1 - h["alpha"]) * g * g
    state, variance = {"square_avg": square}, square
    if "grad_avg" in s:
        state["grad_avg"] = mean = h["alpha"] * s["grad_avg"] + (1 - h["alpha"]) * g
        variance = square - mean * mean
    direction = g / (safe_sqrt(variance + h["eps_root"]) + h["eps"])
    if "momentum_buffer" in s:
        state["momentum_buffer"] = direction = h["momentum"] * s["momentum_buffer"] + direction
    return w - h["lr"] * direction, state


def nadam(w: Tensor, g: Tensor, s: State, h: State, step: int, decouple=False) -> tuple[Tensor, State]:
    steps = torch.arange(1, step + 2, dtype=torch.float64)
    momenta = h["beta1"] * (1 - 0.5 * 0.96 ** (steps * h["momentum_decay"]))
    product = momenta[:-1].prod()
    if not decouple:
        g = g + h["weight_decay"] * w
    m = h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g
    v = h["beta2"] * s["exp_avg_sq"] + (1 - h["beta2"]) * g * g
    root = safe_sqrt(v / (1 - h["beta2"] ** step)) + h["eps"]
    update = (1 - momenta[-2]) / (1 - product) * g + momenta[-1] / (1 - product * momenta[-1]) * m
    decay = h["lr"] * h["weight_decay"] * w if decouple else 0
    return w - decay - h["lr"] * update / root, {"exp_avg": m, "exp_avg_sq": v}


def lion(w: Tensor, g: Tensor, s: State, h: State, step: int) -> tuple[Tensor, State]:
    direction = (h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g).sign()
    m = h["beta2"] * s["exp_avg"] + (1 - h["beta2"]) * g
    return w - h["lr"] * (direction + h["weight_decay"] * w), {"exp_avg": m}


TWINS: dict[str, Twin] = {
    "sgd": sgd,
    "sgd_momentum": sgd_momentum,
    "sgd_nesterov": sgd_nesterov,
    "adam": adam,
    "adamw": adamw,
    "amsgrad": amsgrad,
    "adabelief": adabelief,
    "adabelief_coupled": partial(adabelief, decouple=False),
    "adabelief_rectified": partial(adabelief, rectify=True),
    "adabelief_rectified_coupled": partial(adabelief, rectify=True, decouple=False),
    "adagrad": adagrad,
    "adadelta": adadelta,
    "rmsprop": rmsprop,
    "rmsprop_momentum": rmsprop,
    "rmsprop_centered": rmsprop,
    "rmsprop_centered_momentum": rmsprop,
    "nadam": nadam,
    "nadam_decoupled": partial(nadam, decouple=True),
    "lion": lion,
}

SMALLEST_RMS = 1e-3  # of parameters, where updates are measured by them
SMALLEST_UPDATE = 1e-8  # a part of the parameters


class _Set:
    """One set of a level's hyperparameters: those of the group, or those of one tensor."""

    def __init__(self, level, is_top: bool) -> None:
        self.level, self.twin, self.start = level, TWINS[level.rule], level.start()
        self.h = {k: torch.tensor(float(v), dtype=torch.float64) for k, v in level.values().items()}
        self.used = dict(self.h)
        self.spaces = dict(zip(self.h, level.coordinates(), strict=True))
        self.limits = dict(zip(self.h, level.limits(), strict=True))
        self.learn = () if is_top else level.learn_names
        self.x = {k: COORDINATES[self.spaces[k]][1](self.h[k], self.h[k]) for k in self.learn}
        self.state: dict[object, State] = {}
        self.z: dict[tuple[str, object], Tensor] = {}
        self.bounded = dict.fromkeys(self.h, 0)
        self.delta = 1.0
        self.least = 0.0  # lr

    def update(self, key: object, w: Tensor, g: Tensor, step: int, dry: bool = False) -> Tensor:
        """One update of what `key` names; adds its derivatives, d new / d h, to the traces."""
        start = {name: torch.full_like(w, value) for name, value in self.start.items()}
        state = self.state.get(key, start)
        new, after = self.twin(w, g, state, self.used, step)
        if dry:
            return new
        for name in self.learn:
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(self.used[name], torch.ones((), dtype=torch.float64))
                moved, _ = self.twin(w, g, state, {**self.used, name: dual}, step)
                z = forward_ad.unpack_dual(moved).tangent
            z = torch.zeros_like(w) if z is None else z.clone()
            self.z[name, key] = self.keep(step) * self.z.get((name, key), 0.0) + z
        self.state[key] = after
        return new

    def keep(self, step: int) -> float:
        steps, part = self.level.horizon if isinstance(self.level.horizon, tuple) else (self.level.horizon, 0)
        return 1 - 1 / max(steps, part * step)

    def hypergradient(self, gradients: dict[object, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The exact derivatives with respect to the coordinates, and those that move them."""
        exact, applied = {}, {}
        for name, x in self.x.items():
            g = torch.cat([torch.zeros(0, dtype=torch.float64), *(g.flatten() for g in gradients.values())])
            zs = [self.z.get((name, key), torch.zeros_like(g)) for key, g in gradients.items()]
            z = torch.cat([torch.zeros(0, dtype=torch.float64), *(z.flatten() for z in zs)])
            gz, zz, gg = g @ z, z @ z, g @ g
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                (slope,) = torch.autograd.grad(COORDINATES[self.spaces[name]][0](leaf), leaf)
            exact[name] = gz * slope * (self.delta if name == "lr" else 1.0)
            applied[name] = exact[name]
            if self.level.normalize:
                cosine = gz / (zz.sqrt() * gg.sqrt()) if gz != 0 else torch.zeros_like(gz)
                applied[name] = -cosine if slope < 0 else cosine
        norm = sum((g.square() for g in applied.values()), torch.zeros((), dtype=torch.float64)).sqrt()
        if self.level.clip is not None and norm > self.level.clip:
            applied = {name: g * self.level.clip / norm for name, g in applied.items()}
        return exact, applied

    def move(self, name: str, moved: Tensor, above: _Set, key: object) -> None:
        to_h, to_x = COORDINATES[self.spaces[name]]
        if self.spaces[name] == "multiplicative":
            factor = 1 + moved - self.x[name]
            moved = self.x[name] + factor.log()
            for other in above.learn:  # of which the last update is the fresh part of the trace
                old = above.faded.get((other, key), 0.0)
                above.z[other, key] = old + (above.z[other, key] - old) / factor
        value = to_h(moved).clamp(*self.limits[name])
        if name == "lr" and self.level.growth is not None:
            value = torch.minimum(value, self.level.growth * self.h[name])
        if name == "lr":
            value = value.clamp(min=min(self.h[name].item(), self.least))
        cut = not torch.isclose(value, to_h(moved), rtol=1e-12, atol=0)
        self.bounded[name] += cut
        self.x[name], self.h[name] = to_x(value, moved) if cut else moved, value

    def use(self, t: int) -> None:
        self.used = dict(self.h)
        if self.level.converge is not None:
            limit, steps = self.level.converge
            self.delta = 1 / (1 + (t / steps) ** 2)
            self.used["lr"] = self.delta * self.h["lr"] + (1 - self.delta) * limit


class TranscribedTower:
    """Trains copies of ``params`` with the levels of an ``hx.Stack`` and all of their safeguards, written out."""

    def __init__(self, params, stack) -> None:
        self.params = [p.detach().clone() for p in params]
        rows = len(self.params) if stack[0].granularity == "tensor" else 1
        self.levels = [
            [_Set(level, k + 1 == len(stack)) for _ in range(rows if level.granularity == "tensor" else 1)]
            for k, level in enumerate(stack)
        ]
        self.t = 0

    def step(self, loss_of_params) -> None:
        self.t += 1
        leaves = [p.clone().requires_grad_() for p in self.params]
        grads = dict(enumerate(torch.autograd.grad(loss_of_params(leaves), leaves)))

        # What each set moves, by key, with its gradients; from the lowest level up.
        moved: list[list[dict[object, Tensor]]] = [self._share(grads, len(self.levels[0]))]
        for sets in self.levels[:-1]:
            both = [s.hypergradient(gradients) for s, gradients in zip(sets, moved[-1], strict=True)]
            for s, (_, applied) in zip(sets, both, strict=True):
                s.applied = applied
            exact = {(i, name): g for i, (e, _) in enumerate(both) for name, g in e.items()}
            moved.append(self._share(exact, len(self.levels[len(moved)])))

        for k in reversed(range(len(self.levels))):
            for i, s in enumerate(self.levels[k]):
                if s.learn:
                    aboves = self.levels[k + 1]
                    above = aboves[i] if len(aboves) > 1 else aboves[0]
                    step = self.t - s.level.burn_in
                    if i == 0 or len(aboves) > 1:
                        above.faded = {key: above.keep(step) * z for key, z in above.z.items()}
                    for name in s.learn:
                        if step > 0:
                            new = above.update((i, name), s.x[name], s.applied[name], step)
                            s.move(name, new, above, (i, name))
                s.use(self.t)
        for s, gradients in zip(self.levels[0], moved[0], strict=True):
            if s.level.trust is not None:
                self._cap(s, gradients)
        self.params = [
            self.levels[0][i if len(self.levels[0]) > 1 else 0].update(i, w, grads[i], self.t)
            for i, w in enumerate(self.params)
        ]

    @staticmethod
    def _share(gradients: dict[object, Tensor], sets: int) -> list[dict[object, Tensor]]:
        if sets == 1:
            return [gradients]
        row = {key: key if isinstance(key, int) else key[0] for key in gradients}
        return [{key: g for key, g in gradients.items() if row[key] == i} for i in range(sets)]

    def _cap(self, s: _Set, grads: dict[object, Tensor]) -> None:
        w = torch.cat([self.params[i].flatten() for i in grads])
        new = torch.cat([s.update(i, self.params[i], g, self.t, dry=True).flatten() for i, g in grads.items()])
        size = max(w.norm(), SMALLEST_RMS * w.numel() ** 0.5)
        most, norm = s.level.trust * size, (new - w).norm()
        s.least = (SMALLEST_UPDATE * size * s.used["lr"] / norm).item() if norm > 0 else 0.0
        if norm > most:
            s.used["lr"] = s.used["lr"] * most / norm
            s.bounded["lr"] += 1
            if "lr" in s.learn and s.h["lr"] > s.used["lr"]:
                s.h["lr"] = s.used["lr"]
                s.x["lr"] = COORDINATES[s.spaces["lr"]][1](s.h["lr"], s.x["lr"])

    def hyperparameters(self) -> list[dict[str, float | list[float]]]:
        """Of each level, each hyperparameter's value, or a list where each tensor has its own."""
        return [self._of(sets, lambda s, name: s.h[name].item()) for sets in self.levels]

    def bounded(self) -> list[dict[str, float | list[float]]]:
        return [self._of(sets, lambda s, name: float(s.bounded[name])) for sets in self.levels]

    @staticmethod
    def _of(sets: list[_Set], value: Callable[[_Set, str], float]) -> dict[str, float | list[float]]:
        own = sets[0].level.granularity == "tensor"
        return {name: [value(s, name) for s in sets] if own else value(sets[0], name) for name in sets[0].h}
