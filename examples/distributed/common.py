"""What the examples share: the process group, a model and its data, the training loop."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

WIDTH, BATCH = 32, 64


def start() -> torch.device:
    """Joins the process group that torchrun describes, and gives the device of this process."""
    if "RANK" not in os.environ:
        raise SystemExit(
            "start this with torchrun, for example: torchrun --nproc-per-node 2 examples/distributed/ddp.py"
        )
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def model() -> nn.Sequential:
    """The same on all processes: two residual blocks and a head."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(WIDTH, 8))


def batches(steps: int, part: int, parts: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """For one of `parts` replicas of the model: its part of each batch, inputs [n, WIDTH] and targets [n, 8]."""
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 8)).requires_grad_(False)
    for _ in range(steps):
        x = torch.randn(BATCH, WIDTH)
        yield x.chunk(parts)[part].to(device), (3 * teacher(x)).chunk(parts)[part].to(device)


def train(model: nn.Module, opt: torch.optim.Optimizer, data: Iterator[tuple[Tensor, Tensor]], first: int = 1) -> None:
    """An ordinary training loop. What is printed is the loss of the first process's part of the batch."""
    for step, (x, y) in enumerate(data, first):
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        if step % 50 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}, learned lr {opt.param_groups[0]['lr'].item():.4f}", flush=True)
