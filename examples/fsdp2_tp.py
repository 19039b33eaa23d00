"""FSDP2 over tensor parallelism: layers split among the ranks of a group, their parts sharded over the groups.

    torchrun --nproc-per-node 4 examples/fsdp2_tp.py    # two groups of two
    torchrun --nproc-per-node 2 examples/fsdp2_tp.py    # one group of two

The values are those of the unsharded model, whatever the mesh: a run can move to another number of GPUs.
"""

import torch.distributed as dist
from common import config_from_arguments, say, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastinit
from fastinit.cli.models import Decoder

config = config_from_arguments(__doc__)
device = start()
split = 2 if dist.get_world_size() % 2 == 0 else 1
mesh = init_device_mesh(device.type, (dist.get_world_size() // split, split), mesh_dim_names=("data", "tensor"))

with fastinit.on(device, "bf16", shard=True):
    model = Decoder(config)

parallelize_module(
    model,
    mesh["tensor"],
    {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "layers.*.attention.query": ColwiseParallel(),
        "layers.*.attention.key": ColwiseParallel(),
        "layers.*.attention.value": ColwiseParallel(),
        "layers.*.attention.output": RowwiseParallel(),
        "layers.*.gate": ColwiseParallel(),
        "layers.*.up": ColwiseParallel(),
        "layers.*.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    },
)
for layer in model.layers:
    fully_shard(layer, mesh=mesh["data"])
fully_shard(model, mesh=mesh["data"])

fastinit.materialize(model)

weight = model.layers[0].attention.query.weight
say(f"query: {tuple(weight.shape)} as {weight.placements}, {tuple(weight.to_local().shape)} on this rank")
train(model, config, device, part=mesh["data"].get_local_rank())
dist.destroy_process_group()
