"""Creating a model in one of several ways, with the time and the memory that it takes."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastinit

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

WAYS = {
    "fastinit": "fastinit.on(device, dtype)",
    "torch": "torch.device + default dtype",
    "naive": "CPU in fp32, then .to(device, dtype)",
}


def create(way: str, build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model that `build` makes, on `device` in `dtype`, created in one of `WAYS`."""
    if way == "fastinit":
        with fastinit.on(device, dtype):
            return build()
    if way == "torch":
        with default_dtype(dtype), device:
            return build()
    if way == "naive":
        return build().to(device, dtype)
    raise ValueError(f"way={way!r} is not one of {', '.join(WAYS)}")


def create_small(way: str, device: torch.device, dtype: torch.dtype) -> None:
    """Have the lazy imports, the CUDA context and the first load of kernels done before something is timed."""
    create(way, lambda: nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 8), nn.LayerNorm(8)), device, dtype)
    synchronize(device)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_creation(way: str, build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype):
    """(model, measurements). Measured are, in seconds and bytes:

    seconds: until the constructor has returned and all that it enqueued on the GPU is done.
    tensor_bytes: of the model's parameters and buffers.
    host_growth: by which the peak of this process's resident memory exceeds what was resident before; None if this
        system cannot reset the peak.
    device_peak, device_unused: peak of allocated memory beyond what was allocated before; reserved from the GPU but not
        allocated, at the end. None on the CPU.
    """
    gc.collect()
    trim_heap()
    synchronize(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
    peak_was_reset = reset_peak_resident()
    resident = resident_memory()
    start = time.perf_counter()
    model = create(way, build, device, dtype)
    synchronize(device)
    seconds = time.perf_counter() - start
    measurements: dict[str, Any] = {
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensor_bytes": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "host_growth": peak_resident() - resident if peak_was_reset and resident is not None else None,
        "device_peak": torch.cuda.max_memory_allocated(device) - allocated if on_gpu else None,
        "device_unused": torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if on_gpu else None,
    }
    return model, measurements


def resident_memory() -> int | None:
    """Bytes of this process in memory now; None where the system does not tell."""
    return _status("VmRSS")


def peak_resident() -> int:
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_resident() -> bool:
    """Make the peak of resident memory start again from now; False where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim_heap() -> None:
    """Give freed memory back to the system, so that what is allocated next shows as growth (glibc keeps some)."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def warm_memory(nbytes: int) -> None:
    """Write so much memory once and free it.

    A virtual machine may get memory from its host only when it is first written, at a fraction of the speed of memory;
    without this the measurement that happens to run first pays for all. On huge pages, because only whole ones that
    were just in use are sure to be backed by the host when huge pages are asked for next.
    """
    fastinit.empty(nbytes, dtype=torch.uint8, device="cpu").fill_(0)


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
