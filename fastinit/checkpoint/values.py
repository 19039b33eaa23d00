"""What values a dtype can hold: finite ones of a checkpoint must not become infinite in a model.

Private: it may change with any version.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..sharding import is_dtensor

# Elements that are searched at a time.
_CHUNK = 1 << 18


def kind_of(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "boolean"
    return "complex" if dtype.is_complex else "floating point" if dtype.is_floating_point else "integer"


def _limits(dtype: torch.dtype) -> tuple[float, float]:
    info = torch.finfo(dtype) if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype)
    return info.min, info.max


def narrows(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a dtype has finite values beyond the range of another one of its kind."""
    if source == target or kind_of(source) != kind_of(target):
        return False
    (low, high), (lowest, highest) = _limits(source), _limits(target)
    return low < lowest or high > highest


def first_lost(read: Callable[[], torch.Tensor], target: torch.Tensor, same: torch.Tensor) -> float | None:
    """The first finite value of a tensor that a target's dtype, of the same kind, cannot hold.

    `same` is the tensor, or what became of it in that dtype: it is looked at first, and as a rule suffices. A buffer
    may have the most extreme values of the checkpoint's dtype, which masks are made of: they become infinite.
    """
    dtype = target.dtype
    same = _local_real(same.detach())
    if not same.numel():
        return None
    low, high = _limits(dtype)
    if same.is_floating_point():
        least, greatest = torch.aminmax(same)
        # NaN and infinities fail this too. A value beyond the greatest finite one may still be rounded to it.
        if low <= least.item() and greatest.item() <= high:
            return None
    tensor = _local_real(read())
    real = dtype.to_real()
    for part in tensor.reshape(-1).split(_CHUNK):
        if part.is_floating_point():
            lost = part.isfinite() & ~part.to(real).double().isfinite()
            if not isinstance(target, nn.Parameter):
                lost &= part.abs() != torch.finfo(part.dtype).max
        else:
            lost = (part.long() < low) | (part.long() > high)
        if lost.any():
            first: float = part[lost][0].item()
            return first
    return None


def _local_real(tensor: torch.Tensor) -> torch.Tensor:
    if is_dtensor(tensor):
        tensor = tensor.to_local()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def lost_message(name: str, value: float, source: torch.dtype, target: torch.dtype) -> str:
    return (
        f"{name} has the value {value:g} in {source}, beyond the range of the model's {target}, {_limits(target)[0]:g} "
        f"to {_limits(target)[1]:g}. Choose a dtype with a wider range"
    )
