"""How fast readers of safetensors files fill a GPU: fastinit.load beside libraries made for that, warm and cold.

    python benchmarks/load_readers.py [--gigabytes 13.5] [--folder DIRECTORY] [--out DIRECTORY]

Each reader runs in a process of its own, since most are set up by environment variables that a process reads once:
three times with the file in the page cache, and twice after the cache has been told to drop it. What a library does
by default, and what it does when told to read through the page cache or past it, are readers of their own. The clock
runs from the names of the files to tensors on the GPU that are all there; a model that would take them is not built,
except by fastinit.load, which gives no tensors without one.

Bounds: `dd iflag=direct` into nothing, alone and eight at once in different parts of the file, for the disk.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastinit
from fastinit.cli import machine, measure, text

_TENSOR = (4096, 4096)


class Tensors(nn.Module):
    """A model of as many matrices as the file has."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.empty(_TENSOR)) for _ in range(count))


def names(count: int) -> list[str]:
    return [f"layers.{number}" for number in range(count)]


def by_fastinit(path: Path, count: int, device: torch.device) -> Any:
    return fastinit.load(lambda: Tensors(count), path, device, "bf16", progress=False)


def by_safetensors(path: Path, count: int, device: torch.device) -> Any:
    from safetensors.torch import load_file

    return load_file(path, device=str(device))


def by_runai(path: Path, count: int, device: torch.device) -> Any:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path)], device=str(device))
        return dict(streamer.get_tensors())


def by_fastsafetensors(path: Path, count: int, device: torch.device) -> Any:
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, str(device), nogds=os.environ.get("NOGDS") == "1")
    loader.add_filenames({0: [str(path)]})
    buffers = loader.copy_files_to_device()
    return loader, buffers, {name: buffers.get_tensor(name) for name in names(count)}


def by_instanttensor(path: Path, count: int, device: torch.device) -> Any:
    from instanttensor import safe_open

    with safe_open(str(path), framework="pt", device=device) as file:
        return dict(file.tensors())


def by_kvikio(path: Path, count: int, device: torch.device) -> Any:
    import cupy
    import kvikio
    import kvikio.defaults

    kvikio.defaults.set({"num_threads": 16, "task_size": 8 << 20})
    with open(path, "rb") as opened:
        header = 8 + int.from_bytes(opened.read(8), "little")
        metadata = json.loads(opened.read(header - 8))
    tensors = {name: torch.empty(_TENSOR, dtype=torch.bfloat16, device=device) for name in names(count)}
    with kvikio.CuFile(path, "r") as file:
        futures = [
            file.pread(cupy.asarray(tensor.view(torch.uint8)), file_offset=header + metadata[name]["data_offsets"][0])
            for name, tensor in tensors.items()
        ]
        for future in futures:
            future.get()
    return tensors


Reader = Callable[[Path, int, torch.device], Any]
# Name: what reads, and the environment that it wants.
READERS: dict[str, tuple[Reader, dict[str, str]]] = {
    "fastinit.load": (by_fastinit, {}),
    "safetensors load_file": (by_safetensors, {}),
    "runai-model-streamer": (by_runai, {}),
    "runai-model-streamer, sync_buffered": (by_runai, {"RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"}),
    "runai-model-streamer, io_uring_direct": (by_runai, {"RUNAI_STREAMER_FS_STRATEGY": "io_uring_direct"}),
    "runai-model-streamer, libaio_direct": (by_runai, {"RUNAI_STREAMER_FS_STRATEGY": "libaio_direct"}),
    "fastsafetensors": (by_fastsafetensors, {}),
    "fastsafetensors, nogds, buffered": (by_fastsafetensors, {"NOGDS": "1", "FASTSAFETENSORS_ODIRECT": "0"}),
    "fastsafetensors, nogds, direct": (by_fastsafetensors, {"NOGDS": "1", "FASTSAFETENSORS_ODIRECT": "1"}),
    "instanttensor": (by_instanttensor, {}),
    "instanttensor, buffered": (by_instanttensor, {"INSTANTTENSOR_BACKEND": "BUFFERED"}),
    "instanttensor, mmap": (by_instanttensor, {"INSTANTTENSOR_BACKEND": "MMAP"}),
    "kvikio, buffered": (by_kvikio, {"KVIKIO_COMPAT_MODE": "ON"}),
    "kvikio, direct": (by_kvikio, {"KVIKIO_COMPAT_MODE": "ON", "KVIKIO_AUTO_DIRECT_IO_READ": "ON"}),
}


