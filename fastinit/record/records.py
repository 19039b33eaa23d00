"""Records: what the storage of a tensor is to contain.

A *record* holds the content of one tensor's storage in exactly one of three states:

- pending: a recipe (fastinit.recipe) says which fills have been asked for and not been executed;
- computed: *master values* exist on the host, in fp32 where the tensor is in half precision;
- resident: the memory in the final dtype and place has the values.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

from .. import native
from ..execution import allocate, can_fill, refuse_capture
from ..layout import contiguous_strides, numel
from ..recipe import COMPUTED, Region, Write

if TYPE_CHECKING:
    from .block import Block

HALVES = (torch.float16, torch.bfloat16)

modes_off = torch._C.DisableTorchFunction

# One lock for all records: an operation may take placeholders of several blocks, and threads may share a model.
lock = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Nobody else is to see what is done: no thread, mode, graph of autograd or transform of functions."""
    with lock, modes_off(), torch.no_grad(), _disable_current_modes(), temporarily_clear_interpreter_stack():
        with torch._C._ExcludeDispatchKeyGuard(_FUNCTIONALIZED):
            yield


_FUNCTIONALIZED = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)


def in_functorch() -> bool:
    """Whether a transform of functions is under way."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.Functionalize)


# Master values of one tensor beyond this are not made: the tensor gets its memory, and torch computes with that.
LARGEST_MASTER = 32 << 20

# A tensor that is written in more pieces than this is computed.
_MAX_WRITES = 8

_HOST = torch.device("cpu")


class Record(native.Record):
    """What one tensor's storage is to contain.

    Attributes:
        block: the block that made it.
        shape: sizes of the row-major tensor that the recipe fills; regions count elements of the same storage.
        dtype, device: those that the tensor finally has.
        recipe: tuple of writes while it is pending, else None.
        values: contiguous tensor of `shape` on the host while it is computed, else None.
        memory: contiguous tensor of `shape` in the final dtype and place while it is resident, else None.
        recorded: whether its content began as a recipe.
        deferred: it gets memory without values.
        owner: class of the module that has it, and the name there; or None.
        tensors: weak references to the tensors that stand or stood for it.
        executed: the writes that values or memory have had; None, like (), for none that are known.
        replaced: the writes before those, executed or not, that something has overwritten.
        nbytes: bytes of its memory, whether it has any yet or not.
    """

    __slots__ = ()

    block: Block
    owner: tuple[type[torch.nn.Module], str] | None
    tensors: list[weakref.ref[torch.Tensor]]

    def __init__(
        self,
        block: Block,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        recipe: tuple[Write, ...] | None = None,
        values: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        self.block = block
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.recipe = recipe
        self.values = values
        self.memory = memory
        self.recorded = recipe is not None
        self.tensors = []
        block.records.append(weakref.ref(self))

    @property
    def is_fillable(self) -> bool:
        """Whether random fills reach its memory."""
        return can_fill(self.dtype, self.device)

    @property
    def needs_master(self) -> bool:
        """Whether torch computes with other memory than the final one: in half precision, or for a GPU."""
        return self.dtype in HALVES or self.device.type != "cpu"

    def what(self) -> str | None:
        """What it is, for a message: its module's class and the name there; None if it is no parameter either."""
        if self.owner is not None:
            return f"{self.owner[0].__name__}.{self.owner[1]}"
        return "a parameter" if any(isinstance(ref(), torch.nn.Parameter) for ref in self.tensors) else None

    def placeholders(self) -> list[Any]:
        """The tensors that still stand for it."""
        alive = {id(tensor): (ref, tensor) for ref in self.tensors if (tensor := ref()) is not None}
        self.tensors = [ref for ref, _ in alive.values()]  # a loop may have made a view for each element
        return [tensor for _, tensor in alive.values() if getattr(tensor, "_record", None) is self]

    def overwrite(self, recipe: tuple[Write, ...]) -> None:
        """Replace all of its content by a recipe; what is resident stays so, and is written at once."""
        self.set_aside()
        if self.memory is not None:
            self.block.execute(self, self.memory, recipe)
            return
        if self.values is not None and self.block.rename is not None and recipe:
            # In another precision these may be memory, which is written at once: the fill's name is not waited for.
            self.block.execute(self, self.values, recipe)
            self.recorded = True
            return
        if self.recipe:
            self.block.dropped += len(self.recipe)
        self.values = None
        self.recipe = recipe
        self.recorded = True

    def append(self, write: Write) -> None:
        """Let a fill of a region follow."""
        unlimited = self.block.shard or self.block.rename is not None
        if self.recipe is not None and (unlimited or len(self.recipe) < _MAX_WRITES):
            self.recipe += (write,)
        else:
            self.block.execute(self, self.compute(), (write,), zeros=False)

    def compute(self) -> torch.Tensor:
        """The tensor that torch computes with: master values where they are wanted and not too large, else memory."""
        if self.memory is not None:
            return self.memory
        if self.values is None:
            master = torch.float32 if self.dtype in HALVES else self.dtype
            if not self.needs_master or numel(self.shape) * master.itemsize > LARGEST_MASTER:
                return self.materialize()
            refuse_capture(self.device)
            values = allocate(self.shape, master, _HOST)
            self.block.execute(self, values, self.recipe or ())
            self.values, self.recipe = values, None
        self.block.touch(self)
        return self.values

    def materialize(self) -> torch.Tensor:
        """The memory with its final values; allocated and written, unless it is resident."""
        if self.memory is None:
            memory = allocate(self.shape, self.dtype, self.device, name_of=lambda: self.block.name_of(self))
            if self.values is not None:
                self.copy_values(memory)
            else:
                self.block.execute(self, memory, self.recipe or ())
            self.become_resident(memory)
        assert self.memory is not None
        return self.memory

    def did(self, *writes: Write) -> None:
        """Note what its values or memory have been given."""
        executed = self.executed or ()
        if len(executed) + len(writes) > _MAX_WRITES:
            executed, writes = executed[:_MAX_WRITES], (COMPUTED,)
        if executed[-1:] != writes:
            self.executed = (*executed, *writes)

    def copy_values(self, memory: torch.Tensor) -> None:
        """Copy its master values into the memory that it is to have."""
        assert self.values is not None
        # CUDA has read what is not pinned when the call returns. To wait would be for all fills that are under way.
        memory.copy_(self.values, non_blocking=memory.is_cuda and not self.values.is_pinned())

    def become_resident(self, memory: torch.Tensor) -> None:
        """Take memory that has the final values."""
        self.memory, self.recipe, self.values = memory, None, None

    def forked(self) -> Record:
        """Another record of the same content."""
        copies = [None if each is None else each.clone() for each in (self.values, self.memory)]
        record = Record(self.block, self.shape, self.dtype, self.device, self.recipe, *copies)
        record.recorded, record.executed = self.recorded, self.executed
        return record


# --- regions of a record ---------------------------------------------------------------------------------------------


def view_of(memory: torch.Tensor, region: Region | None) -> torch.Tensor:
    """The part of a record's values or memory that a region covers."""
    return memory if region is None else memory.as_strided(region.sizes, region.strides, region.offset)


def is_whole(record: Any, region: Region | None) -> bool:
    """Whether a region covers all elements of its record, each once, in whatever order."""
    if region is None:
        return True
    return numel(region.sizes) == numel(record.shape) and is_dense(region)


def is_dense(region: Region) -> bool:
    """Whether a region covers each element of some range once, in whatever order."""
    dims = sorted((dim for dim in zip(region.strides, region.sizes, strict=True) if dim[1] != 1), reverse=True)
    return tuple(dim[0] for dim in dims) == contiguous_strides([dim[1] for dim in dims])


def is_in_order(record: Any, region: Region | None) -> bool:
    """Whether a region covers all elements of its record in their order, in whatever shape."""
    if region is None:
        return True
    same = numel(region.sizes) == numel(record.shape)
    return same and all(
        stride == expected or size == 1
        for size, stride, expected in zip(region.sizes, region.strides, contiguous_strides(region.sizes), strict=True)
    )
