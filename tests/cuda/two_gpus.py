"""What test_sharded_cuda.py runs on two GPUs with NCCL: shards have the bits of the CPU's unsharded model, and train.

torchrun --standalone --nproc-per-node 2 tests/cuda/two_gpus.py fsdp2|fsdp2_tp|init_weights|fsdp1|zero3
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fastinit
from fastinit.sharding import local_boxes

WIDTH, TOKENS = 48, 101


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        nn.init.trunc_normal_(self.up.weight, std=0.02)
        nn.init.orthogonal_(self.down.weight)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, padding_idx=0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def on_cpu(seed):
    with fastinit.on("cpu", "bf16", seed=seed):
        return dict(Model().named_parameters())


def deferred(shard=True):
    """A deferred model and its seed, on which ranks that are seeded differently agree."""
    torch.manual_seed(dist.get_rank())
    with fastinit.on("cuda", "bf16", shard=shard) as report:
        model = Model()
    return model, report.seed


def assert_shards_are_those_of_the_cpu(model, seed):
    reference = on_cpu(seed)
    for name, parameter in model.named_parameters():
        whole, local = reference[name].detach().view(-1), parameter._local_tensor.detach()
        assert local.is_cuda, name
        for index_offset, sizes, index_strides, offset, strides in local_boxes(parameter):
            expected = whole.as_strided(sizes, index_strides, index_offset)
            got = local.as_strided(sizes, strides, local.storage_offset() + offset).cpu()
            assert torch.equal(got.view(torch.int16), expected.contiguous().view(torch.int16)), name


def train(model):
    tokens = torch.arange(32, device="cuda").view(4, 8)
    loss = nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
    loss.backward()
    assert loss.isfinite()


def fsdp2():
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cuda", (2,))
    model, seed = deferred()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fastinit.materialize(model)
    assert model.head.weight is model.embedding.weight
    assert_shards_are_those_of_the_cpu(model, seed)
    train(model)


def fsdp2_tp():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cuda", shape, mesh_dim_names=("data", "tensor"))
        model, seed = deferred()
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        fastinit.materialize(model)
        assert_shards_are_those_of_the_cpu(model, seed)
        train(model)


def init_weights():
    """The order of torchtitan: shards that exist get their values inside of a block."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def write(model):
        nn.init.normal_(model.embedding.weight, std=0.02)
        for block in model.blocks:
            block.norm.reset_parameters()
            nn.init.trunc_normal_(block.up.weight, std=0.02)
            nn.init.uniform_(block.up.bias, -0.1, 0.1)
            nn.init.xavier_uniform_(block.down.weight)

    reference = Model().to(torch.bfloat16)
    with fastinit.on("cpu", seed=3):
        write(reference)
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cuda", shape, mesh_dim_names=("data", "tensor"))
        with torch.device("meta"):
            model = Model().to(torch.bfloat16)
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        model.to_empty(device="cuda")
        with fastinit.on("cuda", seed=3):
            write(model)
        for name, parameter in model.named_parameters():
            whole = parameter.detach().full_tensor().cpu()
            assert torch.equal(whole.view(torch.int16), reference.get_parameter(name).detach().view(torch.int16)), name
        train(model)


def fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model, seed = deferred()
    model = FullyShardedDataParallel(
        model,
        param_init_fn=fastinit.param_init_fn,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=torch.cuda.current_device(),
        use_orig_params=True,
    )
    reference = on_cpu(seed)
    with FullyShardedDataParallel.summon_full_params(model):
        for name, parameter in model.named_parameters():
            name = name.replace("_fsdp_wrapped_module.", "")
            assert torch.equal(parameter.cpu(), reference[name]), name
    train(model)


def zero3():
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
        "bf16": {"enabled": True},
    }
    model, seed = deferred(fastinit.deepspeed.zero3(config))
    reference = on_cpu(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            assert torch.equal(parameter.detach().cpu(), reference[name].detach()), name
    tokens = torch.arange(32, device="cuda").view(4, 8)
    loss = nn.functional.cross_entropy(engine(tokens).float().flatten(0, 1), tokens.flatten())
    engine.backward(loss)
    engine.step()
    assert loss.isfinite()


if __name__ == "__main__":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if sys.argv[1] != "zero3":
        dist.init_process_group("nccl")
    {each.__name__: each for each in (fsdp2, fsdp2_tp, init_weights, fsdp1, zero3)}[sys.argv[1]]()
    dist.destroy_process_group()
