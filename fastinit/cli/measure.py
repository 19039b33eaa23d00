"""How the commands and benchmarks/ measure: seconds, memory, processes of their own."""

from __future__ import annotations

import concurrent.futures
import ctypes
import gc
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import fastinit

from .machine import kernel_bytes

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Give torch so many threads; None: as many as it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean_up(device: torch.device) -> None:
    """Give all memory back that nothing holds: what comes next finds an empty allocator cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Seconds


def seconds_of(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Until it has returned and all that it enqueued on the GPU is done; and what it returned."""
    synchronize(device)
    began = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - began, result


CALLS = 8  # between two events on a GPU


def seconds_on_device(
    run: Callable[[], Any], device: torch.device, setup: Callable[[int], None] | None = None
) -> float:
    """For work of less than a millisecond: on a GPU by its events around several runs, whose Python then overlaps.

    `setup` does what has to be done, untimed, before it is run so many times.
    """
    calls = CALLS if device.type == "cuda" else 1
    if setup is not None:
        setup(calls)
    if device.type == "cpu":
        return seconds_of(run, device)[0]
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / calls


# Processes


def in_new_process(function: Callable[..., T], *arguments: Any, timeout: float = 600.0) -> T:
    """What a function of a module returns in a process that has done nothing else: see `in_new_processes`."""
    return in_new_processes(function, [arguments], timeout)[0]


def in_new_processes(function: Callable[..., T], arguments: list[tuple[Any, ...]], timeout: float = 600.0) -> list[T]:
    """What a function of a module returns for each of the arguments, all at the same time in new processes.

    Nothing that went before (allocator caches, resident memory, imports, code that Python has specialized) can favour
    what happens there, and a GPU that one breaks is whole for the next.

    Raises:
        whatever the function raised, from a traceback as text; BrokenProcessPool if a process ended; TimeoutError after
        so many seconds.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(arguments), context) as pool:
        futures = [pool.submit(function, *each) for each in arguments]
        try:
            # The first that fails: those that wait for it would never return.
            done = concurrent.futures.wait(futures, timeout, concurrent.futures.FIRST_EXCEPTION)
            for future in done.done:
                future.result()
            if done.not_done:
                raise TimeoutError(f"{function.__name__} was not done after {timeout:g} s")
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()
            raise
        return [future.result() for future in futures]


def on_ranks(
    function: Callable[..., T], ranks: int, device_type: str, *arguments: Any, timeout: float = 120.0
) -> list[T]:
    """What a function of a module returns on each of so many ranks, called with the rank's device and the arguments.

    A rank is a new process in a process group, with a GPU of its own (nccl), or its share of the CPU's threads (gloo).

    Raises:
        as `in_new_processes`.
    """
    with tempfile.TemporaryDirectory() as folder:
        jobs = [(function, rank, ranks, device_type, f"file://{folder}/store", arguments) for rank in range(ranks)]
        return in_new_processes(_on_rank, jobs, timeout)


def _on_rank(
    function: Callable[..., T], rank: int, ranks: int, device_type: str, store: str, arguments: tuple[Any, ...]
) -> T:
    # As torchrun would: Lightning and DeepSpeed read it, and take the process group that there is.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "0"}
    on_gpu = device_type == "cuda"
    device = torch.device(device_type, rank) if on_gpu else torch.device(device_type)
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=store, rank=rank, world_size=ranks)
    result = function(device, *arguments)
    dist.destroy_process_group()  # not after an error, which other ranks in a collective would hold up
    return result


# Memory


class Memory:
    """Peaks of memory from here on, beyond what is in use now."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.init()  # until then the allocator knows no device, and the next call refuses them all
            torch.cuda.reset_peak_memory_stats(device)
            self._allocated = torch.cuda.memory_allocated(device)
        _trim_heap()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts again
            self._resident = kernel_bytes("/proc/self/status", "VmRSS")
        except OSError:
            self._resident = None

    def host_growth(self) -> int | None:
        """Of this process's resident memory; None if this system cannot reset the peak."""
        peak = kernel_bytes("/proc/self/status", "VmHWM")
        return None if self._resident is None or peak is None else peak - self._resident

    def device_peak(self) -> int | None:
        """Of memory that torch has allocated on the GPU; None on the CPU."""
        if self._device.type == "cpu":
            return None
        return torch.cuda.max_memory_allocated(self._device) - self._allocated

    def beyond(self, nbytes: int) -> int | None:
        """By how much the peak of the device's own memory exceeds so many bytes, a model's."""
        peak = self.host_growth() if self._device.type == "cpu" else self.device_peak()
        return None if peak is None else max(peak - nbytes, 0)


def warm_memory(nbytes: int) -> None:
    """Write so much memory of the host once and free it.

    A virtual machine may get memory from its host only when it is first written, at a fraction of the speed of memory;
    without this the measurement that happens to run first pays for all. On huge pages, because only whole ones that
    were just in use are sure to be backed by the host when huge pages are asked for next.
    """
    fastinit.empty(nbytes, dtype=torch.uint8, device="cpu").fill_(0)


def _trim_heap() -> None:
    """Give freed memory back to the system, so that what is allocated next shows as growth (glibc keeps some)."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
