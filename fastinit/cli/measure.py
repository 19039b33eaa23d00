"""How the benchmarks measure: the time of a fill, the time and the memory of a model's creation."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fastinit

if TYPE_CHECKING:
    from .peers import Running
    from .ways import Build, Creator

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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


CALLS = 8  # of a fill between two events on a GPU


def timed_fill(fill: Running, device: torch.device) -> float:
    """Seconds that a fill takes until its values are there."""
    if fill.setup is not None:
        fill.setup(CALLS if device.type == "cuda" else 1)
    if device.type == "cpu":
        began = time.perf_counter()
        result = fill.run()
        if fill.wait is not None:
            fill.wait(result)
        return time.perf_counter() - began
    # Several, so that Python's part of the first one, before the GPU has anything to do, does not count.
    with torch.cuda.device(device):
        if fill.wait is not None:
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(CALLS):
                result = fill.run()
            fill.wait(result)
            return (time.perf_counter() - began) / CALLS
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS):
            fill.run()
        end.record()
        end.synchronize()
        seconds: float = start.elapsed_time(end) / 1e3
        return seconds / CALLS


def timed_creation(create: Creator, build: Build, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """(model, measurements). Measured are, in seconds and bytes:

    seconds: until the constructor has returned and all that it enqueued on the GPU is done.
    tensor_bytes: of the model's parameters and buffers.
    host_growth: by which the peak of this process's resident memory exceeds what was resident before; None if this
        system cannot reset the peak.
    device_peak, device_unused: peak of allocated memory beyond what was allocated before; reserved from the GPU but not
        allocated, at the end. None on the CPU.
    split: the parts of the time that fastinit's report tells, by their names there.
    """
    gc.collect()
    synchronize(device)
    memory = Memory(device)
    start = time.perf_counter()
    model, report = create(build)
    synchronize(device)
    seconds = time.perf_counter() - start
    on_gpu = device.type == "cuda"
    measurements: dict[str, Any] = {
        "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensor_bytes": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "host_growth": memory.host_growth(),
        "device_peak": memory.device_peak(),
        "device_unused": torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if on_gpu else None,
        "split": {} if report is None else split_of(report),
    }
    return model, measurements


class Memory:
    """Peaks of memory from here on, beyond what is in use now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.init()  # until then the allocator knows no device, and the next call refuses them all
            torch.cuda.reset_peak_memory_stats(device)
            self._allocated = torch.cuda.memory_allocated(device)
        trim_heap()
        self._resident = resident_memory() if reset_peak_resident() else None

    def host_growth(self) -> int | None:
        """Of this process's resident memory; None if this system cannot reset the peak."""
        return None if self._resident is None else peak_resident() - self._resident

    def device_peak(self) -> int | None:
        """Of memory that torch has allocated on the GPU; None on the CPU."""
        if self._device.type == "cpu":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._allocated

    def peak(self) -> int | None:
        """Of the memory that the device has."""
        return self.host_growth() if self._device.type == "cpu" else self.device_peak()


PARTS = ("seconds_python", "seconds_allocation", "seconds_fills")


def split_of(report: fastinit.Report) -> dict[str, float]:
    return {name: getattr(report, name) for name in PARTS if hasattr(report, name)}


def resident_memory() -> int | None:
    """Bytes of this process in memory now; None where the system does not tell."""
    return _status("VmRSS")


def peak_resident() -> int:
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    import resource  # which Windows does not have

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
