"""The fast path of operators: methods that go straight to what the dispatcher would have called.

Each names the overload that torch would choose for its plain arguments, and hands it to `dispatch` itself, which saves
the way through torch: some 20 us for each small operation of a constructor, and for the first one in a process the
import of torch.distributed.tensor, which torch's C++ makes when it meets a subclass of Tensor. Anything unusual (a
graph to be recorded, a mode of somebody else's, keywords) is torch's. Without these methods every result is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..execution import DTYPES
from .dispatch import dispatch, take_view
from .mode import AS_METHODS, is_mine
from .records import Record, lock, modes_off
from .tensors import Placeholder, stand_for

aten = torch.ops.aten

_torch: Any = torch.Tensor

OPERATORS: dict[str, Any] = {}


def _plainly(function: Callable[..., Any], self: Placeholder, *operands: Any) -> Any:
    """A function of tensors with all modes off; NotImplemented if torch would do more than to call the dispatcher."""
    if not is_mine():
        return NotImplemented
    with lock, modes_off():
        # What computes an argument, or another thread, may have made it real after its method was looked up.
        if type(self) is not Placeholder:
            return NotImplemented
        if torch.is_grad_enabled():
            if self.requires_grad:
                return NotImplemented
            for each in operands:
                if type(each) not in (int, float) and isinstance(each, torch.Tensor) and each.requires_grad:
                    return NotImplemented
        return function(self, *operands)


def _elementwise(function: Any, overload: Any, *operands: Any) -> Any:
    """An operator, computed by a function of torch's where that is all that `dispatch` would do."""
    result = _on_values(function, operands) if function is not None else None
    return dispatch(overload, operands, {}) if result is None else result


def _on_values(function: Callable[..., torch.Tensor], operands: tuple[Any, ...]) -> Placeholder | None:
    """A function of numbers and of whole tensors of one floating-point dtype, if their master values are there."""
    first: Record | None = None
    values: list[Any] = []
    for each in operands:
        if type(each) not in (int, float):
            if type(each) is not Placeholder:
                return None
            record = each._record
            if record.values is None or each._region is not None:
                return None
            first = first or record
            if record.dtype not in DTYPES or record.dtype != first.dtype or record.device != first.device:
                return None
            record.block.touch(record)
            values.append(record.values)
        else:
            values.append(each)
    if first is None or first.block.ran is not None or torch.is_inference_mode_enabled():
        return None  # `dispatch` counts what is run, and leaves that mode
    result = function(*values)
    record = Record(first.block, tuple(result.shape), first.dtype, first.device, values=result)
    record.block.touch(record)
    return stand_for(record)


def _method(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a method that is given torch's own for what is not plain."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        usual = getattr(_torch, name)
        in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))

        def method(self: Placeholder, *args: Any, **kwargs: Any) -> Any:
            result = NotImplemented if kwargs else _plainly(function, self, *args)
            if result is NotImplemented:
                return usual(self, *args, **kwargs)
            if in_place:
                torch.autograd.graph.increment_version(self)
            return result

        method.__name__ = name
        OPERATORS[name] = method
        return function

    return register


