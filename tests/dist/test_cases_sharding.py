"""fully_shard, parallelize_module, DTensor and DistributedDataParallel in a block that knows nothing of them."""

import pytest
import torch
import torch.distributed.tensor as dt
from cases import close, dirty, over_dtypes
from models import DTYPES, SEED, same_bits
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import fastinit


@pytest.fixture(scope="module")
def rank(tmp_path_factory):
    one = Ranks(1, tmp_path_factory)
    yield lambda function, *args: one.run(function, *args, world=1)[0]
    one.end()


class Layers(nn.Module):
    """Weights of every kind: random, constant, computed, tied."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.arange(1, 5) / 7)
        self.register_buffer("table", torch.linspace(0, 1, 5).cos())

    def forward(self, x):
        return self.head(self.norm(self.down(self.up(self.embedding(x)))) * self.scale)


def _usual(dtype):
    with fastinit.on("cpu", dtype, seed=SEED):
        return Layers()


def _locals(model):
    """Return what a model holds, by name: of DTensors the local part, which is the whole on one rank."""
    tensors = {name: getattr(t, "_local_tensor", t).detach() for name, t in model.state_dict().items()}
    return {name: (t.clone(), t.stride(), t.dtype) for name, t in tensors.items()}


def _compare(model, dtype):
    ours, right = _locals(model), _locals(_usual(dtype))
    assert list(ours) == list(right)
    for name, (tensor, strides, kind) in right.items():
        assert same_bits(ours[name][0], tensor), (name, ours[name][0], tensor)
        assert ours[name][1:] == (strides, kind), name


def _shard(model, mesh):
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _tensor_parallel(model, mesh):
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "norm": SequenceParallel()}
    return parallelize_module(model, mesh, plan)


def _distribute(model, mesh):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if module is not model.head:
                placed = dt.distribute_tensor(parameter.data, mesh, [dt.Shard(0)])
                module.register_parameter(name, nn.Parameter(placed))
    model.head.weight = model.embedding.weight
    return model


def _replicate(model, mesh):
    from torch.distributed._composable import replicate

    return replicate(model)


def _from_local(model, mesh):
    model.up.weight = nn.Parameter(dt.DTensor.from_local(model.up.weight.detach(), mesh, [dt.Shard(0)]))
    return model


def _distribute_module(model, mesh):
    return dt.distribute_module(model, mesh)


WAYS = {
    "fully_shard": _shard,
    "parallelize_module": _tensor_parallel,
    "distribute_tensor": _distribute,
    "distribute_module": _distribute_module,
    "from_local": _from_local,
    "replicate": _replicate,
}


def _made_by(way, dtype):
    mesh = init_device_mesh("cpu", (1,))
    dirty()
    with fastinit.on("cpu", dtype, seed=SEED):
        model = WAYS[way](Layers(), mesh)
    _compare(model, dtype)
    return [type(p).__name__ for p in model.parameters()]


@pytest.mark.parametrize("way", WAYS)
@over_dtypes
def test_a_model_that_is_distributed_in_the_block_has_the_weights_of_one_that_is_not(rank, way, dtype):
    kinds = rank(_made_by, way, dtype)
    assert ("DTensor" in kinds) == (way != "replicate"), kinds


def _distributed_after(way, dtype):
    """The same after the block: what it gives is ordinary."""
    mesh = init_device_mesh("cpu", (1,))
    _compare(WAYS[way](_usual(dtype), mesh), dtype)


@pytest.mark.parametrize("way", WAYS)
@over_dtypes
def test_a_model_that_is_distributed_after_the_block_keeps_its_weights(rank, way, dtype):
    rank(_distributed_after, way, dtype)


def _wrapped(dtype):
    dirty()
    with fastinit.on("cpu", dtype, seed=SEED):
        model = nn.parallel.DistributedDataParallel(Layers())
    _compare(model.module, dtype)
    x = torch.tensor([[1, 2, 3]])
    right = _usual(dtype)
    for each in (model, right):
        each(x).float().pow(2).sum().backward()
    assert torch.equal(model(x), right(x))
    for ours, theirs in zip(model.parameters(), right.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@over_dtypes
def test_distributed_data_parallel_in_the_block_wraps_written_weights(rank, dtype):
    rank(_wrapped, dtype)


def _trained_in_the_block(dtype):
    mesh = init_device_mesh("cpu", (1,))
    x = torch.tensor([[1, 2, 3]])
    dirty()
    with fastinit.on("cpu", dtype, seed=SEED):
        model = _shard(Layers(), mesh)
        ours = model(x).full_tensor() if isinstance(model(x), dt.DTensor) else model(x)
    assert close(ours.detach(), _shard(_usual(dtype), mesh)(x).detach(), 0.05)


@over_dtypes
def test_a_sharded_model_runs_in_the_block(rank, dtype):
    rank(_trained_in_the_block, dtype)


FACTORIES = {
    "zeros": (lambda mesh: dt.zeros(4, 2, device_mesh=mesh, placements=[dt.Shard(0)]), lambda: torch.zeros(4, 2)),
    "ones": (lambda mesh: dt.ones(4, device_mesh=mesh), lambda: torch.ones(4)),
    "full": (lambda mesh: dt.full((4,), 0.3, device_mesh=mesh), lambda: torch.full((4,), 0.3)),
    "empty": (lambda mesh: dt.empty(4, device_mesh=mesh).fill_(0.3), lambda: torch.full((4,), 0.3)),
    "distribute_tensor": (
        lambda mesh: dt.distribute_tensor(torch.arange(4) / 7, mesh, [dt.Shard(0)]),
        lambda: torch.arange(4) / 7,
    ),
    "arithmetic": (
        lambda mesh: dt.distribute_tensor(torch.full((4,), 0.3), mesh, [dt.Replicate()]) * 2.0,
        lambda: torch.full((4,), 0.3) * 2.0,
    ),
    "init": (
        lambda mesh: nn.init.constant_(dt.empty(4, device_mesh=mesh), 0.3),
        lambda: torch.full((4,), 0.3),
    ),
    "redistribute": (
        lambda mesh: dt.distribute_tensor(torch.ones(4, 2), mesh, [dt.Shard(0)]).redistribute(mesh, [dt.Replicate()]),
        lambda: torch.ones(4, 2),
    ),
    "full_tensor": (
        lambda mesh: dt.distribute_tensor(torch.full((4,), 0.3), mesh, [dt.Shard(0)]).full_tensor(),
        lambda: torch.full((4,), 0.3),
    ),
    "like": (
        lambda mesh: torch.ones_like(dt.distribute_tensor(torch.zeros(4), mesh, [dt.Shard(0)])),
        lambda: torch.ones(4),
    ),
}


def _from_factory(name, dtype):
    mesh = init_device_mesh("cpu", (1,))
    make, plain = FACTORIES[name]
    right = plain().to(DTYPES[dtype])
    dirty()
    with fastinit.on("cpu", dtype, seed=SEED):
        kept, read = make(mesh), getattr(make(mesh), "_local_tensor", torch.empty(0)).tolist()
    local = getattr(kept, "_local_tensor", kept)
    assert close(local, right, 2 * torch.finfo(right.dtype).eps) and local.stride() == right.stride()
    assert type(local) is torch.Tensor and (not read or len(read) == 4)


@pytest.mark.parametrize("name", FACTORIES)
@over_dtypes
def test_factories_of_dtensor_write_what_they_say(rank, name, dtype):
    rank(_from_factory, name, dtype)


RANDOM = {
    "normal_": lambda tensor: nn.init.normal_(tensor),
    "uniform_": lambda tensor: tensor.uniform_(-1, 1),
    "randn_like": lambda tensor: torch.randn_like(tensor),
    "dropout": lambda tensor: nn.functional.dropout(tensor + 1.0),
}


def _random(name, dtype):
    mesh, made = init_device_mesh("cpu", (1,)), []
    for outer in (1, 2):
        torch.manual_seed(outer)
        before = torch.get_rng_state()
        with fastinit.on("cpu", dtype, seed=SEED):
            tensor = RANDOM[name](dt.zeros(64, device_mesh=mesh, placements=[dt.Shard(0)]))
        assert torch.equal(before, torch.get_rng_state()), "torch's generator was moved"
        made.append(tensor.to_local())
    assert same_bits(*made) and made[0].dtype == DTYPES[dtype] and made[0].float().std() > 0.2


@pytest.mark.parametrize("name", RANDOM)
@over_dtypes
def test_what_is_random_in_a_dtensor_follows_the_blocks_seed(rank, name, dtype):
    rank(_random, name, dtype)
