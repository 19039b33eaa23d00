"""Inits of tensors that exist already, inside of a block: distributed and unwritten ones (the order of torchtitan).

Meta device, fully_shard or parallelize_module, to_empty, with fastinit.on(device, seed=...): model.init_weights()
"""

import pytest
import torch
import torch.distributed as dist
from models import SEED, registered, same_bits
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastinit


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    four = Ranks(4, tmp_path_factory)
    yield four
    four.end()


class Net(nn.Module):
    def __init__(self, width=11):
        super().__init__()
        self.embedding = nn.Embedding(13, width)
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Parameter(torch.empty(2))
        self.scale = nn.Parameter(torch.empty(5, 3))

    def init_weights(self):
        self.embedding.reset_parameters()
        self.up.reset_parameters()
        nn.init.xavier_normal_(self.down.weight, gain=0.5)
        self.norm.reset_parameters()
        nn.init.trunc_normal_(self.gate, std=0.02)
        with torch.no_grad():
            self.scale.uniform_(-0.5, 0.5)


def whole(dtype):
    model = Net().to(dtype)
    with fastinit.on("cpu", seed=SEED):
        model.init_weights()
    return model


def shards(model, how):
    world = dist.get_world_size()
    if how == "FSDP2":
        return fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    plan = {"embedding": RowwiseParallel(input_layouts=Replicate()), "up": ColwiseParallel(), "down": RowwiseParallel()}
    if how == "TP":
        return parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
    names = ("data", "tensor") if how == "FSDP2 over TP" else ("replicate", "shard")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    if how == "HSDP":
        return fully_shard(model, mesh=mesh)
    return fully_shard(parallelize_module(model, mesh["tensor"], plan), mesh=mesh["data"])


def _check_order_of_torchtitan(how, dtype, recorded, on_meta=False):
    if recorded:
        with fastinit.on("cpu", dtype, seed=SEED + 1, shard=True):
            model = Net()
    else:
        with torch.device("meta"):
            model = Net().to(dtype)
    shards(model, how)
    if not on_meta:
        model.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())
    with fastinit.on("cpu", seed=SEED) as report:
        model.init_weights()
    if on_meta:
        fastinit.materialize(model)
    assert report.parameters > 0 and fastinit.uninitialized(model) == []
    expected = registered(whole(dtype))
    for name, tensor in registered(model).items():
        if isinstance(tensor, DTensor):
            assert same_bits(tensor.full_tensor(), expected[name]), name
        else:
            assert same_bits(tensor, expected[name]), name


@pytest.mark.parametrize("recorded", [False, True], ids=["meta", "shard=True"])
@pytest.mark.parametrize(
    "how, world, dtype",
    [
        *((how, world, torch.bfloat16) for how in ("FSDP2", "TP") for world in (1, 2, 3, 4)),
        *((how, 4, dtype) for how in ("HSDP", "FSDP2 over TP") for dtype in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_init_weights_of_shards_gives_the_bits_of_the_whole_model(ranks, how, world, dtype, recorded):
    ranks.run(_check_order_of_torchtitan, how, dtype, recorded, world=world)


@pytest.mark.parametrize("how, world", [("FSDP2", 3), ("TP", 2), ("HSDP", 4), ("FSDP2 over TP", 4)])
def test_init_weights_of_unwritten_shards_on_meta_changes_what_materialize_gives_them(ranks, how, world):
    ranks.run(_check_order_of_torchtitan, how, torch.bfloat16, True, True, world=world)


def _check_seeds_that_differ():
    with torch.device("meta"):
        model = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (2,)))
    model.to_empty(device="cpu")
    torch.manual_seed(dist.get_rank())
    with fastinit.on("cpu"):
        model.reset_parameters()
    reference = nn.Linear(4, 4)
    torch.manual_seed(0)  # as rank 0
    with fastinit.on("cpu"):
        reference.reset_parameters()
    for name, parameter in model.named_parameters():
        assert same_bits(parameter.full_tensor(), reference.get_parameter(name)), name


def test_ranks_that_have_drawn_other_seeds_take_that_of_rank_0(ranks):
    ranks.run(_check_seeds_that_differ, world=2)


def _check_gradient():
    with fastinit.on("cpu", "fp32", empty=True, seed=SEED):
        model = nn.Linear(8, 8, bias=False)
    placed = (init_device_mesh("cpu", (2,)), [Shard(0)])
    model.weight = nn.Parameter(distribute_tensor(model.weight, *placed, src_data_rank=None))
    gradient = model.weight.grad = distribute_tensor(torch.ones(8, 8), *placed)
    assert fastinit.initialize(model) == ["weight"]
    assert model.weight.grad is gradient


def test_a_gradient_stays_with_a_distributed_tensor_that_gets_its_values(ranks):
    ranks.run(_check_gradient, world=2)


def _check_fill():
    mesh = init_device_mesh("cpu", (2, 2))
    expected = fastinit.fill_(torch.empty(5, 7), fastinit.Normal(), seed=SEED, stream=3)
    for placements in ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(0)]):
        tensor = distribute_tensor(torch.zeros(5, 7), mesh, placements)
        assert fastinit.fill_(tensor, fastinit.Normal(), seed=SEED, stream=3) is tensor
        assert same_bits(tensor.full_tensor(), expected)
    with pytest.raises(ValueError, match="window= was given for a DTensor"):
        fastinit.fill_(tensor, fastinit.Normal(), seed=SEED, window=fastinit.Window((5, 7), (0, 0)))


