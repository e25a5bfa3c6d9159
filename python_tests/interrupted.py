"""A training job that writes a checkpoint every few steps and goes on from it: python interrupted.py FOLDER STEPS."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch
from problems import Regression

import hyperopt_ext as hx

TOTAL = 250
STACK = hx.AdamW(lr=1e-3, space={"lr": "log"}, normalize=True, horizon=5) / hx.Adam(lr=1e-2, learn="lr") / hx.SGD(1e-4)


class Job:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoint.pt"
        self.problem = Regression(TOTAL, torch.float32)
        opt = hx.HyperOptimizer(self.problem.model.parameters(), STACK)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(opt, 30)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=50)
        self.parts = {"model": self.problem.model, "opt": opt, "scheduler": scheduler, "scaler": scaler}
        self.step = 0
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            self.step = saved.pop("step")
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])

    def save(self) -> None:
        """Whole or not at all: the new file takes the old one's place in one call of the system."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"step": self.step, **states}, f"{self.path}.new")
        os.replace(f"{self.path}.new", self.path)

    def run(self, until: int = TOTAL) -> str:
        opt, scaler = self.parts["opt"], self.parts["scaler"]
        while self.step < until:
            opt.zero_grad()
            broken = float("inf") if self.step in (70, 131) else 1.0
            scaler.scale(self.problem.loss(self.step) * broken).backward()
            scaler.step(opt)
            scaler.update()
            self.parts["scheduler"].step()
            self.step += 1
            if self.step % 3 == 0:
                self.save()
            print(self.step, flush=True)
        return self.digest()

    def digest(self) -> str:
        """Of all bytes that matter."""
        tensors = [p.detach() for p in self.problem.model.parameters()]
        tensors += [value for state in self.parts["opt"].state.values() for value in state.values()]
        tensors += [group[name] for group in self.parts["opt"].param_groups for name in ("tower", "lr")]
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("done", Job(Path(sys.argv[1])).run())
