"""Who fills tensors in the benchmarks: fastinit, torch and other generators of random numbers, each defined once.

A peer whose package is not installed is `Missing`; one that has no such distribution, dtype or device raises
`Unsupported`. Either is written into the results beside the others' times.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastinit

from .workloads import FILLS, STD

SAMPLE = 2**20  # elements that the values are judged by


class Unsupported(Exception):
    """A peer does not do this; the message says what."""


class Missing(Exception):
    """A peer's package is not installed; the message names it."""


@dataclass(frozen=True, slots=True)
class Running:
    """A fill that is ready to be run, as often as one likes.

    Args:
        run: fills once. On a GPU it returns when the work is on the current stream, unless there is a `wait`.
        sample: some of the values that `run` has written, in fp32 on the CPU.
        wait: for a peer with streams of its own: returns when what `run` returned has its values.
        setup: what has to be done, untimed, before it is run so many times.
    """

    run: Callable[[], Any]
    sample: Callable[[], Tensor]
    wait: Callable[[Any], Any] | None = None
    setup: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """A generator of random numbers.

    Args:
        prepare: makes the fill of a distribution of `workloads.FILLS`, for a CPU on which torch has been given so many
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
        Missing, Unsupported: the peer cannot take part.
    """
    peer = PEERS[name]
    if peer.requires is not None and not importable(peer.requires):
        raise Missing(peer.requires)
    return peer.prepare(distribution, tensor, threads)


def importable(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def names(device: torch.device) -> list[str]:
    """The peers that could fill on a device, installed or not."""
    return [name for name, peer in PEERS.items() if device.type in peer.devices]


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
        raise Unsupported("cuRAND writes fp32 and fp64 alone")
    if distribution not in ("uniform", "normal"):
        raise Unsupported(f"cuRAND has no {distribution} distribution")
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
        raise Unsupported(f"triton.language has no {distribution} distribution")
    from . import triton_fills

    return _of_tensor(tensor, lambda: triton_fills.fill(tensor, distribution, STD))


def _jax(implementation: str) -> Callable[[str, Tensor, int | None], Running]:
    def prepare(distribution: str, tensor: Tensor, threads: int | None) -> Running:
        if threads == 1 and (os.cpu_count() or 1) > 1:
            raise Unsupported("JAX takes all cores")
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
        raise Unsupported("NumPy's generators write fp32 and fp64 alone")
    if distribution == "truncated normal":
        raise Unsupported("NumPy has no truncated normal distribution")
    if threads is not None and threads > 1:
        raise Unsupported("NumPy takes one thread")
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
