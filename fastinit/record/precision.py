"""Which dtype the result of an operator has, by torch's own answer, where its values were computed in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .nested import map_tensors, tensors_in
from .records import HALVES, view_of
from .tensors import Placeholder

# What torch has answered, by the operator and what the dtype of its results can depend on.
_answers: dict[Any, list[torch.dtype]] = {}


def result_dtypes(func: Any, args: Any, kwargs: Any, results: Any, default: torch.dtype) -> list[torch.dtype]:
    """The dtype of each tensor among an operator's results, as torch gives it for these operands.

    Args:
        func, args, kwargs: the call, with placeholders of their final dtypes.
        results: what torch has computed on their values.
        default: the default dtype of the code that calls.
    """
    operands = tensors_in((args, kwargs))
    computed = [each.dtype for each in tensors_in(results)]
    if not any(each.dtype in HALVES for each in operands) and kwargs.get("dtype") not in HALVES:
        if kwargs.get("dtype") is not None or any(each.dtype not in WHOLE for each in operands):
            return computed
        return [of_default(dtype, default) for dtype in computed]
    if not any(dtype in SINGLE for dtype in computed):
        return computed
    key = (func, tuple(map(_kind, args)), tuple((name, _kind(value)) for name, value in kwargs.items()))
    answer = _answers.get(key)
    if answer is None:
        # What draws is not asked: that would take numbers of the generator.
        asked = None if torch.Tag.nondeterministic_seeded in func.tags else _asked(func, args, kwargs)
        answer = _answers[key] = asked or _with_promoted(operands, computed, kwargs.get("dtype"))
    return answer if len(answer) == len(computed) else _with_promoted(operands, computed, kwargs.get("dtype"))


# What torch makes of whole numbers where its default dtype is fp32.
SINGLE = (torch.float32, torch.complex64)

WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def values_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of a dtype are computed."""
    return torch.float32 if dtype in HALVES else dtype


def of_default(dtype: torch.dtype, default: torch.dtype) -> torch.dtype:
    """The dtype that torch gives for this one, made of whole numbers alone, where the default dtype is another one."""
    return {torch.float32: default, torch.complex64: complex_of(default)}.get(dtype, dtype)


def complex_of(default: torch.dtype) -> torch.dtype:
    """The dtype that torch gives complex numbers where this one is the default.

    For bf16 that is not ``to_complex()``, which from torch 2.14 on is a complex dtype of 32 bits.
    """
    return torch.complex64 if default is torch.bfloat16 else default.to_complex()


def in_doubles(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What torch gives for whole numbers where its default dtype is fp64, for a result that is not whole."""
    try:
        return function(*map_tensors(torch.Tensor.double, args), **map_tensors(torch.Tensor.double, kwargs))
    except RuntimeError:
        args, kwargs = tree_map(_exact, (args, kwargs))
        return function(*args, **kwargs)


def _exact(value: Any) -> Any:
    """An operand in fp64; conditions stay what they are, and numbers bring the precision."""
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return value.double() if isinstance(value, torch.Tensor) and value.dtype != torch.bool else value


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.dim() > 0
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    return value if isinstance(value, torch.dtype) else type(value)


def _asked(func: Any, args: Any, kwargs: Any) -> list[torch.dtype] | None:
    """What torch gives for operands of these dtypes and shapes, all of them zeros; None if it has no such operator.

    Not on the meta device, where many an operator is Python that imports torch._dynamo, which takes a second.
    """
    options = dict(kwargs, device="cpu") if kwargs.get("device") is not None else kwargs
    try:
        answer = func(*map_tensors(_zeros, args), **map_tensors(_zeros, options))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    return [each.dtype for each in tensors_in(answer)]


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is Placeholder:
        return view_of(torch.zeros(tensor._record.shape, dtype=tensor.dtype), tensor._region)
    return torch.zeros_like(tensor, device="cpu") if tensor.layout == torch.strided else tensor


def _with_promoted(
    operands: list[torch.Tensor], computed: list[torch.dtype], named: torch.dtype | None
) -> list[torch.dtype]:
    """What was computed in fp32 in the dtype that the call names, or that torch's promotion gives for its operands."""
    floats = [each for each in operands if each.is_floating_point() or each.is_complex()]
    dtypes = [each.dtype for each in floats if each.dim()] or [each.dtype for each in floats]
    promoted = named or functools.reduce(torch.promote_types, dtypes)
    return [promoted if dtype == torch.float32 else dtype for dtype in computed]
