"""What has written the tensors of a block's models, for its report: looked at once, at the end of the block.

What is pending says so itself, and a record remembers what it has executed and what was overwritten. What has become
real earlier is remembered by its storage, as long as somebody may read the report.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..recipe import COMPUTED
from .block import Block, History
from .names import prefixes_of
from .records import modes_off
from .tensors import Placeholder
from .unwritten import Unwritten


class Written(NamedTuple):
    """A tensor that a module has at the end of a block.

    Attributes:
        name: in the module.
        identity: the same for tied ones.
        is_parameter: and not a buffer.
        shape, dtype, history: of the tensor.
    """

    name: str
    identity: int
    is_parameter: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    history: History


# The modules of a block with their tensors.
Found = list[tuple["weakref.ref[torch.nn.Module]", list[Written]]]


def written(block: Block) -> Found:
    """All modules that a block has seen with their tensors; to be called before those become real."""
    with modes_off():
        return [(weakref.ref(module), list(_written(block, module))) for module in block.seen_modules()]


def _written(block: Block, module: torch.nn.Module) -> Iterator[Written]:
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None:
                what = tensors is module._parameters, tuple(tensor.shape), tensor.dtype
                yield Written(name, id(tensor), *what, _history_of(block, tensor))


_UNKNOWN = History((COMPUTED,), ())


def _history_of(block: Block, tensor: torch.Tensor) -> History:
    if type(tensor) is Placeholder:
        return block.history_of(tensor._record)
    if type(tensor) is Unwritten:
        return History(tensor._record.origin.recipe, ())
    if block.histories and type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided:
        known = block.histories.get(StorageWeakRef(tensor.untyped_storage()))
        if known is not None:
            version, history = known
            unchanged = version == tensor._version
            return history if unchanged else history._replace(writes=(*history.writes, COMPUTED))
    return _UNKNOWN


def named(found: Found) -> list[tuple[str, torch.nn.Module, Written]]:
    """The tensors of modules that still exist, with full names and modules, tied ones once, in a model's order."""
    existing = {id(module): (module, tensors) for ref, tensors in found if (module := ref()) is not None}
    names: dict[int, tuple[str, torch.nn.Module, Written]] = {}
    for key, prefix in prefixes_of([module for module, _ in existing.values()]).items():
        if key in existing:
            module, tensors = existing[key]
            for each in tensors:
                names.setdefault(each.identity, (prefix + each.name, module, each))
    return list(names.values())
