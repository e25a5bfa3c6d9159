"""torch.distributed.checkpoint: saved by any number of processes, resumed by any other. Run it twice or more:

    torchrun --nproc-per-node 2 examples/distributed/checkpoint.py FOLDER
    torchrun --nproc-per-node 1 examples/distributed/checkpoint.py FOLDER

The second run goes on where the first one stopped. A checkpoint without `.metadata` was cut off, and is passed over.
"""

import sys
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import batches, model, start, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard

import hyperopt_ext as hx

STEPS = 100


class Run(Stateful):
    """What a checkpoint holds."""

    def __init__(self, net: nn.Module, opt: hx.HyperOptimizer) -> None:
        self.net, self.opt, self.steps = net, opt, 0

    def state_dict(self):
        weights, optimizer = get_state_dict(self.net, self.opt)
        return {"net": weights, "opt": optimizer, "steps": self.steps}

    def load_state_dict(self, saved):
        set_state_dict(self.net, self.opt, model_state_dict=saved["net"], optim_state_dict=saved["opt"])
        self.steps = saved["steps"]


if len(sys.argv) != 2:
    raise SystemExit("name the folder of the checkpoint: torchrun --nproc-per-node 2 checkpoint.py FOLDER")
folder = Path(sys.argv[1])
device = start()
net = model().to(device)
for layer in net:
    fully_shard(layer)
fully_shard(net)
run = Run(net, hx.auto(net.parameters(), "adamw"))
complete = sorted(path.parent for path in folder.glob("*/.metadata"))
if complete:
    dcp.load({"run": run}, checkpoint_id=complete[-1])
    if dist.get_rank() == 0:
        print(f"resumed after {run.steps} steps")
data = batches(run.steps + STEPS, dist.get_rank(), dist.get_world_size(), device)
for _ in range(run.steps):
    next(data)  # seen before
train(net, run.opt, data, run.steps + 1)
run.steps += STEPS
dcp.save({"run": run}, checkpoint_id=folder / f"step_{run.steps:06d}")
dist.destroy_process_group()
