"""What the examples share, and fastinit has no part in: the process group, the size of the model, training steps."""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from fastinit.cli.models import DecoderConfig


def start() -> torch.device:
    """Join the group that torchrun has described: a GPU for each process where there are enough, else the CPU.

    Without torchrun, this process is the whole group.
    """
    if "LOCAL_WORLD_SIZE" not in os.environ:
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="localhost")
    if torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"]):
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def config_from_arguments(description: str) -> DecoderConfig:
    """The shape of a Llama; --width 4096 --layers 32 --vocabulary 32000 is that of the 7B one."""
    return config_of(parser(description).parse_args())


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 128; default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=1000, help="default: %(default)s")
    return parser


def config_of(size: argparse.Namespace) -> DecoderConfig:
    hidden = -(-size.width * 8 // 3 // 256) * 256
    return DecoderConfig(size.vocabulary, size.width, size.layers, heads=max(size.width // 128, 4), hidden=hidden)


def learning_rate(size: DecoderConfig) -> float:
    """Of AdamW: 1e-3 for the small default; the wider a layer, the smaller the steps that it stands."""
    return 0.128 / size.width


def say(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)


def train(model: nn.Module, config: DecoderConfig, device: torch.device, part: int, steps: int = 5) -> None:
    """Learn a few random tokens by heart. `part` numbers the share of the data: the same for ranks that split a layer.

    Raises:
        RuntimeError: the loss is not finite, or did not fall.
    """
    tokens = torch.randint(config.vocabulary, (2, 33), generator=torch.Generator().manual_seed(part)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate(config))
    losses = []
    for step in range(steps):
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
        say(f"step {step + 1}: loss {losses[-1]:.4f}")
    if not losses[-1] < losses[0] < float("inf"):
        raise RuntimeError(f"the loss did not fall: {losses}")
