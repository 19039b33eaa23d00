"""What a context did, and what has written each tensor of its models; what gives values later adds to it.

Private: it may change with any version.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Literal

import torch
from torch import nn

if sys.platform != "win32":
    import resource

from .execution import Timing
from .layout import numel
from .native import ADD, CLAMP, DIVIDE, ERFINV, MULTIPLY
from .recipe import CALLED, COMPUTED, COPIED, Constant, Distribution, Normal, TruncatedNormal, Uniform, Write
from .record.block import Block
from .record.history import Written, written

# Where weights are multiplied, their standard deviation times the square root of the fan-in or the fan-out is within
# these bounds: about 1, 0.6 for the default of nn.Linear, down to 0.08 where residual branches are scaled by depth.
_LEAST_GAIN, _GREATEST_GAIN = 1 / 20, 5.0

_DISTRIBUTIONS: dict[int, type[Distribution]] = {
    each.kind: each for each in (Constant, Uniform, Normal, TruncatedNormal)
}


@dataclass(frozen=True, slots=True)
class FillReport:
    """One of the writes to a tensor.

    Attributes:
        distribution: a `Constant`, `Uniform`, `Normal` or `TruncatedNormal`; or "computed": by any operation that is
            not a recorded fill; or "copied": from another tensor, a checkpoint's say.
        steps: arithmetic on every element after the fill, such as ``("*", 0.5)`` or ``("clamp", -1.0, 1.0)``.
        stream: which random numbers; None if it draws none.
        seed: their key, where the code has set one of its own; None: the report's.
        elements: how many elements it writes, if these are a part of the tensor; None: all.
    """

    distribution: Distribution | Literal["computed", "copied"]
    steps: tuple[tuple[Any, ...], ...] = ()
    stream: int | None = None
    seed: int | None = None
    elements: int | None = None

    def __str__(self) -> str:
        text = self.distribution if isinstance(self.distribution, str) else _spelled(self.distribution)
        for name, *numbers in self.steps:
            text += f" {name}" + "".join(f" {number:.4g}" for number in numbers)
        return text if self.elements is None else f"{text} on {self.elements:,} elements"

    @property
    def is_random(self) -> bool:
        """Whether it draws from a distribution."""
        return not isinstance(self.distribution, (str, Constant))

    @property
    def std(self) -> float | None:
        """Standard deviation of what it writes; None if there is no formula for it."""
        if isinstance(self.distribution, str):
            return None
        std = _std(self.distribution)
        for operator, *numbers in self.steps:
            if operator in ("*", "/"):
                std *= abs(numbers[0]) if operator == "*" else 1 / abs(numbers[0])
            elif operator != "+":
                return None
        return std


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What one parameter or buffer was at the end of a block, and how it came by its values.

    Attributes:
        name: in the largest model of the block that has it; of tied ones the first name.
        module: class of the module that has it.
        is_parameter: whether it is a parameter and not a buffer.
        shape, dtype: of the tensor.
        writes: what has written it, or is to (`empty=`, `shard=`), in order; () if nothing has.
        replaced: what was written before, and overwritten whole; fills that never ran among them.
    """

    name: str
    module: type[nn.Module]
    is_parameter: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    writes: tuple[FillReport, ...]
    replaced: tuple[FillReport, ...]

    @property
    def source(self) -> Literal["random", "constant", "computed", "copied", "nothing"]:
        """Where its values are from."""
        if not self.writes:
            return "nothing"
        distributions = {each.distribution for each in self.writes}
        if "computed" in distributions:
            return "computed"
        if "copied" in distributions:
            return "copied"
        return "random" if any(each.is_random for each in self.writes) else "constant"

    @property
    def std(self) -> float | None:
        """Expected standard deviation, of the fill that writes most of it; None if there is no formula for it."""
        if self.source not in ("random", "constant"):
            return None
        return max(self.writes, key=lambda each: math.inf if each.elements is None else each.elements).std

    @property
    def fans(self) -> tuple[int, int] | None:
        """Its fan-in and fan-out, as ``torch.nn.init`` has them; None for what is no weight of a product."""
        if not self.is_parameter or len(self.shape) < 2 or issubclass(self.module, (nn.Embedding, nn.EmbeddingBag)):
            return None
        field_size = numel(self.shape[2:])
        return self.shape[1] * field_size, self.shape[0] * field_size


