"""DistributedDataParallel: every process has the whole model, and so the same tower.

torchrun --nproc-per-node 2 examples/distributed/ddp.py
"""

import torch.distributed as dist
from common import batches, model, start, train
from torch.nn.parallel import DistributedDataParallel

import hyperopt_ext as hx

device = start()
net = DistributedDataParallel(model().to(device))
opt = hx.auto(net.parameters(), "adamw")
train(net, opt, batches(200, dist.get_rank(), dist.get_world_size(), device))
dist.destroy_process_group()
