"""Who else fills tensors and creates models: other generators of random numbers, and other libraries' ways.

One whose package is not installed, or that has no such distribution, dtype or model, is `Unavailable`, which is written
into the results beside the others' times.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastinit
from fastinit.cli.measure import default_dtype
from fastinit.cli.models import LLAMA_7B, Decoder, DecoderConfig
from fastinit.cli.workloads import FILLS, SAMPLE, STD, WAYS, Build, Creator, Way


class Unavailable(Exception):
    """A peer cannot take part; the message says why."""


def require(*packages: str | None) -> None:
    for package in filter(None, packages):
        try:
            importlib.import_module(package)
        except ImportError:
            raise Unavailable(f"missing: {package} is not installed") from None


@dataclass(frozen=True, slots=True)
class Running:
    """A fill that is ready to be run, as often as one likes.

    Args:
        run: fills once. On a GPU it returns when the work is on the current stream, unless there is a `wait`.
        sample: some of the values that `run` has written, in fp32 on the CPU.
        wait: for a peer with streams of its own: returns when what `run` returned has its values.
    """

    run: Callable[[], Any]
    sample: Callable[[], Tensor]
    wait: Callable[[Any], Any] | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """A generator of random numbers.

    Args:
        prepare: makes the fill of a distribution of `FILLS`, which writes the tensor, or memory of its own of the same
            size, dtype and device.
        requires: package that it needs besides torch.
        devices: types of device that it fills.
        distributions: which of them it has.
        fp32_alone: whether it writes no half precision.
        threads: "one thread" or "all threads" if it leaves no choice of how many it takes of a CPU.
    """

    prepare: Callable[[str, Tensor], Running]
    requires: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    distributions: tuple[str, ...] = tuple(FILLS)
    fp32_alone: bool = False
    threads: str | None = None


def prepare(name: str, distribution: str, tensor: Tensor, threads: str | None = None) -> Running:
    """The fill of a tensor by the peer of that name, on a CPU by "one thread" or "all threads".

    Raises:
        Unavailable: the peer cannot take part.
    """
    peer = PEERS[name]
    if peer.fp32_alone and tensor.dtype != torch.float32:
        raise Unavailable(f"unsupported: {name} writes fp32 and fp64 alone")
    if distribution not in peer.distributions:
        raise Unavailable(f"unsupported: {name} has no {distribution} distribution")
    if threads and peer.threads and threads != peer.threads:
        raise Unavailable(f"unsupported: {name} takes {peer.threads}")
    require(peer.requires)
    return peer.prepare(distribution, tensor)


def _of_tensor(tensor: Tensor, run: Callable[[], Any]) -> Running:
    return Running(run, lambda: tensor[:SAMPLE].float().cpu())


def _fastinit(distribution: str, tensor: Tensor) -> Running:
    values = FILLS[distribution].ours
    return _of_tensor(tensor, lambda: fastinit.fill_(tensor, values, seed=1))


def _torch(distribution: str, tensor: Tensor) -> Running:
    fill = FILLS[distribution].torch
    return _of_tensor(tensor, lambda: fill(tensor))


def _curand(distribution: str, tensor: Tensor) -> Running:
    """cuRAND's host interface, by which CuPy's own generators draw too. Its uniform values are in (0, 1]."""
    import cupy
    from cupy.cuda import curand

    pointer, count = tensor.data_ptr(), tensor.numel()
    with cupy.cuda.Device(tensor.device.index or 0):
        generator = curand.createGenerator(curand.CURAND_RNG_PSEUDO_PHILOX4_32_10)
    curand.setStream(generator, torch.cuda.current_stream(tensor.device).cuda_stream)
    curand.setPseudoRandomGeneratorSeed(generator, 1)
    if distribution == "uniform":
        return _of_tensor(tensor, lambda: curand.generateUniform(generator, pointer, count))
    return _of_tensor(tensor, lambda: curand.generateNormal(generator, pointer, count, 0.0, STD))


def _triton(distribution: str, tensor: Tensor) -> Running:
    import triton_fills

    return _of_tensor(tensor, lambda: triton_fills.fill(tensor, distribution, STD))


def _jax(implementation: str) -> Callable[[str, Tensor], Running]:
    def prepare(distribution: str, tensor: Tensor) -> Running:
        # Read when JAX starts. Else it takes three quarters of the GPU's memory at once.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax
        import numpy
        from jax import numpy as jnp

        shape, dtype = (tensor.numel(),), jnp.dtype(str(tensor.dtype).removeprefix("torch."))
        draws = {
            "constant": lambda key: jnp.full(shape, 0.5, dtype),
            "uniform": lambda key: jax.random.uniform(key, shape, dtype, -1.0, 1.0),
            "normal": lambda key: jax.random.normal(key, shape, dtype) * jnp.asarray(STD, dtype),
            "truncated normal": lambda key: (
                jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) * jnp.asarray(STD, dtype)
            ),
        }
        device = jax.devices("gpu" if tensor.device.type == "cuda" else "cpu")[tensor.device.index or 0]
        key = jax.device_put(jax.random.key(1, impl=implementation), device)
        draw = jax.jit(draws[distribution])
        with jax.default_device(device):  # a constant's key does not decide where it is made
            compiled = draw.lower(key).compile()

        def sample() -> Tensor:
            return torch.from_numpy(numpy.array(compiled(key)[:SAMPLE].astype(jnp.float32)))

        return Running(lambda: compiled(key), sample, jax.block_until_ready)

    return prepare


def _numpy(distribution: str, tensor: Tensor) -> Running:
    import numpy

    array, generator = tensor.numpy(), numpy.random.default_rng(1)

    def uniform() -> None:
        generator.random(dtype=numpy.float32, out=array)
        numpy.multiply(array, 2.0, out=array)
        numpy.subtract(array, 1.0, out=array)

    def normal() -> None:
        generator.standard_normal(dtype=numpy.float32, out=array)
        numpy.multiply(array, STD, out=array)

    runs = {"constant": lambda: array.fill(0.5), "uniform": uniform, "normal": normal}
    return _of_tensor(tensor, runs[distribution])


PEERS = {
    "fastinit": Peer(_fastinit),
    "torch": Peer(_torch),
    "cuRAND": Peer(_curand, "cupy", ("cuda",), ("uniform", "normal"), fp32_alone=True),
    "Triton": Peer(_triton, "triton", ("cuda",), ("uniform", "normal")),
    "JAX threefry": Peer(_jax("threefry2x32"), "jax", threads="all threads"),
    "JAX rbg": Peer(_jax("rbg"), "jax", threads="all threads"),
    "NumPy": Peer(_numpy, "numpy", ("cpu",), ("constant", "uniform", "normal"), fp32_alone=True, threads="one thread"),
}


# Models


def shape_for(device: torch.device, quick: bool, on_cpu: int) -> DecoderConfig:
    """Llama 7B on a GPU, a model of so many parameters on a CPU; a tiny one to see that it runs."""
    return LLAMA_7B if device.type == "cuda" and not quick else DecoderConfig.of_size(1_000_000 if quick else on_cpu)


def llama(config: DecoderConfig, library: str) -> Build:
    """Creates the model of that shape: of "torch.nn" modules, or that of "transformers", by options of `from_config`.

    Raises:
        Unavailable: transformers is not installed.
    """
    if library == "torch.nn":
        return lambda: Decoder(config)
    require("transformers")
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # whose modules no clock is to see imported

    def build(**options: Any) -> nn.Module:
        # A new configuration each time: creation writes the dtype into it.
        shape = LlamaForCausalLM.config_class(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads,
        )
        return AutoModelForCausalLM.from_config(shape, **options)

    return build


def _fabric(device: torch.device, dtype: torch.dtype) -> Creator:
    from lightning.fabric import Fabric

    precision = {torch.float32: "32-true", torch.float16: "16-true", torch.bfloat16: "bf16-true"}[dtype]
    devices = [device.index or 0] if device.type == "cuda" else 1
    fabric = Fabric(accelerator=device.type, devices=devices, precision=precision)

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
    def create(build: Callable[..., nn.Module]) -> tuple[nn.Module, None]:
        with device:
            return build(dtype=dtype), None

    return create


def _in_fp32(way: str) -> Callable[[torch.device, torch.dtype], Creator]:
    return lambda device, _: WAYS[way].prepare(device, torch.float32)


def _plain(device: torch.device, dtype: torch.dtype) -> Creator:
    return lambda build: (build(), None)


ALL_WAYS = WAYS | {
    "fabric": Way("Lightning Fabric's init_module", _fabric, "lightning"),
    "accelerate": Way("init_empty_weights, to_empty, init", _accelerate, "accelerate"),
    "transformers": Way("torch.device + from_config(dtype=), for models of its own", _transformers, "transformers"),
    "fastinit fp32": Way("fastinit.on(device, fp32)", _in_fp32("fastinit")),
    "torch fp32": Way("torch.device in fp32", _in_fp32("torch")),
    "plain fp32": Way("CPU in fp32, no context", _plain, fp32_on_host=True),
}


def prepare_way(name: str, device: torch.device, dtype: torch.dtype) -> Creator:
    """What creates models this way.

    Raises:
        Unavailable: its package is not installed.
    """
    require(ALL_WAYS[name].requires)
    return ALL_WAYS[name].prepare(device, dtype)
