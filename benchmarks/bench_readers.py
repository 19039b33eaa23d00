"""How fast readers of safetensors files fill a device: fastinit.load beside libraries made for that, warm and cold.

Each reader runs in a process of its own, since most are set up by environment variables that a process reads once.
Warm: the file is in the page cache; cold: the cache has been told to drop it. What a library does by default, and what
it does when told to read through the page cache or past it, are readers of their own. The clock runs from the name of
the file to tensors on the device that are all there; a model that would take them is not built, except by
fastinit.load, which gives no tensors without one. The bound of the disk is `dd iflag=direct`, eight at once in
different parts of the file. kvikio's, the fastest, is also measured with a model that takes its tensors.
"""

import json
import os
import subprocess

import peers
import pytest
import torch
from torch import nn

import fastinit
from fastinit.cli import measure


class Tensors(nn.Module):
    """A model of as many matrices as the file has."""

    def __init__(self, count, shape):
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in range(count))


def by_fastinit(path, count, shape, device):
    return fastinit.load(lambda: Tensors(count, shape), path, device, "bf16", progress=False).state_dict()


def by_safetensors(path, count, shape, device):
    from safetensors.torch import load_file

    return load_file(path, device=str(device))


def by_runai(path, count, shape, device):
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path)], device=str(device))
        return dict(streamer.get_tensors())


def by_fastsafetensors(path, count, shape, device):
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, str(device), nogds=os.environ.get("NOGDS") == "1")
    loader.add_filenames({0: [str(path)]})
    buffers = loader.copy_files_to_device()
    tensors = {f"layers.{number}": buffers.get_tensor(f"layers.{number}") for number in range(count)}
    return tensors | {"kept": (loader, buffers)}  # which own the memory


def by_instanttensor(path, count, shape, device):
    from instanttensor import safe_open

    with safe_open(str(path), framework="pt", device=device) as file:
        return dict(file.tensors())


def by_kvikio(path, count, shape, device):
    import cupy
    import kvikio
    import kvikio.defaults

    kvikio.defaults.set({"num_threads": 16, "task_size": 8 << 20})
    with open(path, "rb") as opened:
        header = 8 + int.from_bytes(opened.read(8), "little")
        metadata = json.loads(opened.read(header - 8))
    names = [f"layers.{number}" for number in range(count)]
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16, device=device) for name in names}
    with kvikio.CuFile(path, "r") as file:
        futures = [
            file.pread(cupy.asarray(tensor.view(torch.uint8)), file_offset=header + metadata[name]["data_offsets"][0])
            for name, tensor in tensors.items()
        ]
        for future in futures:
            future.get()
    return tensors


def by_kvikio_with_model(path, count, shape, device):
    with torch.device("meta"):
        model = Tensors(count, shape)
    model.load_state_dict(by_kvikio(path, count, shape, device), assign=True)
    return model.state_dict()


# Name: what reads, its package, and the environment that it wants.
READERS = {
    "fastinit": (by_fastinit, None, ""),
    "safetensors load_file": (by_safetensors, "safetensors", ""),
    "runai": (by_runai, "runai_model_streamer", ""),
    "runai, sync_buffered": (by_runai, "runai_model_streamer", "RUNAI_STREAMER_FS_STRATEGY=sync_buffered"),
    "runai, io_uring_direct": (by_runai, "runai_model_streamer", "RUNAI_STREAMER_FS_STRATEGY=io_uring_direct"),
    "runai, libaio_direct": (by_runai, "runai_model_streamer", "RUNAI_STREAMER_FS_STRATEGY=libaio_direct"),
    "fastsafetensors": (by_fastsafetensors, "fastsafetensors", ""),
    "fastsafetensors, buffered": (by_fastsafetensors, "fastsafetensors", "NOGDS=1 FASTSAFETENSORS_ODIRECT=0"),
    "fastsafetensors, direct": (by_fastsafetensors, "fastsafetensors", "NOGDS=1 FASTSAFETENSORS_ODIRECT=1"),
    "instanttensor": (by_instanttensor, "instanttensor", ""),
    "instanttensor, buffered": (by_instanttensor, "instanttensor", "INSTANTTENSOR_BACKEND=BUFFERED"),
    "instanttensor, mmap": (by_instanttensor, "instanttensor", "INSTANTTENSOR_BACKEND=MMAP"),
    "kvikio, buffered": (by_kvikio, "kvikio", "KVIKIO_COMPAT_MODE=ON"),
    "kvikio, buffered, and a model": (by_kvikio_with_model, "kvikio", "KVIKIO_COMPAT_MODE=ON"),
    "kvikio, direct": (by_kvikio, "kvikio", "KVIKIO_COMPAT_MODE=ON KVIKIO_AUTO_DIRECT_IO_READ=ON"),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory, quick):
    """A file in bf16, how many tensors it has, and their shape. Each ends with its number and a 3."""
    from safetensors.torch import save_file

    count, shape = (4, (64, 64)) if quick else (200, (4096, 4096))  # 6.7 GB
    path = tmp_path_factory.mktemp("readers") / "model.safetensors"
    tensors = {f"layers.{number}": torch.full(shape, 3.0, dtype=torch.bfloat16) for number in range(count)}
    for number in range(count):
        tensors[f"layers.{number}"][-1, -2] = number
    save_file(tensors, path, {"format": "pt"})
    yield path, count, shape
    path.unlink()


@pytest.mark.parametrize("way", READERS)
@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_reader(figure, once, main_device, file, cache, way):
    nbytes = file[0].stat().st_size
    with figure(f"{nbytes / 1e9:.3g} GB, {cache}, {main_device}", way) as record:
        peers.require(READERS[way][1], "safetensors")
        seconds = once(measure.in_new_process, read, way, str(main_device), *file, timeout=120.0)
        record(seconds[cache], bytes=nbytes)


def read(way, device_name, path, count, shape):
    """Seconds of a reader in this process; the first read sets up what is set up once and does not count."""
    reader, _, environment = READERS[way]
    os.environ |= dict(each.split("=") for each in environment.split())
    device = torch.device(device_name)
    torch.zeros(1, device=device)
    seconds = {"warm": [], "cold": []}
    for cache in ("warm", "warm", "warm", "cold", "cold"):
        if cache == "cold":
            drop(path)
        taken, tensors = measure.seconds_of(lambda: reader(path, count, shape, device), device)
        seconds[cache].append(taken)
        for number in range(count):
            if tensors[f"layers.{number}"][-1, -2:].tolist() != [number, 3]:
                raise RuntimeError(f"{way} has read tensor {number} wrong")
        del tensors
        measure.clean_up(device)
    return {"warm": seconds["warm"][1:], "cold": seconds["cold"]}


def drop(path):
    """Have the page cache forget a file, which must be on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_disk(figure, quick, file):
    path, block, at_once = file[0], 4096 if quick else 8 << 20, 8
    blocks = path.stat().st_size // block // at_once
    command = ["dd", f"if={path}", "of=/dev/null", f"bs={block}", "iflag=direct", f"count={blocks}"]

    def run():
        processes = [
            subprocess.Popen([*command, f"skip={part * blocks}"], stderr=subprocess.DEVNULL) for part in range(at_once)
        ]
        if sum(each.wait() for each in processes):
            raise OSError("dd cannot read past the page cache here")

    with figure("the disk past the page cache", "dd, 8 at once") as record:
        nbytes = at_once * blocks * block
        record(lambda: measure.seconds_of(run, torch.device("cpu"))[0], rounds=2, bytes=nbytes)
