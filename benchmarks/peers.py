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
from fastinit.cli.models import Decoder, DecoderConfig
from fastinit.cli.workloads import FILLS, SAMPLE, STD, WAYS, Build, Creator, Way


class Unavailable(Exception):
    """A peer cannot take part; the message says why."""


def require(package: str | None) -> None:
    if package is not None:
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
        prepare: makes the fill of a distribution of `FILLS`, for a CPU on which torch has been given so many
            threads; None: as many as it likes, or on a GPU. It writes the tensor, or memory of its own of the same
            size, dtype and device.
        requires: package that it needs besides torch.
        devices: types of device that it fills.
    """

    prepare: Callable[[str, Tensor, int | None], Running]
    requires: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


def prepare(name: str, distribution: str, tensor: Tensor, threads: int | None = None) -> Running:
    """The fill of a tensor by the peer of that name.

    Raises:
        Unavailable: the peer cannot take part.
    """
    require(PEERS[name].requires)
    return PEERS[name].prepare(distribution, tensor, threads)


def _of_tensor(tensor: Tensor, run: Callable[[], Any]) -> Running:
    return Running(run, lambda: tensor[:SAMPLE].float().cpu())


def _fastinit(distribution: str, tensor: Tensor, threads: int | None) -> Running:
    values = FILLS[distribution].ours
    return _of_tensor(tensor, lambda: fastinit.fill_(tensor, values, seed=1))


def _torch(distribution: str, tensor: Tensor, threads: int | None) -> Running:
    fill = FILLS[distribution].torch
    return _of_tensor(tensor, lambda: fill(tensor))


def _curand(distribution: str, tensor: Tensor, threads: int | None) -> Running:
    """cuRAND's host interface, by which CuPy's own generators draw too. Its uniform values are in (0, 1]."""
    if tensor.dtype != torch.float32:
        raise Unavailable("unsupported: cuRAND writes fp32 and fp64 alone")
    if distribution not in ("uniform", "normal"):
        raise Unavailable(f"unsupported: cuRAND has no {distribution} distribution")
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


def _triton(distribution: str, tensor: Tensor, threads: int | None) -> Running:
    if distribution not in ("uniform", "normal"):
        raise Unavailable(f"unsupported: triton.language has no {distribution} distribution")
    import triton_fills

    return _of_tensor(tensor, lambda: triton_fills.fill(tensor, distribution, STD))


def _jax(implementation: str) -> Callable[[str, Tensor, int | None], Running]:
    def prepare(distribution: str, tensor: Tensor, threads: int | None) -> Running:
        if threads == 1 and (os.cpu_count() or 1) > 1:
            raise Unavailable("unsupported: JAX takes all cores")
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


def _numpy(distribution: str, tensor: Tensor, threads: int | None) -> Running:
    if tensor.dtype != torch.float32:
        raise Unavailable("unsupported: NumPy's generators write fp32 and fp64 alone")
    if distribution == "truncated normal":
        raise Unavailable("unsupported: NumPy has no truncated normal distribution")
    if threads is not None and threads > 1:
        raise Unavailable("unsupported: NumPy takes one thread")
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
    "cuRAND": Peer(_curand, "cupy", ("cuda",)),
    "Triton": Peer(_triton, "triton", ("cuda",)),
    "JAX threefry": Peer(_jax("threefry2x32"), "jax"),
    "JAX rbg": Peer(_jax("rbg"), "jax"),
    "NumPy": Peer(_numpy, "numpy", ("cpu",)),
}


# Models


@dataclass(frozen=True, slots=True)
class TransformersModel:
    """A language model of transformers; called, it is created from its configuration, with options of `from_config`."""

    configure: Callable[[], Any]

    def __call__(self, **options: Any) -> nn.Module:
        from transformers import AutoModelForCausalLM

        # A new configuration each time: creation writes the dtype into it.
        model: nn.Module = AutoModelForCausalLM.from_config(self.configure(), **options)
        return model


def llama(config: DecoderConfig, library: str) -> Build:
    """Creates the model of that shape: of "torch.nn" modules, or that of "transformers"."""
    if library == "torch.nn":
        return lambda: Decoder(config)

    def configure() -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads,
        )

    return TransformersModel(configure)


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
            raise Unavailable("unsupported: creates models of transformers alone")
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
    "transformers": Way("torch.device + from_config(dtype=)", _transformers, "transformers"),
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
