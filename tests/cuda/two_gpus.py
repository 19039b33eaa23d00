"""What the tests on two GPUs share: a model, how it is sharded, its whole tensors."""

import importlib.util
from contextlib import ExitStack

import torch
import torch.distributed as dist
from models import registered
from ranks import launched, launched_by_deepspeed
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WIDTH, TOKENS = 48, 101


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        nn.init.trunc_normal_(self.up.weight, std=0.02)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, orthogonal=True):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        if orthogonal:  # which torch has in fp32 alone
            nn.init.orthogonal_(self.blocks[1].down.weight)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.empty(WIDTH))
        self.reset_parameters()

    def reset_parameters(self):
        """Of this module alone, as FSDP wants it."""
        self.table.copy_(torch.exp(torch.arange(float(WIDTH)) / -7))

    def init_weights(self):
        """For weights that exist, as torchtitan has it."""
        self.head.weight = self.embedding.weight  # `to_empty` gives a model that is not sharded one memory for each
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            block.norm.reset_parameters()
            nn.init.trunc_normal_(block.up.weight, std=0.02)
            nn.init.uniform_(block.up.bias, -0.1, 0.1)
            nn.init.xavier_uniform_(block.down.weight)
        self.reset_parameters()

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x * self.table.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(model, device):
    tokens = torch.arange(32, device=device).view(4, 8)
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())


def kind():
    """The type of device of a rank."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def join():
    """Let frameworks take this process, which has its process group, for one that torchrun has started."""
    (launched_by_deepspeed if importlib.util.find_spec("deepspeed") else launched)()


def shard(model, data=None, tensor=None):
    """FSDP2 over tensor parallelism, or one of them, each on a mesh of its own."""
    for block in model.blocks:
        if tensor is not None:
            parallelize_module(block, tensor, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if data is not None:
            fully_shard(block, mesh=data)
    return model if data is None else fully_shard(model, mesh=data)


def whole(model, root=None):
    """Copies of all tensors, gathered from all ranks, by name; `root` is what FSDP1 or DeepSpeed has made of it."""
    with ExitStack() as gathered:
        if isinstance(root, FullyShardedDataParallel):
            gathered.enter_context(FullyShardedDataParallel.summon_full_params(root))
        partitioned = [each for each in model.parameters() if hasattr(each, "ds_id")]
        if partitioned:
            import deepspeed

            gathered.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        return {
            name.replace("_fsdp_wrapped_module.", ""): tensor.full_tensor()
            if isinstance(tensor, DTensor)
            else tensor.clone()
            for name, tensor in registered(model).items()
        }
