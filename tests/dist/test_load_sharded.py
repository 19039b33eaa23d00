"""Sharded models loaded from files: each rank has its part of the values, and reads no more than that."""

import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from models import same_bits
from ranks import Ranks, cases, distributions, on_every_rank, read_bytes
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastinit
from fastinit import CheckpointError
from fastinit.checkpoint import copies
from fastinit.checkpoint.files import Checkpoint


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(4, tmp_path_factory)
    yield ranks
    ranks.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@given(distributions(), st.sampled_from([0, copies._ROW_BYTES]))
@cases(60)
def test_every_placement_gets_its_values_rounded_once(folder, distribution, row_bytes):
    """Whether rows of a few bytes are read one by one, or cut from the mapped file."""
    shape, mesh_shape, placements = distribution
    whole = torch.randn(shape)
    state = {"0": whole, "1": torch.ones(3)}
    save_file(state, folder / "whole.safetensors")
    torch.save({**state, "0": whole.mT.contiguous().mT if whole.dim() > 1 else whole}, folder / "transposed.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no process group; what is there is overwritten
        dcp.save(state, checkpoint_id=folder / "dcp")

    def check(rank):
        mesh = init_device_mesh("cpu", mesh_shape)
        model = nn.ParameterList([torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(3)])
        model[0] = nn.Parameter(distribute_tensor(model[0].data, mesh, placements, src_data_rank=None))
        local, place = model[0].to_local(), model[0]._local_tensor.data_ptr()
        expected = distribute_tensor(whole.bfloat16(), mesh, placements, src_data_rank=None).to_local()
        for name in ("whole.safetensors", "transposed.pt", "dcp"):
            with mock.patch.object(copies, "_ROW_BYTES", row_bytes):
                fastinit.load(model, folder / name, progress=False)
            assert same_bits(local.contiguous(), expected.contiguous()), name
            assert model[0]._local_tensor.data_ptr() == place and torch.equal(model[1], torch.ones(3))
            for parameter in model:
                parameter.detach().zero_()

    on_every_rank(torch.Size(mesh_shape).numel(), check)


class OwnCode(nn.Linear):
    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)


@pytest.mark.parametrize("dim", [0, 1])
def test_loading_code_of_a_models_own_sees_whole_tensors_and_fills_shards(folder, dim):
    source = nn.Linear(5, 7)
    torch.save(source.state_dict(), folder / "linear.pt")

    def check(rank):
        mesh = init_device_mesh("cpu", (3,))
        model = OwnCode(5, 7, dtype=torch.bfloat16)
        shard = distribute_tensor(model.weight.data, mesh, [Shard(dim)], src_data_rank=None)
        model.weight = nn.Parameter(shard)
        fastinit.load(model, folder / "linear.pt", progress=False)
        expected = distribute_tensor(source.weight.data.bfloat16(), mesh, [Shard(dim)], src_data_rank=None).to_local()
        assert same_bits(model.weight.to_local(), expected) and same_bits(model.bias, source.bias.bfloat16())

    on_every_rank(3, check)


class Block(nn.Module):
    def __init__(self, width=1001):
        super().__init__()
        self.up = nn.Linear(256, width)
        self.down = nn.Linear(width, 256)
        self.norm = nn.BatchNorm1d(256)


def made(seed, width=1001):
    with fastinit.on("cpu", "fp32", seed=seed):
        return nn.Sequential(*(Block(width) for _ in range(4)))


def by_fsdp2(model, mesh):
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def by_tensor_parallelism(model, mesh):
    """Rows of one matrix, columns of the other."""
    for block in model:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh, plan, src_data_rank=None)  # all ranks make the same model


def by_both(model, mesh):
    by_tensor_parallelism(model, mesh["tensor"])
    by_fsdp2(model, mesh["data"])


# The width that each has. Of uneven shards of tensor parallelism FSDP2 cuts other rows than `distribute_tensor` says.
SHARDINGS = {by_fsdp2: 1001, by_tensor_parallelism: 1001, by_both: 1000}


def mesh_of(shard, world):
    if shard is by_both:
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    return init_device_mesh("cpu", (world,))


