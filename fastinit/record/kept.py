"""What a block with `shard=True` leaves with values: buffers, mostly, of a model that is not materialized yet.

Such a model is often given memory by `torch.nn.Module.to_empty`, which would leave these tensors without their values.
Once nothing of the block is unwritten any more, whoever has written it, they are ordinary tensors again, at the next
garbage collection at the latest.

Why they are no `Unwritten` tensors whose recipe is a known value: such a tensor has no storage, and all that is asked
of it (`uninitialized`, `load`, FSDP2's copies into zeros) is asked of something without values. What has values is used
before anything is materialized: autograd's graphs lead to its C++ object, which must stay what it is, and it may be of
any dtype and layout, where recipes are for dense floating-point tensors alone.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from .block import Block
from .nested import tensors_in
from .records import modes_off
from .unwritten import Key

# What gives a tensor of the same values.
_CONVERTS = {
    getattr(torch.Tensor, name)
    for name in "bfloat16 clone cpu cuda detach double float half requires_grad_ to type".split()
} | {torch.Tensor.data.__get__, torch.empty_like}  # type: ignore[attr-defined]


class Kept(torch.Tensor):
    """An ordinary tensor in all but this: a tensor that is made like it gets its values.

    Whoever makes another tensor of it in any other way makes it one of torch's own class.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = (*args, *(kwargs or {}).values())
        kept = [each for each in tensors_in(operands) if type(each) is Kept]
        for each in kept:
            release(each)
        result = func(*args, **(kwargs or {}))
        if func is torch.empty_like and not result.is_meta:
            with modes_off(), torch.no_grad():
                result.copy_(_values(operands[0]))
        if func in _CONVERTS or not isinstance(result, torch.Tensor):
            for each in kept:
                _keep(each)
        if func in _CONVERTS:
            _keep(result, of=operands[0])
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        release(self)  # a parameter has another method than other tensors
        result: torch.Tensor = copy.deepcopy(self, memo)
        _keep(self)
        _keep(result, of=self)
        return result


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the values of one that is on the meta device, perhaps, and has come there from elsewhere."""
    values: torch.Tensor = tensor.__dict__.get("_values", tensor)
    return values


def _keep(tensor: Any, of: torch.Tensor | None = None) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return
    if tensor.is_meta and of is not None:
        tensor._values = _values(of)
    if not _values(tensor).is_meta:
        if type(tensor) is torch.nn.Parameter:
            tensor._is_param = True
        tensor.__class__ = Kept


def release(tensor: torch.Tensor) -> None:
    """Let a tensor be one of torch's own class again, if it is not."""
    if type(tensor) is Kept:
        kind: Any = torch.nn.Parameter if tensor.__dict__.pop("_is_param", False) else torch.Tensor
        tensor.__class__ = kind


def keep_values(block: Block, key: Key) -> None:
    """Let the modules of a block keep what they have with values, until nothing of it is unwritten.

    Args:
        block: what is at its end.
        key: what all that it has left unwritten refers to.
    """
    modules = list(block.modules.values())
    for tensor in _tensors(modules):
        _keep(tensor)
    weakref.finalize(key, _release_all, modules).atexit = False


def _tensors(modules: list[Any]) -> Iterator[Any]:
    for ref in modules:
        module = ref()
        if module is not None:
            yield from (*module._parameters.values(), *module._buffers.values())


def _release_all(modules: list[Any]) -> None:
    for tensor in _tensors(modules):
        release(tensor)
