"""What a context did: `on` gives it, and what gives values later adds to it.

Private: it may change with any version.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

if sys.platform != "win32":
    import resource

from .execution import Timing
from .record.block import Block


@dataclass(slots=True)
class Report:
    """What one context did; complete once the context has ended.

    Pass it to `materialize`, and what that does is added.

    Attributes:
        device, dtype, seed: where, in what, and from which key.
        streams: "order", or "name" if names decide what is drawn.
        parameters: number of elements of all parameters that modules own, each counted once.
        bytes: their size.
        fills_executed: fills that were run, constants included.
        fills_dropped: fills that never ran because something overwrote the tensor first.
        fills_deferred: fills that `empty` has left to `fastinit.initialize`, or to nobody.
        fills_by_order: random fills whose order decides what they draw, although names were to do that.
        seconds: wall time inside the context. Fills on a GPU are asynchronous and may still be running.
        seconds_python: what of it was spent on the constructor and on recording it.
        seconds_allocation: what of it was spent on giving tensors their memory.
        seconds_fills: how long the fills took: on the CPU the rest of the wall time; on a GPU, where they run beside
            the constructor and after it, the time on the GPU. Reading it then waits for them.
        peak_memory: bytes by which the device's peak of allocated memory exceeds what was allocated at the start; on
            the CPU, by which the peak of the process's resident memory grew (0 on Windows, which does not tell, and on
            devices of other kinds).
    """

    device: torch.device
    dtype: torch.dtype
    seed: int
    streams: Literal["order", "name"] = "order"
    parameters: int = 0
    bytes: int = 0
    fills_executed: int = 0
    fills_dropped: int = 0
    fills_deferred: int = 0
    fills_by_order: int = 0
    seconds: float = 0.0
    seconds_python: float = 0.0
    seconds_allocation: float = 0.0
    peak_memory: int = 0
    _timing: Timing = field(default_factory=Timing, repr=False)
    _started: float = field(default=0.0, repr=False)
    _memory: int = field(default=0, repr=False)

    def __str__(self) -> str:
        deferred = f", {self.fills_deferred} deferred" if self.fills_deferred else ""
        if self.streams == "name":
            deferred += f", streams by name ({self.fills_by_order} by order)"
        return (
            f"{self.parameters:,} parameters, {readable(self.bytes)} in {str(self.dtype).removeprefix('torch.')} "
            f"on {self.device}: {self.fills_executed} fills executed, {self.fills_dropped} dropped{deferred}, "
            f"{self.seconds * 1e3:.1f} ms, peak memory {readable(self.peak_memory)}"
        )

    @property
    def seconds_fills(self) -> float:
        if not self._timing.events:
            return self._timing.fills
        for _, after in self._timing.events:
            after.synchronize()
        seconds: float = sum(before.elapsed_time(after) for before, after in self._timing.events) / 1e3
        return seconds


def start(device: torch.device, dtype: torch.dtype, seed: int, streams: Literal["order", "name"]) -> Report:
    """The report of a context that begins now."""
    report = Report(device, dtype, seed, streams)
    report._memory = _cuda_bytes(device, "current") if device.type == "cuda" else _peak_bytes(device)
    report._started = time.perf_counter()
    return report


def finish(report: Report, block: Block) -> None:
    """The context ends now."""
    report._timing = block.timing
    _add(report, report._started, block.timing)
    report.fills_dropped = block.dropped
    report.fills_deferred = block.deferred
    report.fills_by_order = len(block.by_order)


@contextmanager
def adding_to(report: Report | None) -> Iterator[Timing]:
    """Add to a report, if there is one, what is done under a timing that this gives."""
    began, timing = time.perf_counter(), Timing()
    yield timing
    if report is not None:
        _add(report, began, timing)
        report._timing.fills += timing.fills
        report._timing.events += timing.events


def _add(report: Report, began: float, timing: Timing) -> None:
    seconds = time.perf_counter() - began
    report.seconds += seconds
    report.fills_executed += timing.executed
    report.seconds_allocation += timing.allocation
    report.seconds_python += seconds - timing.allocation - timing.fills
    report.peak_memory = max(_peak_bytes(report.device) - report._memory, 0)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return _cuda_bytes(device, "peak")
    if device.type != "cpu" or sys.platform == "win32":
        return 0  # not known there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _cuda_bytes(device: torch.device, which: str) -> int:
    # torch.cuda.max_memory_allocated asks for the same numbers, and flattens all the others on the way.
    nbytes: int = torch.cuda.memory.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"][which]
    return nbytes


def readable(nbytes: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"
