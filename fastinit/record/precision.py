"""Which dtype the result of an operator has, by torch's own answer, where its values were computed in fp32."""

from __future__ import annotations

from typing import Any

import torch

from .records import HALVES, view_of
from .tensors import Placeholder, map_tensors, tensors_in

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
        whole = kwargs.get("dtype") is None and all(each.dtype in WHOLE for each in operands)
        # Of integers torch makes its default dtype, which is fp32 in the process and may be another one in the block.
        return [default if whole and dtype == torch.float32 else dtype for dtype in computed]
    if torch.float32 not in computed:
        return computed
    key = (func, tuple(map(_kind, args)), tuple((name, _kind(value)) for name, value in kwargs.items()))
    answer = _answers.get(key)
    if answer is None:
        # What draws is not asked: that would take numbers of the generator.
        asked = None if torch.Tag.nondeterministic_seeded in func.tags else _asked(func, args, kwargs)
        answer = _answers[key] = asked or _with_promoted(operands, computed)
    return answer if len(answer) == len(computed) else _with_promoted(operands, computed)


WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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


def _with_promoted(operands: list[torch.Tensor], computed: list[torch.dtype]) -> list[torch.dtype]:
    return [_promoted(operands) if dtype == torch.float32 else dtype for dtype in computed]


def _promoted(operands: list[torch.Tensor]) -> torch.dtype:
    """The dtype that torch's promotion gives the result of an operation on these tensors."""
    floats = [each for each in operands if each.is_floating_point() or each.is_complex()]
    dimensioned = [each.dtype for each in floats if each.dim()] or [each.dtype for each in floats]
    dtype = dimensioned[0]
    for other in dimensioned[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype
