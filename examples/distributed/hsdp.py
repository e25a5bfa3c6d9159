"""HSDP: sharded within a node, replicated between nodes. A replicated shard counts once.

torchrun --nproc-per-node 4 examples/distributed/hsdp.py
"""

import torch.distributed as dist
from common import batches, model, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import hyperopt_ext as hx

device = start()
if dist.get_world_size() % 2:
    raise SystemExit("hsdp.py makes two replicas: it needs an even number of processes")
mesh = init_device_mesh(device.type, (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
net = model().to(device)
for layer in net:
    fully_shard(layer, mesh=mesh)
fully_shard(net, mesh=mesh)
opt = hx.auto(net.parameters(), "adamw")
train(net, opt, batches(200, dist.get_rank(), dist.get_world_size(), device))
dist.destroy_process_group()
