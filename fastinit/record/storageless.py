"""Tensors without storage, whatever they stand for: how they are made, copied, and exchanged for others.

Two classes are such tensors, torch's wrapper subclasses: placeholders of a block (fastinit.record.tensors), and what a
block leaves unwritten (fastinit.record.unwritten). Both have a `_record`, and a `_region` of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ..layout import contiguous_strides
from ..recipe import Region


def without_storage(kind: type[torch.Tensor], record: Any, region: Region | None, nbytes: int) -> Any:
    """A new tensor of a class of this package, with the sizes and strides of a region; its storage claims `nbytes`."""
    offset, sizes, strides = region or Region(0, record.shape, contiguous_strides(record.shape))
    options = {"dtype": record.dtype, "device": record.device, "storage_size": nbytes}
    tensor = _make(kind, sizes, strides=strides, storage_offset=offset, **options)
    _refuse_address(tensor)
    return tensor


_make: Any = torch.Tensor._make_wrapper_subclass

# C++ that no dispatcher sees (torch's to_dlpack, extensions) asks for an address, and would take null for one.
_refuse_address: Any = torch._C._set_throw_on_mutable_data_ptr


def deep_copy(tensor: Any, memo: dict[int, Any], stand_for: Callable[..., Any]) -> torch.Tensor:
    """A copy of a tensor without storage; those that share a record share its copy, too."""
    if id(tensor) in memo:
        known: torch.Tensor = memo[id(tensor)]
        return known
    record = memo.get(id(tensor._record))
    if record is None:
        record = memo[id(tensor._record)] = tensor._record.forked()
    result: torch.Tensor = stand_for(record, tensor._region).requires_grad_(tensor.requires_grad)
    memo[id(tensor)] = result
    if tensor.grad is not None:
        result.grad = copy.deepcopy(tensor.grad, memo)
    for name, value in attributes_of(tensor).items():
        setattr(result, name, copy.deepcopy(value, memo))
    return result


def attributes_of(tensor: torch.Tensor) -> dict[str, Any]:
    """What others have set on a tensor without storage, and that it is a parameter."""
    own = ("_record", "_region")
    return {name: value for name, value in tensor.__dict__.items() if name not in own}


def _wrap_and_swap(tensor: torch.Tensor, real: torch.Tensor) -> None:
    # A tensor that nothing but a graph of autograd knows is owned by its C++ object before torch 2.10, and what owns it
    # is not swapped: giving it to Python once more makes it Python's.
    torch._C._functorch._unwrap_for_grad(tensor, 0)
    torch._C._swap_tensor_impl(tensor, real)


swap_impl = torch._C._swap_tensor_impl if torch.__version__ >= (2, 10) else _wrap_and_swap  # type: ignore[operator]