def test_fill_takes_distributed_tensors(ranks):
    ranks.run(_check_fill, world=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["empty", "shard", "shard, on meta"])
def test_init_weights_of_what_a_block_left_unwritten_gives_the_bits_of_an_ordinary_model(way, dtype):
    with fastinit.on("cpu", dtype, seed=SEED + 1, **{way.partition(",")[0]: True}):
        model = Net()
    if way == "shard":
        model.to_empty(device="cpu")
    with fastinit.on("cpu", seed=SEED):
        model.init_weights()
    if "meta" in way:
        assert all(parameter.is_meta for parameter in model.parameters())
        fastinit.materialize(model)
    assert fastinit.uninitialized(model) == []
    expected = registered(whole(dtype))
    for name, tensor in registered(model).items():
        assert type(tensor) is nn.Parameter and same_bits(tensor, expected[name]), name


def test_what_is_on_meta_takes_constants_in_its_parts_and_refuses_what_cannot_be_recorded():
    with fastinit.on("cpu", seed=SEED, shard=True):
        model = nn.Embedding(6, 4)
    with fastinit.on("cpu", seed=SEED + 1), torch.no_grad():
        model.weight.normal_(0, 0.1)
        model.weight[2].zero_()
        with pytest.raises(RuntimeError, match="'weight' is on the meta device"):
            model.weight[3].normal_()
    with fastinit.on("cpu", seed=SEED + 1), torch.no_grad():
        expected = torch.empty(6, 4).normal_(0, 0.1)
        expected[2] = 0
    assert fastinit.materialize(model) == ["weight"]
    assert same_bits(model.weight, expected)


@pytest.mark.parametrize("keep", ["empty", "shard"])
def test_a_tensor_like_an_unwritten_one_is_recorded_in_the_next_block(keep):
    def made(**options):
        with fastinit.on("cpu", "bf16", seed=SEED):
            with fastinit.on("cpu", "bf16", seed=SEED + 1, **options):
                inner = nn.Linear(3, 2)
            model = nn.Module()
            model.noise = nn.Parameter(torch.randn_like(inner.weight))
            model.scale = nn.Parameter(inner.bias.new_full((3,), 0.1))
            model.ones = nn.Parameter(torch.ones_like(inner.weight, dtype=torch.float32))
            model.inner = inner
        fastinit.materialize(model)
        return registered(model)

    ours, expected = made(**{keep: True}), made()
    assert list(ours) == list(expected)
    for name, tensor in ours.items():
        assert type(tensor) is nn.Parameter and same_bits(tensor, expected[name]), name


@pytest.mark.parametrize("size", [5, 16, 64])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_orthogonal_parametrizations_are_orthogonal_in_half_precision(size, dtype):
    def made(dtype):
        with fastinit.on("cpu", dtype, seed=SEED):
            return nn.utils.parametrizations.orthogonal(nn.Linear(size, size))

    model, full = made(dtype), made("fp32")
    base = model.parametrizations.weight[0].base
    assert same_bits(base, full.parametrizations.weight[0].base.to(base.dtype))
    error = (model.weight.float().T @ model.weight.float() - torch.eye(size)).abs().max()
    assert error < {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}[dtype]
