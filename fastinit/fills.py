"""The fills by themselves, for people who write their own parallel code.

Private: it may change with any version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .execution import Fills, allocate, can_fill
from .layout import Window, numel
from .recipe import Distribution, Write
from .sharding import is_dtensor, local_boxes, local_tensor


def fill_(
    tensor: torch.Tensor | Sequence[torch.Tensor],
    distribution: Distribution | Sequence[Distribution],
    *,
    seed: int,
    stream: int | Sequence[int] = 0,
    window: Window | None = None,
) -> torch.Tensor | Sequence[torch.Tensor]:
    """Fill a tensor, or many in one call, with values that depend on seed, stream and element index alone.

    Element i of the row-major global tensor gets the same bits whatever the device, the stored dtype (rounded once
    from fp32) and the part of the global tensor that `tensor` holds. docs/stream-v1.md specifies them. In fp64 torch
    draws them, the whole global tensor for any part of it.

    Args:
        tensor: fp32, fp16, bf16 or fp64 tensor of any shape and strides, or a sequence of such on one device. Of a
            DTensor, this rank's shard is filled.
        distribution: `Normal`, `Uniform`, `TruncatedNormal` or `Constant`; or one per tensor.
        seed: 64-bit key.
        stream: 64-bit number of the stream; or one per tensor. Give each tensor of a model its own.
        window: where in the global tensor `tensor` lies. None: it is the whole of it.

    Returns:
        The argument, written. On a GPU the fill runs on the tensor's device and its current stream.

    Raises:
        TypeError: for what is no tensor, or a dtype or a device that no fill reaches.
        ValueError: for a window that does not fit, a seed or a stream out of range, sequences of unequal lengths, or
            a tensor whose elements share memory.

    Example:
        >>> whole = fastinit.fill_(torch.empty(8, 4), fastinit.Normal(0.0, 0.02), seed=7)
        >>> lower = fastinit.fill_(
        ...     torch.empty(4, 4), fastinit.Normal(0.0, 0.02), seed=7, window=fastinit.Window((8, 4), (4, 0)))
        >>> torch.equal(whole[4:], lower)
        True
    """
    tensors = [tensor] if isinstance(tensor, torch.Tensor) else tensor
    if not isinstance(tensors, Sequence) or not all(isinstance(each, torch.Tensor) for each in tensors):
        raise TypeError(f"fill_: tensor={tensor!r} must be a tensor or a sequence of tensors; give model.weight, say")
    distributions = _one_per_tensor("distribution", distribution, tensors)
    streams = _one_per_tensor("stream", stream, tensors)
    if not tensors:
        return tensor
    device = tensors[0].device
    fills = Fills(seed, device)
    for each, what, number in zip(tensors, distributions, streams, strict=True):
        if each.device != device:
            raise ValueError(f"fill_: tensor is on {each.device} and another one on {device}; call fill_ per device")
        _add(fills, each, what, seed, number, window)
    fills.run_or_be_captured()
    for each in tensors:
        torch.autograd.graph.increment_version(each)
    return tensor


def empty(
    *size: int | Sequence[int],
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """Uninitialized tensor like ``torch.empty``; large CPU ones are placed on huge pages where the system has them.

    Args:
        size: sizes, as integers or as one sequence.
        dtype, device: as for ``torch.empty``.

    Raises:
        torch.OutOfMemoryError, RuntimeError: when the memory is not there, with shape, dtype and device.

    Example:
        >>> fastinit.empty(2, 3, dtype=torch.bfloat16).shape
        torch.Size([2, 3])
    """
    shape: Sequence[Any] = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
    return allocate(
        shape,
        torch.get_default_dtype() if dtype is None else dtype,
        torch.get_default_device() if device is None else torch.device(device),
    )


def _one_per_tensor(name: str, value: Any, tensors: Sequence[torch.Tensor]) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * len(tensors)
    if len(value) != len(tensors):
        raise ValueError(f"fill_: {len(value)} values of {name} for {len(tensors)} tensors; give one, or one each")
    return list(value)


def _add(
    fills: Fills, tensor: torch.Tensor, distribution: Distribution, seed: int, stream: int, window: Window | None
) -> None:
    if not isinstance(distribution, Distribution):
        raise TypeError(
            f"fill_: distribution={distribution!r} must be a fastinit.Normal, Uniform, TruncatedNormal or Constant"
        )
    if not (0 <= seed < 2**64 and 0 <= stream < 2**64):
        name, value = ("stream", stream) if 0 <= seed < 2**64 else ("seed", seed)
        raise ValueError(f"fill_: {name} is {value}, which is not an unsigned 64-bit integer; use {name} % 2**64")
    boxes, elements = None, tensor.numel()
    if is_dtensor(tensor):
        if window is not None:
            raise ValueError("fill_: window= was given for a DTensor, whose placements say which part this rank holds")
        boxes, tensor = local_boxes(tensor), local_tensor(tensor)
    if not can_fill(tensor.dtype, tensor.device) or tensor.layout != torch.strided:
        raise TypeError(
            f"fill_: tensor has dtype={tensor.dtype}, device={str(tensor.device)!r} and layout={tensor.layout}; fills "
            "reach strided fp32, fp16, bf16 and fp64 tensors on every device but meta"
        )
    sizes, strides = tuple(tensor.size()), tensor.stride()
    if any(stride == 0 and size > 1 for size, stride in zip(sizes, strides, strict=True)):
        raise ValueError(
            f"fill_: tensor of shape {sizes} and strides {strides} shares memory between elements; clone it"
        )
    if window is not None:
        boxes, elements = [window.box(sizes, strides)], numel(window.shape)
    if tensor.numel():
        write = Write(distribution.kind, distribution.parameters, stream)
        fills.write(tensor, (write,), boxes, elements=elements)
