"""FSDP2: each rank creates its shards of the parameters, and nothing else.

    torchrun --nproc-per-node 2 examples/fsdp2_llama.py

Against a script that builds on the meta device, `fastinit.on` takes the place of `torch.device("meta")`, and
`fastinit.materialize` that of `to_empty` and whatever initialized the weights afterwards: the constructor's own
initialization counts, and the buffers are there.
"""

import torch.distributed as dist
from common import config_from_arguments, say, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastinit
from fastinit.cli.models import Decoder

config = config_from_arguments(__doc__)
device = start()
mesh = init_device_mesh(device.type, (dist.get_world_size(),))

with fastinit.on(device, "bf16", shard=True) as init:
    model = Decoder(config)  # or transformers' LlamaForCausalLM(config), or any other module

for layer in model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)

fastinit.materialize(model)

here = sum(parameter.to_local().numel() for parameter in model.parameters())
say(f"{here:,} of {init.parameters:,} parameters on each of {dist.get_world_size()} ranks")
train(model, config, device, part=dist.get_rank())
dist.destroy_process_group()
