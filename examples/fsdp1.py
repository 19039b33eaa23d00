"""FSDP1: `param_init_fn` gives each unit its values just before it is sharded.

    torchrun --nproc-per-node 2 examples/fsdp1.py

No rank ever holds more than its shards and one unit. `sync_module_states` is not needed: all ranks compute the same.
"""

import torch.distributed as dist
from common import config_from_arguments, say, start, train
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import fastinit
from fastinit.cli.models import Decoder, DecoderLayer

config = config_from_arguments(__doc__)
device = start()

with fastinit.on(device, "bf16", shard=True) as init:
    model = Decoder(config)

model = FullyShardedDataParallel(
    model,
    param_init_fn=fastinit.param_init_fn,
    auto_wrap_policy=ModuleWrapPolicy({DecoderLayer}),
    device_id=device,
    use_orig_params=True,
)

say(f"{init.parameters:,} parameters on {dist.get_world_size()} ranks")
train(model, config, device, part=dist.get_rank())
dist.destroy_process_group()
