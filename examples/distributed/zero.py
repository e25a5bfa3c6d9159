"""ZeroRedundancyOptimizer: each process keeps the state of some parameters; all have the same tower.

torchrun --nproc-per-node 2 examples/distributed/zero.py
"""

import torch.distributed as dist
from common import batches, model, start, train
from torch.nn.parallel import DistributedDataParallel

import hyperopt_ext as hx
from hyperopt_ext.zero import ZeroRedundancyOptimizer

device = start()
net = DistributedDataParallel(model().to(device))
lr = hx.AdamW(lr=1e-5, learn="lr", space={"lr": "log"}, normalize=True, horizon=(100, 0.25), trust=0.03)
opt = ZeroRedundancyOptimizer(net.parameters(), lr / hx.Adam(lr=0.05))
train(net, opt, batches(200, dist.get_rank(), dist.get_world_size(), device))

opt.consolidate_state_dict(to=0)
if dist.get_rank() == 0:
    own, whole = len(opt.optim.state), len(opt.state_dict()["state"])
    print(f"of the state of {whole} tensors, this process keeps that of {own}")
dist.destroy_process_group()
