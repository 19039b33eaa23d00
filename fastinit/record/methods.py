"""The fast path: methods of the placeholder class that answer what the dispatcher would answer.

A method that is defined on the class is found before torch's, so that it pays neither the function mode nor the
dispatcher. Those here are an optimisation alone: without them (`use(False)`, or FASTINIT_FAST=0 in the environment)
every result is the same. They serve what torch.nn's constructors call, and hand anything unusual to torch's own method.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from ..native import CONSTANT, NORMAL, UNIFORM
from ..recipe import Write
from .operators import OPERATORS, is_mine
from .tensors import Placeholder, lock, stand_for

_torch: Any = torch.Tensor


def _size(self: Placeholder, dim: Any = None) -> Any:
    region = self._region
    sizes = self._record.shape if region is None else region.sizes
    if dim is None:
        return torch.Size(sizes)
    return sizes[dim] if type(dim) is int and -len(sizes) <= dim < len(sizes) else _torch.size(self, dim)


def _shape(self: Placeholder) -> torch.Size:
    region = self._region
    return torch.Size(self._record.shape if region is None else region.sizes)


def _dim(self: Placeholder) -> int:
    region = self._region
    return len(self._record.shape if region is None else region.sizes)


def _detach(self: Placeholder) -> torch.Tensor:
    if self.requires_grad or not is_mine():
        result: torch.Tensor = _torch.detach(self)
        return result
    with lock:
        return stand_for(self._record, self._region)


def _fill(kind: int, tensor: Placeholder, parameters: tuple[float, ...]) -> bool:
    """Record a fill of the whole of a pending tensor; False if it is not so plain."""
    if tensor._region is not None or (tensor.requires_grad and torch.is_grad_enabled()) or not is_mine():
        return False
    with lock:
        record = tensor._record
        if record.recipe is None or not record.is_native:
            return False
        stream, key = (0, None) if kind == CONSTANT else record.block.generator.next_stream()
        record.overwrite((Write(kind, parameters, stream, (), None, key),))
        torch.autograd.graph.increment_version(tensor)
    return True


_NO_GENERATOR = {"generator": None}


def _uniform_(self: Placeholder, *args: Any, **kwargs: Any) -> torch.Tensor:
    if kwargs == _NO_GENERATOR:
        kwargs = {}
    if len(args) == 2 and not kwargs and type(args[1] - args[0]) is float and 0.0 <= args[1] - args[0] < math.inf:
        if _fill(UNIFORM, self, (float(args[0]), float(args[1]))):
            return self
    result: torch.Tensor = _torch.uniform_(self, *args, **kwargs)
    return result


def _normal_(self: Placeholder, *args: Any, **kwargs: Any) -> torch.Tensor:
    if kwargs == _NO_GENERATOR:
        kwargs = {}
    if len(args) == 2 and not kwargs and all(type(each) in (int, float) and math.isfinite(each) for each in args):
        if args[1] >= 0 and _fill(NORMAL, self, (float(args[0]), float(args[1]))):
            return self
    result: torch.Tensor = _torch.normal_(self, *args, **kwargs)
    return result


def _fill_(self: Placeholder, *args: Any, **kwargs: Any) -> torch.Tensor:
    if len(args) == 1 and not kwargs and type(args[0]) in (int, float) and _fill(CONSTANT, self, (float(args[0]),)):
        return self
    result: torch.Tensor = _torch.fill_(self, *args, **kwargs)
    return result


def _zero_(self: Placeholder) -> torch.Tensor:
    if _fill(CONSTANT, self, (0.0,)):
        return self
    result: torch.Tensor = _torch.zero_(self)
    return result


_METHODS: dict[str, Any] = {
    "detach": _detach,
    "dim": _dim,
    "fill_": _fill_,
    "normal_": _normal_,
    "shape": property(_shape),
    "size": _size,
    "uniform_": _uniform_,
    "zero_": _zero_,
}


def use(fast: bool) -> None:
    """Give the placeholder class its fast methods, or take them away."""
    for name, method in {**OPERATORS, **_METHODS}.items():
        if fast:
            setattr(Placeholder, name, method)
        elif name in vars(Placeholder):
            delattr(Placeholder, name)


use(os.environ.get("FASTINIT_FAST", "1") != "0")
