"""HSDP: sharded within a node, replicated across nodes; fp32 parameters that FSDP2 computes with in bf16.

    torchrun --nproc-per-node 4 examples/hsdp.py    # two replicas of two shards
    torchrun --nproc-per-node 2 examples/hsdp.py    # one of each

Replicas need no broadcast to start equal: every rank computes the same values for the same elements.
"""

import torch
import torch.distributed as dist
from common import config_from_arguments, say, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fastinit
from fastinit.cli.models import Decoder

config = config_from_arguments(__doc__)
device = start()
shards = 2 if dist.get_world_size() % 2 == 0 else 1  # on real machines: the GPUs of a node
mesh = init_device_mesh(device.type, (dist.get_world_size() // shards, shards), mesh_dim_names=("replicate", "shard"))

with fastinit.on(device, "fp32", shard=True):
    model = Decoder(config)

precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for layer in model.layers:
    fully_shard(layer, mesh=mesh, mp_policy=precision)
fully_shard(model, mesh=mesh, mp_policy=precision)

fastinit.materialize(model)

say(f"{mesh.shape[0]} replicas of {mesh.shape[1]} shards")
train(model, config, device, part=dist.get_rank())
dist.destroy_process_group()