def _is_operand(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return type(value) is Placeholder or (type(value) is torch.Tensor and not value.is_meta)
    return type(value) in (int, float)


# --- elementwise ----------------------------------------------------------------------------------------------------


def _unary(overload: Any, function: Any = None) -> Callable[..., Any]:
    return lambda self, *args: NotImplemented if args else _elementwise(function, overload, self)


def _binary(overload: Any, function: Any = None) -> Callable[..., Any]:
    def method(self: Placeholder, *args: Any) -> Any:
        plain = len(args) == 1 and _is_operand(args[0])
        return _elementwise(function, overload, self, *args) if plain else NotImplemented

    return method


for _name in (
    *"abs acos asin atan ceil cos cosh erf exp expm1 floor log log10 log1p log2 neg reciprocal".split(),
    *"round rsqrt sigmoid sign sin sinh sqrt tan tanh trunc".split(),
):
    _method(_name)(_unary(getattr(aten, _name).default, getattr(_torch, _name)))
    AS_METHODS[getattr(torch, _name)] = _name
for _name in ("erfinv", "erfinv_", "neg_"):  # the values of a step of a recipe are not torch's
    _method(_name)(_unary(getattr(aten, _name).default))
AS_METHODS[torch.erfinv] = "erfinv"
_method("__neg__")(_unary(aten.neg.default, _torch.neg))
for _name, _base in (("mul", "mul"), ("add", "add"), ("sub", "sub"), ("div", "div"), ("truediv", "div")):
    _function = _binary(getattr(aten, _base).Tensor, getattr(_torch, _base))
    _method(f"__{_name}__")(_function)
    _method(f"__i{_name}__")(_binary(getattr(aten, f"{_base}_").Tensor))
    if _name == _base:
        _method(_name)(_function)
        _method(f"{_name}_")(_binary(getattr(aten, f"{_name}_").Tensor))
        AS_METHODS[getattr(torch, _name)] = _name


def _reflected(name: str, function: Callable[[Placeholder, Any], Any]) -> None:
    """Register a method for numbers on the left; Python asks it for tensors there, too, as it is a subclass's."""
    forward = getattr(_torch, f"__{name}__")
    usual = getattr(_torch, f"__r{name}__")

    def reflected(self: Placeholder, other: Any) -> Any:
        if isinstance(other, torch.Tensor):
            return forward(other, self)
        result = _plainly(function, self, other) if type(other) in (int, float) else NotImplemented
        return usual(self, other) if result is NotImplemented else result

    OPERATORS[f"__r{name}__"] = reflected


_reflected("add", lambda self, other: _elementwise(_torch.add, aten.add.Tensor, self, other))
_reflected("mul", lambda self, other: _elementwise(_torch.mul, aten.mul.Tensor, self, other))
_reflected("sub", lambda self, other: _elementwise(torch.rsub, aten.rsub.Scalar, self, other))
_reflected("pow", lambda self, other: _elementwise(torch.pow, aten.pow.Scalar, other, self))
# As torch has it: the reciprocal, multiplied.
_reflected("truediv", lambda self, other: _elementwise(_torch.reciprocal, aten.reciprocal.default, self) * other)


def _pow(self: Placeholder, exponent: Any) -> Any:
    if not _is_operand(exponent):
        return NotImplemented
    number = not isinstance(exponent, torch.Tensor)
    return _elementwise(_torch.pow, aten.pow.Tensor_Scalar if number else aten.pow.Tensor_Tensor, self, exponent)


_method("pow")(_pow)
_method("__pow__")(_pow)


@_method("outer")
def _outer(self: Placeholder, other: Any) -> Any:
    if not _is_operand(other) or not isinstance(other, torch.Tensor) or self.dim() != 1 or other.dim() != 1:
        return NotImplemented
    return self.unsqueeze(1) * other


AS_METHODS[torch.outer] = "outer"


@_method("clamp_")
def _clamp_(self: Placeholder, *bounds: Any) -> Any:
    plain = len(bounds) == 2 and all(type(each) in (int, float) for each in bounds)
    return dispatch(aten.clamp_.default, (self, *bounds), {}) if plain else NotImplemented


# --- copies and conversions -----------------------------------------------------------------------------------------


@_method("clone")
def _clone(self: Placeholder, *args: Any) -> Any:
    return NotImplemented if args else _elementwise(_torch.clone, aten.clone.default, self)


@_method("copy_")
def _copy_(self: Placeholder, *args: Any) -> Any:
    if len(args) != 1 or type(args[0]) not in (Placeholder, torch.Tensor, torch.nn.Parameter):
        return NotImplemented
    with torch.no_grad():
        return dispatch(aten.copy_.default, (self, args[0]), {}) if args[0].shape == self.shape else NotImplemented


def _converted(self: Placeholder, dtype: torch.dtype) -> Any:
    return self if self.dtype == dtype else dispatch(aten._to_copy.default, (self,), {"dtype": dtype})


for _name, _dtype in (
    *(("float", torch.float32), ("double", torch.float64), ("half", torch.float16), ("bfloat16", torch.bfloat16)),
    *(("long", torch.int64), ("int", torch.int32)),
):
    _method(_name)(lambda self, *args, dtype=_dtype: NotImplemented if args else _converted(self, dtype))


def _to(self: Placeholder, *args: Any, **kwargs: Any) -> Any:
    if not kwargs.keys() - {"dtype", "device"} and not any(isinstance(each, torch.Tensor) for each in args):
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        here = device is None or (device.type == self.device.type and device.index in (None, self.device.index))
        if here and (device or dtype) is not None and not non_blocking and memory_format is None:
            result = _plainly(_converted, self, dtype or self.dtype)
            if result is not NotImplemented:
                return result
    return _torch.to(self, *args, **kwargs)


OPERATORS["to"] = _to


# --- views ----------------------------------------------------------------------------------------------------------


def _view(name: str) -> None:
    usual = getattr(_torch, name)

    @_method(name)
    def view(self: Placeholder, *args: Any) -> Any:
        # What views something that requires grad requires it, too, also while no graph is recorded.
        if self.requires_grad or any(isinstance(each, (torch.Tensor, torch.dtype)) for each in args):
            return NotImplemented
        return take_view(usual, self, *args)


for _name in "chunk expand narrow permute select split squeeze t transpose unbind unsqueeze view".split():
    _view(_name)


@_method("__getitem__")
def _getitem(self: Placeholder, index: Any) -> Any:
    parts = index if type(index) is tuple else (index,)
    if self.requires_grad or not all(each is None or each is Ellipsis or type(each) in (int, slice) for each in parts):
        return NotImplemented
    return take_view(_torch.__getitem__, self, index)


# Not under its own name, with which C++ would take tensors without dimensions for sequences.
OPERATORS["_getitem"] = OPERATORS.pop("__getitem__")
AS_METHODS[_torch.__getitem__] = "_getitem"
