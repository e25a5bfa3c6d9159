"""accelerate: `prepare` wraps the tower like any optimizer; accumulation, clipping, and its checkpoints.

python examples/trainers/accelerate_loop.py [FOLDER]
ACCELERATE_USE_CPU=1 torchrun --nproc-per-node 2 examples/trainers/accelerate_loop.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hyperopt_ext as hx


def main() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    x = torch.randn(4096, 16)
    y = x[:, :4].sum(1, keepdim=True).sin()
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    opt = hx.auto(net.parameters(), "adamw")
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    net, opt, loader = accelerator.prepare(net, opt, loader)

    for epoch in range(5):
        for inputs, targets in loader:
            with accelerator.accumulate(net):
                loss = (net(inputs) - targets).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(net.parameters(), 1.0)
                opt.step()
                opt.zero_grad()
        lr = opt.param_groups[0]["lr"].item()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}, learned lr {lr:.5f}")
    accelerator.save_state(str(Path(sys.argv[1] if len(sys.argv) > 1 else "accelerate_run")))
    accelerator.end_training()


if __name__ == "__main__":
    main()
