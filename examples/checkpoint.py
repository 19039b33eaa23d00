"""A sharded checkpoint that lacks a part of the model: only that part is initialized.

    torchrun --nproc-per-node 2 examples/checkpoint.py

Here the layers come from an earlier run and the head is new, as in fine-tuning. `materialize(empty=True)` gives memory
and no values, so nothing is computed that the checkpoint supplies; what it did not supply, fastinit knows.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import config_from_arguments, say, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastinit
from fastinit.cli.models import Decoder

config = config_from_arguments(__doc__)
device = start()
mesh = init_device_mesh(device.type, (dist.get_world_size(),))


def sharded_model() -> torch.nn.Module:
    with fastinit.on(device, "bf16", shard=True):
        model = Decoder(config)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


with tempfile.TemporaryDirectory() as folder:
    folders = [folder]
    dist.broadcast_object_list(folders, src=0)

    before = sharded_model()
    fastinit.materialize(before)
    dcp.save({"layers": before.layers.state_dict()}, checkpoint_id=folders[0])

    model = sharded_model()
    fastinit.materialize(model, empty=True)
    dcp.load({"layers": model.layers.state_dict()}, checkpoint_id=folders[0])
    dist.barrier()  # before rank 0 removes the folder

say(f"initialized, because the checkpoint has no values for them: {fastinit.initialize(model)}")
for loaded, saved in zip(model.layers.parameters(), before.layers.parameters(), strict=True):
    assert torch.equal(loaded.to_local(), saved.to_local())
train(model, config, device, part=dist.get_rank())
dist.destroy_process_group()
