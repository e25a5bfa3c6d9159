"""FSDP2: parameters, gradients and optimizer state are sharded; the tower is on every process.

torchrun --nproc-per-node 2 examples/distributed/fsdp2.py
"""

import torch.distributed as dist
from common import batches, model, start, train
from torch.distributed.fsdp import fully_shard

import hyperopt_ext as hx

device = start()
net = model().to(device)
for layer in net:
    fully_shard(layer)
fully_shard(net)
opt = hx.auto(net.parameters(), "adamw")  # after fully_shard, as any optimizer
train(net, opt, batches(200, dist.get_rank(), dist.get_world_size(), device))
dist.destroy_process_group()
