"""Tensor parallelism and FSDP2 on a mesh of two dimensions; the norms are plain for the one and sharded by the other.

torchrun --nproc-per-node 4 examples/distributed/tensor_parallel.py
"""

import torch.distributed as dist
from common import batches, model, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import hyperopt_ext as hx

device = start()
if dist.get_world_size() % 2:
    raise SystemExit("tensor_parallel.py splits layers in two: it needs an even number of processes")
mesh = init_device_mesh(device.type, (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
net = model().to(device)
for block in net[:2]:
    parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(block, mesh=mesh["dp"])
fully_shard(net, mesh=mesh["dp"])
opt = hx.auto(net.parameters(), "adamw")
train(net, opt, batches(200, mesh["dp"].get_local_rank(), mesh["dp"].size(), device))
dist.destroy_process_group()