def drop(path: Path) -> None:
    """Have the page cache forget a file, which must be on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path: Path) -> float:
    """Which part of a file the page cache has."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_WRITE) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        view = (ctypes.c_ubyte * len(mapped)).from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(view), ctypes.c_size_t(len(mapped)), pages)
        del view
    if failed:
        raise OSError("mincore failed")
    return sum(page & 1 for page in pages) / len(pages)


def read_in_this_process(name: str, path: Path, count: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of one reader; the first warm one sets up what is set up once."""
    reader, _ = READERS[name]
    torch.zeros(1, device=device)
    seconds: dict[str, list[float]] = {"warm": [], "cold": []}
    for kind in ("warm", "warm", "warm", "cold", "cold"):
        if kind == "cold":
            drop(path)
        measure.synchronize(device)
        began = time.perf_counter()
        kept = reader(path, count, device)
        measure.synchronize(device)
        seconds[kind].append(time.perf_counter() - began)
        if kind == "cold" and len(seconds["cold"]) == 2:
            check(kept, count)
        del kept
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return seconds


def check(kept: Any, count: int) -> None:
    """Whether what a reader made has the file's values: a few of each tensor."""
    tensors = kept[-1] if isinstance(kept, tuple) else kept.state_dict() if isinstance(kept, nn.Module) else kept
    for number, name in enumerate(names(count)):
        corner = tensors[name][-1, -2:].float().cpu().tolist()
        if corner != [number % 128, 3.0]:
            raise AssertionError(f"{name} ends in {corner}")


def write(path: Path, count: int) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for number, name in enumerate(names(count)):
        tensors[name] = torch.full(_TENSOR, 3.0, dtype=torch.bfloat16)
        tensors[name][-1, -2] = number % 128
    save_file(tensors, path, {"format": "pt"})


def direct_reads(path: Path, at_once: int) -> float:
    """Bytes per second of `dd` past the page cache."""
    blocks = path.stat().st_size // (8 << 20) // at_once
    began = time.perf_counter()
    running = [
        subprocess.Popen(
            ["dd", f"if={path}", "of=/dev/null", "bs=8M", "iflag=direct", f"skip={part * blocks}", f"count={blocks}"],
            stderr=subprocess.DEVNULL,
        )
        for part in range(at_once)
    ]
    if any(each.wait() for each in running):
        raise OSError("dd cannot read past the page cache here")
    return at_once * blocks * (8 << 20) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gigabytes", type=float, default=13.5)
    parser.add_argument("--folder", type=Path, help="for the file; its file system is what is measured")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    parser.add_argument("--readers", choices=READERS, nargs="+", default=list(READERS))
    parser.add_argument("--reader", choices=READERS, help="in this process, of the file that --file names")
    parser.add_argument("--file", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    count = max(1, round(options.gigabytes * 1e9 / (2 * _TENSOR[0] * _TENSOR[1])))
    if options.reader:
        print(json.dumps(read_in_this_process(options.reader, options.file, count, device)))
        return

    results: dict[str, Any] = {"machine": machine.describe(), "device": str(device), "readers": {}}
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "model.safetensors"
        write(path, count)
        results["bytes"] = size = path.stat().st_size
        drop(path)
        results["cached after dropping"] = cached(path)
        for at_once in (1, 8):
            try:
                results[f"dd, {at_once} at once"] = direct_reads(path, at_once)
            except OSError as error:
                results[f"dd, {at_once} at once"] = str(error)
        for name in options.readers:
            _, environment = READERS[name]
            command = [sys.executable, __file__, "--reader", name, "--file", path, "--device", str(device)]
            command += ["--gigabytes", str(options.gigabytes)]
            try:
                done = subprocess.run(
                    command, env=os.environ | environment, capture_output=True, text=True, timeout=120
                )
                record = (
                    json.loads(done.stdout.splitlines()[-1])
                    if done.returncode == 0
                    else {"error": (done.stderr.strip().splitlines() or ["?"])[-1]}
                )
            except subprocess.TimeoutExpired:
                record = {"error": "not done within 120 s"}
            results["readers"][name] = record
            row = [name]
            for kind in ("warm", "cold"):
                row.append(f"{size / min(record[kind]) / 1e9:.1f}" if kind in record else record["error"][:70])
            rows.append(row)
            print(*row, sep=" | ", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "load-readers.json").write_text(json.dumps(results, indent=1) + "\n")
    print(text.markdown_table(["reader", "GB/s from the page cache", "GB/s, cache dropped"], rows))
    print({key: value for key, value in results.items() if key.startswith(("dd", "cached", "bytes"))})


if __name__ == "__main__":
    main()
