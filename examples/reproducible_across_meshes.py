"""One model on 1, 2 and 4 ranks and three kinds of meshes: fastinit's weights are the same on all, torch's are not.

    python examples/reproducible_across_meshes.py

It starts four processes on the CPU by itself, shards a model in five ways, and prints a digest of its weights: those of
fastinit, and those that `to_empty` and `reset_parameters` give after the same torch.manual_seed.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fastinit

# Sizes and names of each mesh; a model is split over "tensor", sharded over "data" and replicated over "copies".
MESHES = [
    ((1,), ("data",)),
    ((2,), ("data",)),
    ((4,), ("data",)),
    ((2, 2), ("copies", "data")),
    ((2, 2), ("data", "tensor")),
]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))


def shard(module: nn.Module, sizes: tuple[int, ...], names: tuple[str, ...]) -> None:
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    if "tensor" in names:
        parallelize_module(module, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(module, mesh=mesh["copies", "data"] if "copies" in names else mesh["data"])


def by_fastinit(sizes: tuple[int, ...], names: tuple[str, ...]) -> nn.Module:
    with fastinit.on("cpu", shard=True):
        module = model()
    shard(module, sizes, names)
    fastinit.materialize(module)
    return module


def by_torch(sizes: tuple[int, ...], names: tuple[str, ...]) -> nn.Module:
    with torch.device("meta"):
        module = model()
    shard(module, sizes, names)
    module.to_empty(device="cpu")
    for each in (module[0], module[2]):
        each.reset_parameters()
    return module


def digest(module: nn.Module) -> str:
    """Of all weights, gathered from the ranks that hold their parts."""
    bits = hashlib.sha256()
    for parameter in module.parameters():
        assert isinstance(parameter, DTensor)
        bits.update(parameter.full_tensor().detach().numpy().tobytes())
    return bits.hexdigest()[:16]


def run(rank: int, folder: str, results: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # DTensor warns that it gathers in two steps
    for number, (sizes, names) in enumerate(MESHES):
        ranks = torch.Size(sizes).numel()
        if rank >= ranks:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=ranks)
        digests = []
        for create in (by_fastinit, by_torch):
            torch.manual_seed(0)
            digests.append(digest(create(sizes, names)))
        if rank == 0:
            results.put((ranks, " x ".join(f"{size} {name}" for size, name in zip(sizes, names, strict=True)), digests))
        dist.destroy_process_group()


if __name__ == "__main__":
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (folder, results), nprocs=4)
    rows = [results.get() for _ in MESHES]
    print(f"{'ranks':5}  {'mesh':18}  {'fastinit':16}  torch")
    for ranks, mesh, (ours, theirs) in rows:
        print(f"{ranks:<5}  {mesh:18}  {ours}  {theirs}")
    ours, theirs = zip(*(digests for _, _, digests in rows), strict=True)
    assert len(set(ours)) == 1, "fastinit's weights depend on the mesh"
    print(f"fastinit: {len(set(ours))} digest; torch: {len(set(theirs))} of {len(rows)}")
