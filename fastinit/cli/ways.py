"""The ways of creating a model that the demo and the benchmarks compare, each defined once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastinit
from fastinit.report import Report

from .measure import default_dtype, warm_memory
from .peers import Unsupported
from .workloads import TransformersModel

Build = Callable[[], nn.Module]
Creator = Callable[[Build], "tuple[nn.Module, Report | None]"]


@dataclass(frozen=True, slots=True)
class Way:
    """How a model can be created on a device in a dtype.

    Args:
        description: what one would write, in a few words.
        prepare: gives the function that creates a model, and fastinit's report where there is one. What a program does
            once, such as making a Fabric, happens here and is not timed.
        requires: package that it needs besides torch.
        fp32_on_host: whether the parameters, or those of the way's whole model, lie on the CPU in fp32 meanwhile.
    """

    description: str
    prepare: Callable[[torch.device, torch.dtype], Creator]
    requires: str | None = None
    fp32_on_host: bool = False


def _fastinit(device: torch.device, dtype: torch.dtype) -> Creator:
    def create(build: Build) -> tuple[nn.Module, Report]:
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


def _plain(device: torch.device, dtype: torch.dtype) -> Creator:
    return lambda build: (build(), None)


def _fabric(device: torch.device, dtype: torch.dtype) -> Creator:
    from lightning.fabric import Fabric

    precisions: dict[torch.dtype, Any] = {
        torch.float32: "32-true",
        torch.float16: "16-true",
        torch.bfloat16: "bf16-true",
    }
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    fabric = Fabric(
        accelerator=accelerator, devices=[device.index or 0] if accelerator == "gpu" else 1, precision=precisions[dtype]
    )

    def create(build: Build) -> tuple[nn.Module, None]:
        with fabric.init_module():
            return build(), None

    return create


def _accelerate(device: torch.device, dtype: torch.dtype) -> Creator:
    from accelerate import init_empty_weights

    def create(build: Build) -> tuple[nn.Module, None]:
        with default_dtype(dtype), init_empty_weights():
            model = build()
        model.to_empty(device=device)  # leaves buffers without values too, and breaks ties of plain modules
        initialize(model)
        return model, None

    return create


@torch.no_grad()
def initialize(model: Any) -> None:
    """Give the parameters of a model of raw memory values, as its modules or its library would."""
    if not hasattr(model, "init_weights"):
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return
    for module in model.modules():
        module._is_hf_initialized = False  # set on the meta device, where it was not true
    model.init_weights()


def _transformers(device: torch.device, dtype: torch.dtype) -> Creator:
    def create(build: Build) -> tuple[nn.Module, None]:
        if not isinstance(build, TransformersModel):
            raise Unsupported("creates models of transformers alone")
        with device:
            return build(dtype=dtype), None

    return create


WAYS = {
    "fastinit": Way("fastinit.on(device, dtype)", _fastinit),
    "fastinit fp32": Way("fastinit.on(device, fp32)", lambda device, _: _fastinit(device, torch.float32)),
    "torch": Way("torch.device + default dtype", _torch),
    "torch fp32": Way("torch.device in fp32", lambda device, _: _torch(device, torch.float32)),
    "naive": Way("CPU in fp32, then .to(device, dtype)", _naive, fp32_on_host=True),
    "plain": Way("CPU in fp32, no context", _plain, fp32_on_host=True),
    "fabric": Way("Lightning Fabric's init_module", _fabric, "lightning"),
    "accelerate": Way("init_empty_weights, to_empty, init", _accelerate, "accelerate"),
    "transformers": Way("torch.device + from_config(dtype=)", _transformers, "transformers"),
}


def warm_host(way: str, parameters: int, device: torch.device, dtype: torch.dtype) -> None:
    """Have the host's memory backed for a model of so many parameters, if that is where this way puts it."""
    in_fp32 = WAYS[way].fp32_on_host
    if in_fp32 or device.type == "cpu":
        warm_memory(parameters * (torch.float32 if in_fp32 else dtype).itemsize)