def assert_loaded(model, state):
    """Fail unless this rank has its part of each tensor, rounded once and as torch would cut it; nobody waits."""
    for name, tensor in model.state_dict().items():
        expected = state[name].to(tensor.dtype)
        if isinstance(tensor, DTensor):
            expected = distribute_tensor(expected, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
            tensor = tensor.to_local()
        assert same_bits(tensor.contiguous(), expected.contiguous()), name


def load_and_count(path, shard, world):
    """The number of bytes that this rank reads."""
    model = made(1, SHARDINGS[shard])
    shard(model, mesh_of(shard, world))
    fastinit.load(model, path, progress=False)  # imports
    for tensor in model.state_dict().values():
        tensor.detach().zero_()
    before = read_bytes()
    report = fastinit.LoadReport()
    fastinit.load(model, path, progress=False, report=report)
    read = read_bytes() - before
    state = made(2, SHARDINGS[shard]).state_dict()
    assert_loaded(model, state)
    assert report.bytes == sum(tensor.nbytes for tensor in state.values()) and not report.missing
    return read


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("shard", SHARDINGS)
def test_ranks_together_read_a_file_about_once(ranks, folder, shard, world):
    path = folder / f"{shard.__name__}.safetensors"
    save_file(made(2, SHARDINGS[shard]).state_dict(), path)
    size = path.stat().st_size
    read = ranks.run(load_and_count, path, shard, world, world=world)
    assert 0.9 * size < sum(read) <= 1.1 * size and max(read) <= 1.2 * size / world


@pytest.mark.parametrize("shard", SHARDINGS)
def test_a_model_without_values_is_loaded_and_what_the_file_lacks_is_initialized(folder, shard):
    width = SHARDINGS[shard]
    state = made(2, width).state_dict()
    new = made(1, width).state_dict()
    lacking = {name: state.pop(name) for name in ("1.down.weight", "2.up.bias", "3.norm.weight")}
    save_file(state, folder / "part.safetensors")

    def check(rank):
        with fastinit.on("cpu", "fp32", seed=1, shard=True):
            model = nn.Sequential(*(Block(width) for _ in range(4)))
        shard(model, mesh_of(shard, 4))
        fastinit.materialize(model, empty=True)
        report = fastinit.LoadReport()
        fastinit.load(model, folder / "part.safetensors", strict=False, progress=False, report=report)
        assert set(report.missing) == set(lacking) and not fastinit.uninitialized(model)
        assert_loaded(model, {name: state.get(name, new[name]) for name in new})

    on_every_rank(4, check)


def load_wider_values_and_count(path, shard, world):
    """What a rank reads for a model in bf16 that has no values yet."""
    read = []
    for _ in range(2):  # imports
        with fastinit.on("cpu", "bf16", seed=1, shard=True):
            model = nn.Sequential(*(Block(SHARDINGS[shard]) for _ in range(4)))
        shard(model, mesh_of(shard, world))
        fastinit.materialize(model, empty=True)
        before = read_bytes()
        fastinit.load(model, path, progress=False)
        read.append(read_bytes() - before)
    assert_loaded(model, made(2).state_dict())
    return read[1]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc")
def test_what_has_no_values_to_keep_is_not_read_twice(ranks, folder):
    save_file(made(2).state_dict(), folder / "fp32.safetensors")
    size = (folder / "fp32.safetensors").stat().st_size
    read = ranks.run(load_wider_values_and_count, folder / "fp32.safetensors", by_fsdp2, 2, world=2)
    assert 0.9 * size < sum(read) <= 1.1 * size


@pytest.mark.parametrize("shard", [by_fsdp2, by_tensor_parallelism])
def test_a_model_without_values_has_none_after_it_was_refused(folder, shard):
    state = made(2).state_dict()
    state["3.up.weight"][:, 7] = 1e6  # on every rank
    save_file(state, folder / "refused.safetensors")
    save_file(made(2).state_dict(), folder / "accepted.safetensors")

    def check(rank):
        with fastinit.on("cpu", "fp16", seed=1, shard=True):
            model = nn.Sequential(*(Block() for _ in range(4)))
        shard(model, mesh_of(shard, 2))
        fastinit.materialize(model, empty=True)
        unwritten = fastinit.uninitialized(model)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"3\.up\.weight has the value 1e\+06"):
                fastinit.load(model, folder / "refused.safetensors", progress=False)
            assert fastinit.uninitialized(model) == unwritten
        fastinit.load(model, folder / "accepted.safetensors", progress=False)
        assert_loaded(model, made(2).state_dict())

    on_every_rank(2, check)


def load_what_is_too_large(path):
    model = made(1)
    by_tensor_parallelism(model, init_device_mesh("cpu", (2,)))
    with pytest.raises(CheckpointError, match=r"2\.down\.weight has the value 1e\+06"):
        fastinit.load(model.half(), path, progress=False)


def test_what_does_not_fit_is_refused_on_the_rank_that_has_it(ranks, folder):
    state = made(2).state_dict()
    state["2.down.weight"][:, 3] = 1e6
    state["2.down.weight"][:, 900] = 1e6
    save_file(state, folder / "large.safetensors")
    ranks.run(load_what_is_too_large, folder / "large.safetensors", world=2)


def save_from_fsdp2(path):
    model = made(2)
    by_fsdp2(model, init_device_mesh("cpu", (2,)))
    dcp.save(model.state_dict(), checkpoint_id=path)


def load_on_another_mesh(path):
    mesh = init_device_mesh("cpu", (2,))
    models = [made(1), made(1)]
    fully_shard(models[0], mesh=mesh)
    by_tensor_parallelism(models[1], mesh)
    state = made(2).bfloat16().state_dict()
    for model in models:
        fastinit.load(model.bfloat16(), path, progress=False)
        assert_loaded(model, state)


def test_a_distributed_checkpoint_is_streamed_chunk_by_chunk_onto_any_mesh(ranks, folder):
    path = folder / "from_fsdp2"
    ranks.run(save_from_fsdp2, path, world=2)
    checkpoint = Checkpoint(path)
    assert len(checkpoint.parts("0.up.weight")) == 2
    ranks.run(load_on_another_mesh, path, world=2)
    model = fastinit.load(lambda: made(1), path, "cpu", "bf16", progress=False)
    for name, tensor in made(2).state_dict().items():
        assert same_bits(model.state_dict()[name], tensor.to(model.state_dict()[name].dtype)), name