@dataclass
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
        tensors: what has written each parameter and buffer, as `TensorReport`, of the modules that still exist.
        findings: sentences about those that nothing has initialized, that were initialized twice and differently, or
            whose spread is far from what their fan-in and fan-out ask for.
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
    _found: list[Written] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        deferred = f", {self.fills_deferred} deferred" if self.fills_deferred else ""
        if self.streams == "name":
            deferred += f", streams by name ({self.fills_by_order} by order)"
        return (
            f"{self.parameters:,} parameters, {readable(self.bytes)} in {_dtype(self.dtype)} "
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

    @property
    def tensors(self) -> list[TensorReport]:
        return [
            TensorReport(
                each.name,
                type(module),
                each.is_parameter,
                each.shape,
                each.dtype,
                tuple(_reported(each.history.writes)),
                tuple(_reported(each.history.replaced)),
            )
            for each in self._found
            if (module := each.module()) is not None
        ]

    @property
    def findings(self) -> list[str]:
        return list(_findings(self.tensors))

    def table(self) -> str:
        """`tensors` and `findings` as text; those that differ by numbers in their names and by streams in one row."""
        rows: dict[tuple[str, ...], int] = {}
        for each in self.tensors:
            what = (str(each.shape), _dtype(each.dtype), _listed(each.writes) or "nothing", _listed(each.replaced))
            row = (pattern_of(each.name), *what)
            rows[row] = rows.get(row, 0) + 1
        header = ("", "tensor", "shape", "dtype", "written by", "replaced")
        text = _columns(header, [(f"{count} x" if count > 1 else "", *row) for row, count in rows.items()])
        return "\n".join((text, *(f"- {each}" for each in self.findings)))

    def to_json(self) -> str:
        """All of it as JSON: the attributes, `tensors` and `findings`."""
        numbers = {
            name: value for name, value in vars(self).items() if isinstance(value, (int, float)) and name[0] != "_"
        }
        tensors = [
            {
                "name": each.name,
                "module": each.module.__name__,
                "is_parameter": each.is_parameter,
                "shape": each.shape,
                "dtype": _dtype(each.dtype),
                "source": each.source,
                "std": each.std,
                "writes": [_plain(write) for write in each.writes],
                "replaced": [_plain(write) for write in each.replaced],
            }
            for each in self.tensors
        ]
        described = {"device": str(self.device), "dtype": _dtype(self.dtype), "streams": self.streams, **numbers}
        described["seconds_fills"] = self.seconds_fills
        return json.dumps({**described, "tensors": tensors, "findings": self.findings}, indent=1)


def start(device: torch.device, dtype: torch.dtype, seed: int, streams: Literal["order", "name"]) -> Report:
    """The report of a context that begins now."""
    report = Report(device, dtype, seed, streams)
    report._memory = _cuda_bytes(device, "current") if device.type == "cuda" else _peak_bytes(device)
    report._started = time.perf_counter()
    return report


def look(report: Report, block: Block) -> None:
    """Note what models a block has made, before an engine takes the parameters over, and what is known of them."""
    report.parameters, report.bytes = block.parameters()
    report._found = written(block)


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
    began, timing = time.perf_counter(), Timing(watched=report is not None)
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


# --- writes -----------------------------------------------------------------------------------------------------------

# How steps are spelled, and how many numbers each takes.
_STEPS = {MULTIPLY: ("*", 1), DIVIDE: ("/", 1), ADD: ("+", 1), CLAMP: ("clamp", 2), ERFINV: ("erfinv", 0)}


def _reported(writes: Iterable[Write]) -> Iterator[FillReport]:
    for write in writes:
        if write.kind in (COMPUTED.kind, CALLED):
            yield FillReport("computed", tuple(map(_step, write.steps)))
        elif write.kind == COPIED.kind:
            yield FillReport("copied")
        else:
            kind = _DISTRIBUTIONS[write.kind]
            random = kind is not Constant
            yield FillReport(
                kind(*write.parameters),
                tuple(map(_step, write.steps)),
                write.stream if random else None,
                write.key if random else None,
                None if write.region is None else numel(write.region.sizes),
            )


def _step(step: tuple[int, float, float]) -> tuple[Any, ...]:
    operator, *numbers = step
    name, count = _STEPS[operator]
    return (name, *numbers[:count])


def _spelled(distribution: Distribution) -> str:
    return f"{type(distribution).__name__}({', '.join(f'{value:.4g}' for value in distribution.parameters)})"


def _plain(write: FillReport) -> dict[str, Any]:
    """A write as JSON has it, where no number is infinite."""
    plain: dict[str, Any] = {"distribution": write.distribution, "std": write.std}
    if not isinstance(write.distribution, str):
        plain["distribution"] = type(write.distribution).__name__
        plain["parameters"] = [each if math.isfinite(each) else str(each) for each in write.distribution.parameters]
    return plain | {name: getattr(write, name) for name in ("steps", "stream", "seed", "elements")}


def _std(distribution: Distribution) -> float:
    if isinstance(distribution, Constant):
        return 0.0
    if isinstance(distribution, Uniform):
        return (distribution.high - distribution.low) / math.sqrt(12)
    if isinstance(distribution, Normal):
        return distribution.std
    # Between alpha and beta standard deviations: by the moments of a truncated normal.
    mean, std, low, high = distribution.parameters
    alpha, beta = (low - mean) / std, (high - mean) / std
    mass = (math.erf(beta / math.sqrt(2)) - math.erf(alpha / math.sqrt(2))) / 2
    at_alpha, at_beta = (math.exp(-z * z / 2) / math.sqrt(2 * math.pi) for z in (alpha, beta))
    moment = sum(sign * z * at for sign, z, at in ((1, alpha, at_alpha), (-1, beta, at_beta)) if math.isfinite(z))
    if mass <= 0:
        return 0.0
    return std * math.sqrt(max(1 + moment / mass - ((at_alpha - at_beta) / mass) ** 2, 0.0))


# --- what is worth a look ---------------------------------------------------------------------------------------------


def _findings(tensors: list[TensorReport]) -> Iterator[str]:
    unwritten = [each.name for each in tensors if each.is_parameter and each.source == "nothing"]
    if unwritten:
        yield f"never initialized: {_patterns(unwritten)}"
    overwritten = [each.name for each in tensors if any(fill.distribution == "copied" for fill in each.replaced)]
    if overwritten:
        yield f"copied from another tensor, a checkpoint's say, and then overwritten: {_patterns(overwritten)}"
    twice: dict[str, list[str]] = {}
    for each in tensors:
        drawn = [fill.distribution for fill in (*each.replaced, *each.writes) if fill.is_random]
        if len(set(drawn)) > 1:
            kinds = ", then ".join(type(distribution).__name__ for distribution in dict.fromkeys(drawn))
            twice.setdefault(kinds, []).append(each.name)
    for kinds, names in twice.items():
        yield f"initialized twice, differently ({kinds}): {_patterns(names)}"
    far: dict[str, list[str]] = {}
    for each in tensors:
        if each.fans is None or not each.std:
            continue
        gains = [each.std * math.sqrt(fan) for fan in each.fans]
        if not any(_LEAST_GAIN <= gain <= _GREATEST_GAIN for gain in gains):
            scales = " and ".join(f"{1 / math.sqrt(fan):.3g}" for fan in each.fans)
            text = f"standard deviation {each.std:.3g}, where fan-in and fan-out scaling give {scales}"
            far.setdefault(text, []).append(each.name)
    for text, names in far.items():
        yield f"{text}: {_patterns(names)}"


def pattern_of(name: str) -> str:
    """A name with an asterisk for each number in it."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _patterns(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(map(pattern_of, names)))


# --- text -------------------------------------------------------------------------------------------------------------


def _listed(writes: tuple[FillReport, ...]) -> str:
    return "; ".join(map(str, writes))


def _columns(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table as wide as the terminal where rich is installed, else as wide as it gets."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *rows)
        )
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    text = StringIO()
    Console(file=text, width=shutil.get_terminal_size((160, 24)).columns, markup=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def readable(nbytes: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


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
