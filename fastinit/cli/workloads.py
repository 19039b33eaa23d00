"""What is measured: distributions to fill tensors from, and the usual ways of creating a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastinit
from fastinit.recipe import Distribution

from .measure import Memory, clean_up, default_dtype, seconds_of, warm_memory

Build = Callable[[], nn.Module]
Creator = Callable[[Build], "tuple[nn.Module, fastinit.Report | None]"]

SAMPLE = 2**20  # elements that values are judged by


@dataclass(frozen=True, slots=True)
class Fill:
    """Values to fill a tensor with: as fastinit says it, as torch does, and the mean that they should have."""

    ours: Distribution
    torch: Callable[[Tensor], Any]
    mean: float = 0.0

    def are_right(self, values: Tensor) -> bool:
        """Whether values have the mean and the standard deviation that were asked for, within 5 %."""
        expected = torch.tensor([self.mean, fastinit.FillReport(self.ours).std], dtype=torch.float64)
        sample = values.flatten()[:SAMPLE].double().cpu()
        found = torch.stack([sample.mean(), sample.std()])
        return bool(((found - expected).abs() < 0.05 * expected.abs().max()).all())


STD = 0.02
FILLS = {
    "constant": Fill(fastinit.Constant(0.5), lambda tensor: tensor.fill_(0.5), mean=0.5),
    "uniform": Fill(fastinit.Uniform(-1.0, 1.0), lambda tensor: tensor.uniform_(-1.0, 1.0)),
    "normal": Fill(fastinit.Normal(0.0, STD), lambda tensor: tensor.normal_(0.0, STD)),
    "truncated normal": Fill(
        fastinit.TruncatedNormal(0.0, STD, -2 * STD, 2 * STD),
        lambda tensor: nn.init.trunc_normal_(tensor, 0.0, STD, -2 * STD, 2 * STD),
    ),
}


def elements_to_fill(device: torch.device, quick: bool) -> int:
    """2^30 on a GPU, far more than any cache holds, if a quarter of the memory has room; 2^24 on a CPU."""
    if device.type == "cpu":
        return 2**18 if quick else 2**24
    elements = 2**24 if quick else 2**30
    while 4 * 4 * elements > torch.cuda.mem_get_info(device)[0]:
        elements //= 2
    return elements


@dataclass(frozen=True, slots=True)
class Way:
    """How a model can be created on a device in a dtype.

    Args:
        description: what one would write, in a few words.
        prepare: gives the function that creates a model, and fastinit's report where there is one. What a program does
            once, such as making a Fabric, happens here and is not timed.
        requires: package that it needs besides torch.
        fp32_on_host: whether the model lies on the CPU in fp32 meanwhile.
    """

    description: str
    prepare: Callable[[torch.device, torch.dtype], Creator]
    requires: str | None = None
    fp32_on_host: bool = False


def _fastinit(device: torch.device, dtype: torch.dtype) -> Creator:
    def create(build: Build) -> tuple[nn.Module, fastinit.Report]:
        with fastinit.on(device, dtype) as report:
            model = build()
        return model, report

    return create


def _torch(device: torch.device, dtype: torch.dtype) -> Creator:
    def create(build: Build) -> tuple[nn.Module, None]:
        with default_dtype(dtype), device:
            return build(), None

    return create


def _naive(device: torch.device, dtype: torch.dtype) -> Creator:
    return lambda build: (build().to(device, dtype), None)


WAYS = {
    "fastinit": Way("fastinit.on(device, dtype)", _fastinit),
    "torch": Way("torch.device + default dtype", _torch),
    "naive": Way("CPU in fp32, then .to(device, dtype)", _naive, fp32_on_host=True),
}


def linears(count: int) -> Build:
    """Small modules, two tensors each, whose creation is Python's work."""
    return lambda: nn.ModuleList(nn.Linear(64, 64) for _ in range(count))


@dataclass(frozen=True, slots=True)
class Created:
    """What one creation took.

    Args:
        seconds: until the constructor has returned and all that it enqueued on the GPU is done.
        parameters, tensor_bytes: of the model; bytes with its buffers.
        host_growth: by which the peak of this process's resident memory exceeds what was resident before; None if this
            system cannot reset the peak.
        device_peak: peak of allocated memory beyond what was allocated before; None on the CPU.
        beyond: bytes by which the peak of memory where the model is exceeds the model.
        parts: of the time, by fastinit's report.
    """

    seconds: float
    parameters: int
    tensor_bytes: int
    host_growth: int | None
    device_peak: int | None
    beyond: int | None
    parts: dict[str, float]

    def info(self) -> dict[str, Any]:
        """What results have of it beside the seconds."""
        return {"parameters": self.parameters, "beyond": self.beyond, "parts": self.parts}


def timed_creation(create: Creator, build: Build, device: torch.device) -> tuple[nn.Module, Created]:
    """(model, what it took)."""
    memory = Memory(device)
    seconds, (model, report) = seconds_of(lambda: create(build), device)
    peaks = memory.host_growth(), memory.device_peak()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tensor_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    names = () if report is None else ("python", "allocation", "fills")
    parts = {name: getattr(report, f"seconds_{name}") for name in names}
    return model, Created(seconds, parameters, tensor_bytes, *peaks, memory.beyond(tensor_bytes), parts)


def make_ready(way: Way, parameters: int, device: torch.device, dtype: torch.dtype) -> None:
    """Before a creation of so many parameters: empty caches, and host memory that is backed where the way needs it."""
    clean_up(device)
    if way.fp32_on_host or device.type == "cpu":
        warm_memory(parameters * (torch.float32 if way.fp32_on_host else dtype).itemsize)
