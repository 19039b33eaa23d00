"""Sharded models loaded from safetensors files: each rank has its part of the values, and reads no more than that."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from models import same_bits
from ranks import Ranks, cases, distributions, on_every_rank
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastinit
from fastinit import CheckpointError
from fastinit.checkpoint_files import Checkpoint


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory)
    yield ranks
    ranks.end()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@given(distributions())
@cases(60)
def test_every_placement_gets_its_values_rounded_once(folder, distribution):
    shape, mesh_shape, placements = distribution
    whole = torch.randn(shape)
    save_file({"0": whole, "1": torch.ones(3)}, folder / "whole.safetensors")

    def check(rank):
        mesh = init_device_mesh("cpu", mesh_shape)
        model = nn.ParameterList([torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(3)])
        model[0] = nn.Parameter(distribute_tensor(model[0].data, mesh, placements, src_data_rank=None))
        local, place = model[0].to_local(), model[0]._local_tensor.data_ptr()
        fastinit.load(model, folder / "whole.safetensors", progress=False)
        expected = distribute_tensor(whole.bfloat16(), mesh, placements, src_data_rank=None).to_local()
        assert same_bits(local.contiguous(), expected.contiguous())
        assert model[0]._local_tensor.data_ptr() == place and torch.equal(model[1], torch.ones(3))

    on_every_rank(torch.Size(mesh_shape).numel(), check)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(256, 1001)
        self.down = nn.Linear(1001, 256)
        self.norm = nn.BatchNorm1d(256)


def made(seed):
    with fastinit.on("cpu", "fp32", seed=seed):
        return nn.Sequential(*(Block() for _ in range(4)))


def read_bytes():
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


def load_with_fsdp2(path):
    """The number of bytes that this rank reads."""
    mesh = init_device_mesh("cpu", (2,))
    model = made(1)
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fastinit.load(model, path, progress=False)  # imports
    for parameter in model.parameters():
        parameter.detach().zero_()
    before = read_bytes()
    report = fastinit.LoadReport()
    fastinit.load(model, path, progress=False, report=report)
    read = read_bytes() - before
    state = made(2).state_dict()
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, state[name]), name
    assert report.bytes == sum(tensor.nbytes for tensor in state.values()) and not report.missing
    return read


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc")
def test_two_ranks_of_fsdp2_read_a_file_about_once(ranks, folder):
    state = made(2).state_dict()
    save_file(state, folder / "fsdp2.safetensors")
    size = (folder / "fsdp2.safetensors").stat().st_size
    read = ranks.run(load_with_fsdp2, folder / "fsdp2.safetensors", world=2)
    assert 0.9 * size < sum(read) <= 1.1 * size and max(read) <= 0.6 * size


def load_with_tensor_parallelism(path):
    mesh = init_device_mesh("cpu", (2,))
    model = made(1)
    for block in model:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fastinit.load(model, path, progress=False)
    state = made(2).state_dict()
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, state[name]), name
    with pytest.raises(CheckpointError, match=r"2\.down\.weight has the value 1e\+06"):
        fastinit.load(model.half(), path.with_name("large.safetensors"), progress=False)


def test_tensor_parallelism_is_loaded_and_what_does_not_fit_is_refused_on_the_rank_that_has_it(ranks, folder):
    state = made(2).state_dict()
    save_file(state, folder / "tp.safetensors")
    state["2.down.weight"][:, 3] = 1e6
    state["2.down.weight"][:, 900] = 1e6
    save_file(state, folder / "large.safetensors")
    ranks.run(load_with_tensor_parallelism, folder / "tp.safetensors", world=2)


def save_from_fsdp2(path):
    mesh = init_device_mesh("cpu", (2,))
    model = made(2)
    for block in model:
        fully_shard(block, mesh=mesh)
    dcp.save(model.state_dict(), checkpoint_id=path)


def load_on_another_mesh(path):
    mesh = init_device_mesh("cpu", (2,))
    models = [made(1), made(1)]
    fully_shard(models[0], mesh=mesh)
    for block in models[1]:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    state = made(2).bfloat16().state_dict()
    for model in models:
        fastinit.load(model.bfloat16(), path, progress=False)
        for name, tensor in model.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert same_bits(whole, state[name].to(tensor.dtype)), name


def test_a_distributed_checkpoint_is_streamed_chunk_by_chunk_onto_any_mesh(ranks, folder):
    path = folder / "from_fsdp2"
    ranks.run(save_from_fsdp2, path, world=2)
    checkpoint = Checkpoint(path)
    assert len(checkpoint.parts("0.up.weight")) == 2
    ranks.run(load_on_another_mesh, path, world=2)
    model = fastinit.load(lambda: made(1), path, "cpu", "bf16", progress=False)
    for name, tensor in made(2).state_dict().items():
        assert same_bits(model.state_dict()[name], tensor.to(model.state_dict()[name].dtype)), name
