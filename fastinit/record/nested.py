"""Tensors in nested containers: the arguments and the results of operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .tensors import Placeholder

# What operators are mostly given beside tensors: torch takes its time to say that something is no tensor.
_ATOMS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
_CONTAINERS = frozenset({tuple, list, dict})


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors among the arguments or results of an operator; much sooner than by torch's pytrees."""
    kind = type(value)
    if kind in _ATOMS:
        return []
    if kind not in _CONTAINERS:
        if isinstance(value, torch.Tensor):
            return [value]
        if not isinstance(value, (dict, list, tuple)):
            return []
    found: list[torch.Tensor] = []
    for each in value.values() if isinstance(value, dict) else value:
        if type(each) is Placeholder or type(each) is torch.Tensor:
            found.append(each)
        elif type(each) not in _ATOMS:
            found += tensors_in(each)
    return found


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """The arguments or results of an operator with a function of each of their tensors in its place."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind not in _CONTAINERS and isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(function, each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return kind([map_tensors(function, each) for each in value])
    return value
