"""DeepSpeed ZeRO-3: each rank creates its slices of the parameters, and nothing else.

    torchrun --nproc-per-node 2 examples/deepspeed_zero3.py

Against a script that builds under `deepspeed.zero.Init`, only that line is another one. What zero.Init fills whole on
every rank and broadcasts is filled here where it stays; what it cannot run, such as an `orthogonal_` in the
constructor, runs.
"""

import os

import torch
import torch.distributed as dist
from common import config_from_arguments, learning_rate, say, start
from torch.nn import functional

import fastinit
from fastinit.cli.models import Decoder

config = config_from_arguments(__doc__)
device = start()
os.environ["DS_ACCELERATOR"] = device.type  # before DeepSpeed looks for a GPU by itself
import deepspeed  # noqa: E402

if device.type == "cpu":  # it would compile an all-reduce through shared memory, for minutes
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

ds_config = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
}

with fastinit.on(device, "bf16", shard=fastinit.deepspeed.zero3(ds_config)):
    model = Decoder(config)

optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate(config))
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)

here = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
say(f"{here:,} of {config.parameters:,} parameters on each of {dist.get_world_size()} ranks")

# Learn a few random tokens by heart.
generator = torch.Generator().manual_seed(dist.get_rank())
tokens = torch.randint(config.vocabulary, (2, 33), generator=generator).to(device)
losses = []
for step in range(5):
    logits = engine(tokens[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    losses.append(mean.item() / dist.get_world_size())
    say(f"step {step + 1}: loss {losses[-1]:.4f}")
if not losses[-1] < losses[0] < float("inf"):
    raise RuntimeError(f"the loss did not fall: {losses}")
dist.destroy_process_group()
