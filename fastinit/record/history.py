"""What has written the tensors of a block's models, for its report: looked at once, at the end of the block.

What is pending says so itself, and a record remembers what it has executed and what was overwritten. What has become
real earlier is remembered by its storage, as long as somebody may read the report.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from ..recipe import COMPUTED
from .block import Block, History
from .names import models_of, tensors_of
from .records import modes_off
from .tensors import Placeholder
from .unwritten import Unwritten


class Written(NamedTuple):
    """A tensor that a module has at the end of a block.

    Attributes:
        name: in the largest model of the block that has it.
        module: weak reference to the module.
        is_parameter: and not a buffer.
        shape, dtype, history: of the tensor.
    """

    name: str
    module: weakref.ref[torch.nn.Module]
    is_parameter: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    history: History


def written(block: Block) -> list[Written]:
    """The tensors of all modules that a block has seen, tied ones once; to be called before they become real."""
    found: dict[int, Written] = {}
    with modes_off():
        for model in models_of(block.seen_modules()):
            for name, module, own_name, tensor in tensors_of(model):
                if id(tensor) not in found and not is_lazy(tensor):  # which has no shape before its module is called
                    what = own_name in module._parameters, tuple(tensor.shape), tensor.dtype
                    found[id(tensor)] = Written(name, weakref.ref(module), *what, _history_of(block, tensor))
    return list(found.values())


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
            return history if version == tensor._version else history._replace(writes=(*history.writes, COMPUTED))
    return _UNKNOWN
