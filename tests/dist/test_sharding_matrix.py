"""Every way to shard a model, from every kind of block, on 1 to 4 ranks: gathered, it is the unsharded one to the bit.

Each cell is the whole order that a user would write: create, wrap, and give values where the block has left them out.
That of ZeRO-3, which needs processes of its own, is in test_deepspeed.py. Ranks are gloo processes (see ranks.py).
"""

import pytest
import torch
import torch.distributed as dist
from models import SEED, Block, registered, same_bits
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastinit

WORLDS = [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3, 4]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    four = Ranks(4, tmp_path_factory)
    yield four
    four.end()


class Net(nn.Module):
    """Sizes that 2, 3 and 4 do not divide, an orthogonal matrix, a tie, a buffer, and fewer elements than ranks."""

    def __init__(self, width=11):
        super().__init__()
        self.embedding = nn.Embedding(13, width, padding_idx=3)
        self.layers = nn.ModuleList(Block(width) for _ in range(4))
        self.mixer = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.mixer.weight)
        self.head = nn.Linear(width, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.gate = nn.Parameter(torch.empty(2).uniform_())
        self.register_buffer("rotation", torch.arange(4) ** -0.5, persistent=False)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.mixer(hidden) * self.gate[0] * self.rotation[0])


def created(dtype, **how):
    with fastinit.on("cpu", dtype, seed=SEED, **how):
        return Net()


def finish(model):
    """Values for whatever has none yet, by the function that is for it."""
    unwritten = fastinit.uninitialized(model)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    written = fastinit.materialize(model) if on_meta else fastinit.initialize(model)
    assert set(written) == set(unwritten) and fastinit.uninitialized(model) == []


# --- ways to shard: each takes a new model and returns the tensors that this rank knows whole, by their names ---------


def _gathered(model):
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in registered(model).items()}


def _fully_sharded(model, mesh):
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _mesh(names, first):
    """A mesh of two axes, the first one of this size if the ranks can be divided so."""
    world = dist.get_world_size()
    sizes = (first, world // first) if world % first == 0 else (1, world)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def _tensor_parallel(model, mesh, **how):
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "mixer": RowwiseParallel(),
        "layers.*.up": ColwiseParallel(),
        "layers.*.down": RowwiseParallel(),
    }
    return parallelize_module(model, mesh, plan, **how)


def fsdp1(model):
    how = {"use_orig_params": True, "device_id": torch.device("cpu")}
    if model.gate.is_meta:
        how["param_init_fn"] = fastinit.param_init_fn
    else:
        finish(model)
    for i, layer in enumerate(model.layers):
        model.layers[i] = FullyShardedDataParallel(layer, **how)
    model = FullyShardedDataParallel(model, **how)
    with FullyShardedDataParallel.summon_full_params(model):
        found = registered(model.module)
        return {name.replace("_fsdp_wrapped_module.", ""): tensor.detach().clone() for name, tensor in found.items()}


def fsdp2(model):
    _fully_sharded(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    finish(model)
    return _gathered(model)


def hsdp(model):
    _fully_sharded(model, _mesh(("replicate", "shard"), 2))
    finish(model)
    return _gathered(model)


def tensor_parallel(model):
    # What has no values cannot be sent: each rank takes its part by itself.
    how = {} if fastinit.uninitialized(model) == [] else {"src_data_rank": None}
    _tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)), **how)
    finish(model)
    return _gathered(model)


def fsdp2_over_tensor_parallel(model):
    how = {} if fastinit.uninitialized(model) == [] else {"src_data_rank": None}
    mesh = _mesh(("data", "tensor"), 2)
    _fully_sharded(_tensor_parallel(model, mesh["tensor"], **how), mesh["data"])
    finish(model)
    return _gathered(model)


def pipeline_stage(model):
    rank, world = dist.get_rank(), dist.get_world_size()
    kept = {str(i) for i in range(4) if i * world // 4 == rank}
    for i in range(4):
        if str(i) not in kept:
            model.layers[i] = None
    if rank:
        model.embedding = model.head = None
    finish(model)
    stages = [None] * world
    dist.all_gather_object(stages, registered(model))
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def ddp(model):
    finish(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(torch.arange(6).view(2, 3)).sum().backward()
    return registered(model)


WAYS = [fsdp1, fsdp2, hsdp, tensor_parallel, fsdp2_over_tensor_parallel, pipeline_stage, ddp]
BLOCKS = {"device": {}, "empty": {"empty": True}, "shard": {"shard": True}}


def _check(way, block, dtype):
    expected = registered(created(dtype))
    found = way(created(dtype, **BLOCKS[block]))
    assert found.keys() >= expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name].detach(), tensor.detach()), name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("way", WAYS)
def test_gathered_it_is_the_unsharded_model(ranks, way, block, world):
    ranks.run(_check, way, block, "bf16", world=world)


def _check_refusals():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    refused = r"fastinit: \S+ .*was created without values.*"
    with pytest.raises(RuntimeError, match=refused + r"src_data_rank=None.*call fastinit\.initialize\(model\)"):
        _tensor_parallel(created("fp32", empty=True), mesh)
    with pytest.raises(RuntimeError, match=refused + r"call fastinit\.initialize\(model\)"):
        nn.parallel.DistributedDataParallel(created("fp32", empty=True))
    with pytest.raises(RuntimeError, match=refused + r"call fastinit\.initialize\(model\)"):
        FullyShardedDataParallel(created("fp32", empty=True), device_id=torch.device("cpu"))


def test_wrappers_that_need_the_values_refuse_what_has_none_and_say_what_helps(ranks):
    ranks.run(_check_refusals, world=2)
